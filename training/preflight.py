"""What is wrong with a configuration and with the data it names: found together, before a model loads."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets.exceptions import DatasetsError
from pydantic import TypeAdapter, ValidationError

from .data.pairs import DataConfig, Pairs, load_pairs
from .data.sources import SourceConfig, find_files
from .data.visiting_order import VisitSampler
from .losses import LossConfig


if TYPE_CHECKING:
    from .config import TrainConfig

KINDS = ("long", "short")  # of captions
USER_ERRORS = (ValueError, OSError, DatasetsError)  # whose message says enough
Loaded = TypeVar("Loaded")


class MistakeError(ValueError):
    """What the first process found wrong; all processes raise it together."""


def first_process_first(accelerator: Accelerator, load: Callable[[], Loaded]) -> Loaded:
    """
    What `load` returns on each process; the others follow the first, which prepares and fetches what they then find.

    Raises:
        [`MistakeError`]: on all processes where `load` fails on the first, so that none waits for it.
    """
    loaded, failure = None, None
    if accelerator.is_main_process:
        try:
            loaded = load()
        except USER_ERRORS as error:
            failure = error
    (told,) = broadcast_object_list([failure and str(failure)])
    if told is not None:
        raise MistakeError(told) from failure
    return loaded if accelerator.is_main_process else load()


def caption_kinds(loss: LossConfig) -> list[str]:
    """
    The captions that the loss weighs: with a weight of 0 or 1 the other text is not even read, nor is the short one
    where the long text's first sentence stands for it.
    """
    kinds = []
    if loss.long_weight > 0:
        kinds.append("long")
    if loss.long_weight < 1 and loss.short_text == "own":
        kinds.append("short")
    return kinds


def open_data(config: "TrainConfig", processes: int) -> tuple[Pairs, Pairs | None]:
    """
    The training pairs and the held-out ones, if there are any.

    Args:
        processes: among which each batch is shared out.

    Raises:
        `ValueError`: with all that is wrong with both, and with the batch size for them.
    """
    opened, mistakes = _open(config.data, caption_kinds(config.loss))
    if opened[0] is not None:
        try:
            VisitSampler(opened[0].order(config.seed), config.loop.batch_size, steps=1, share=(0, processes))
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return opened


def data_mistakes(values: Mapping[str, Any]) -> list[str]:
    """
    Those of the data that a configuration names, although other parts of it are wrong: where its `data` section is not
    itself, and its sources are on this machine.

    Args:
        values: the configuration as nested dictionaries.
    """
    try:
        data = TypeAdapter(DataConfig).validate_python(values.get("data"))
    except ValidationError:
        return []
    try:
        kinds = caption_kinds(TypeAdapter(LossConfig).validate_python(values.get("loss") or {}))
    except ValidationError:
        kinds = list(KINDS)
    return _open(data, kinds, only_local=True)[1]


def _open(
    data: DataConfig, kinds: list[str], only_local: bool = False
) -> tuple[tuple[Pairs | None, Pairs | None], list[str]]:
    opened, mistakes = [], []
    for held_out in (False, True):
        given = data.validation if held_out else data.train
        try:
            there = given and (
                not only_local or _is_local(given, data.validation_split if held_out else data.train_split)
            )
            opened.append(load_pairs(data, kinds, held_out=held_out) if there else None)
        except USER_ERRORS as error:
            opened.append(None)
            mistakes.extend(str(error).splitlines())
    return tuple(opened), mistakes


def _is_local(given: str | list[SourceConfig], split: str) -> bool:
    """Whether no source is on the Hub; raises `ValueError` for a file that does not exist."""
    sources = [SourceConfig(path=given)] if isinstance(given, str) else given
    return all(find_files(source.path, source.split or split) for source in sources)
