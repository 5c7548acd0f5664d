"""Imports flow one way between the folders, and what travels to the Hub stays flat (DESIGN: the rooms)."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
ROOMS = {"modeling_lrsclip", "geosearch", "training", "evaluation", "model_cards"}
ALLOWED = {
    "modeling_lrsclip": set(),
    "geosearch": {"modeling_lrsclip"},
    "evaluation": {"modeling_lrsclip"},
    "training": {"modeling_lrsclip"},
    "model_cards": {"modeling_lrsclip"},
}
# and training/ablations/, training/lrs2m/
MAY_IMPORT_EVALUATION = {"training/train.py", "training/validation.py", "training/ablate.py"}


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(dots, module) of every import statement, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


@pytest.mark.parametrize("room", sorted(room for room in ROOMS if (ROOT / room).is_dir()))
def test_imports_flow_one_way(room):
    for path in sorted((ROOT / room).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        allowed = ALLOWED[room] | {room}
        if name in MAY_IMPORT_EVALUATION or name.startswith(("training/lrs2m/", "training/ablations/")):
            allowed = allowed | {"evaluation"}
        for dots, module in imports_of(path):
            top = module.split(".")[0]
            assert dots or top not in ROOMS or top in allowed, f"{name} imports {module}"


TRAVELLING = ["configuration", "image_processing", "modeling", "position_stretching", "processing"]


@pytest.mark.parametrize("name", TRAVELLING)
def test_what_travels_imports_only_what_travels(name):
    path = next((ROOT / "modeling_lrsclip").glob(f"{name}*.py"))
    for dots, module in imports_of(path):
        assert dots == 0 or (dots == 1 and module.startswith(tuple(TRAVELLING))), f"{path.name} imports {module}"
        assert dots or module.split(".")[0] != "modeling_lrsclip", f"{path.name}: siblings are imported as .name"
