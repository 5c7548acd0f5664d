# SPDX-License-Identifier: Apache-2.0
"""
Any published CLIP checkpoint as a folder for `from_pretrained`, stretched to longer texts if asked for.

    python -m modeling_lrsclip.convert LRSCLIP_ViT-B-16.pt lrsclip-b16 --tokenizer bpe_simple_vocab_16e6.txt.gz
    python -m modeling_lrsclip.convert openai/clip-vit-base-patch16 lrsclip-start --stretch
    python -m modeling_lrsclip.convert lrsclip-b16 lrsclip-b16-clip --plain-clip
"""

import argparse
from importlib import import_module
from typing import Any

from .commands import DEFAULT_TOKENIZER, command_parser


def __getattr__(name: str) -> Any:
    """`convert`, `load_published` and `prepare`, whose seconds of imports `--help` does without."""
    if name in ("convert", "load_published", "prepare", "Prepared"):
        return getattr(import_module(".conversion", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    description = "Writes a published CLIP checkpoint as an LRSCLIP folder for from_pretrained."
    parser = command_parser("python -m modeling_lrsclip.convert", description)
    add = parser.add_argument
    add("source", nargs="?", help="checkpoint file (.pt, .safetensors), or folder or Hub id in HuggingFace format")
    add("output_dir", nargs="?", help="folder to write; an earlier conversion there is replaced")
    files = f"Hub id, folder, or bpe_simple_vocab_16e6.txt.gz (the source's own; for files {DEFAULT_TOKENIZER})"
    add("--tokenizer", help=files)
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="of all weights (the source's)")
    add("--preset", help="where a checkpoint file is from, such as openai, if it has 77 positions: activation, heads")
    add("--activation", choices=("quick_gelu", "gelu"), help="of a checkpoint file, instead of the preset's")
    towers = ("VISION", "TEXT")
    add("--heads", type=int, nargs=2, metavar=towers, help="of a checkpoint file, instead of the preset's")
    form = parser.add_mutually_exclusive_group()
    store = {"dest": "layout", "action": "store_const"}
    form.add_argument("--plain-clip", const="plain-clip", help="a stock CLIP, without remote code", **store)
    form.add_argument("--open-clip", const="open-clip", help="a folder for open_clip's local-dir:", **store)
    add("--stretch", action="store_true", help="stretch the text position table, 77 -> 248")
    add("--kept-positions", type=int, help="with --stretch: first rows kept as they are (20)")
    add("--stretch-ratio", type=int, help="with --stretch: rows that stand for each later one (4)")
    add("--check-published", action="store_true", help="ask the Hub whether every published model is where it was")
    options = parser.parse_args(argv)
    if not options.check_published and options.output_dir is None:
        parser.error("give SOURCE and OUTPUT_DIR, or --check-published.")
    if not options.stretch and (options.kept_positions is not None or options.stretch_ratio is not None):
        parser.error("--kept-positions and --stretch-ratio say how to stretch; add --stretch.")
    return options


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    options = parse_arguments(argv)
    from .conversion import carry_out

    carry_out(options)


if __name__ == "__main__":
    main()
