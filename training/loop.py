"""The training loop: load, step, log, validate, save."""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from torch.utils.data import DataLoader

from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor

from .checkpoint import load_newest_state, newest_checkpoint, save_model, save_state
from .data.pairs import CaptionedImages, Collator, count_workers
from .data.skipped import SkippedRows
from .data.visiting_order import VisitSampler
from .gather import average_gradient, fewest, gather, gather_with_gradient
from .large_batch import cached_gradients, cut, plain_gradients
from .losses import DualTextLoss, dual_text_loss
from .model import compile_layers
from .nonfinite import not_finite
from .run_log import TRACKERS, RunLog
from .sharding import clamp_logit_scale, is_sharded, prepare, whole_model
from .signals import Interrupted, Interruption, leave_signals_to_the_parent
from .text_groups import (
    TextGroups,
    as_they_come,
    caption_numbers,
    group_by_length,
    group_cost,
    share_of_identical,
    token_lengths,
)


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
    log_ids: bool = False  # every batch's sample ids into log.jsonl
    # "none" is none of them.
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(default_factory=lambda: ["tensorboard"])
    validate_every: int | None = Field(None, ge=1)  # steps; always after the last one
    patience: int | None = Field(None, ge=1)  # stop early after so many validations without a better mR
    save_every: int | None = Field(None, ge=1)  # steps; always after the last one
    keep_checkpoints: int = Field(2, ge=1)  # newest ones

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_none(cls, given):
        if given in (None, "none"):
            return []
        return [given] if isinstance(given, str) else given

    @field_validator("trackers")
    @classmethod
    def _trackers_are_installed(cls, given):
        missing = [name for name in given if not TRACKERS[name]()]
        if missing:
            raise ValueError(
                f"loop.trackers names {', '.join(missing)}, which is not installed; pip install it, or set it to none"
            )
        return given

    @model_validator(mode="after")
    def _patience_needs_validations(self):
        if self.patience and not self.validate_every:
            raise ValueError("loop.patience counts validations; set loop.validate_every too")
        return self


