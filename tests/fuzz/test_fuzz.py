"""
Damaged files: a reader gives a result, or refuses in one sentence that names the file.

No other exception, no code of the file's, no more than some seconds and some gigabytes. The suite tries a few files of
each kind; `make fuzz` thousands (FUZZ_EXAMPLES of each kind, from a seed).
"""

import itertools
import os
import re
import shutil
import tempfile
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from modeling_lrsclip.files.configuration import ConfigurationError
from tests.fuzz.guard import BrokenRule, guarded
from tests.fuzz.readers import READERS, ROOT


EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "8"))
REFUSALS = (ValueError, SystemExit)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_read_or_refused_by_name(kind, folder):
    reader, wholes = READERS[kind], READERS[kind].wholes()
    numbers = itertools.count()

    def place(content: bytes) -> Path:
        path = folder / f"{kind} {next(numbers)}".replace(" ", "-") / reader.name  # a new one: caches go by the name
        path.parent.mkdir()
        path.write_bytes(content)
        return path

    for whole, _ in wholes:  # what a reader imports, it has imported then
        with_whole = place(whole)
        try:
            reader.read(with_whole)
        except REFUSALS as error:
            assert with_whole.name in str(error) or isinstance(error, SystemExit), error

    broken: dict[str, bytes] = {}  # the first file for each way in which the rule is broken

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize="FUZZ_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.one_of([damage for _, damage in wholes]))
    def check(content: bytes) -> None:
        path = place(content)
        try:
            with guarded():
                reader.read(path)
        except REFUSALS as error:
            said = str(error)
            if len(said) > 3000:
                broken.setdefault(f"a message of {len(said)} characters at {_where(error)}", content)
            elif not (path.name in said or path.parent.name in said or _mistakes(error)):
                broken.setdefault(f"{_where(error)} does not name the file: {said}", content)
        except (Exception, BrokenRule) as error:
            broken.setdefault(f"{type(error).__name__} at {_where(error)}: {str(error)[:200]}", content)
        finally:
            shutil.rmtree(path.parent)

    check()
    if broken:
        kept = Path(tempfile.mkdtemp(prefix="fuzz-"))
        for number, content in enumerate(broken.values()):
            (kept / f"{number}-{reader.name}").write_bytes(content)
        pytest.fail(f"{kind}, files in {kept}:\n" + "\n".join(broken), pytrace=False)


def _where(error: BaseException) -> str:
    """The last line of this project that the error came through."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if str(ROOT) in frame.filename and ".venv" not in frame.filename
    ]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"


def _mistakes(error: BaseException) -> bool:
    """Whether fields of a configuration are named, which may come from several files and the command line."""
    return isinstance(error, ConfigurationError) or "The configuration has mistakes" in str(error)


def test_every_line_of_security_md_names_a_test():
    lines = re.findall(r"^\d+\. .*", (ROOT / "SECURITY.md").read_text(), re.M)
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(lines) == 10
    for line in lines:
        named = re.findall(r"`(test_\w+)`", line)
        assert named and set(named) <= defined, line
