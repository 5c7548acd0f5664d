"""
The training loop: load, step, log, validate, save.

Shapes: B pairs of a step's global batch, W processes, b = B / W pairs of this one, n its texts (long and short ones
together), L tokens, P projection width.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from modeling_lrsclip import LRSCLIPModel, LRSCLIPProcessor
from modeling_lrsclip.files.atomic import replace_json

from .checkpoint import TrainState, load_newest_state, newest_checkpoint, save_model, save_state, whole_model
from .config import TrainConfig
from .data.batches import load_batches
from .data.fingerprints import changes, fingerprints, refuse_changes
from .data.pairs import INPUT_IDS, CaptionedImages
from .data.skipped import SkippedRows
from .data.visiting_order import VisitSampler
from .distributed import average_gradient, gather, gather_with_gradient, is_sharded, smallest_count, wait_for_all
from .large_batch import cached_gradients, cut
from .losses import DualTextLoss, dual_text_loss
from .model import TRAIN_TOKENIZER, Embedder, autocast_dtype, clamp_logit_scale, compile_layers, prepare
from .optim import build_optimizer, build_scheduler, follow_schedule
from .run_log import RunLog
from .signals import Interrupted, Interruption
from .text_groups import (
    TextGroups,
    as_they_come,
    group_by_length,
    group_cost,
    share_of_identical,
    text_hashes,
    token_lengths,
)


NOT_FINITE_BATCH = "nonfinite.json"  # below a run folder
MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


@dataclass(eq=False)
class Trainer:
    """A run from its first step, or from a checkpoint, to its final model."""

    accelerator: Accelerator  # its `prepare` has not seen `model` yet
    model: LRSCLIPModel  # in float32; bare, `embedder` is its wrapper for several processes and mixed precision
    processor: LRSCLIPProcessor  # for its inputs
    images: CaptionedImages  # the rows to train on
    config: TrainConfig  # of the whole run
    # Called on the main process with the bare model; returns recall in percent by name, `mR` among them.
    validate: Callable[[LRSCLIPModel], dict[str, float]] | None = None
    keep_best: Callable[[TrainState], None] | None = None  # called on the main process when the folder `best` is new

    def __post_init__(self):
        accelerator, model, images, config = self.accelerator, self.model, self.images, self.config
        wait_for_all("the first one looked into the data")
        self.folder, self.state = Path(config.output_dir), TrainState()
        self.steps = config.loop.count_steps(len(images))
        optimizer = build_optimizer(model, config.optim)
        self.scheduler = build_scheduler(optimizer, config.optim, self.steps)  # stepped by hand, whatever W
        if config.loop.compile:
            compile_layers(model)
        embedder = Embedder(model, autocast_dtype(accelerator))
        self.embedder, self.optimizer = prepare(accelerator, embedder, optimizer, config.optim.max_grad_norm)
        self.report = RunLog(accelerator, self.folder, self.steps, config.loop.batch_size, log_ids=config.loop.log_ids)
        self.interruption = Interruption()
        self.skipped = SkippedRows(self.folder, config.data.max_skipped_fraction, accelerator.is_main_process)
        self.data = fingerprints(images.pairs, config.data.paths()) if accelerator.is_main_process else []
        self.changed_data: list[str] = []  # in words, where a resumed run was allowed to have others than before

    def train(self) -> TrainState:
        """
        Train from wherever the state stands to the last step.

        Returns:
            the state after it.

        Raises:
            [`Interrupted`]: on a signal, when the step it fell into is done and saved.
            [`NotFiniteError`], [`NotSavedError`]: on all processes together, the checkpoints so far being whole.
        """
        loop, state = self.config.loop, self.state
        self.embedder.train()
        wait_for_all("the first one described the run")
        with self.interruption, self.report.running(state):
            self.validate_if_due()  # where the run was killed between saving and validating
            start = time.perf_counter() - state.seconds
            for batch in () if self.out_of_patience() else self.batches():
                state.skipped = self.skipped.take(batch, state.skipped, (state.step + 1) * loop.batch_size)
                losses, numbers = self.step(batch)
                state.step += 1
                state.seconds = time.perf_counter() - start
                last, stop = state.step == self.steps, self.interruption.agreed
                self.report.losses(state, losses, numbers, write=last or state.step % loop.log_every == 0)
                if last or stop or (loop.save_every and state.step % loop.save_every == 0):
                    self.save(batch)
                if stop and not last:
                    raise Interrupted(
                        f"{signal.Signals(stop).name} ended the run after step {state.step} of {self.steps}, saved in "
                        f"{newest_checkpoint(self.folder)}; go on with --resume.",
                        stop,
                    )
                self.validate_if_due()  # after saving: where both are due, a run killed while it validates loses nothing
                if self.out_of_patience():
                    self.save(batch)
                    break
                start = time.perf_counter() - state.seconds  # validating and saving is not training time
            save_model(self.accelerator, self.model, self.processor, self.folder / "final")
            self.report.draw()
        return state

    def resume(self) -> None:
        """
        Go on from the newest checkpoint that is whole, if there is any.

        Raises:
            `ValueError`: for a checkpoint that cannot be read, or was trained on other data where they may not change.
        """
        states = load_newest_state(self.accelerator, self.folder, self.report.say)
        if states is not None:
            (self.changed_data,) = broadcast_object_list([self.data and changes(states["data"], self.data)])
            if not self.config.allow_changed_data:
                refuse_changes(self.folder, self.changed_data)
            self.state.load_state_dict(states["progress"])
            self.scheduler.load_state_dict(states["schedule"])
            self.report.say(f"resumed after step {self.state.step} of {self.steps}")
            planned = states.get("steps", self.steps)
            if self.steps > planned:
                follow_schedule(self.scheduler)
                self.report.say(
                    f"note: the run was to have {planned} steps and goes on as one of {self.steps} from here on: learning "
                    f"rate (schedule {self.config.optim.schedule}) and a curriculum of the loss follow the longer run"
                )
        else:
            self.report.say(f"starting at step 0: no checkpoint to resume in {self.folder}")

    def save(self, batch: dict[str, Any]) -> None:
        """Save a checkpoint, unless the last update, on `batch`, left weights that are not finite."""
        parameters = [getattr(parameter, "_local_tensor", parameter) for parameter in self.model.parameters()]
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).all()
        if self.interruption.agree(trouble=not finite):
            largest = torch.stack([parameter.detach().abs().max() for parameter in parameters]).max()
            numbers = {"step": self.state.step, "largest_weight": largest}
            raise not_finite(self.accelerator, self.folder, "largest_weight", numbers, batch.get("ids", []))
        progress, schedule = self.state.state_dict(), self.scheduler.state_dict()
        states = {"progress": progress, "schedule": schedule, "data": self.data, "steps": self.steps}
        tokenizer = self.processor.tokenizer if self.config.model.tokenizer == TRAIN_TOKENIZER else None
        keep = self.config.loop.keep_checkpoints
        save_state(self.accelerator, self.folder, states, self.state.step, keep, tokenizer)

    def batches(self) -> Iterator[dict[str, Any]]:
        """The batches still to come, this process' share of each."""
        order = self.images.pairs.order(self.config.seed)
        share = self.accelerator.process_index, self.accelerator.num_processes
        visits = VisitSampler(order, self.config.loop.batch_size, self.steps, self.state.step, share)
        return load_batches(self.images, self.processor, visits, self.accelerator.device)

    def step(self, batch: dict[str, torch.Tensor]) -> tuple[DualTextLoss, dict[str, Any]]:
        """
        Take one optimizer step.

        Args:
            batch: this process' share of the global batch, as [`Collator`] makes it.

        Returns:
            the losses of the global batch, and what else there is to log.

        Raises:
            [`NotFiniteError`]: on all processes, before a number that is not finite reaches the weights.
        """
        accelerator, micro_batch_size = self.accelerator, self.config.loop.micro_batch_size
        device, end_of_text = accelerator.device, self.model.config.text_config.eos_token_id
        self.report.batch(self.state.step + 1, batch.get("ids", []))
        pixel_values = batch["pixel_values"].to(device, non_blocking=True)  # (b, 3, H, W)
        input_ids = {kind: batch[name] for kind, name in INPUT_IDS.items() if name in batch}  # (b, L) each
        texts = self._group(list(input_ids.values()))
        hashes = {kind: gather(text_hashes(ids, end_of_text).to(device)) for kind, ids in input_ids.items()}  # (B,)
        self.report.counts["tokens"] += sum(int(token_lengths(ids, end_of_text).sum()) for ids in input_ids.values())
        self.report.counts["tokens_with_padding"] += sum(group.numel() for group in texts.groups)
        # Of the step alone: a resumed run has the same.
        loss_config = self.config.loss.at(self.state.step / self.steps)

        def loss_of(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> DualTextLoss:
            """The loss of the global batch from this process' images (b, P) and grouped texts (n, P)."""
            parts = text_embeds[texts.order].split(len(image_embeds))  # (b, P) of each kind
            embeds = {kind: gather_with_gradient(part) for kind, part in zip(hashes, parts, strict=True)}  # (B, P)
            long_and_short = [embeds.get(kind) for kind in INPUT_IDS]
            both_hashes = [hashes.get(kind) for kind in INPUT_IDS]
            images, scale = gather_with_gradient(image_embeds), self.model.logit_scale.exp()
            return dual_text_loss(images, *long_and_short, scale, loss_config, *both_hashes)

        if micro_batch_size is None or micro_batch_size >= len(pixel_values):
            losses = loss_of(*self.embedder(pixel_values, texts.groups))
            accelerator.backward(losses.loss)
        else:
            pieces = cut(pixel_values, texts.groups, micro_batch_size)
            losses = cached_gradients(accelerator, self.embedder, pieces, loss_of, self.model.logit_scale)
        if is_sharded(accelerator):  # every process has all of this gradient; the mean keeps copies from drifting
            average_gradient(self.model.logit_scale)
        numbers = {"learning_rate": self.scheduler.get_last_lr()[0]}
        if loss_config is not self.config.loss:
            numbers["long_weight"] = loss_config.long_weight
        numbers |= {f"identical_{kind}": share_of_identical(of_kind) for kind, of_kind in hashes.items()}
        limit = self.config.optim.max_grad_norm
        norm = accelerator.clip_grad_norm_(self.embedder.parameters(), math.inf if limit is None else limit)
        numbers["gradient_norm"] = torch.as_tensor(norm)  # a scalar; DeepSpeed has clipped by now, and says a number
        self._stop_if_not_finite(losses, numbers, batch)  # before it reaches the weights
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:  # by fp16's loss scaling
            self.scheduler.step()
        self.optimizer.zero_grad()
        clamp_logit_scale(accelerator, self.model, MAX_LOGIT_SCALE)
        return losses, numbers | {"logit_scale": self.model.logit_scale.detach().exp()}

    def _group(self, input_ids: list[torch.Tensor]) -> TextGroups:
        """The texts as the text tower will read them, on its device."""
        loop, device, text_config = self.config.loop, self.accelerator.device, self.model.config.text_config
        end_of_text = text_config.eos_token_id
        if loop.micro_batch_size is not None and loop.micro_batch_size < len(input_ids[0]):
            texts = group_by_length(input_ids, end_of_text, rows=loop.micro_batch_size)
        elif loop.group_texts:
            cost = group_cost(device, text_config.hidden_size)
            texts = group_by_length(input_ids, end_of_text, cost=cost)
            if is_sharded(self.accelerator):  # each forward pass is made of all processes' weights: all need as many
                most = smallest_count(len(texts.groups), device)
                texts = group_by_length(input_ids, end_of_text, cost=cost, most=most)
        else:
            texts = as_they_come(input_ids)
        groups = [group.to(device, non_blocking=True) for group in texts.groups]
        return TextGroups(groups, texts.order.to(device, non_blocking=True))

    def _stop_if_not_finite(self, losses: DualTextLoss, numbers: dict[str, Any], batch: dict[str, Any]) -> None:
        """Stop all processes together; also where they agree on the step that a signal ends the run after."""
        finite = losses.loss.isfinite()
        if self.accelerator.scaler is None:  # fp16's loss scaling skips steps of infinite gradients by itself
            finite = finite & numbers["gradient_norm"].isfinite()
        if self.interruption.agree(trouble=not finite):
            numbers = {"step": self.state.step + 1} | losses._asdict() | numbers
            numbers["logit_scale"] = self.model.logit_scale.detach().exp()
            name = "gradient_norm" if losses.loss.isfinite() else "loss"
            raise not_finite(self.accelerator, self.folder, name, numbers, batch.get("ids", []))

    def out_of_patience(self) -> bool:
        """Whether the run is to stop early."""
        patience = self.config.loop.patience
        return patience is not None and self.state.step < self.steps and self.state.not_better >= patience

    def validate_if_due(self) -> None:
        """Validate where that is due, once at a step: the state knows whether it has happened."""
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
        """Measure recall on the main process, and save the folder `best` where it is higher than ever before."""
        state, accelerator = self.state, self.accelerator
        recall = torch.zeros(1, dtype=torch.float64, device=accelerator.device)
        model = whole_model(accelerator, self.model)
        if model is not None:
            numbers = self.validate(model)
            recall += numbers["mR"]
            self.report.validation(state, numbers)
        wait_for_all(f"the first one validated after step {state.step}")
        recall = accelerator.reduce(recall, "sum").item()  # every process must take the same branch
        state.validated, better = state.step, recall > state.best_recall
        state.not_better = 0 if better else state.not_better + 1
        if better:
            state.best_recall, state.best_step = recall, state.step
            save_model(accelerator, self.model, self.processor, self.folder / "best")
            if self.keep_best is not None and accelerator.is_main_process:
                self.keep_best(state)
            wait_for_all(f"the first one published the model of step {state.step}")


class NotFiniteError(FloatingPointError):
    """All processes stop with it at the same step; the checkpoints are of finite weights."""


def not_finite(
    accelerator: Accelerator, run_folder: Path, name: str, numbers: dict[str, Any], ids: list[str]
) -> NotFiniteError:
    """
    Write down a step whose loss, gradient or weights are not finite, in `nonfinite.json`; every process must call it.

    Args:
        accelerator: of all processes.
        run_folder: that the file is written into.
        name: of the number in `numbers` that is not finite.
        numbers: the `step` and its numbers, as text in the file, since JSON has no nan.
        ids: of the samples in this process' share of the batch; the file holds those of all, in rank order.

    Returns:
        the error to raise.
    """
    values = {name: value.item() if torch.is_tensor(value) else value for name, value in numbers.items()}
    values = {name: value for name, value in values.items() if value is not None}
    numbers = {name: str(value) if isinstance(value, float) else value for name, value in values.items()}
    all_ids, checkpoint, path = gather_object(ids), newest_checkpoint(run_folder), run_folder / NOT_FINITE_BATCH
    if accelerator.is_main_process:
        run_folder.mkdir(parents=True, exist_ok=True)
        replace_json(path, {"what": name} | numbers | {"checkpoint": checkpoint and str(checkpoint), "ids": all_ids})
    where = f"The last good checkpoint is {checkpoint}" if checkpoint else "There is no checkpoint yet"
    return NotFiniteError(
        f"The {name.replace('_', ' ')} is {numbers[name]} at step {numbers['step']}; lower optim.learning_rate, set "
        f"optim.max_grad_norm, or set precision to fp32, in another output_dir. {where}; the ids of the batch are in "
        f"{path}: if one of its rows is at fault, mend it and go on with --resume."
    )