@plain_dataclass
class TrainState:
    """What, beside weights, optimizer, schedule and random states, a resumed run must know."""

    step: int = 0  # optimizer steps done
    best_recall: float = -1.0  # mean of long and short mR, percent
    best_step: int = 0
    validated: int = 0  # step of the last validation
    not_better: int = 0  # validations since the best one
    skipped: int = 0  # visits so far of rows that could not be used
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
        if config.loop.compile:
            compile_layers(model)
        self.model = model  # bare; `embedder` is its wrapper for several processes and mixed precision
        self.embedder, self.optimizer = prepare(accelerator, model, optimizer, config.optim.max_grad_norm)
        self.folder = Path(config.output_dir)
        self.state = TrainState()
        self.kept_best: Callable[[], None] | None = None  # called when `best` is new, on the main process only
        self.report = RunLog(accelerator, self.folder, self.steps, config.loop.batch_size, log_ids=config.loop.log_ids)
        self.interruption = Interruption()
        self.skipped = SkippedRows(self.folder, config.data.max_skipped_fraction, accelerator.is_main_process)
        accelerator.register_for_checkpointing(self.state, scheduler)

    def train(self) -> TrainState:
        """
        Trains from wherever the state stands to the last step; returns the state.

        Raises:
            [`Interrupted`]: on a signal, when the step it fell into is done and saved.
            [`NotFiniteError`], [`NotSavedError`]: on all processes together, the checkpoints so far being whole.
        """
        loop, state = self.config.loop, self.state
        self.embedder.train()
        with self.interruption, self.report.running(state):
            self.validate_if_due()  # where the run was killed between saving and validating
            start = time.perf_counter() - state.seconds
            for batch in () if self.out_of_patience() else self.batches():
                used = (state.step + 1) * loop.batch_size
                state.skipped = self.skipped.take(batch, state.skipped, used)
                losses, numbers = self.step(batch)
                state.step += 1
                state.seconds = time.perf_counter() - start
                last, stop = state.step == self.steps, self.interruption.agreed
                self.report.losses(state, losses, numbers, write=last or state.step % loop.log_every == 0)
                if last or stop or (loop.save_every and state.step % loop.save_every == 0):
                    self.save(batch)
                if stop and not last:
                    raise self._interrupted(stop)
                self.validate_if_due()  # after saving: where both are due, a run killed while it validates loses nothing
                if self.out_of_patience():
                    self.save(batch)
                    break
                start = time.perf_counter() - state.seconds  # validating and saving is not training time
            save_model(self.accelerator, self.model, self.processor, self.folder / "final")
            self.report.draw()
        return state

    def resume_if_asked(self) -> None:
        """Goes on from the newest checkpoint that is whole, if there is any."""
        if not self.config.resume:
            return
        found = load_newest_state(self.accelerator, self.folder, self.report.say)
        self.report.say(
            f"resumed after step {self.state.step} of {self.steps}"
            if found
            else f"starting at step 0: no checkpoint to resume in {self.folder}"
        )

    def save(self, batch: dict[str, Any]) -> None:
        """A checkpoint, unless the last update, on `batch`, left weights that are not finite."""
        parameters = [getattr(parameter, "_local_tensor", parameter) for parameter in self.model.parameters()]
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).all()
        if self.interruption.agree(trouble=not finite):
            told = {
                "step": self.state.step,
                "largest_weight": torch.stack([parameter.detach().abs().max() for parameter in parameters]).max(),
            }
            raise not_finite(self.accelerator, self.folder, "largest_weight", told, batch.get("ids", []))
        save_state(self.accelerator, self.folder, self.state.step, self.config.loop.keep_checkpoints)

    def _interrupted(self, signal_number: int) -> Interrupted:
        name = signal.Signals(signal_number).name
        step, checkpoint = self.state.step, newest_checkpoint(self.folder)
        return Interrupted(
            f"{name} ended the run after step {step} of {self.steps}, saved in {checkpoint}; go on with --resume.",
            signal_number,
        )

    def batches(self) -> DataLoader:
        data = self.config.data
        sampler = VisitSampler(
            self.data.pairs.order(self.config.seed),
            self.config.loop.batch_size,
            self.steps,
            start=self.state.step,
            share=(self.accelerator.process_index, self.accelerator.num_processes),
        )
        workers = count_workers(data, self.accelerator.device.type)
        # Not prepared: the sampler already gives each process its share, and resumes by itself.
        return DataLoader(
            self.data,
            batch_sampler=sampler,
            collate_fn=Collator(self.processor),
            num_workers=workers,
            prefetch_factor=data.prefetch_factor if workers else None,
            worker_init_fn=leave_signals_to_the_parent,
            # Its own: it draws a seed, which the random numbers of a resumed run must not notice.
            generator=torch.Generator(),
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def step(self, batch: dict[str, torch.Tensor]) -> tuple[DualTextLoss, dict[str, Any]]:
        """One optimizer step on this process' share of the global batch, (b = B / W) pairs."""
        accelerator, micro_batch_size = self.accelerator, self.config.loop.micro_batch_size
        self.report.batch(self.state.step + 1, batch.get("ids", []))
        pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)  # (b, 3, H, W)
        matrices = {TEXTS[name]: batch[name] for name in TEXTS if name in batch}
        texts = self._group(list(matrices.values()))
        captions = self._captions(matrices)
        self.report.count("tokens", sum(int(token_lengths(ids, self._end_of_text).sum()) for ids in matrices.values()))
        self.report.count("tokens_with_padding", sum(group.numel() for group in texts.groups))
        loss_of = partial(self._loss, order=texts.order, captions=captions)
        if micro_batch_size is None or micro_batch_size >= len(pixel_values):
            losses = plain_gradients(accelerator, self.embedder, (pixel_values, texts.groups), loss_of)
        else:
            pieces = cut(pixel_values, texts.groups, micro_batch_size)
            losses = cached_gradients(accelerator, self.embedder, pieces, loss_of, self.model.logit_scale)
        if is_sharded(accelerator):  # every process has all of this gradient; the mean keeps copies from drifting
            average_gradient(self.model.logit_scale)
        numbers = {"learning_rate": self.scheduler.get_last_lr()[0]}
        numbers |= {f"identical_{kind}": share_of_identical(number) for kind, number in captions.items()}
        numbers["gradient_norm"] = self._clip_gradient()
        self._stop_if_not_finite(losses, numbers, batch)  # before it reaches the weights
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:  # by fp16's loss scaling
            self.scheduler.step()
        self.optimizer.zero_grad()
        clamp_logit_scale(accelerator, self.model, MAX_LOGIT_SCALE)
        return losses, numbers | {"logit_scale": self.model.logit_scale.detach().exp()}

    def _group(self, matrices: list[torch.Tensor]) -> TextGroups:
        """The texts as the text tower will read them, on its device."""
        loop, device, end_of_text = self.config.loop, self.accelerator.device, self._end_of_text
        if loop.micro_batch_size is not None and loop.micro_batch_size < len(matrices[0]):
            texts = group_by_length(matrices, end_of_text, rows=loop.micro_batch_size)
        elif loop.group_texts:
            cost = group_cost(device, self.model.config.text_config.hidden_size)
            texts = group_by_length(matrices, end_of_text, cost=cost)
            if is_sharded(self.accelerator):  # each forward pass is made of all processes' weights: all need as many
                most = fewest(len(texts.groups), device)
                texts = group_by_length(matrices, end_of_text, cost=cost, most=most)
        else:
            texts = as_they_come(matrices)
        groups = [group.to(device, non_blocking=True) for group in texts.groups]
        return TextGroups(groups, texts.order.to(device, non_blocking=True))

    def _captions(self, matrices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """For each kind of text, the numbers (B,) of the global batch's captions: equal ones are identical."""
        device = self.accelerator.device
        return {kind: gather(caption_numbers(ids, self._end_of_text).to(device)) for kind, ids in matrices.items()}

    @property
    def _end_of_text(self) -> int:
        return self.model.config.text_config.eos_token_id

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
        return dual_text_loss(
            gather_with_gradient(image_embeds),
            texts.get("long"),
            texts.get("short"),
            self.model.logit_scale.exp(),
            self.config.loss,
            captions.get("long"),
            captions.get("short"),
        )

    def _clip_gradient(self) -> torch.Tensor:
        """The norm of the gradient before it is clipped, if it is to be clipped at all."""
        limit = self.config.optim.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.embedder.parameters(), math.inf if limit is None else limit)
        return torch.as_tensor(norm)  # DeepSpeed has clipped by now, and says a number

    def _stop_if_not_finite(self, losses: DualTextLoss, numbers: dict[str, Any], batch: dict[str, Any]) -> None:
        """All processes together; also where they agree on the step that a signal ends the run after."""
        finite = losses.loss.isfinite()
        if self.accelerator.scaler is None:  # fp16's loss scaling skips steps of infinite gradients by itself
            finite = finite & numbers["gradient_norm"].isfinite()
        if self.interruption.agree(trouble=not finite):
            told = {"step": self.state.step + 1} | losses._asdict() | numbers
            told["logit_scale"] = self.model.logit_scale.detach().exp()
            what = "gradient_norm" if losses.loss.isfinite() else "loss"
            raise not_finite(self.accelerator, self.folder, what, told, batch.get("ids", []))

    def out_of_patience(self) -> bool:
        patience = self.config.loop.patience
        return patience is not None and self.state.step < self.steps and self.state.not_better >= patience

    def validate_if_due(self) -> None:
        """Once at a step: the state knows whether that has happened."""
        step, every = self.state.step, self.config.loop.validate_every
        due = step == self.steps or (every and step and step % every == 0)
        if self.validate and due and self.state.validated < step:
            self.validate_and_keep_best()
            if self.out_of_patience():
                self.report.say(
                    f"stopping early at step {step}: no better mR than {self.state.best_recall:.1f} of step "
                    f"{self.state.best_step} in {self.state.not_better} validations"
                )

    def validate_and_keep_best(self) -> None:
        state, accelerator = self.state, self.accelerator
        recall = torch.zeros(1, dtype=torch.float64, device=accelerator.device)
        model = whole_model(accelerator, self.model)
        if model is not None:
            numbers = self.validate(model)
            recall += numbers["mR"]
            self.report.validation(state, numbers)
        recall = accelerator.reduce(recall, "sum").item()  # every process must take the same branch
        state.validated, better = state.step, recall > state.best_recall
        state.not_better = 0 if better else state.not_better + 1
        if better:
            state.best_recall, state.best_step = recall, state.step
            save_model(accelerator, self.model, self.processor, self.folder / "best")
            if self.kept_best is not None:
                self.kept_best()


def count_steps(loop: LoopConfig, rows: int) -> int:
    """Optimizer steps of a run; what does not fill a batch at the end of an epoch is left out."""
    return loop.steps or max(1, round(loop.epochs * (rows // loop.batch_size)))
