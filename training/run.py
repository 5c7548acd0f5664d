"""A run from its configuration to its final model: what it is made of, and how it ends."""

import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import disable_progress_bars
from tqdm import tqdm
from transformers.utils import logging

from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.commands import say_once_that_the_hub_is_away
from modeling_lrsclip.files.configuration import plain_values

from . import ENDED_BY_SIGNAL, FAILED, NOT_FINITE, NOT_SAVED
from .checkpoint import NotSavedError, TrainState, trained_tokenizer
from .config import TrainConfig
from .data.batches import count_workers, explain_lost_workers
from .data.held_out import HELD_OUT, hold_out, image_keys, write_held_out
from .data.inspection import inspect_pairs
from .data.pairs import CaptionedImages, Pairs, open_data, resized_side
from .data.skipped import SKIPPED
from .data.visiting_order import VisitSampler
from .distributed import USER_ERRORS, MistakeError, explain_lost_processes, first_process_first, start_processes
from .loop import NotFiniteError, Trainer
from .model import TRAIN_TOKENIZER, build_model, build_processor, open_start
from .push import look_for_a_token, push
from .run_folder import RunRecord, check_run_folder, lock_run_folder
from .signals import Interrupted, limited_meeting
from .validation import Validation


def run_or_say_why_not(config: TrainConfig) -> None:
    """Train; a run that ends early says why in a sentence, and ends with one of the exit codes."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as `training` leaves it while all is imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    say_once_that_the_hub_is_away()
    disable_progress_bars()
    try:
        run(config)
    except Interrupted as interrupted:
        leave(str(interrupted), ENDED_BY_SIGNAL + interrupted.signal_number)
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
    """End this process, the reason said once for all of them."""
    if is_first():
        print(message, file=sys.stderr)
    raise SystemExit(exit_code)


def is_first() -> bool:
    """Whether this is the only process of the run or the first of several, before accelerate knows."""
    return os.environ.get("RANK", "0") == "0"


def run(config: TrainConfig) -> Path:
    """Train as `config` says; returns the folder of the final model."""
    folder = Path(config.output_dir)
    with lock_run_folder(folder) if is_first() else nullcontext():
        check_run_folder(folder, plain_values(config), config.resume)
        return train(config, folder)


def train(config: TrainConfig, folder: Path) -> Path:
    """Build what a run is made of, train, and record it; returns the folder of the final model."""
    with limited_meeting():
        accelerator = start_processes(config.precision, config.seed, folder, config.loop.trackers)
    if count_workers(config.data, accelerator.device.type):  # whose forks must not wait for the tokenizer's threads
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.disable_progress_bar()
    pairs, held_out, processor, model = load(config, accelerator)
    short_from_long, size = config.loss.short_text == "first_sentence", resized_side(processor)
    images = CaptionedImages(pairs, config.data, config.seed, short_from_long, size)
    validation = record = None
    if held_out is not None:
        validation = Validation(config.data, folder, processor, held_out, accelerator.mixed_precision)
    if accelerator.is_main_process:
        steps, data = config.loop.count_steps(len(pairs)), inspect_pairs(pairs, processor, config.data)
        record = RunRecord(folder, plain_values(config), accelerator, steps, data, validation and validation.rows)
        both = set() if config.data.share or held_out is None else pairs.locations & held_out.locations
        record.introduce(model, both)
        if config.push_to_hub:
            look_for_a_token(print)

    def push_best(state: TrainState) -> None:
        record.describe_model(folder / "best", state, state.best_step)
        push(config.push, folder / "best", state.best_step, tqdm.write)

    keep_best = push_best if config.push_to_hub and config.push.every == "validation" else None
    trainer = Trainer(accelerator, model, processor, images, config, validation, keep_best)
    if config.resume:
        trainer.resume()
    if record is not None:
        record.start(trainer.state.step, trainer.changed_data)
        if config.data.share:
            write_held_out(held_out, folder / HELD_OUT)
            print(f"held out by image: {len(held_out)} rows, in {folder / HELD_OUT} for evaluation.run --data")
    try:
        state = trainer.train()
    except (Interrupted, NotFiniteError, NotSavedError):  # of all processes together: none waits for another
        accelerator.end_training()
        raise
    except RuntimeError as error:
        step = trainer.state.step + 1
        lost = explain_lost_workers(error, images, step) or explain_lost_processes(error, f"taking step {step}")
        if lost is None:
            raise
        raise lost from error
    accelerator.end_training()
    if record is not None:
        record.finish(state)
        if config.push_to_hub:
            held_out_data = str(folder / HELD_OUT) if config.data.share else config.data.validation
            push(config.push, folder / "final", state.step, print, held_out_data if config.push.measure else None)
        if state.skipped:
            left_out = f"{state.skipped} visits of rows that could not be used"
            print(f"{left_out} went to the row after; see {folder / SKIPPED}")
        if validation is not None:
            print(f"best validation mR {state.best_recall:.1f} at step {state.best_step}: {folder / 'best'}")
        print(folder / "final")
    return folder / "final"


def load(config: TrainConfig, accelerator: Accelerator) -> tuple[Pairs, Pairs | None, LRSCLIPProcessor, LRSCLIPModel]:
    """
    Open the training pairs and the held-out ones, and build the processor and the model to start from; every process must
    call it. Where a share of the images is held out, the first process alone reads all of them.
    """
    batch_size, processes = config.loop.batch_size, accelerator.num_processes

    def opened() -> tuple[Pairs, Pairs | None, list[np.ndarray] | None]:
        pairs, held_out = open_data(
            config.data, config.loss.kinds, batch_size=batch_size, seed=config.seed, processes=processes
        )
        return pairs, held_out, image_keys(pairs) if config.data.share and accelerator.is_main_process else None

    def built() -> tuple[Pairs, Pairs | None, LRSCLIPProcessor, LRSCLIPModel]:
        kept, held = hold_out(pairs, config.data.share, keys) if config.data.share else (pairs, held_out)
        VisitSampler(kept.order(config.seed), batch_size, steps=1, share=(0, processes))  # are there enough left?
        trains = config.model.tokenizer == TRAIN_TOKENIZER
        trained = trained_tokenizer(Path(config.output_dir)) if trains and config.resume else None
        start = open_start(replace(config.model, tokenizer=str(trained)) if trained else config.model)
        processor = build_processor(start, kept.all_texts())
        model = build_model(start, processor)
        model.config.long_weight = config.loss.at(1.0).long_weight  # of a curriculum, the weight it ends with
        return kept, held, processor, model

    pairs, held_out, keys = first_process_first(accelerator, opened)
    (keys,) = broadcast_object_list([keys])
    return first_process_first(accelerator, built)
