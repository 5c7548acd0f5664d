"""
Fine-tunes a CLIP on images with a long and a short caption each (paper, IV-C).

    accelerate launch -m training.train --config training/configs/demo.yaml [--section.field value]
"""

import datetime
import os
import statistics
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from datasets import Dataset, disable_progress_bars
from datasets.exceptions import DatasetsError
from pydantic import RootModel
from transformers.utils import logging

from evaluation.embedding import embed_images, weights_hash
from evaluation.retrieval import evaluate_retrieval
from modeling_lrsclip import LRSCLIPModel

from .config import TrainConfig, parse_config
from .data import CaptionedImages, caption_list, find_file, load_pairs, read_image
from .loop import Trainer, count_steps
from .model import build_model, build_processor
from .optim import build_optimizer, build_scheduler
from .record import SCHEMA_VERSION, describe_source, git_state, read_record, versions, write_record


MEASURED_CAPTIONS = 1000  # whose token lengths are told at the start
LONGEST_WAIT = datetime.timedelta(hours=6)  # of the other processes, while the first one validates or reads data


def main(argv: list[str] | None = None) -> None:
    config = parse_config(argv)
    try:
        run(config)
    except (ValueError, OSError, FloatingPointError, DatasetsError) as error:
        raise SystemExit(f"error: {error}") from error


def run(config: TrainConfig) -> Path:
    """Trains as `config` says; returns the folder of the final model."""
    folder = Path(config.output_dir)
    check_run_folder(folder, config)
    if config.data.workers:  # forked processes must not wait for the tokenizer's threads, which a fork leaves behind
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    device = PartialState(cpu=on_cpu(), timeout=LONGEST_WAIT).device
    accelerator = Accelerator(
        mixed_precision=choose_precision(config.precision, device.type),
        log_with="tensorboard",
        project_dir=str(folder),
    )
    use_all_cores(accelerator)
    logging.disable_progress_bar()
    disable_progress_bars()
    set_seed(config.seed)
    with accelerator.main_process_first():
        columns = caption_columns(config)
        rows = load_pairs(config.data.train, config.data.train_split, config.data, columns)
        held_out = None
        if config.data.validation:
            held_out = load_pairs(config.data.validation, config.data.validation_split, config.data, columns)
        captions = (text for name in columns for stored in rows[name] for text in caption_list(stored))
        processor = build_processor(config.model, captions)
    model = build_model(config.model, processor)
    model.config.long_weight = config.loss.long_weight
    optimizer = build_optimizer(model, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, count_steps(config.loop, len(rows)))
    trainer = Trainer(
        accelerator,
        model,
        processor,
        optimizer,
        scheduler,
        CaptionedImages(rows, config.data, config.seed, config.loss.short_text == "first_sentence"),
        config,
        validate=None if held_out is None else Validation(config, processor, held_out, accelerator.mixed_precision),
    )
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(config), sort_keys=False))
        lengths = measure_captions(trainer, rows, columns)
        introduce(trainer, len(rows), lengths)
    accelerator.init_trackers("tensorboard")
    state = trainer.train()
    accelerator.end_training()
    if accelerator.is_main_process:
        record_run(trainer, len(rows), lengths, None if held_out is None else len(held_out))
        if held_out is not None:
            print(f"best validation mR {state.best_recall:.1f} at step {state.best_step}: {folder / 'best'}")
        print(folder / "final")
    return folder / "final"


def as_dict(config: TrainConfig) -> dict:
    return RootModel[TrainConfig](config).model_dump()


def check_run_folder(folder: Path, config: TrainConfig) -> None:
    """
    Raises `ValueError` when the folder holds a run and this one would overwrite it, or would go on with it under
    another configuration; how often to log, validate and save may change.
    """
    if not (folder / "config.yaml").exists():
        return
    if not config.resume:
        raise ValueError(f"{folder} holds a run already; go on with it by --resume, or set another output_dir.")
    free = {"resume", "output_dir", "loop.log_every", "loop.validate_every", "loop.save_every"}
    free |= {"loop.keep_checkpoints", "data.workers"}
    before, now = flatten(yaml.safe_load((folder / "config.yaml").read_text())), flatten(as_dict(config))
    changed = [name for name in now if name not in free and before.get(name) != now[name]]
    if changed:
        told = ", ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in changed)
        raise ValueError(f"{folder} cannot be resumed with another configuration: {told}; set another output_dir.")


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested sections as dotted names."""
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and name not in ("text", "vision")
        flat |= flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def choose_precision(precision: str, device: str) -> str:
    """
    accelerate's name for it; "auto" is bf16 where the hardware of `device` multiplies it, else fp32.

    Raises:
        `ValueError`: for bf16 on a CPU that only emulates it, many times slower than fp32.
    """
    if device == "cuda":
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast_bf16 = device == "cpu" and torch.backends.mkldnn.is_available()
        fast_bf16 = fast_bf16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if device == "cpu" and precision == "bf16" and not fast_bf16:
            raise ValueError(
                "This CPU has no bf16 arithmetic and would emulate it, many times slower than fp32; set precision to auto."
            )
    if precision == "auto":
        precision = "bf16" if fast_bf16 else "fp32"
    return "no" if precision == "fp32" else precision


def on_cpu() -> bool:
    """
    Whether the processes are to meet on the CPU: where `accelerate launch` was told so (its state does not look by
    itself this early), and where there are several of them and no GPU.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())


