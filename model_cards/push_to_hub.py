"""
Pushes a checkpoint to the Hub with its card, its results and a script that measures them again, as one commit.

    python model_cards/push_to_hub.py --checkpoint runs/mine/final --results results/results.json --repo you/mine

Everything is put together in a temporary folder and loaded from there in a process that cannot import this project
before anything is sent. Exit status: 0 done; 2 bad input; 3 the Hub refused or could not be reached, nothing new is to
be seen there, or it says where to look; 4 what was put together does not do what the checkpoint does, nothing was sent;
5 the commit is there, its tag is not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


if not __package__:  # run as a file: siblings and modeling_lrsclip are found from the clone's root
    sys.path.insert(0, str(Path(__file__).parents[1]))

from model_cards.build_card import RECORD, UNKNOWN
from modeling_lrsclip.commands import command, command_parser


MESSAGE = "Upload model, card and results"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("python model_cards/push_to_hub.py", __doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="model folder as save_pretrained writes it")
    parser.add_argument("--repo", required=True, help="owner/name on the Hub; made if it does not exist")
    parser.add_argument("--results", type=Path, help="results.json of evaluation.run (without: not yet measured)")
    parser.add_argument("--training", type=Path, help=f"{RECORD} of training.train (default: the one in --checkpoint)")
    parser.add_argument("--published", help="for weights converted from the authors' files, such as lrsclip-vit-b-16")
    parser.add_argument("--license", default=UNKNOWN, help=f"of the weights, as the Hub spells it ({UNKNOWN})")
    plain_clip = "owner/name for the same weights as a stock CLIP, without remote code"
    parser.add_argument("--plain-clip", metavar="REPO", help=plain_clip)
    parser.add_argument("--private", action="store_true", help="if the repository is made now")
    parser.add_argument("--create-pr", action="store_true", help="propose it as a pull request")
    parser.add_argument("--revision", metavar="TAG", help="tag for the commit; an existing one is refused")
    parser.add_argument("--message", default=MESSAGE, help=f"of the commit ({MESSAGE})")
    trust = "stage and run the code beside the weights also where it is not this package's"
    parser.add_argument("--trust-checkpoint-code", action="store_true", help=trust)
    parser.add_argument("--dry-run", action="store_true", help="show files, sizes and the card; contact nothing")
    return parser.parse_args(arguments)


@command()
def main(arguments: Sequence[str] | None = None, api: Any = None) -> None:
    """
    Run the command; what goes wrong is one sentence on standard error and an exit status, see above.

    Args:
        arguments: of the command line.
        api: `huggingface_hub.HfApi`, where it is not the default one.
    """
    options = parse_arguments(arguments)
    from huggingface_hub import HfApi  # seconds of imports, which --help and a mistyped option do without

    from model_cards.upload import run

    run(options, api or HfApi())


if __name__ == "__main__":
    sys.exit(main())
