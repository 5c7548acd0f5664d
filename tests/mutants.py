"""
Mutants: one small mistake after another is put into a module, and its own tests must notice.

    python -m tests.mutants [--sample 20] [--seed 0] [MODULE ...]

A mutant turns a comparison, an operator or a condition around, changes a number, or takes a statement out. It lives in a
copy of the clone; the tests run in a process forked after the heavy imports. Prints each mutant that survives, and of
each module the share that died; exit code 1 where that is below 95 %.
"""

import argparse
import ast
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
TESTS = {
    "modeling_lrsclip/position_stretching.py": ["modeling_lrsclip/test_position_stretching.py"],
    "modeling_lrsclip/files/atomic.py": ["modeling_lrsclip/files/test_atomic.py"],
    "training/losses.py": ["training/test_losses.py", "training/test_large_batch.py"],
    "training/data/visiting_order.py": ["training/data/test_data_order.py", "training/data/test_data_streaming.py"],
    "training/distributed.py": ["training/test_processes.py", "training/test_losses.py"],
    "training/checkpoint.py": ["training/test_checkpoint.py"],
    "evaluation/retrieval.py": ["evaluation/test_retrieval.py", "evaluation/test_metrics.py"],
    "evaluation/metrics/semantic_localization/measures.py": ["evaluation/test_localization_metrics.py"],
    "model_cards/staging.py": ["model_cards/test_push_to_hub.py", "model_cards/test_tampering.py"],
}
TURNED = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{
        ast.Add: ast.Sub,
        ast.Sub: ast.Add,
        ast.Mult: ast.Div,
        ast.Div: ast.Mult,
        ast.FloorDiv: ast.Mult,
        ast.Mod: ast.Mult,
    },
    **{ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}
HEAVY = ["accelerate", "datasets", "evaluate", "peft", "pytest", "scipy.stats", "torch.distributed.fsdp"]
HEAVY += ["torch._dynamo", "transformers.models.auto.modeling_auto", "transformers.models.clip.modeling_clip"]
HEAVY += [
    "transformers.models.clip.tokenization_clip",
    "transformers.processing_utils",
    "transformers.image_processing_utils",
]
LONGEST = 300  # seconds; a mutant whose tests hang is noticed too
Mutant = tuple[ast.AST, str]  # what is replaced, by what text


def mutants_of(tree: ast.AST, nodes: Iterator[ast.AST] | None = None) -> Iterator[Mutant]:
    """All mutants of a module; annotations, decorators, docstrings and the words of errors are left as they are."""
    for node in [tree] if nodes is None else nodes:
        if isinstance(node, ast.Raise):
            yield node, "pass"
            continue
        yield from _mutants_at(node)
        skipped = {"annotation", "returns", "decorator_list", "format_spec"}
        for name, value in ast.iter_fields(node):
            if name not in skipped:
                values = value if isinstance(value, list) else [value]
                yield from mutants_of(tree, [one for one in values if isinstance(one, ast.AST)])


def _mutants_at(node: ast.AST) -> Iterator[Mutant]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in TURNED:
        ops = [TURNED[type(node.ops[0])](), *node.ops[1:]]
        yield node, f"({ast.unparse(ast.Compare(node.left, ops, node.comparators))})"
    elif isinstance(node, ast.BinOp) and type(node.op) in TURNED:
        yield node, f"({ast.unparse(ast.BinOp(node.left, TURNED[type(node.op)](), node.right))})"
    elif isinstance(node, ast.BoolOp):
        yield node, f"({ast.unparse(ast.BoolOp(TURNED[type(node.op)](), node.values))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        yield node, repr(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    elif (
        isinstance(node, ast.Expr)
        and not isinstance(node.value, ast.Constant | ast.Yield)
        or isinstance(node, ast.AugAssign)
    ):
        yield node, "pass"
    elif isinstance(node, ast.Return) and node.value is not None:
        yield node, "return None"


def mutated(source: str, mutant: Mutant) -> str:
    """The source with the mutant in its place."""
    node, text = mutant
    lines = source.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    return (source.encode()[:start] + text.encode() + source.encode()[end:]).decode()


def tests_pass(clone: Path, tests: list[str]) -> bool:
    """Whether a module's tests pass in the clone, in a process forked from this one."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(clone)
        sys.path[:] = [str(clone), *(path for path in sys.path if path not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]  # they are the clone's
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1), os.dup2(silent, 2)
        import pytest

        os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]))
    until = time.monotonic() + LONGEST
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.1)
    return os.waitstatus_to_exitcode(ended[1]) == 0


def main() -> int:
    """Run the mutants and print what survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)} (all)")
    parser.add_argument("--sample", type=int, default=20, help="mutants of each module (20)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.dont_write_bytecode = True  # a mutant of the same size and second would be taken for the file before
    for heavy in HEAVY:
        importlib.import_module(heavy)
    clone, poor = Path(tempfile.mkdtemp(prefix="mutants-")), False
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, clone / name)
    for module in options.modules or TESTS:
        source, died, began = (ROOT / module).read_text(), 0, time.monotonic()
        if not tests_pass(clone, TESTS[module]):
            raise SystemExit(f"{module}: its tests fail without a mutant.")
        every = list(mutants_of(ast.parse(source)))
        sample = random.Random(options.seed).sample(every, min(options.sample, len(every)))
        for node, text in sample:
            (clone / module).write_text(mutated(source, (node, text)))
            if tests_pass(clone, TESTS[module]):
                print(
                    f"  survives: {module}:{node.lineno}: {ast.get_source_segment(source, node)!r:.90} -> {text:.90}",
                    flush=True,
                )
            else:
                died += 1
        (clone / module).write_text(source)
        poor |= died < 0.95 * len(sample)
        print(
            f"{module}: {died} of {len(sample)} died ({len(every)} in all), {time.monotonic() - began:.0f} s",
            flush=True,
        )
    shutil.rmtree(clone)
    return int(poor)


if __name__ == "__main__":
    sys.exit(main())
