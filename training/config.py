"""A run's configuration: one YAML file, any field of which the command line can override, checked before anything loads."""

import argparse
from collections.abc import Mapping
from typing import Any

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
from .loop import TrainConfig
from .losses import LossConfig
from .signals import EXIT_CODES


USAGE = """\
accelerate launch -m training.train --config FILE [--field value] [--section.field value] ...

Every field of the configuration can be overridden, for example
  --output_dir runs/mine --data.train tiles/captions.jsonl --loop.batch_size 64 --optim.learning_rate 1e-5
"""


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
