"""Random captioners small enough for a test: a Qwen2-VL and a Qwen2, with a tokenizer and a chat template of their own."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from training.lrs2m.captioners.captioner import Request
from training.lrs2m.captioners.transformers_model import Engine


SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600, initial_alphabet=sorted(alphabet), special_tokens=SPECIAL, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text_fields(tokenizer: PreTrainedTokenizerFast) -> dict:
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in (("eos_token_id", "<|im_end|>"), ("pad_token_id", "<|endoftext|>"))
    }
    return ids | {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
    }


def save_tiny_qwen2_vl(folder: Path, texts: list[str]) -> Path:
    """A random Qwen2-VL of two layers with its image processor and tokenizer."""
    tokenizer = make_tokenizer(texts)
    named = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"), ("vision_start_token_id", "vision_start"), ("vision_end_token_id", "vision_end")
    )}  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text_fields(tokenizer) | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        **named,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56).save_pretrained(folder)
    return folder


def save_tiny_qwen2(folder: Path, texts: list[str]) -> Path:
    """A random text-only Qwen2 of two layers."""
    tokenizer = make_tokenizer(texts)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**text_fields(tokenizer)))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def teach(engine: Engine, folder: Path, lessons: list[tuple[Request, str]], rounds: int = 100) -> None:
    """Train a tiny captioner until it is sure of these texts, whatever the processor's last bits are, and save it."""
    optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-2, weight_decay=0.0)
    ready = [_lesson(engine, request, text) for request, text in lessons]
    for _ in range(rounds):
        worst = 0.0
        for lesson in ready:
            loss = engine.model(**lesson).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            worst = max(worst, loss.item())
        if worst < 0.01:
            break
    assert worst < 0.01, f"the lessons were not learned: loss {worst:.3f}"
    engine.model.save_pretrained(folder)


def _lesson(engine: Engine, request: Request, text: str) -> dict[str, torch.Tensor]:
    inputs = dict(engine.inputs([request]))
    answer = torch.tensor([engine.tokenizer(text + "<|im_end|>")["input_ids"]])  # (1, A)
    asked = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)  # (1, L + A)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.full_like(answer, value)], dim=1)
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :asked] = -100
    return inputs
