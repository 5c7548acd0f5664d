"""The training loop: load, step, log, validate, save."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch.utils.data import DataLoader
from tqdm import tqdm

from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor

from .checkpoint import load_newest_state, save_model, save_state
from .data import CaptionedImages, Collator, VisitSampler
from .gather import gather, gather_with_gradient
from .large_batch import Embedder, cached_gradients, cut, plain_gradients
from .losses import DualTextLoss, dual_text_loss
from .model import compile_layers
from .texts import TextGroups, as_they_come, caption_numbers, group_by_length, group_cost, share_of_identical


if TYPE_CHECKING:
    from .config import TrainConfig

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5
TEXTS = {"input_ids": "long", "short_input_ids": "short"}  # of a batch


@dataclass(config=ConfigDict(extra="forbid"))
class LoopConfig:
    batch_size: int = Field(512, ge=2)  # pairs a step, of all processes together; 512 is the best of Fig. 7
    epochs: float = Field(1.0, gt=0)
    steps: int | None = Field(None, ge=1)  # optimizer steps, instead of epochs
    micro_batch_size: int | None = Field(None, ge=1)  # pairs a process holds at a time (cached gradients); None: all
    group_texts: bool = True  # by length, each group padded to its own longest; False: long, short, as they come
    compile: bool = False  # torch.compile of the towers' layers
    log_every: int = Field(10, ge=1)  # steps
    validate_every: int | None = Field(None, ge=1)  # steps; always after the last one
    save_every: int | None = Field(None, ge=1)  # steps; always after the last one
    keep_checkpoints: int = Field(2, ge=1)  # newest ones


@plain_dataclass
class TrainState:
    """What, beside weights, optimizer, schedule and random states, a resumed run must know."""

    step: int = 0  # optimizer steps done
    best_recall: float = -1.0  # mean of long and short mR, percent
    best_step: int = 0
    seconds: float = 0.0  # training time so far

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class Trainer:
    """
    Args:
        accelerator: its `prepare` has not seen `model` and `optimizer` yet.
        model, processor: in float32 and for its inputs.
        optimizer, scheduler: the scheduler is stepped once a step by hand, whatever the number of processes.
        data: rows to train on.
        config: the whole run's configuration (`training.config.TrainConfig`).
        validate: called on the main process with the bare model; returns recall in percent by name, `mR` among them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: LRSCLIPModel,
        processor: LRSCLIPProcessor,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        data: CaptionedImages,
        config: "TrainConfig",
        validate: Callable[[LRSCLIPModel], dict[str, float]] | None = None,
    ):
        self.accelerator, self.processor, self.data, self.config = accelerator, processor, data, config
        self.steps, self.scheduler, self.validate = count_steps(config.loop, len(data)), scheduler, validate
        if config.loop.group_texts and accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                "loop.group_texts lets every process cut its texts as it likes, and FSDP wants equally many forward "
                "passes of them; set it to false."
            )
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "DeepSpeed steps at every backward pass, which training.train does not allow for; launch with DDP."
            )
        if validate and accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                "Validation runs on one process, which FSDP cannot do; leave data.validation out and measure afterwards."
            )
        if config.loop.compile:
            compile_layers(model)
        self.model = model  # bare; `embedder` is its wrapper for several processes and mixed precision
        self.embedder, self.optimizer = accelerator.prepare(Embedder(model), optimizer)
        self.folder = Path(config.output_dir)
        self.state = TrainState()
        self.report = RunLog(accelerator, self.folder, self.steps)
        accelerator.register_for_checkpointing(self.state, scheduler)
        self.batches()  # says what is wrong with the batch size before the run folder is made

    def train(self) -> TrainState:
        """Trains from wherever the state stands to the last step; returns the state."""
        loop, state = self.config.loop, self.state
        if self.config.resume:
            found = load_newest_state(self.accelerator, self.folder)
            self.report.say(
                f"resumed after step {state.step} of {self.steps}"
                if found
                else f"starting at step 0: no checkpoint to resume in {self.folder}"
            )
        self.report.rewind(state.step)
        self.embedder.train()
        with self.report.progress(state.step):
            start = time.perf_counter() - state.seconds
            for batch in self.batches():
                losses, numbers = self.step(batch)
                state.step += 1
                state.seconds = time.perf_counter() - start
                last = state.step == self.steps
                self.report.losses(state, losses, numbers, write=last or state.step % loop.log_every == 0)
                if self.validate and (last or (loop.validate_every and state.step % loop.validate_every == 0)):
                    self.validate_and_keep_best()
                if last or (loop.save_every and state.step % loop.save_every == 0):
                    save_state(self.accelerator, self.folder, state.step, loop.keep_checkpoints)
                start = time.perf_counter() - state.seconds  # validating and saving is not training time
        save_model(self.accelerator, self.model, self.processor, self.folder / "final")
        return state

    def batches(self) -> DataLoader:
        sampler = VisitSampler(
            rows=len(self.data),
            batch_size=self.config.loop.batch_size,
            steps=self.steps,
            seed=self.config.seed,
            start=self.state.step,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        # Not prepared: the sampler already gives each process its share, and resumes by itself.
        return DataLoader(
            self.data,
            batch_sampler=sampler,
            collate_fn=Collator(self.processor),
            num_workers=self.config.data.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def step(self, batch: dict[str, torch.Tensor]) -> tuple[DualTextLoss, dict[str, Any]]:
        """One optimizer step on this process' share of the global batch, (b = B / W) pairs."""
        accelerator, micro_batch_size = self.accelerator, self.config.loop.micro_batch_size
        pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)  # (b, 3, H, W)
        matrices = {TEXTS[name]: batch[name] for name in TEXTS if name in batch}
        texts = self._group(list(matrices.values()))
        captions = self._captions(matrices)
        loss_of = partial(self._loss, order=texts.order, captions=captions)
        if micro_batch_size is None or micro_batch_size >= len(pixel_values):
            losses = plain_gradients(accelerator, self.embedder, (pixel_values, texts.groups), loss_of)
        else:
            pieces = cut(pixel_values, texts.groups, micro_batch_size)
            losses = cached_gradients(accelerator, self.embedder, pieces, loss_of, self.model.logit_scale)
        numbers = {"learning_rate": self.scheduler.get_last_lr()[0]}
        numbers |= {f"identical_{kind}": share_of_identical(number) for kind, number in captions.items()}
        if self.config.optim.max_grad_norm is not None:
            norm = accelerator.clip_grad_norm_(self.embedder.parameters(), self.config.optim.max_grad_norm)
            numbers["gradient_norm"] = norm
            if accelerator.scaler is None and not norm.isfinite():  # fp16's loss scaling skips such steps by itself
                raise self._not_finite("gradient norm", norm)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:  # by fp16's loss scaling
            self.scheduler.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return losses, numbers | {"logit_scale": self.model.logit_scale.detach().exp()}

    def _group(self, matrices: list[torch.Tensor]) -> TextGroups:
        """The texts as the text tower will read them, on its device."""
        loop, device, text_config = self.config.loop, self.accelerator.device, self.model.config.text_config
        end_of_text = text_config.eos_token_id
        if loop.micro_batch_size is not None and loop.micro_batch_size < len(matrices[0]):
            texts = group_by_length(matrices, end_of_text, rows=loop.micro_batch_size)
        elif loop.group_texts:
            cost = group_cost(device, text_config.hidden_size)
            texts = group_by_length(matrices, end_of_text, cost=cost)
        else:
            texts = as_they_come(matrices)
        groups = [group.to(device, non_blocking=True) for group in texts.groups]
        return TextGroups(groups, texts.order.to(device, non_blocking=True))

    def _captions(self, matrices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """For each kind of text, the numbers (B,) of the global batch's captions: equal ones are identical."""
        end_of_text, device = self.model.config.text_config.eos_token_id, self.accelerator.device
        return {kind: gather(caption_numbers(ids, end_of_text).to(device)) for kind, ids in matrices.items()}

    def _loss(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        order: torch.Tensor,
        captions: dict[str, torch.Tensor],
    ) -> DualTextLoss:
        """The loss of the global batch from this process' images (b, P) and grouped texts (n, P)."""
        texts = text_embeds[order].split(len(image_embeds))  # (b, P) of each kind
        texts = {kind: gather_with_gradient(embeds) for kind, embeds in zip(captions, texts, strict=True)}  # (B, P)
        losses = dual_text_loss(
            gather_with_gradient(image_embeds),
            texts.get("long"),
            texts.get("short"),
            self.model.logit_scale.exp(),
            self.config.loss,
            captions.get("long"),
            captions.get("short"),
        )
        if not losses.loss.isfinite():  # the same number on every process, so all stop here together
            raise self._not_finite("loss", losses.loss)
        return losses

    def _not_finite(self, what: str, value: torch.Tensor) -> FloatingPointError:
        return FloatingPointError(
            f"The {what} is {value.item()} at step {self.state.step + 1}; lower optim.learning_rate, set "
            f"optim.max_grad_norm, or set precision to fp32. Checkpoints so far, if any, are in {self.folder}."
        )

    def validate_and_keep_best(self) -> None:
        state, accelerator = self.state, self.accelerator
        recall = torch.zeros(1, dtype=torch.float64, device=accelerator.device)
        if accelerator.is_main_process:
            numbers = self.validate(self.model)
            recall += numbers["mR"]
            self.report.validation(state, numbers)
        recall = accelerator.reduce(recall, "sum").item()  # every process must take the same branch
        if recall > state.best_recall:
            state.best_recall, state.best_step = recall, state.step
            save_model(accelerator, self.model, self.processor, self.folder / "best")


def count_steps(loop: LoopConfig, rows: int) -> int:
    """Optimizer steps of a run; what does not fill a batch at the end of an epoch is left out."""
    return loop.steps or max(1, round(loop.epochs * (rows // loop.batch_size)))


class RunLog:
    """The progress bar on the main process, `log.jsonl` and the trackers of accelerate (TensorBoard)."""

    def __init__(self, accelerator: Accelerator, folder: Path, steps: int):
        self.accelerator, self.path, self.steps, self.bar = accelerator, folder / "log.jsonl", steps, None

    def progress(self, done: int) -> tqdm:
        self.bar = tqdm(
            total=self.steps,
            initial=done,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            disable=not self.accelerator.is_main_process,
            mininterval=0.5,
        )
        return self.bar

    def rewind(self, step: int) -> None:
        """Takes out of `log.jsonl` what a killed run wrote after the checkpoint it is resumed from."""
        if self.accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            self.path.write_text(
                "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
            )

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def losses(self, state: TrainState, losses: DualTextLoss, numbers: dict[str, Any], write: bool) -> None:
        self.bar.update()
        if not write:  # numbers are read off the device only when somebody will see them
            return
        parts = {name: value.item() for name, value in losses._asdict().items() if value is not None}
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in parts.items()}, refresh=False)
        numbers = {name: float(value) for name, value in numbers.items()}
        self._write("train", state, parts | numbers | {"seconds": state.seconds})

    def validation(self, state: TrainState, numbers: dict[str, float]) -> None:
        shown = ", ".join(f"{name} {value:.1f}" for name, value in numbers.items() if "mR" in name or "R@1" in name)
        self.say(f"step {state.step}: validation {shown}")
        self._write("validation", state, numbers)

    def _write(self, kind: str, state: TrainState, numbers: dict[str, float]) -> None:
        self.accelerator.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=state.step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as log:
                log.write(json.dumps({"kind": kind, "step": state.step} | numbers) + "\n")
