# SPDX-License-Identifier: Apache-2.0
"""
A CLIP checkpoint as a folder for `LRSCLIPModel.from_pretrained`, stretched to longer texts if asked for.

    python -m modeling_lrsclip.convert openai/clip-vit-base-patch16 lrsclip-start --stretch
"""

import argparse
import sys

from transformers import AutoTokenizer
from transformers.utils import logging

from .image_processing_lrsclip import LRSCLIPImageProcessor
from .modeling_lrsclip import LRSCLIPModel
from .processing_lrsclip import LRSCLIPProcessor


def convert(
    source: str, output_dir: str, *, stretch: bool = False, kept_positions: int = 20, stretch_ratio: int = 4
) -> LRSCLIPModel:
    """
    Args:
        source (`str`): folder or Hub id of a CLIP (or unstretched LRSCLIP) in HuggingFace format, with its tokenizer.
        output_dir (`str`): folder to write: weights, processor and the code for `trust_remote_code=True`.
        stretch (`bool`): stretch the text position table; without it the table is taken over as it is.
        kept_positions, stretch_ratio (`int`): see [`stretch_position_embedding`].

    Returns:
        `LRSCLIPModel`: what was written.

    Raises:
        `ValueError`: as `LRSCLIPModel.from_clip`.
        `OSError`: for a source that is neither a model folder nor a Hub id.
    """
    model = LRSCLIPModel.from_clip(
        source, kept_positions=kept_positions, stretch_ratio=stretch_ratio if stretch else 1
    )
    positions = model.config.text_config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(source, model_max_length=positions)
    image_processor = LRSCLIPImageProcessor.from_pretrained(source)
    model.save_pretrained(output_dir)
    LRSCLIPProcessor(image_processor, tokenizer).save_pretrained(output_dir)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_lrsclip.convert",
        description="Writes a CLIP checkpoint as an LRSCLIP folder for from_pretrained.",
    )
    parser.add_argument("source", help="folder or Hub id of a CLIP in HuggingFace format")
    parser.add_argument("output_dir", help="folder to write")
    parser.add_argument("--stretch", action="store_true", help="stretch the text position table, 77 -> 248")
    parser.add_argument("--kept-positions", type=int, help="with --stretch: first rows kept as they are (20)")
    parser.add_argument("--stretch-ratio", type=int, help="with --stretch: rows that stand for each later one (4)")
    options = parser.parse_args(argv)
    numbers = {"kept_positions": options.kept_positions, "stretch_ratio": options.stretch_ratio}
    numbers = {name: value for name, value in numbers.items() if value is not None}
    if numbers and not options.stretch:
        parser.error("--kept-positions and --stretch-ratio say how to stretch; add --stretch.")
    logging.disable_progress_bar()
    try:
        model = convert(options.source, options.output_dir, stretch=options.stretch, **numbers)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{options.source} -> {options.output_dir}: {model.config.text_config.max_position_embeddings} text positions"
    )


if __name__ == "__main__":
    main()
