"""
Configurations: YAML files, fields set from the command line, checked against a dataclass with all mistakes at once.

A field is named by its sections with dots between, places in a list by their number: `optim.learning_rate`,
`sources.0.read.path`.
"""

import datetime
import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import TypeAdapter, ValidationError


Config = TypeVar("Config")
_LONGEST = 600  # characters of a mistake, which may quote a value of any length


class ConfigurationError(ValueError):
    """A configuration with mistakes, each of them a sentence."""

    def __init__(self, mistakes: Sequence[str]):
        half = _LONGEST // 2
        short = (one if len(one) <= _LONGEST else f"{one[:half]} … {one[-half:]}" for one in mistakes)
        self.mistakes = list(dict.fromkeys(short))
        super().__init__("The configuration has mistakes:\n" + "\n".join(f"  {mistake}" for mistake in self.mistakes))


def read_yaml(path: str | Path, advice: str = "") -> dict[str, Any]:
    """
    Reads the sections and fields of a YAML file; those without a value are left out.

    Args:
        path: the file.
        advice: what an error says at its end, such as where examples are.

    Raises:
        `ValueError`: one sentence naming the file, for one that is missing, no YAML, or holds no fields.
    """
    path, advice = Path(path), advice and f"; {advice}"
    if not path.is_file():
        raise ValueError(f"{path} does not exist{advice}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}{advice}.") from None
    if not isinstance(values if values is not None else {}, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; write fields and sections{advice}.")
    return {name: value for name, value in (values or {}).items() if value is not None}


def parse_value(text: str) -> Any:
    """
    The value that a word of the command line stands for, as in a YAML file.

    What YAML would make something else of remains text: patterns of files, dates, `2026_01`, `007`.
    """
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):  # *.parquet, {000..031}.tar
        return text
    changed = isinstance(value, int) and not isinstance(value, bool) and str(value) != text.strip()
    return text if changed or isinstance(value, datetime.date) else value


def split_setting(setting: str) -> tuple[str, Any]:
    """
    Name and value of `section.field=value`.

    Raises:
        `ValueError`: for a word without a name or a value.
    """
    name, equals, value = setting.partition("=")
    if not equals or not name.strip():
        raise ValueError(f"{setting} has no value; write section.field=value.")
    return name.strip(), parse_value(value)


def parse_options(words: Sequence[str], switches: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """
    Names and values of `--section.field value`, `--section.field=value`, and `--switch`, which sets it to true.

    Raises:
        `ValueError`: for a word that is no option, and an option without a value.
    """
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} stands where a --field was expected; write --field value.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if words and not words[0].startswith("--"):
                value = words.pop(0)
            elif name in switches:
                value = "true"
            else:
                raise ValueError(f"--{name} has no value; write --{name} value.")
        yield name, parse_value(value)


