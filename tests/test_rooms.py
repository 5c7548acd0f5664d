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
MAY_IMPORT_EVALUATION = {"training/train.py", "training/validation.py"}


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(dots, module) of every import statement, wherever it stands."""
    imports = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append((node.level, node.module or ""))
    return imports


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


DOCUMENTED_BY_TRANSFORMERS = {"center_crop", "get_text_features", "forward"}  # arguments and results are CLIP's


def public_functions(tree: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    """Functions of a module and methods of its classes whose names do not begin with an underscore."""
    functions = [(node.name, node) for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for owner in tree.body:
        if isinstance(owner, ast.ClassDef) and not owner.name.startswith("_"):
            methods = [node for node in owner.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
            functions += [(f"{owner.name}.{node.name}", node) for node in methods]
    return [(name, node) for name, node in functions if not node.name.startswith("_")]


def parameters(node: ast.FunctionDef) -> list[str]:
    """Names of a function's parameters, without `self` and `cls`."""
    arguments = node.args
    names = [each.arg for each in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
    names += [each.arg for each in (arguments.vararg, arguments.kwarg) if each]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_functions_take_seven_parameters_at_most(room):
    long = []
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(parameters(node)) > 7:
                long.append(f"{path.name}: {node.name} takes {len(parameters(node))}")
    clip = ["modeling_lrsclip.py: forward takes 9"]  # CLIPModel's, and the two of the short texts
    assert long == (clip if room == "modeling_lrsclip" else [])


def missing_sections(node: ast.FunctionDef) -> list[str]:
    """`Args:` and `Returns:` where a function of three or more parameters lacks them."""
    names = parameters(node)
    if len(names) < 3 or node.name in DOCUMENTED_BY_TRANSFORMERS:
        return []
    docstring = ast.get_docstring(node) or ""
    returns_nothing = isinstance(node.returns, ast.Constant) and node.returns.value is None
    wanted = ["Args:"] if returns_nothing or "Yields:" in docstring else ["Args:", "Returns:"]
    return [section for section in wanted if section not in docstring]


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_public_functions_say_what_they_take_and_return(room):
    lacking = []
    for path in sorted((ROOT / room).rglob("*.py")):
        for name, node in public_functions(ast.parse(path.read_text())):
            if sections := missing_sections(node):
                lacking.append(f"{path.relative_to(ROOT)}: {name} lacks {' and '.join(sections)}")
    assert not lacking, "\n".join(lacking)


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_docstrings_begin_with_a_verb_or_a_noun_phrase(room):
    odd = []
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                if docstring.startswith(("Of ", "What ", "As ")):
                    odd.append(f"{path.relative_to(ROOT)}: {docstring[:60]}")
    assert not odd, "\n".join(odd)
