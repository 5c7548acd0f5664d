"""
The README's list of the fields of a recipe is what the dataclasses say: names, types, defaults, and the comments beside.

    python -m tests.training.lrs2m.test_recipe_fields

writes it anew.
"""

import ast
import inspect
import io
import re
import tokenize
from pathlib import Path
from typing import Any

from modeling_lrsclip.files.configuration import field_types
from training.lrs2m import recipe


README = Path(recipe.__file__).parent / "README.md"
BEGIN, END = "<!-- fields: begin -->\n", "<!-- fields: end -->\n"


def comments_of(source: str) -> dict[int, str]:
    """Comments by their line, one that stands alone marked by a leading #."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: ("#" if token.line.lstrip().startswith("#") else "") + token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def meanings(source: str) -> dict[str, dict[str, str]]:
    """By dataclass and field, the comment beside the field, or else the lines of comment right above it."""
    comments, by_class = comments_of(source), {}
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.ClassDef):
            continue
        fields = by_class[statement.name] = {}
        for field in statement.body:
            if isinstance(field, ast.AnnAssign):
                lines = range(field.lineno, field.end_lineno + 1)
                beside = [comments[line] for line in lines if line in comments]
                line = field.lineno - 1
                while not beside[:1] and comments.get(line, "").startswith("#"):
                    line -= 1
                above = [comments[number][1:] for number in range(line + 1, field.lineno)]
                fields[field.target.id] = " ".join(beside or above)
    return by_class


def dataclasses_in_order(kind: Any = recipe.Recipe) -> list[Any]:
    """`Recipe` and the dataclasses that its fields hold, each once, as they are met."""
    kinds = [kind]
    for info in kind.__pydantic_fields__.values():
        for inner in [info.annotation, *_arguments(info.annotation)]:
            if hasattr(inner, "__pydantic_fields__"):
                kinds += dataclasses_in_order(inner)
    return list(dict.fromkeys(kinds))


def _arguments(annotation: Any) -> list[Any]:
    arguments = list(getattr(annotation, "__args__", ()))
    return arguments + [inner for argument in arguments for inner in _arguments(argument)]


def type_of(info: Any, described: str | None) -> str:
    """A field's type and default as a reader of YAML sees them."""
    if described is None:
        return info.annotation.__name__.removesuffix("Config")
    text = re.sub(r"Optional\[(.*)\]", r"\1", described.replace(", default None", ""))
    text = re.sub(r"Literal\[([^]]*)\]", lambda names: names[1].replace("'", "").replace(", ", " | "), text)
    text = re.sub(r"(?:training\.lrs2m\.recipe\.)?(\w+)Config\b", r"\1", text.replace("typing.", ""))
    return text.replace(" | None", "").replace("|", "\\|")


def field_list() -> str:
    comments = meanings(inspect.getsource(recipe))
    parts = []
    for kind in dataclasses_in_order():
        types = field_types(kind)
        lines = [f"**{kind.__name__.removesuffix('Config')}**: {inspect.getdoc(kind).splitlines()[0]}", ""]
        lines += ["| field | type | meaning |", "|---|---|---|"]
        for name, info in kind.__pydantic_fields__.items():
            lines.append(f"| `{name}` | {type_of(info, types.get(name))} | {comments[kind.__name__][name]} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def test_the_readme_lists_every_field_of_a_recipe():
    text = README.read_text()
    written = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert written == field_list(), f"run python -m {__spec__.name}"


def test_every_field_says_what_it_is():
    silent = [
        f"{kind}.{name}"
        for kind, fields in meanings(inspect.getsource(recipe)).items()
        for name, said in fields.items()
        if not said
    ]
    assert not silent


if __name__ == "__main__":
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(before + BEGIN + field_list() + END + rest.partition(END)[2])
