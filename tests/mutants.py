"""
Mutants: one small mistake after another is put into a module, and its own tests must notice.

    python -m tests.mutants [--sample 20] [--seed 0] [MODULE ...]

A mutant turns a comparison, an operator or a condition around, changes a number, or takes a statement out. It lives in a
copy of the clone; the tests that reach its line run in a process forked after the imports, the quickest first. Prints
each mutant that survives, and of each module the share that died, but for those in EQUIVALENT, which change nothing
that anybody could notice; exit code 1 where that is below 95 %.
"""

import argparse
import ast
import builtins
import contextlib
import importlib.util
import json
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

import pytest


ROOT = Path(__file__).parents[1]
TESTS = {
    "modeling_lrsclip/position_stretching.py": ["modeling_lrsclip/test_position_stretching.py"],
    "modeling_lrsclip/files/atomic.py": ["modeling_lrsclip/files/test_atomic.py"],
    "training/losses.py": ["training/test_losses.py", "training/test_large_batch.py"],
    "training/data/visiting_order.py": ["training/data/test_data_order.py", "training/data/test_data_streaming.py"],
    "training/distributed.py": [
        "training/test_processes.py::test_what_two_processes_gather",
        "training/test_processes.py::test_a_process_alone_gathers_nothing",
    ],
    "training/checkpoint.py": ["training/test_checkpoint.py"],
    "evaluation/retrieval.py": ["evaluation/test_retrieval.py"],
    "evaluation/metrics/semantic_localization/measures.py": ["evaluation/test_localization_metrics.py"],
    "model_cards/staging.py": [
        "model_cards/test_staging.py",
        *(
            f"model_cards/test_push_to_hub.py::{test}"
            for test in (
                *("test_what_does_not_do_the_same_is_not_sent", "test_a_dry_run_contacts_nothing"),
                *("test_paths_of_this_machine_stay_here", "test_a_folder_without_its_code_gets_it"),
                "test_the_same_weights_as_a_stock_clip_beside_it",
            )
        ),
    ],
}
# Of a module, the functions that are mutated, where its tests are for these alone.
FUNCTIONS = {
    "training/distributed.py": {
        *("gather", "gather_with_gradient", "forward", "backward"),
        *("smallest_count", "average_gradient", "largest"),
    }
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
ROOMS = ("modeling_lrsclip", "geosearch", "evaluation", "training", "model_cards", "tests", "conftest", "__main__")
# Mutants that nothing can tell from the original, by module: function ("": none), what stands there, what instead; why.
EQUIVALENT = {
    "modeling_lrsclip/files/atomic.py": {
        ("replace_json", "1", "2"): "a line end and blanks, which split() drops anyway",
    },
    "training/checkpoint.py": {
        ("", "1e6", "1000001.0"): "of a message that has one decimal",
        ("", "1.0", "2.0"): "any number below 0",
    },
    "training/data/visiting_order.py": {
        ("__init__", "2", "3"): "size of a cache",
    },
    "training/losses.py": {
        ("backward", "False", "True"): "autocast leaves doubles and products into a buffer alone",
        ("forward", "False", "True"): "autocast leaves doubles alone",
        ("backward", "1", "2"): "a share of the largest variance but one, for what is rounding",
        ("backward", "0", "1"): "any finite number: what it is multiplied with has no variance",
    },
    "evaluation/retrieval.py": {
        ("", "16", "17"): "size of a block",
        ("", "16 * 2**20", "(16 / 2 ** 20)"): "size of a block",
        ("", "2**20", "(2 * 20)"): "size of a block",
        ("", "2", "3"): "size of a block",
        ("", "20", "21"): "size of a block",
        ("", "2000", "2001"): "in the same bar",
        ("retrieval_ranks", "1", "2"): "size of the smallest block",
        ("retrieval_ranks", "8", "9"): "size of a block",
        ("check_embeddings", "0", "1"): "all tensors are on one device here",
        ("evaluate_retrieval", "64", "65"): "size of a batch",
        ("tokens_curve", "kept < encoder.positions", "(kept <= encoder.positions)"): "a set has it once",
        ("tokens_curve", "len(row) > kept", "(len(row) >= kept)"): "encoded again, it comes out the same",
        (
            *("tokens_curve", "changed and kept < encoder.positions", "(changed or kept < encoder.positions)"),
        ): "what is encoded again comes out the same",
    },
    "evaluation/metrics/semantic_localization/measures.py": {
        ("region_mask", "1", "2"): "both are true",
        ("_highest_around", "2 * reach <= PEAK_SIDE", "(2 * reach < PEAK_SIDE)"): "1000 is no power of two",
        ("_highest_around", "2", "3"): "the last of 1, 2, 4, ... up to 512: 3 x 256 fits into 1000, as 2 x 256 does",
    },
    "model_cards/staging.py": {
        ("", "4", "5"): "length of a text that is tried",
        ("verify", "300", "301"): "width of an image that is tried",
        ("verify", "260", "261"): "height of an image that is tried",
        ("verify", "30", "31"): "angle of an image that is tried",
    },
}
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
    elif isinstance(node, ast.Return) and not (node.value is None or ast.unparse(node.value) == "None"):
        yield node, "return None"


def mutated(source: str, mutant: Mutant) -> str:
    """The source with the mutant in its place."""
    node, text = mutant
    lines = source.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    return (source.encode()[:start] + text.encode() + source.encode()[end:]).decode()


class Reach:
    """A pytest plugin: the statements of a module that each test reaches, its fixtures too, and how long it takes."""

    def __init__(self):
        self.of_tests, self.of_fixtures, self.fixtures, self.seconds = {}, {}, {}, {}
        builtins.reached = set()  # where [`marked`] writes to

    def _noted(self, lines: set[int]) -> Iterator[None]:
        before, builtins.reached = builtins.reached, lines
        try:
            return (yield)
        finally:
            builtins.reached = before

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        return (yield from self._noted(self.of_fixtures.setdefault(fixturedef.argname, set())))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self.fixtures[item.nodeid] = item.fixturenames
        return (yield from self._noted(self.of_tests.setdefault(item.nodeid, set())))

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration

    def tests(self) -> list[tuple[str, list[int]]]:
        """Tests, the quickest first, each with the first lines of the statements that it reaches."""
        reached = {
            test: self.of_tests[test].union(*(self.of_fixtures.get(name, ()) for name in fixtures))
            for test, fixtures in self.fixtures.items()
        }
        return [(test, sorted(reached[test])) for test in sorted(reached, key=self.seconds.get)]


def marked(source: str) -> str:
    """The source, in which every statement of a function first notes that it is reached."""
    tree = ast.parse(source)
    for node in list(ast.walk(tree)):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and not isinstance(node, ast.Module | ast.ClassDef):
                marks = [
                    ast.parse(f"getattr(__import__('builtins'), 'reached', set()).add({one.lineno})").body[0]
                    for one in block
                ]
                setattr(node, name, [one for pair in zip(marks, block) for one in pair])
    return ast.unparse(tree)


def run_tests(clone: Path, tests: list[str], reach: Path | None = None) -> bool:
    """Whether tests pass in the clone, in a process forked from this one; `reach` is a file for what they reach."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(clone)
        sys.path[:] = [str(clone), *(path for path in sys.path if path not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]  # they are the clone's
        output = os.open(clone / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        plugin = Reach()
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests], plugins=[plugin] if reach else [])
        if reach:
            libraries = [name for name in sys.modules if name.partition(".")[0] not in ROOMS]
            reach.write_text(json.dumps({"tests": plugin.tests(), "libraries": libraries}))
        os._exit(code)
    until = time.monotonic() + LONGEST
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1]) == 0


def look_around(clone: Path, module: str, source: str) -> list[tuple[str, list[int]]]:
    """Run a module's tests as they are, and import here what they import, which every mutant's process then has."""
    report = clone / "reach.json"
    write(clone / module, marked(source))
    if not run_tests(clone, [f"tests/{test}" for test in TESTS[module]], report):
        raise SystemExit(f"{(clone / 'output.txt').read_text()}{module}: its tests fail without a mutant.")
    reach = json.loads(report.read_text())
    for name in reach["libraries"]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    return reach["tests"]


def write(module: Path, source: str) -> None:
    """Write a module, whose compiled form would be taken for it where size and second are equal."""
    module.write_text(source)
    Path(importlib.util.cache_from_source(str(module))).unlink(missing_ok=True)


def tests_of(tree: ast.Module, node: ast.AST, tests: list[tuple[str, list[int]]]) -> list[str]:
    """The tests that reach a node; all of them where it is run by an import, or where processes of their own do."""
    inner = [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef) and node in _within(one.body)]
    if not inner:
        return [test for test, _ in tests]
    line = max(one.lineno for one in _within(inner[0].body) if isinstance(one, ast.stmt) and node in _within([one]))
    return [test for test, reached in tests if not reached or line in reached]


def _within(nodes: list[ast.AST]) -> list[ast.AST]:
    return [inner for node in nodes for inner in ast.walk(node)]


def is_equivalent(module: str, tree: ast.Module, source: str, mutant: Mutant) -> bool:
    """Whether a mutant is listed in EQUIVALENT."""
    node, text = mutant
    functions = [one.name for one in ast.walk(tree) if isinstance(one, ast.FunctionDef) and node in _within([one])]
    before = " ".join(ast.get_source_segment(source, node).split())
    return (functions[-1] if functions else "", before, text) in EQUIVALENT.get(module, {})


def main() -> int:
    """Run the mutants and print what survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)} (all)")
    parser.add_argument("--sample", type=int, default=20, help="mutants of each module (20)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    clone, poor = Path(tempfile.mkdtemp(prefix="mutants-")), False
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, clone / name)
    for module in options.modules or TESTS:
        source, began = (clone / module).read_text(), time.monotonic()
        tests, tree = look_around(clone, module, source), ast.parse(source)
        wanted = [one for one in ast.walk(tree) if getattr(one, "name", "") in FUNCTIONS.get(module, ())]
        every = [one for one in mutants_of(tree, wanted or None) if not is_equivalent(module, tree, source, one)]
        sample = random.Random(options.seed).sample(every, min(options.sample, len(every)))
        survivors = 0
        for node, text in sample:
            write(clone / module, mutated(source, (node, text)))
            reaching = tests_of(tree, node, tests)
            if not reaching or run_tests(clone, reaching):
                survivors += 1
                before = " ".join(ast.get_source_segment(source, node).split())
                print(f"  survives: {module}:{node.lineno}: {before:.90} -> {text:.90}", flush=True)
        write(clone / module, source)
        died = len(sample) - survivors
        poor |= died < 0.95 * len(sample)
        print(
            f"{module}: {died} of {len(sample)} died ({len(every)} in all), {time.monotonic() - began:.0f} s",
            flush=True,
        )
    shutil.rmtree(clone)
    return int(poor)


if __name__ == "__main__":
    sys.exit(main())
