"""What is left behind of a step whose loss, gradient or weights are not finite."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from modeling_lrsclip.files.atomic import replace_json

from .checkpoint import newest_checkpoint


NOT_FINITE_BATCH = "nonfinite.json"  # below a run folder


class NotFiniteError(FloatingPointError):
    """All processes stop with it at the same step; the checkpoints are of finite weights."""


def not_finite(
    accelerator: Accelerator, run_folder: Path, what: str, told: dict[str, Any], ids: list[str]
) -> NotFiniteError:
    """
    Writes `nonfinite.json` and returns the error to raise; every process must call it.

    Args:
        what: the name in `told` of what is not finite.
        told: the `step` and numbers of it, as text in the file, since JSON has no nan.
        ids: of the samples in this process' share of the batch; the file holds those of all, in rank order.
    """
    told = {name: _as_text(value) for name, value in told.items() if value is not None}
    all_ids, checkpoint, path = gather_object(ids), newest_checkpoint(run_folder), run_folder / NOT_FINITE_BATCH
    if accelerator.is_main_process:
        run_folder.mkdir(parents=True, exist_ok=True)
        record = {"what": what} | told | {"checkpoint": checkpoint and str(checkpoint), "ids": all_ids}
        replace_json(path, record)
    where = f"The last good checkpoint is {checkpoint}" if checkpoint else "There is no checkpoint yet"
    return NotFiniteError(
        f"The {what.replace('_', ' ')} is {told[what]} at step {told['step']}; lower optim.learning_rate, set "
        f"optim.max_grad_norm, or set precision to fp32, in another output_dir. {where}; the ids of the batch are in "
        f"{path}: if one of its rows is at fault, mend it and go on with --resume."
    )


def _as_text(value: int | float | torch.Tensor) -> int | str:
    value = value.item() if isinstance(value, torch.Tensor) else value
    return str(value) if isinstance(value, float) else value
