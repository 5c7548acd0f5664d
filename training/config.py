"""A run's configuration: one YAML file, any field of which the command line can override, checked before anything loads."""

import argparse
import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from .data import DataConfig
from .loop import LoopConfig
from .losses import LossConfig
from .model import ModelConfig
from .optim import OptimConfig


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

    @model_validator(mode="after")
    def _scratch_needs_a_tokenizer(self):
        if self.model.init == "scratch" and self.model.tokenizer is None:
            raise ValueError(
                'model.init is "scratch" and model.tokenizer is not set; name a tokenizer, or "train" for one learnt '
                "from the training captions"
            )
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
            missing ones, values of a wrong type or out of range.
    """
    parser = argparse.ArgumentParser(
        prog="training.train",
        usage=USAGE,
        description="fields:\n" + "\n".join(f"  {name:32s} {text}" for name, text in _fields().items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file, see training/configs/")
    known, rest = parser.parse_known_args(argv)
    values: dict[str, Any] = {}
    if known.config:
        if not Path(known.config).is_file():
            raise SystemExit(f"--config {known.config} does not exist; the recipes are in training/configs/.")
        try:
            values = yaml.safe_load(Path(known.config).read_text()) or {}
        except yaml.YAMLError as error:
            raise SystemExit(f"{known.config} is not valid YAML: {error}") from None
    for name, value in _overrides(rest):
        _assign(values, name, value)
    try:
        return TypeAdapter(TrainConfig).validate_python(values)
    except ValidationError as error:
        lines = [_explain(mistake) for mistake in error.errors()]
        raise SystemExit("The configuration has mistakes:\n" + "\n".join(f"  {line}" for line in lines)) from None


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
        pairs.append((name, yaml.safe_load(value)))
    return pairs


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
