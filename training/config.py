"""A run's configuration: one YAML file, any field of which the command line can override, checked before anything loads."""

import argparse
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from modeling_lrsclip.files.configuration import (
    ConfigurationError,
    field_types,
    parse_options,
    read_yaml,
    set_field,
    validate,
)

from .data.pairs import INPUT_IDS, local_mistakes
from .data.sources import DataConfig
from .losses import LossConfig
from .model import ModelConfig
from .optim import OptimConfig
from .push import PushConfig
from .run_log import TRACKERS
from .signals import EXIT_CODES


USAGE = """\
accelerate launch -m training.train --config FILE [--field value] [--section.field value] ...

Every field of the configuration can be overridden, for example
  --output_dir runs/mine --data.train tiles/captions.jsonl --loop.batch_size 64 --optim.learning_rate 1e-5
"""


@dataclass(config=ConfigDict(extra="forbid"))
class LoopConfig:
    batch_size: int = Field(512, ge=2)  # pairs a step, of all processes together; 512 is the best of Fig. 7
    epochs: float = Field(1.0, gt=0)
    steps: int | None = Field(None, ge=1)  # optimizer steps, instead of epochs
    micro_batch_size: int | None = Field(None, ge=1)  # pairs a process holds at a time (cached gradients); None: all
    group_texts: bool = True  # by length, each group padded to its own longest; False: long, short, as they come
    compile: bool = False  # torch.compile of the towers' layers
    log_every: int = Field(10, ge=1)  # steps
    log_ids: bool = False  # every batch's sample ids into log.jsonl
    # "none" is none of them.
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(default_factory=lambda: ["tensorboard"])
    validate_every: int | None = Field(None, ge=1)  # steps; always after the last one
    patience: int | None = Field(None, ge=1)  # stop early after so many validations without a better mR
    save_every: int | None = Field(None, ge=1)  # steps; always after the last one
    keep_checkpoints: int = Field(2, ge=1)  # newest ones

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_none(cls, trackers):
        if trackers in (None, "none"):
            return []
        return [trackers] if isinstance(trackers, str) else trackers

    @field_validator("trackers")
    @classmethod
    def _trackers_are_installed(cls, trackers):
        missing = [name for name in trackers if not TRACKERS[name]()]
        if missing:
            raise ValueError(
                f"loop.trackers names {', '.join(missing)}, which is not installed; pip install it, or set it to none"
            )
        return trackers

    @model_validator(mode="after")
    def _patience_needs_validations(self):
        if self.patience and not self.validate_every:
            raise ValueError("loop.patience counts validations; set loop.validate_every too")
        return self

    def count_steps(self, rows: int) -> int:
        """Count the optimizer steps of a run; what does not fill a batch at the end of an epoch is left out."""
        return self.steps or max(1, round(self.epochs * (rows // self.batch_size)))


@dataclass(config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class TrainConfig:
    """The configuration of a whole run."""

    output_dir: str  # the run folder
    data: DataConfig
    model: ModelConfig = Field(default_factory=ModelConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    loop: LoopConfig = Field(default_factory=LoopConfig)
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of the arithmetic; weights and loss stay float32
    resume: bool = False  # go on from the newest checkpoint in output_dir
    allow_changed_data: bool = False  # when resuming; what changed is in run.json
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
        if self.push_to_hub and self.push.measure and isinstance(self.data.validation, list):
            raise ValueError(
                "push.measure takes one data.validation, not a list of sources; name one, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _patience_has_validation_data(self):
        if self.loop.patience and not self.data.validation:
            raise ValueError("loop.patience is set and data.validation is not; set both or neither")
        return self


def parse_config(argv: list[str] | None = None) -> TrainConfig:
    """
    Read `--config FILE` and the overrides of the command line.

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
        switches = [name for name, text in fields.items() if text.startswith("bool")]
        for name, value in parse_options(rest, [*switches, *(name.replace("_", "-") for name in switches)]):
            set_field(values, name.replace("-", "_") if name.replace("-", "_") in switches else name, value)
        return validate(TrainConfig, values)
    except ConfigurationError as error:
        raise SystemExit(str(ConfigurationError(error.mistakes + data_mistakes(values)))) from None
    except ValueError as error:
        raise SystemExit(str(error)) from None


def data_mistakes(values: Mapping[str, Any]) -> list[str]:
    """
    List what is wrong with the data that a configuration names, although other parts of it are wrong: where its `data`
    section is not itself, and its sources are on this machine.

    Args:
        values: the configuration as nested dictionaries.
    """
    try:
        data = validate(DataConfig, values.get("data"))
    except ConfigurationError:
        return []
    try:
        kinds = validate(LossConfig, values.get("loss") or {}).kinds
    except ConfigurationError:
        kinds = list(INPUT_IDS)
    return local_mistakes(data, kinds)
