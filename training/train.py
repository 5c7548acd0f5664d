"""
Fine-tunes a CLIP on images with a long and a short caption each (paper, IV-C).

    python -m training.train --config training/configs/demo.yaml [--section.field value]

Several processes: `accelerate launch -m training.train ...`.
"""

from collections.abc import Mapping
from typing import Any

from modeling_lrsclip.commands import command_parser
from modeling_lrsclip.files.configuration import (
    ConfigurationError,
    field_types,
    parse_options,
    read_yaml,
    set_field,
    validate,
)

from . import EXIT_CODES, end_with_the_launcher
from .config import DataConfig, LossConfig, TrainConfig


USAGE = """\
python -m training.train --config FILE [--field value] [--section.field value] ...

Every field of the configuration can be overridden, for example
  --output_dir runs/mine --data.train tiles/captions.jsonl --loop.batch_size 64 --optim.learning_rate 1e-5
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command; a run that ends early says why in a sentence, and ends with one of the `EXIT_CODES`."""
    end_with_the_launcher()
    config = parse_config(argv)
    from .run import run_or_say_why_not  # seconds of imports, which --help and a mistyped field do without

    run_or_say_why_not(config)


def parse_config(argv: list[str] | None = None) -> TrainConfig:
    """
    Read `--config FILE` and the overrides of the command line.

    Raises:
        `SystemExit`: with a message that lists every mistake at once: unknown fields with the nearest valid name,
            missing ones, values of a wrong type or out of range, and those of the data files, where they are named.
    """
    fields = field_types(TrainConfig)
    listed = "\n".join(f"  {name:32s} {text}" for name, text in fields.items())
    parser = command_parser("training.train", f"fields:\n{listed}")
    parser.usage, parser.epilog, parser.allow_abbrev = USAGE, EXIT_CODES, False
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
    from .data.pairs import INPUT_IDS, try_to_open

    try:
        data = validate(DataConfig, values.get("data"))
    except ConfigurationError:
        return []
    try:
        kinds = validate(LossConfig, values.get("loss") or {}).kinds
    except ConfigurationError:
        kinds = list(INPUT_IDS)
    return try_to_open(data, kinds, only_local=True)[1]


if __name__ == "__main__":
    main()
