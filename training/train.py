"""
Fine-tunes a CLIP on images with a long and a short caption each (paper, IV-C).

    accelerate launch -m training.train --config training/configs/demo.yaml [--section.field value]
"""

import datetime
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, set_seed
from datasets import disable_progress_bars
from PIL.Image import Image
from pydantic import RootModel
from transformers.utils import logging

from evaluation.retrieval import evaluate_retrieval
from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.encoding.encoder import embed_images
from modeling_lrsclip.encoding.imagery import read_image
from modeling_lrsclip.files.atomic import replace_text
from modeling_lrsclip.files.hashing import weights_sha256
from modeling_lrsclip.published.registry import MODELS, resolve

from .checkpoint import NotSavedError
from .config import TrainConfig, parse_config
from .data.pairs import CaptionedImages, Pairs, check_row, count_workers
from .data.rows import Row, caption_list
from .data.skipped import SkippedFile, check_share, skipped_row
from .devices import choose_precision, on_cpu, use_all_cores
from .gather import keep_until_exit
from .loop import Trainer, count_steps
from .model import SCRATCH, SHORTHANDS, ModelConfig, build_model, build_processor
from .nonfinite import NotFiniteError
from .optim import build_optimizer, build_scheduler
from .preflight import USER_ERRORS, MistakeError, first_process_first, open_data
from .push import look_for_a_token, push
from .run_folder import check_run_folder, lock_run_folder
from .run_record import (
    SCHEMA_VERSION,
    describe_data,
    describe_source,
    git_state,
    read_record,
    record_start,
    versions,
    write_record,
)
from .sharding import make_accelerator
from .signals import ENDED_BY_SIGNAL, FAILED, NOT_FINITE, NOT_SAVED, Interrupted, end_with_the_launcher


MEASURED_CAPTIONS = 1000  # whose token lengths are told at the start
LONGEST_WAIT = datetime.timedelta(hours=6)  # of the other processes, while the first one validates or reads data


def main(argv: list[str] | None = None) -> None:
    end_with_the_launcher()
    disable_progress_bars()
    config = parse_config(argv)
    try:
        run(config)
    except Interrupted as told:
        leave(str(told), ENDED_BY_SIGNAL + told.signal_number)
    except KeyboardInterrupt:
        leave("ended before the first step or after the last one; --resume goes on.", ENDED_BY_SIGNAL + signal.SIGINT)
    except NotFiniteError as error:
        leave(f"error: {error}", NOT_FINITE)
    except NotSavedError as error:
        leave(f"error: {error}", NOT_SAVED)
    except MistakeError as error:
        raise SystemExit(f"error: {error}" if is_first() else FAILED) from error
    except USER_ERRORS as error:
        raise SystemExit(f"error: {error}") from error


def leave(message: str, exit_code: int) -> NoReturn:
    """Ends this process, the reason told once for all of them."""
    if is_first():
        print(message, file=sys.stderr)
    raise SystemExit(exit_code)


def is_first() -> bool:
    """Whether this is the only process of the run or the first of several, before accelerate knows."""
    return os.environ.get("RANK", "0") == "0"


def run(config: TrainConfig) -> Path:
    """Trains as `config` says; returns the folder of the final model."""
    with lock_run_folder(Path(config.output_dir)) if is_first() else nullcontext():
        check_run_folder(Path(config.output_dir), as_dict(config), config.resume)
        return train(config, Path(config.output_dir))


