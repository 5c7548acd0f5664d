"""
How fast texts are encoded, against the published way, which pads every text to 248 tokens.

    python -m tests.speed.encoding [--published DIR] [--texts 64] [--rounds 3] [--dtype bf16]

Random weights of ViT-B/16's text tower (12 layers, width 512); both sides take the same weights and texts in turn, from
strings to unit embeddings, the ratio is the median of the rounds. `--published` is a checkout of
`MitsuiChen14/LRSCLIP`, whose `model/model_longclip.py` is run as it is, in float32 without gradients; without it, plain
`CLIPModel` takes its place. In float32 the embeddings must agree to 1e-5.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from modeling_lrsclip import LRSCLIPConfig, LRSCLIPImageProcessor, LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.encoding import embed_texts
from modeling_lrsclip.train_tokenizer import train_tokenizer

from .published import published_model


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
    "dock",
    "ship",
    "car",
    "lot",
    "court",
    "bridge",
    "river",
    "lake",
]
LENGTHS = {"15 tokens (RSITMD's short captions)": 15, "89 tokens (long captions)": 89}  # mean, start and end included
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def build(layers: int) -> tuple[LRSCLIPModel, LRSCLIPProcessor]:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(WORDS * 3, vocab_size=600)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = special | {"vocab_size": len(tokenizer), "num_hidden_layers": layers}
    model = LRSCLIPModel(LRSCLIPConfig(text_config=text, vision_config={"num_hidden_layers": 1})).eval()
    return model, LRSCLIPProcessor(LRSCLIPImageProcessor(), tokenizer)


def captions(rng: random.Random, count: int, mean: int) -> list[str]:
    """Texts of `mean` tokens on average, start and end included."""
    lengths = [max(1, round(rng.gauss(mean - 2, (mean - 2) / 4))) for _ in range(count)]
    return [" ".join(rng.choice(WORDS) for _ in range(length)) for length in lengths]


def padded_to_the_table(
    encode: Callable[[Tensor], Tensor], processor: LRSCLIPProcessor, texts: list[str], batch_size: int
) -> Tensor:
    """The published way, `(N, D)` unit rows: batches in input order, every row 248 tokens long."""
    embeds = []
    with torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            inputs = processor(text=texts[start : start + batch_size], padding="max_length", return_tensors="pt")
            ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)  # padded with 0 there
            embeds.append(normalize(encode(ids), dim=-1))
    return torch.cat(embeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="checkout of MitsuiChen14/LRSCLIP")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--layers", type=int, default=12, help="of the tower; fewer for a quick try")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of ours; the other side takes fp32")
    parser.add_argument("--processor-time", action="store_true", help="count processor seconds, where others work too")
    options = parser.parse_args()
    rng = random.Random(0)
    model, processor = build(options.layers)
    name, encode = "plain CLIPModel at 248", lambda ids: model.get_text_features(input_ids=ids).pooler_output
    if options.published:
        name, encode = "the published code", published_model(options.published, model).eval().encode_text
    clock = time.process_time if options.processor_time else time.perf_counter
    for title, mean in LENGTHS.items():
        texts = captions(rng, options.texts, mean)
        tokens = [len(row) for row in processor.encode_text(texts)]
        ratios, rates = [], []
        for _ in range(options.rounds):
            start = clock()
            slow = padded_to_the_table(encode, processor, texts, options.batch_size)
            middle = clock()
            fast = embed_texts(model, processor, texts, options.batch_size, dtype=DTYPES[options.dtype])
            end = clock()
            torch.testing.assert_close(fast, slow, atol=1e-5 if options.dtype == "fp32" else 0.02, rtol=0)
            ratios.append((middle - start) / (end - middle))
            rates.append(len(texts) / (end - middle))
        print(
            f"{title}, here {statistics.fmean(tokens):.0f} from {min(tokens)} to {max(tokens)}: "
            f"{statistics.median(rates):.1f} texts/s in {options.dtype}, {statistics.median(ratios):.1f}x {name}",
            flush=True,
        )


if __name__ == "__main__":
    main()
