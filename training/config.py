"""A run's configuration: one YAML file, any field of which the command line can override, checked before anything loads."""

import argparse
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from modeling_lrsclip.files.configuration import (
    ConfigurationError,
    field_types,
    parse_options,
    read_yaml,
    set_field,
    validate,
)

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
    fields = field_types(TrainConfig)
    parser = argparse.ArgumentParser(
        prog="training.train",
        usage=USAGE,
        description="fields:\n" + "\n".join(f"  {name:32s} {text}" for name, text in fields.items()),
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file, see training/configs/")
    known, rest = parser.parse_known_args(argv)
    values: dict[str, Any] = {}
    try:
        if known.config:
            values = read_yaml(known.config, "the recipes are in training/configs/")
        for name, value in parse_options(rest, [name for name, text in fields.items() if text.startswith("bool")]):
            set_field(values, name, value)
        return validate(TrainConfig, values)
    except ConfigurationError as error:
        raise SystemExit(str(ConfigurationError(error.mistakes + data_mistakes(values)))) from None
    except ValueError as error:
        raise SystemExit(str(error)) from None
