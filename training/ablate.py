"""
The paper's ablations (Tables VI to IX, Figs. 7 to 10), each by one command.

    python -m training.ablate --study pcm                                   # on drawn scenes, one seed
    python -m training.ablate --study all --full                            # three seeds
    python -m training.ablate --study init --data your/tiles                 # your pairs, OpenAI's CLIP

Below --output, each study gets a folder with table.md, results.json and figure.png; the trained arms lie in `arms/`,
shared by all studies, and are never trained twice. An interrupted command is given again and goes on.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence

from modeling_lrsclip.commands import command, command_parser

from .ablations.studies import STUDIES


DRAWN_PAIRS = 9600  # a small model's fine-tuning: long and short texts are told apart well, and not yet perfectly


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("python -m training.ablate", __doc__)
    add = parser.add_argument
    add("--study", required=True, help=f"comma-separated, of: {', '.join(STUDIES)}; or all")
    mode = parser.add_mutually_exclusive_group()
    store = {"dest": "mode", "action": "store_const"}
    mode.add_argument("--quick", const="quick", default="quick", help="one seed, five loss weights (default)", **store)
    mode.add_argument("--full", const="full", help="three seeds, nine loss weights", **store)
    add("--seeds", help="comma-separated, in the place of the mode's")
    add("--output", default="runs/ablations", help="folder of tables, figures, arms (runs/ablations)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of all arms' recipe")
    add(
        "--launch",
        default=shlex.quote(sys.executable),
        help="what runs -m training.train (python), for example 'accelerate launch --num_processes 2'",
    )
    add("--device", help="for the evaluation (cuda where there is one)")
    add(
        "--config",
        help="recipe of the arms (training/configs/vit_b16_paper.yaml for your own data, ablation.yaml for drawn scenes)",
    )
    add = parser.add_argument_group("your own data and model").add_argument
    add("--data", help="training pairs, as data.train, where --config does not name them")
    add("--evaluation-data", nargs="+", help="as --data of evaluation.run (by default the training data)")
    add("--long-clip", metavar="MODEL", help="for init: a Long-CLIP, as model.init (the published B/16)")
    add("--sizes", nargs=3, metavar="MODEL", help="for model_size: three CLIPs (OpenAI's B/32, B/16, L/14)")
    add = parser.add_argument_group("drawn scenes, which are taken where no data is named").add_argument
    add("--scenes", type=int, default=DRAWN_PAIRS, help=f"training pairs ({DRAWN_PAIRS})")
    add("--test-scenes", type=int, default=2048, help="held-out pairs (2048)")
    add("--mosaics", type=int, default=16, help="landscapes for localization (16)")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", "training.ablate", *words])
    return options


@command(interrupted="interrupted; the same command goes on from here.")
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; bad input is one sentence on standard error and exit status 2."""
    options = parse_arguments(arguments)
    from transformers.utils import logging  # seconds of imports, which --help and a mistyped option do without

    from .ablations.run_studies import ablate

    logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the run in progress is told, too
    ablate(options)


if __name__ == "__main__":
    sys.exit(main())
