"""The console commands find the clone from any folder, and say what is missing where there is none."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_lrsclip import commands
from tests import processes


ROOT = Path(__file__).parents[2]
SETUP = ROOT / "setup.py"


def console_scripts() -> list[str]:
    tree = ast.parse(SETUP.read_text())
    entry_points = next(node.value for node in ast.walk(tree) if getattr(node, "arg", None) == "entry_points")
    return ast.literal_eval(entry_points)["console_scripts"]


def test_every_command_leads_to_a_function():
    names = [line.split(" = ")[0] for line in console_scripts()]
    assert names == ["geosearch", "lrsclip-convert", "lrsclip-evaluate", "lrsclip-train"]
    for line in console_scripts():
        module, function = line.split(" = ")[1].split(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("function, module", [("evaluate", "evaluation.run"), ("train", "training.train")])
def test_works_from_any_folder(function, module, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(SETUP.parent)!r}); from modeling_lrsclip.commands import {function}; "
    code += f"sys.path.pop(0); sys.argv = ['lrsclip', '--help']; {function}()"
    run = processes.run([sys.executable, "-c", code], cwd=tmp_path)
    assert run.returncode == 0 and module in run.stdout, run.stderr


def test_without_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "CLONE", tmp_path)
    with pytest.raises(SystemExit, match="lrsclip-train is run from a clone; install it there with pip install -e"):
        commands.train()


@pytest.mark.parametrize(
    "raised, status, message",
    [
        (None, 0, ""),
        (ValueError("--top 0 is too few."), 3, "error: --top 0 is too few.\n"),
        (FileNotFoundError(2, "No such file", "a.json"), 3, "error: [Errno 2] No such file: 'a.json'\n"),
        (KeyboardInterrupt(), 130, "stopped; run it again\n"),
    ],
)
def test_what_ends_a_command_is_a_sentence_and_a_status(raised, status, message, capsys):
    @commands.command(status=3, interrupted="stopped; run it again")
    def main(arguments: list[str]) -> None:
        """Run it."""
        if raised:
            raise raised

    assert main(["a"]) == status and capsys.readouterr().err == message and main.__doc__ == "Run it."


def test_an_error_may_have_a_status_and_a_mistake_of_ours_is_shown(capsys):
    refused = RuntimeError("not pushed")
    refused.exit_status = 4

    @commands.command()
    def main(error: Exception | None) -> int:
        if error:
            raise error
        return 7

    assert (main(None), main(refused), main(error=ValueError("other"))) == (7, 4, 2)
    with pytest.raises(TypeError, match="ours"):
        main(TypeError("ours"))


CLONE = os.environ | {"PYTHONPATH": str(ROOT)}
COMMANDS = ["training.train", "evaluation.run", "evaluation.compare", "evaluation.attention", "geosearch"]
COMMANDS += ["training.ablate", "model_cards/push_to_hub.py", "model_cards/evaluate_checkpoint.py"]
COMMANDS += ["modeling_lrsclip.convert", "modeling_lrsclip.export_onnx", "model_cards/build_card.py"]
COMMANDS += [f"evaluation.benchmarks.{name}" for name in ("aerial_scenes", "scene_mosaics", "scene_archive")]
COMMANDS += [f"training.lrs2m.{name}" for name in ("build", "join", "verify", "statistics", "push", "rejoin")]
COMMANDS += ["training.lrs2m.retrieval_export", "training.lrs2m.card", "geosearch.demo"]
ASK_ALL = """
import contextlib, io, runpy, sys

for name in sys.argv[1:]:
    sys.argv, printed = [name, "--help"], io.StringIO()
    sys.orig_argv = [sys.executable, *["-m"] * (not name.endswith(".py")), name, "--help"]
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
    assert "usage: " in printed.getvalue(), name
    slow = sorted({"torch", "transformers", "accelerate", "datasets"} & set(sys.modules))
    assert not slow, f"{name} imports {slow} before its options are read"
"""


def test_help_waits_for_no_library():
    """Seconds of imports come after the options are read."""
    shown = subprocess.run([sys.executable, "-c", ASK_ALL, *COMMANDS], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr.splitlines()[-1]


@pytest.mark.parametrize("program", ["geosearch_demo.py", "evaluation/infer.py", "-m training.infer"])
def test_another_program_has_the_model_from_the_start(tmp_path, program):
    """Also where it or its folders are named as those of this clone."""
    words = program.split()
    code = f"import sys; sys.orig_argv = [sys.executable, *{words}]\n"  # as that of a new interpreter
    code += "import modeling_lrsclip\n"
    code += "from transformers import AutoConfig; print(AutoConfig.for_model('lrsclip').model_type)"
    file = tmp_path / f"{words[-1].removesuffix('.py').replace('.', '/')}.py"
    file.parent.mkdir(exist_ok=True)
    (file.parent / "__init__.py").touch()
    file.write_text(code)
    words = words if words[0] == "-m" else [str(file)]
    shown = processes.run([sys.executable, *words], env=CLONE, cwd=tmp_path)
    assert shown.stdout == "lrsclip\n", shown.stderr


@pytest.mark.parametrize("module", ["encoding.loading", "conversion"])
def test_a_command_knows_the_model_where_it_needs_one(module):
    """A process that runs a command begins without it, and what loads a model makes it known."""
    code = (
        "import sys; sys.orig_argv = [sys.executable, '-m', 'evaluation.run']; import evaluation\n"
        "import modeling_lrsclip; assert 'torch' not in sys.modules\n"
        f"import modeling_lrsclip.{module}; from transformers import AutoConfig\n"
        "print(AutoConfig.for_model('lrsclip').model_type)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout == "lrsclip\n", shown.stderr