def use_all_cores(accelerator: Accelerator) -> None:
    """`accelerate launch` gives a process one thread; without a GPU the processes share the cores instead."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and accelerator.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def caption_columns(config: TrainConfig) -> list[str]:
    """
    The caption columns that the loss weighs: with a weight of 0 or 1 the other text is not even read, nor is the short
    one where the long text's first sentence stands for it.
    """
    loss, columns = config.loss, []
    if loss.long_weight > 0:
        columns.append(config.data.long_column)
    if loss.long_weight < 1 and loss.short_text == "own":
        columns.append(config.data.short_column)
    return columns


def measure_captions(trainer: Trainer, rows: Dataset, columns: list[str]) -> dict[str, dict[str, float]]:
    """Token lengths of the first captions of each column, and the share from 0 to 1 that the table cuts."""
    positions, measured = trainer.processor.tokenizer.model_max_length, {}
    for name in columns:
        lengths = trainer.processor.count_tokens(
            [caption_list(stored)[0] for stored in rows[name][:MEASURED_CAPTIONS]]
        )
        cut = sum(length > positions for length in lengths) / len(lengths)
        measured[name] = {"measured": len(lengths), "mean_tokens": statistics.fmean(lengths), "share_truncated": cut}
    return measured


def introduce(trainer: Trainer, pairs: int, lengths: dict[str, dict[str, float]]) -> None:
    """Says what is trained on what, and how long the captions are against the table."""
    positions = trainer.processor.tokenizer.model_max_length
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    print(
        f"{parameters:.1f} M parameters, {positions} text positions; {pairs} pairs, {trainer.steps} steps of "
        f"{trainer.config.loop.batch_size} on {trainer.accelerator.num_processes} x {trainer.accelerator.device.type}, "
        f"{trainer.accelerator.mixed_precision.replace('no', 'fp32')}"
    )
    data = trainer.config.data
    if data.validation:
        validation, train = find_file(data.validation, data.validation_split), find_file(data.train, data.train_split)
        if validation == train and (train.is_file() or data.validation_split == data.train_split):
            print(f"note: validation is on the training pairs themselves ({train}), so its recall is not held out")
    for name, told in lengths.items():
        print(
            f"{name}: {told['mean_tokens']:.0f} tokens on average, {told['share_truncated']:.0%} longer than "
            f"{positions} and cut"
        )


def record_run(trainer: Trainer, pairs: int, lengths: dict[str, dict[str, float]], held_out: int | None) -> None:
    """Writes `run.json` into the run folder and beside the weights of `final` and `best`."""
    config, state, accelerator = trainer.config, trainer.state, trainer.accelerator
    measured = held_out and min(held_out, config.data.validation_pairs or held_out)
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    record = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "init": describe_source(config.model.init) if config.model.init != "scratch" else None,
        "init_run": read_record(config.model.init),
        "data": describe_source(config.data.train) | {"pairs": pairs, "captions": lengths},
        "validation": held_out and describe_source(config.data.validation) | {"pairs": measured},
        "best": held_out and {"step": state.best_step, "mR": state.best_recall},
        "steps": trainer.steps,
        "seconds": state.seconds,
        "processes": accelerator.num_processes,
        "device": device,
        "precision": accelerator.mixed_precision.replace("no", "fp32"),
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "config": as_dict(config),
    }
    folder = trainer.folder
    for name, step in (("best", state.best_step), ("final", state.step)):
        if name == "final" or held_out:
            weights = weights_hash(LRSCLIPModel.from_pretrained(folder / name, dtype=torch.float32))
            write_record(folder / name, record | {"weights": {"step": step, "sha256": weights}})
    write_record(folder, record | {"weights": {"step": step, "sha256": weights}})  # of the final model


class Validation:
    """Recall of held-out pairs, long and short texts each by themselves."""

    def __init__(self, config: TrainConfig, processor, rows: Dataset, precision: str):
        self.config, self.processor, self.precision = config, processor, precision
        self.rows = rows.select(range(min(len(rows), config.data.validation_pairs or len(rows))))
        self.columns = caption_columns(config)

    def __call__(self, model) -> dict[str, float]:
        dtype = torch.bfloat16 if self.precision == "bf16" else None
        images = (read_image(stored) for stored in self.rows[self.config.data.image_column])
        image_embeds = embed_images(model, self.processor, images, dtype=dtype)  # (M, P), once for both texts
        numbers = {}
        for column in self.columns:
            pairs = [(text, index) for index, stored in enumerate(self.rows[column]) for text in caption_list(stored)]
            texts, owners = zip(*pairs)
            recall = evaluate_retrieval(model, self.processor, image_embeds, list(texts), list(owners), dtype=dtype)
            kind = "long" if column == self.config.data.long_column else "short"
            numbers |= {f"{kind}_{name}": value for name, value in recall.items()}
        means = [value for name, value in numbers.items() if name.endswith("_mR")]
        return numbers | {"mR": statistics.fmean(means)}


if __name__ == "__main__":
    main()
