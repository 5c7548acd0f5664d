"""A run's configuration: one YAML file, any field of which the command line can override, checked before anything loads."""

import argparse
import datetime
import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from .data.pairs import DataConfig
from .loop import LoopConfig
from .losses import LossConfig
from .model import ModelConfig
from .optim import OptimConfig
from .preflight import data_mistakes
from .push import PushConfig
from .signals import EXIT_CODES


@dataclass(config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class TrainConfig:
    output_dir: str  # the run folder
    data: DataConfig
    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    loop: LoopConfig = Field(default_factory=LoopConfig)
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the arithmetic; weights and loss stay float32
    resume: bool = False  # go on from the newest checkpoint in output_dir
    push_to_hub: bool = False  # the final model, see `push`
    push: PushConfig = Field(default_factory=PushConfig)

    @model_validator(mode="after")
    def _scratch_needs_a_tokenizer(self):
        if self.model.init == "scratch" and self.model.tokenizer is None:
            raise ValueError(
                'model.init is "scratch" and model.tokenizer is not set; name a tokenizer, or "train" for one learnt '
                "from the training captions"
            )
        return self

    @model_validator(mode="after")
    def _push_has_an_address(self):
        if self.push_to_hub and self.push.repo is None:
            raise ValueError("push_to_hub is set and push.repo is not; name a repository, as owner/name")
        if self.push_to_hub and not self.data.validation and (self.push.measure or self.push.every == "validation"):
            raise ValueError("push.measure and push.every: validation need data.validation; set it, or leave them out")
        if self.push_to_hub and self.push.measure and not isinstance(self.data.validation, str):
            raise ValueError(
                "push.measure takes one data.validation, not a list of sources; name one, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _patience_has_validation_data(self):
        if self.loop.patience and not self.data.validation:
            raise ValueError("loop.patience is set and data.validation is not; set both or neither")
        return self


USAGE = """\
accelerate launch -m training.train --config FILE [--field value] [--section.field value] ...

Every field of the configuration can be overridden, for example
  --output_dir runs/mine --data.train tiles/captions.jsonl --loop.batch_size 64 --optim.learning_rate 1e-5
"""


def parse_config(argv: list[str] | None = None) -> TrainConfig:
    """
    Reads `--config FILE` and the overrides of the command line.

    Raises:
        `SystemExit`: with a message that lists every mistake at once: unknown fields with the nearest valid name,
            missing ones, values of a wrong type or out of range, and those of the data files, where they are named.
    """
    parser = argparse.ArgumentParser(
        prog="training.train",
        usage=USAGE,
        description="fields:\n" + "\n".join(f"  {name:32s} {text}" for name, text in _fields().items()),
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file, see training/configs/")
    known, rest = parser.parse_known_args(argv)
    values = _read_file(known.config) if known.config else {}
    for name, value in _overrides(rest):
        _assign(values, name, value)
    try:
        return TypeAdapter(TrainConfig).validate_python(values)
    except ValidationError as error:
        lines = [_explain(mistake) for mistake in error.errors()] + data_mistakes(values)
        raise SystemExit("The configuration has mistakes:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _read_file(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise SystemExit(f"--config {path} does not exist; the recipes are in training/configs/.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise SystemExit(f"{path} is not a configuration; write fields and sections, as in training/configs/.")
    sections = {name.partition(".")[0] for name in _fields() if "." in name}
    return {name: {} if value is None and name in sections else value for name, value in values.items()}


def _overrides(rest: list[str]) -> list[tuple[str, Any]]:
    pairs, words = [], list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise SystemExit(f"{word!r} stands where a --field was expected; write --field value.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if words and not words[0].startswith("--"):
                value = words.pop(0)
            elif _fields().get(name, "").startswith("bool"):
                value = "true"  # a switch: --resume
            else:
                raise SystemExit(f"--{name} has no value; write --{name} value.")
        pairs.append((name, _value(value)))
    return pairs


def _value(text: str) -> Any:
    """What a word of the command line means: as in a YAML file, but for patterns of files and for dates."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:  # *.parquet, {000..031}.tar
        return text
    return text if isinstance(value, datetime.date) else value


def _assign(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, field = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise SystemExit(f"--{name}: {section} is a single value and has no field {field}.")
    values[field] = value


def _explain(mistake: dict) -> str:
    name = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "unexpected_keyword_argument":
        nearest = difflib.get_close_matches(name, _fields(), n=1, cutoff=0.0)
        return f"{name} is not a field; did you mean {nearest[0]}?"
    if mistake["type"] in ("missing", "missing_argument"):
        return f"{name} is required and not set."
    if mistake["type"] == "value_error":  # of our own, which names the fields
        return f"{mistake['msg'].removeprefix('Value error, ')}."
    return f"{name}={mistake['input']!r}: {mistake['msg'][0].lower()}{mistake['msg'][1:]}."


def _fields(config_class: Any = TrainConfig, prefix: str = "") -> dict[str, str]:
    """Every field by its dotted name, with its type and default."""
    listed: dict[str, str] = {}
    for name, info in config_class.__pydantic_fields__.items():
        if hasattr(info.annotation, "__pydantic_fields__"):
            listed |= _fields(info.annotation, f"{prefix}{name}.")
        else:
            listed[prefix + name] = _describe(info)
    return listed


def _describe(info: FieldInfo) -> str:
    kind = info.annotation.__name__ if isinstance(info.annotation, type) else str(info.annotation)
    kind = kind.replace("typing.", "")
    return (
        f"{kind}, required"
        if info.is_required()
        else f"{kind}, default {info.get_default(call_default_factory=True)!r}"
    )