def train(config: TrainConfig, folder: Path) -> Path:
    device = PartialState(cpu=on_cpu(), timeout=LONGEST_WAIT).device
    if count_workers(config.data, device.type):  # forks must not wait for the tokenizer's threads, which stay behind
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    accelerator = make_accelerator(
        choose_precision(config.precision, device.type),
        log_with=list(config.loop.trackers) or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "tensorboard")),
    )
    keep_until_exit()
    use_all_cores(accelerator)
    logging.disable_progress_bar()
    set_seed(config.seed)
    pairs, held_out, start, processor = first_process_first(accelerator, partial(load, config, accelerator))
    model = build_model(start, processor)
    model.config.long_weight = config.loss.long_weight
    optimizer = build_optimizer(model, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, count_steps(config.loop, len(pairs)))
    trainer = Trainer(
        accelerator,
        model,
        processor,
        optimizer,
        scheduler,
        CaptionedImages(
            pairs, config.data, config.seed, config.loss.short_text == "first_sentence", image_size(processor)
        ),
        config,
        validate=None if held_out is None else Validation(config, processor, held_out, accelerator.mixed_precision),
    )
    if accelerator.is_main_process:
        replace_text(folder / "config.yaml", yaml.safe_dump(as_dict(config), sort_keys=False))
        lengths = measure_captions(trainer, pairs)
        introduce(trainer, lengths)
        describe = partial(describe_run, trainer, len(pairs), lengths, held_out and len(held_out))
        trainer.kept_best = partial(push_best, trainer, describe)
        if config.push_to_hub:
            look_for_a_token(print)
    trainer.resume_if_asked()
    if accelerator.is_main_process:
        record_start(folder, {"step": trainer.state.step} | describe_start(accelerator))
    try:
        state = trainer.train()
    except (Interrupted, NotFiniteError, NotSavedError):  # of all processes together: none waits for another
        accelerator.end_training()
        raise
    accelerator.end_training()
    if accelerator.is_main_process:
        record_run(trainer, describe())
        if config.push_to_hub:
            push(
                config.push,
                folder / "final",
                state.step,
                print,
                config.data.validation if config.push.measure else None,
            )
        if held_out is not None:
            print(f"best validation mR {state.best_recall:.1f} at step {state.best_step}: {folder / 'best'}")
        print(folder / "final")
    return folder / "final"


def load(config: TrainConfig, accelerator: Accelerator) -> tuple[Pairs, Pairs | None, ModelConfig, LRSCLIPProcessor]:
    """The training pairs, the held-out ones, the model section with `init` resolved, and the processor."""
    pairs, held_out = open_data(config, accelerator.num_processes)
    captions = (text for kind in pairs.kinds for stored in pairs.captions(kind) for text in caption_list(stored))
    start = resolve_init(config.model)
    return pairs, held_out, start, build_processor(start, captions)


def resolve_init(model: ModelConfig) -> ModelConfig:
    """
    The same with `init` a folder, a Hub id or a file, by whatever name it was given; fetches a published file.

    Raises:
        `ValueError`: for a name or path that is none of these, or a file that cannot be fetched.
    """
    if model.init == SCRATCH:
        return model
    source = resolve(full_name(model.init))
    options = {name: value for name, value in source.load_options.items() if getattr(model, name) is None}
    return replace(model, init=source.path, **options)


def full_name(init: str) -> str:
    """Of a published model that is named by a short word; else `init` itself."""
    return init if Path(init).exists() else SHORTHANDS.get(init, init)


def describe_init(init: str) -> dict[str, str]:
    """What a run started from, a published model by where it is published."""
    model = None if Path(init).exists() else MODELS.get(full_name(init).lower())
    return describe_source((model and (model.repo or model.url)) or init)


def push_best(trainer: Trainer, describe: Callable[[], dict[str, Any]]) -> None:
    """Pushes a new best model with its record, where that was asked for."""
    config, state = trainer.config, trainer.state
    if config.push_to_hub and config.push.every == "validation":
        record_model(trainer.folder / "best", describe(), state.best_step)
        push(config.push, trainer.folder / "best", state.best_step, trainer.report.say)


def as_dict(config: TrainConfig) -> dict:
    return RootModel[TrainConfig](config).model_dump()


def image_size(processor: LRSCLIPProcessor) -> int:
    """Pixels of the short side that the image processor resizes to."""
    size = dict(processor.image_processor.size)
    return size.get("shortest_edge") or max(size["height"], size["width"])


def measure_captions(trainer: Trainer, pairs: Pairs) -> dict[str, dict[str, float]]:
    """Token lengths of the sources' first captions, and the share from 0 to 1 that the table cuts, by column."""
    positions, measured = trainer.processor.tokenizer.model_max_length, {}
    each = max(1, MEASURED_CAPTIONS // len(pairs.sources))
    for kind in pairs.kinds:
        texts = [caption_list(stored)[0] for stored in pairs.captions(kind, each)]
        if not texts:
            raise ValueError(f"The first {each} rows have no {kind} caption at all; look at the data.")
        lengths = trainer.processor.count_tokens(texts)
        cut = sum(length > positions for length in lengths) / len(lengths)
        name = trainer.config.data.columns([kind])[kind]
        measured[name] = {"measured": len(lengths), "mean_tokens": statistics.fmean(lengths), "share_truncated": cut}
    return measured


def introduce(trainer: Trainer, lengths: dict[str, dict[str, float]]) -> None:
    """Says what is trained on what, and how long the captions are against the table."""
    positions = trainer.processor.tokenizer.model_max_length
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    print(
        f"{parameters:.1f} M parameters, {positions} text positions; {len(trainer.data)} pairs, {trainer.steps} steps of "
        f"{trainer.config.loop.batch_size} on {trainer.accelerator.num_processes} x {trainer.accelerator.device.type}, "
        f"{trainer.accelerator.mixed_precision.replace('no', 'fp32')}"
    )
    if trainer.validate:
        for seen in sorted(trainer.data.pairs.locations & trainer.validate.pairs.locations):
            print(f"note: validation is on the training pairs themselves ({seen}), so its recall is not held out")
    for name, told in lengths.items():
        print(
            f"{name}: {told['mean_tokens']:.0f} tokens on average, {told['share_truncated']:.0%} longer than "
            f"{positions} and cut"
        )


def describe_start(accelerator: Accelerator) -> dict[str, Any]:
    """When, on what and with what the run, or its resumption, was started."""
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "precision": accelerator.mixed_precision.replace("no", "fp32"),
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
    }


