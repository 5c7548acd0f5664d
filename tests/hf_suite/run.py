"""
Runs transformers' own test suites on stock CLIP and on LRSCLIP, side by side.

    python tests/hf_suite/run.py [--sdist FILE] [pytest options, for example: -n 2, -k sdpa]

The tests are those of the installed transformers version, taken from its source archive (fetched with pip once into
`.hf_suite/`). Prints a table and exits with 0 if LRSCLIP passes wherever stock CLIP passes.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import transformers


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".hf_suite"

# Modules that the archive's tests import and the archive leaves out; what they would add is not run.
STAND_INS = {
    "hf_tests/__init__.py": "",
    "hf_tests/exporters/__init__.py": "",
    "hf_tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "hf_tests/generation/__init__.py": "",
    "hf_tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "hf_tests/utils/__init__.py": "",
    "hf_tests/utils/test_configuration_utils.py": (
        "config_common_kwargs = {'return_dict': False, 'output_hidden_states': True, 'chunk_size_feed_forward': 5,\n"
        "                        'dtype': 'float16', 'problem_type': 'regression', 'id2label': {0: 'a', 1: 'b'}}\n"
    ),
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}
SUITES = ("Text", "Vision", "Dual", "Processing", "Pixels")

# Tests that may be skipped for LRSCLIP though stock CLIP passes them.
EXPLAINED_SKIPS = {
    "test_processor_text_has_no_visual": "5.17 asks for a `videos` argument, which CLIPProcessor inherits unused",
}


def fetch_sdist(version: str) -> Path:
    """The source archive of a transformers version, downloaded by pip unless it is in the cache."""
    archive = CACHE / f"transformers-{version}.tar.gz"
    if not archive.exists():
        print(f"Fetching the source archive of transformers {version} into {CACHE}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", str(CACHE), f"transformers=={version}"], check=True)
    return archive


def unpack_tests(archive: Path, target: Path) -> None:
    """Writes the archive's `tests/*.py` to `target/hf_tests`, with the stand-ins for what it lacks."""
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as files:
        top = f"transformers-{transformers.__version__}/tests/"
        members = [member for member in files.getmembers() if member.name.startswith(top) and member.isfile()]
        if not members:
            raise SystemExit(f"{archive} holds no {top}; give the source archive of the installed version.")
        for member in members:
            path = target / "hf_tests" / member.name.removeprefix(top)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files.extractfile(member).read())
    for name, source in STAND_INS.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)


def run_pytest(target: Path, options: list[str]) -> Path:
    """Runs `suite.py` offline, so that every machine gets the same result; returns the junit report."""
    report = target / "report.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(target), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-rN", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-o", "addopts=", f"--junitxml={report}", str(HERE / "suite.py"), *options]
    code = subprocess.run(command, env=environment, cwd=ROOT).returncode
    if code not in (0, 1):  # 1: some tests failed
        raise SystemExit(f"pytest ended with {code}; nothing to compare.")
    return report


def read_report(report: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """`{class name: {test name: (outcome, first line of the reason)}}`."""
    results: dict[str, dict[str, tuple[str, str]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                reason = (child.get("message") or "").strip().split("\n")[0]
        results.setdefault(case.get("classname").split(".")[-1], {})[case.get("name")] = (outcome, reason)
    return results


def compare(results: dict) -> tuple[list[tuple[str, str, str, str, str]], bool]:
    """Rows (suite, test, stock outcome, ours, reason), and whether ours passes wherever stock passes."""
    rows = []
    for suite in SUITES:
        stock, ours = results.get(f"CLIP{suite}", {}), results.get(f"LRSCLIP{suite}", {})
        for test in sorted(stock.keys() | ours.keys()):
            (left, left_reason), (right, right_reason) = (side.get(test, ("missing", "")) for side in (stock, ours))
            if (left, right) == ("passed", "skipped"):
                right_reason = EXPLAINED_SKIPS.get(test, f"NOT EXPLAINED: {right_reason}")
            rows.append((suite, test, left, right, right_reason or left_reason))
    ours_where_stock_passes = [(row[1], row[3]) for row in rows if row[2] == "passed"]
    fine = bool(ours_where_stock_passes) and all(
        outcome == "passed" or (outcome == "skipped" and test in EXPLAINED_SKIPS)
        for test, outcome in ours_where_stock_passes
    )
    return rows, fine


def table(rows: list[tuple]) -> str:
    lines = ["| suite | test | CLIP | LRSCLIP | reason |", "|---|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "/")[:160] for cell in row) + " |" for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="source archive of the installed transformers version")
    arguments, options = parser.parse_known_args()
    target = CACHE / transformers.__version__
    unpack_tests(arguments.sdist or fetch_sdist(transformers.__version__), target)
    rows, fine = compare(read_report(run_pytest(target, options)))

    (target / "table.md").write_text(table(rows) + "\n")
    print(f"\ntransformers {transformers.__version__}: what failed or differs\n")
    print(table([row for row in rows if "failed" in row[2:4] or row[2] != row[3]]))
    print("\n| suite | CLIP passed/failed/skipped | LRSCLIP passed/failed/skipped |\n|---|---|---|")
    for suite in (*SUITES, "all"):
        counts = []
        for side in (2, 3):
            outcomes = Counter(row[side] for row in rows if suite in (row[0], "all"))
            counts.append("/".join(str(outcomes[key]) for key in ("passed", "failed", "skipped")))
        print(f"| {suite} | {' | '.join(counts)} |")
    print(f"\nEvery test: {target / 'table.md'}")
    print("LRSCLIP passes wherever CLIP passes." if fine else "LRSCLIP does NOT pass wherever CLIP passes.")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
