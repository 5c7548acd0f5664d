"""
How fast exported towers are against torch, in fp32 and in int8, and how far int8 is from fp32.

    python -m tests.speed.onnx [--texts 64] [--images 64] [--rounds 3] [--layers 12]

Random weights of ViT-B/16 at their real shapes. Per round each side takes the same inputs in turn; the ratio is that of
the medians. Sides: `CLIPModel`'s way in torch (whole batches), this project's encoding (batches that fit the cache, the
last layer for one token), onnxruntime in fp32, and onnxruntime with weights and activations in int8
(`onnxruntime.quantization.quantize_dynamic`). Cosine distances are to torch; of random weights, so those of trained ones
differ: measure them with `evaluation.run --model` on an exported folder.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from modeling_lrsclip import LRSCLIPConfig, LRSCLIPImageProcessor, LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.encoding import embed_images, embed_texts
from modeling_lrsclip.export_onnx import FOLDER, TEXT, VISION, OnnxTowers, export_onnx, quantize
from modeling_lrsclip.train_tokenizer import train_tokenizer

from .encoding import LENGTHS, WORDS, captions


def in_batches(function: Callable[[Tensor], Tensor], inputs: Tensor, size: int) -> Tensor:
    """Unit rows of `function`'s output."""
    return normalize(torch.cat([function(inputs[at : at + size]) for at in range(0, len(inputs), size)]), dim=-1)


def measure(sides: dict[str, Callable[[], Tensor]], rounds: int, clock: Callable[[], float]) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    outputs = {}
    for _ in range(rounds):
        for name, side in sides.items():
            start = clock()
            outputs[name] = side()
            seconds[name].append(clock() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(sides))
    for name, median in medians.items():
        distance = (1 - (outputs[name] * outputs[first]).sum(dim=-1)).max().item()
        print(
            f"  {name:28} {median:7.2f} s  {medians[first] / median:5.2f} x  cosine distance {max(distance, 0):.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--processor-time", action="store_true", help="count processor seconds, where others work too")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    torch.manual_seed(0)
    tokenizer = train_tokenizer(WORDS * 3, vocab_size=600)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    layers = {"num_hidden_layers": options.layers}
    config = LRSCLIPConfig(text_config=special | layers | {"vocab_size": 49408}, vision_config=layers)
    model, processor = LRSCLIPModel(config).eval(), LRSCLIPProcessor(LRSCLIPImageProcessor(), tokenizer)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        export_onnx(folder / "model", folder / "fp32")
        (folder / "int8" / FOLDER).mkdir(parents=True)
        for name in (TEXT, VISION):
            quantize(folder / "fp32" / FOLDER / f"{name}.onnx", folder / "int8" / FOLDER / f"{name}.onnx")
        for kind in ("fp32", "int8"):
            sizes = [(folder / kind / FOLDER / f"{name}.onnx").stat().st_size / 1e6 for name in (TEXT, VISION)]
            print(f"{kind}: text {sizes[0]:,.0f} MB, image {sizes[1]:,.0f} MB")
        towers = {kind: OnnxTowers(folder / kind) for kind in ("fp32", "int8")}
        for title, mean in LENGTHS.items():
            texts = captions(random.Random(0), options.texts, mean)
            ids = processor(text=texts, return_tensors="pt")["input_ids"]
            print(f"{len(texts)} captions of {title}")
            with torch.inference_mode():
                sides = {
                    "torch, CLIPModel's way": lambda ids=ids: in_batches(
                        lambda part: model.get_text_features(input_ids=part).pooler_output, ids, 64
                    ),
                    "torch, evaluation's way": lambda texts=texts: embed_texts(model, processor, texts),
                    "onnxruntime fp32": lambda ids=ids: in_batches(towers["fp32"].text, ids, 64),
                    "onnxruntime int8": lambda ids=ids: in_batches(towers["int8"].text, ids, 64),
                }
                measure(sides, options.rounds, clock)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (options.images, 224, 224, 3), dtype=torch.uint8, generator=generator)
        images = [Image.fromarray(array) for array in pixels.numpy()]
        values = processor(images=images, return_tensors="pt")["pixel_values"]
        print(f"{len(images)} images")
        with torch.inference_mode():
            sides = {
                "torch, CLIPModel's way": lambda: in_batches(
                    lambda part: model.get_image_features(pixel_values=part).pooler_output, values, 64
                ),
                "torch, evaluation's way": lambda: embed_images(model, processor, images),
                "onnxruntime fp32": lambda: in_batches(towers["fp32"].image, values, 8),
                "onnxruntime int8": lambda: in_batches(towers["int8"].image, values, 8),
            }
            measure(sides, options.rounds, clock)


if __name__ == "__main__":
    main()
