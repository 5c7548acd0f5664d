"""The options of `training.ablate`."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch

from modeling_lrsclip.files.configuration import split_setting

from .studies import STUDIES


QUICK, FULL = "quick", "full"
SEEDS = {QUICK: (0,), FULL: (0, 1, 2)}
WEIGHTS = {QUICK: (1, 3, 5, 8, 9), FULL: (1, 2, 3, 4, 5, 6, 7, 8, 9)}  # tenths of the long texts' loss
DRAWN_PAIRS = 9600  # a small model's fine-tuning: long and short texts are told apart well, and not yet perfectly


def parse_arguments(arguments: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.ablate", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--study", required=True, help=f"comma-separated, of: {', '.join(STUDIES)}; or all")
    mode = parser.add_mutually_exclusive_group()
    store = {"dest": "mode", "action": "store_const"}
    mode.add_argument("--quick", const=QUICK, default=QUICK, help="one seed, five loss weights (default)", **store)
    mode.add_argument("--full", const=FULL, help="three seeds, nine loss weights", **store)
    parser.add_argument("--seeds", help="comma-separated, in the place of the mode's")
    parser.add_argument("--output", default="runs/ablations", help="folder of tables, figures, arms (runs/ablations)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of all arms' recipe"
    )
    parser.add_argument(
        "--launch",
        default=shlex.quote(sys.executable),
        help="what runs -m training.train (python), for example 'accelerate launch --num_processes 2'",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for the evaluation")
    parser.add_argument(
        "--config",
        help="recipe of the arms (training/configs/vit_b16_paper.yaml for your own data, ablation.yaml for drawn scenes)",
    )
    user = parser.add_argument_group("your own data and model")
    user.add_argument("--data", help="training pairs, as data.train, where --config does not name them")
    user.add_argument(
        "--evaluation-data", nargs="+", help="as --data of evaluation.run (by default the training data)"
    )
    user.add_argument("--long-clip", metavar="MODEL", help="for init: a Long-CLIP, as model.init (the published B/16)")
    user.add_argument(
        "--sizes", nargs=3, metavar="MODEL", help="for model_size: three CLIPs (OpenAI's B/32, B/16, L/14)"
    )
    drawn = parser.add_argument_group("drawn scenes, which are taken where no data is named")
    drawn.add_argument("--scenes", type=int, default=DRAWN_PAIRS, help=f"training pairs ({DRAWN_PAIRS})")
    drawn.add_argument("--test-scenes", type=int, default=2048, help="held-out pairs (2048)")
    drawn.add_argument("--mosaics", type=int, default=16, help="landscapes for localization (16)")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", "training.ablate", *words])
    return options


def parse_seeds(options: argparse.Namespace) -> tuple[int, ...]:
    """
    Raises:
        `ValueError`: for what is no list of whole numbers from 0 on.
    """
    if options.seeds is None:
        return SEEDS[options.mode]
    try:
        seeds = tuple(dict.fromkeys(int(seed) for seed in options.seeds.split(",")))
    except ValueError:
        seeds = (-1,)
    if min(seeds) < 0:
        raise ValueError(f"--seeds {options.seeds} must be whole numbers from 0 on, such as 0,1,2.")
    return seeds


def parse_setting(setting: str) -> tuple[str, Any]:
    """
    Name and value of `optim.learning_rate=1e-4`, with numbers such as 1e-4 understood: arms compute with them.

    Raises:
        `ValueError`: for a word without name or value.
    """
    try:
        name, value = split_setting(setting)
    except ValueError as error:
        raise ValueError(f"--set {error}") from None
    number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return name, float(value) if number else value
