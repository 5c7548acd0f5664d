"""
How fast texts are encoded, against plain `CLIPModel` with every text padded to 248 tokens, as the published code does.

    python -m tests.benchmarks.encoding [--texts 64] [--rounds 3]

Random weights of ViT-B/16's text tower (12 layers, width 512), float32; both sides take the same weights and texts in
turn, the ratio is the median of the rounds. The embeddings must agree to 1e-5.
"""

import argparse
import random
import statistics
import time

import torch
from torch.nn.functional import normalize

from evaluation.embedding import embed_texts
from modeling_lrsclip import LRSCLIPConfig, LRSCLIPImageProcessor, LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.train_tokenizer import train_tokenizer


WORDS = [
    "a",
    "two",
    "many",
    "green",
    "white",
    "road",
    "field",
    "house",
    "tank",
    "tree",
    "water",
    "of",
    "the",
    "and",
    "near",
    "beside",
    "large",
    "small",
    "long",
    "boat",
]
LENGTHS = {"15 tokens (RSITMD's short captions)": 15, "89 tokens (long captions)": 89}  # mean, start and end included


def padded_to_the_table(model, processor, texts: list[str], batch_size: int) -> torch.Tensor:
    """The published way, `(N, D)` unit rows: batches in input order, every row 248 tokens long."""
    embeds = []
    with torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            inputs = processor(text=texts[start : start + batch_size], padding="max_length", return_tensors="pt")
            embeds.append(normalize(model.get_text_features(input_ids=inputs["input_ids"]).pooler_output, dim=-1))
    return torch.cat(embeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rng = random.Random(0)
    tokenizer = train_tokenizer(WORDS * 3, vocab_size=600)
    processor = LRSCLIPProcessor(LRSCLIPImageProcessor(), tokenizer)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = LRSCLIPModel(LRSCLIPConfig(text_config=special, vision_config={"num_hidden_layers": 1})).eval()
    for title, mean in LENGTHS.items():
        lengths = [max(1, round(rng.gauss(mean - 2, (mean - 2) / 4))) for _ in range(options.texts)]
        texts = [" ".join(rng.choice(WORDS) for _ in range(length)) for length in lengths]
        ratios, rates = [], []
        for _ in range(options.rounds):
            start = time.perf_counter()
            slow = padded_to_the_table(model, processor, texts, 32)
            middle = time.perf_counter()
            fast = embed_texts(model, processor, texts, 32)
            end = time.perf_counter()
            torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)
            ratios.append((middle - start) / (end - middle))
            rates.append(len(texts) / (end - middle))
        print(
            f"{title}: {statistics.median(rates):.1f} texts/s, {statistics.median(ratios):.1f}x plain CLIPModel at 248"
        )


if __name__ == "__main__":
    main()
