"""
The command that draws where an image tower looks for a phrase (paper, Fig. 2): `python -m evaluation.attention --model M
--image TILE.png --text "..." ["..."] --output attention.png`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from modeling_lrsclip.commands import command, command_parser


@command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; bad input is one sentence on standard error and exit status 2."""
    description = "Draws where an image tower looks for phrases (paper, Fig. 2)."
    parser = command_parser("python -m evaluation.attention", description)
    parser.add_argument("--model", required=True, help="as for evaluation.run")
    parser.add_argument("--image", required=True, type=Path)
    parser.add_argument("--text", required=True, nargs="+", help="phrases, a panel each")
    parser.add_argument("--output", required=True, type=Path, help="PNG to write")
    parser.add_argument("--tokenizer", help="for a checkpoint file, as for evaluation.run")
    parser.add_argument("--device", help="such as cpu or cuda:1 (cuda where there is one)")
    options = parser.parse_args(arguments)
    from .attention_maps import explain  # seconds of imports, which --help does without

    print(explain(options))


if __name__ == "__main__":
    sys.exit(main())
