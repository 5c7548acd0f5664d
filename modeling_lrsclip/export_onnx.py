# SPDX-License-Identifier: Apache-2.0
"""
A model's two towers as ONNX files, in the folder that transformers.js and onnxruntime users know from other CLIPs.

    python -m modeling_lrsclip.export_onnx lrsclip-b16 lrsclip-b16-onnx

writes `onnx/text_model.onnx` (`input_ids` (N, L) -> `text_embeds` (N, D)) and `onnx/vision_model.onnx` (`pixel_values`
(B, 3, H, W) -> `image_embeds` (B, D)), both of any batch size, texts of any length up to the position table, embeddings
not normalized; beside them config, tokenizer and processor of the stock CLIP.
With `--int8` the files are `text_model_quantized.onnx` and `vision_model_quantized.onnx` instead: the weights of matrix
products in eight bits, a scale a channel, and their inputs by their range in each call.
"""

from importlib import import_module
from typing import Any

from .commands import command_parser


def __getattr__(name: str) -> Any:
    """`export_onnx`, `OnnxTowers` and the like, whose seconds of imports `--help` does without."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".onnx_towers", __package__), name)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = command_parser("python -m modeling_lrsclip.export_onnx", __doc__.split("\n\n")[0])
    parser.add_argument("source", help="model folder, Hub id or checkpoint file")
    parser.add_argument("output_dir", help="folder to write; an earlier export there is replaced")
    parser.add_argument("--int8", action="store_true", help="quantize both towers: smaller, faster, and less exact")
    options = parser.parse_args(arguments)
    from .onnx_towers import carry_out

    carry_out(options)


if __name__ == "__main__":
    main()