def describe_run(
    trainer: Trainer, pairs: int, lengths: dict[str, dict[str, float]], held_out: int | None
) -> dict[str, Any]:
    """`run.json`, but for the weights it stands beside."""
    config, state = trainer.config, trainer.state
    measured = held_out and min(held_out, config.data.validation_pairs or held_out)
    before = read_record(str(trainer.folder)) or {}
    return describe_start(trainer.accelerator) | {
        "schema_version": SCHEMA_VERSION,
        "starts": before.get("starts", []),
        "init": describe_init(config.model.init) if config.model.init != "scratch" else None,
        "init_run": read_record(config.model.init),
        "data": describe_data(config.data.train) | {"pairs": pairs, "captions": lengths},
        "validation": held_out and describe_data(config.data.validation) | {"pairs": measured},
        "best": held_out and {"step": state.best_step, "mR": state.best_recall},
        "steps": trainer.steps,
        "seconds": state.seconds,
        "config": as_dict(config),
    }


def record_run(trainer: Trainer, record: dict[str, Any]) -> None:
    """Writes `run.json` into the run folder and beside the weights of `final` and `best`."""
    folder, state = trainer.folder, trainer.state
    if trainer.validate is not None:
        record_model(folder / "best", record, state.best_step)
    write_record(folder, record_model(folder / "final", record, state.step))


def record_model(folder: Path, record: dict[str, Any], step: int) -> dict[str, Any]:
    """Writes the record beside the weights of a model folder; returns it with their hash."""
    model = LRSCLIPModel.from_pretrained(folder)
    weights = weights_sha256(sorted(model.state_dict().items()))
    whole = record | {"weights": {"step": step, "sha256": weights}}
    write_record(folder, whole)
    return whole


class Validation:
    """
    Recall of held-out pairs, long and short texts each by themselves; rows that cannot be used are left out, named and
    capped as in training.
    """

    def __init__(self, config: TrainConfig, processor, pairs: Pairs, precision: str):
        self.config, self.processor, self.pairs, self.precision = config, processor, pairs, precision
        self.rows = min(len(pairs), config.data.validation_pairs or len(pairs))

    def __call__(self, model) -> dict[str, float]:
        dtype = torch.bfloat16 if self.precision == "bf16" else None
        usable: list[Row] = []
        images = self.images(usable)
        image_embeds = embed_images(model, self.processor, images, dtype=dtype)  # (M, P), once for both texts
        numbers = {}
        for kind in self.pairs.kinds:
            stored = [caption_list(getattr(row, kind)) for row in usable]
            texts, owners = zip(*((text, index) for index, texts in enumerate(stored) for text in texts))
            recall = evaluate_retrieval(model, self.processor, image_embeds, list(texts), list(owners), dtype=dtype)
            numbers |= {f"{kind}_{name}": value for name, value in recall.items()}
        means = [value for name, value in numbers.items() if name.endswith("_mR")]
        return numbers | {"mR": statistics.fmean(means)}

    def images(self, usable: list[Row]) -> Iterator[Image]:
        """The images that can be used; each one's row is appended to `usable`."""
        found = []
        for number in range(self.rows):
            row = self.pairs.read([number])[0]
            try:
                check_row(row, self.pairs.kinds)
                image = read_image(row.image)
            except ValueError as error:
                found.append(skipped_row(row, self.pairs.location(number), error))
                continue
            usable.append(row)
            yield image
        if found:
            SkippedFile(Path(self.config.output_dir)).add(found)
            check_share(len(found), self.rows, self.config.data.max_skipped_fraction, found[-1])


if __name__ == "__main__":
    main()