def choose_names(names: str, known: Collection[str], noun: str, option: str) -> list[str]:
    """
    Read a comma-separated list, or `all`.

    Args:
        names: as given, for example `zcrl,zcrs`.
        known: all there are.
        noun: one of them in words, for errors.
        option: that the list was given with, for errors.

    Returns:
        Names among `known`, each once, in the order given.

    Raises:
        `ValueError`: for a name that is not known, or none.
    """
    wanted = list(known) if names == "all" else [name.strip().lower() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown {noun} {name!r}; {option} takes {', '.join(known)} or all.{hint}")
    if not wanted:
        raise ValueError(f"no {noun} given; {option} takes {', '.join(known)} or all.")
    return list(dict.fromkeys(wanted))


def set_field(values: dict[str, Any], name: str, value: Any) -> None:
    """
    Sets a field of nested dictionaries and lists by its dotted name; sections that are not there are made.

    Args:
        values: nested dictionaries and lists; changed.
        name: such as `data.train` or `sources.0.path`.
        value: any plain value.

    Raises:
        [`ConfigurationError`]: for a name that leads through a single value, or to a place that a list does not have.
    """
    *sections, last = name.split(".")
    section: Any = values
    for part, following in zip(sections, [*sections[1:], last]):
        if isinstance(section, list):
            if not part.isdigit() or int(part) >= len(section):
                raise ConfigurationError([f"{name}: the list has the places 0 to {len(section) - 1}, not {part}."])
            section = section[int(part)]
        else:
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
        if not isinstance(section, dict | list):
            raise ConfigurationError([f"{name}: {part} is a single value and has no field {following}."])
    if isinstance(section, list):
        raise ConfigurationError([f"{name} does not name a field; name one of an entry, as in {name}.0.field."])
    section[last] = value


def validate(kind: type[Config], values: Mapping[str, Any], hints: Mapping[str, str] | None = None) -> Config:
    """
    Makes a configuration of plain values.

    Args:
        kind: a pydantic dataclass; its sections are dataclasses too.
        values: nested dictionaries and lists, as [`read_yaml`] returns them.
        hints: by the last part of a field's name, what else to say where that field is not set.

    Returns:
        The configuration, checked.

    Raises:
        [`ConfigurationError`]: with every mistake: unknown fields with the nearest valid name, missing ones, values of a
            wrong type or out of range.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except UnicodeEncodeError as error:  # pydantic's own words for a surrogate
        half = error.object[error.start : error.end]
        raise ConfigurationError([f"a field or its value holds half a character, {half!r}; write it anew."]) from None
    except ValidationError as error:
        raise ConfigurationError([_explain(one, kind, values, hints or {}) for one in error.errors()]) from None


def plain_values(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries and lists of what JSON and YAML know."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def field_types(kind: Any, values: Any = None, prefix: str = "") -> dict[str, str]:
    """
    Every field of a configuration by its dotted name, with its type and default in words.

    Args:
        kind: a pydantic dataclass.
        values: plain values, whose lists and dictionaries of sections are followed too.
        prefix: goes before every name.

    Returns:
        Text by name, in the order of the fields.
    """
    listed: dict[str, str] = {}
    for name, info in kind.__pydantic_fields__.items():
        below = values.get(name) if isinstance(values, Mapping) else None
        if hasattr(info.annotation, "__pydantic_fields__"):
            listed |= field_types(info.annotation, below, f"{prefix}{name}.")
            continue
        default = "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)!r}"
        listed[prefix + name] = f"{_type_name(info.annotation)}, {default}"
        for section in _sections(info.annotation):
            if isinstance(below, list):
                entries = [(f"{name}.{number}", entry) for number, entry in enumerate(below)]
            elif isinstance(below, Mapping) and any(isinstance(entry, Mapping) for entry in below.values()):
                entries = [(f"{name}.{key}", entry) for key, entry in below.items()]
            else:
                entries = [(name, below)] if isinstance(below, Mapping) else []
            for entry_name, entry in entries:
                listed |= field_types(section, entry, f"{prefix}{entry_name}.")
    return listed


def _sections(annotation: Any) -> list[Any]:
    """Dataclasses within `list[Section]`, `dict[str, Section]` or `Section | None`."""
    if hasattr(annotation, "__pydantic_fields__"):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]


def _type_name(annotation: Any) -> str:
    """A type as it is written, without what is attached to the alternatives of a union."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    alternatives = get_args(annotation)
    if any(hasattr(alternative, "__metadata__") for alternative in alternatives):
        plain = (getattr(alternative, "__origin__", alternative) for alternative in alternatives)
        return " | ".join(map(_type_name, plain))
    return str(annotation).replace("typing.", "")


def _explain(mistake: Mapping[str, Any], kind: Any, values: Any, hints: Mapping[str, str]) -> str:
    parts = [str(part) for part in mistake["loc"]]
    parts = [part for part in parts if not part.startswith("(")]  # tags of a field that takes several kinds of value
    name, message = ".".join(parts), mistake["msg"]
    if mistake["type"] == "unexpected_keyword_argument":
        fields = [field.split(".") for field in field_types(kind, values)]
        known = dict.fromkeys(".".join(field[:end]) for field in fields for end in range(1, len(field) + 1))
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)  # a section's own name may be misspelt too
        return f"{name} is not a field; did you mean {nearest[0]}?"
    if mistake["type"] in ("missing", "missing_argument"):
        return f"{name} is not set; {hints.get(parts[-1], 'it is required')}."
    if mistake["type"] == "value_error":  # of our own, which names the fields
        return f"{message.removeprefix('Value error, ')}."
    return f"{name}={mistake['input']!r}: {message[0].lower()}{message[1:]}."
