"""
Measures models on tasks: `python -m evaluation.run --model M [M ...] --tasks all --data DATA [DATA ...] --output DIR`.

Prints a table per task and writes results.json, results.md, results.csv and figures.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from modeling_lrsclip.commands import command, command_parser, say_once_that_the_hub_is_away
from modeling_lrsclip.files.cache_folder import cache_folder


TASK_NAMES = ("zcrl", "zcrs", "zic", "selo")
TOKENS_KEPT = "20,40,77,120,160,200,248"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("python -m evaluation.run", "Measures CLIP models on tasks.")
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        required=True,
        help="a row of the table each: a model folder (CLIP, LRSCLIP, SigLIP or another dual encoder, "
        "sentence-transformers, exported ONNX), a Hub id, a published checkpoint file, or a name such as "
        "remoteclip-vit-l-14; NAME=FILE says which published model a file is",
    )
    add("--tasks", default="all", help=f"comma-separated, of: {', '.join(TASK_NAMES)}; or all (default)")
    sources = "folders, files or Hub ids; each task takes those that hold its data"
    add("--data", nargs="+", required=True, help=sources)
    add("--output", required=True, help="folder for results.json, results.md and the figures")
    columns = "zcrl, zcrs: names of columns in files of your own, such as image=tile long=description short=title"
    add("--columns", nargs="+", default=(), metavar="KIND=NAME", help=columns)
    add("--allow-missing", type=int, default=0, help="images a data set may lack (0)")
    add("--batch-size", type=int, default=64, help="texts or images encoded at once, at most (64)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the towers; similarities are always fp32")
    add("--device", help="such as cpu or cuda:1 (cuda where there is one)")
    add("--workers", type=int, default=0, help="processes that read images (0: none beside this one)")
    add("--compile", action="store_true", help="torch.compile the towers: minutes first, faster then")
    cache = str(cache_folder("embeddings"))
    add("--cache", default=cache, help="folder where embeddings are kept for later runs; none: nowhere")
    add("--trust-remote-code", action="store_true", help="run code that lies beside a model's weights; read it first")
    add("--tokenizer", help="for checkpoint files: Hub id, folder or bpe_simple_vocab_16e6.txt.gz")
    curve = f"zcrl: for R@1 against tokens kept ({TOKENS_KEPT}); none: no curve"
    add("--tokens-kept", default=TOKENS_KEPT, help=curve)
    add("--templates", default="paper", help="zic: a set of prompts, or a file with one a line (paper)")
    add("--class-names", choices=("human", "folder"), default="human", help="zic: their wording (human)")
    add("--protocol", choices=("v1", "v2"), default="v1", help="selo: v1 is the paper's (v1)")
    add("--reference-io", action="store_true", help="selo: windows and maps through JPEG, as the published loop does")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", "evaluation.run", *words])
    return options


@command()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; bad input is one sentence on standard error and exit status 2."""
    options = parse_arguments(arguments)
    from .tasks import evaluate  # seconds of imports, which --help and a mistyped option do without

    say_once_that_the_hub_is_away()
    evaluate(options)


if __name__ == "__main__":
    sys.exit(main())
