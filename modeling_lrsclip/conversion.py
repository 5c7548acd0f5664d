# SPDX-License-Identifier: Apache-2.0
"""Any published CLIP checkpoint as a folder for `from_pretrained`: what `modeling_lrsclip.convert` does."""

import argparse
import functools
import json
import logging
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version
from transformers.utils import logging as transformers_logging

from . import auto_classes  # noqa: F401  # so that the Auto classes know it
from .commands import DEFAULT_TOKENIZER, say_once_that_the_hub_is_away
from .configuration_lrsclip import LRSCLIPConfig
from .files.atomic import growing_folder, make_folder, publish_folder
from .files.hashing import file_sha256
from .image_processing_lrsclip import LRSCLIPImageProcessor
from .modeling_lrsclip import LRSCLIPModel
from .position_stretching import stretch_position_embedding
from .processing_lrsclip import LRSCLIPProcessor
from .published import registry
from .published.checkpoints import read_pretrained, read_published_checkpoint
from .published.folders import WRITERS, check_written
from .published.tokenizer import tokenizer_from_bpe


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # either
RECORD = "conversion.json"  # in every folder written here: what it came from and what was decided
_TABLE = "text_model.embeddings.position_embedding.weight"

logger = logging.getLogger("modeling_lrsclip.convert")


def convert(source: str | Path, output_dir: str | Path, layout: str = "lrsclip", **options: Any) -> dict[str, Any]:
    """
    Writes a checkpoint as a folder: weights, processor, tokenizer, the code for `trust_remote_code=True`, and a record
    of what was decided. The folder appears when it is complete and was read back equal, or not at all.

    Args:
        source (`str` or `Path`): see [`prepare`].
        output_dir (`str` or `Path`): folder to write. An earlier conversion there is replaced, anything else is not.
        layout (`str`): `lrsclip`; `plain-clip`, a stock CLIP that needs no remote code (see [`write_plain_clip`]); or
            `open-clip`, for open_clip's `local-dir:` and `hf-hub:` (see [`write_open_clip`]).
        options: of [`prepare`].

    Returns:
        `dict`: the record, as in the folder's `conversion.json`.

    Raises:
        `ValueError`: as [`prepare`], and for an `output_dir` that holds something else.
        `OSError`: as [`prepare`], and for a disk that fails.
    """
    if layout not in WRITERS:
        raise ValueError(f"layout {layout!r} is unknown; there are {', '.join(WRITERS)}.")
    output_dir = Path(output_dir).resolve()
    _check_output(output_dir, source, options.get("tokenizer"))
    make_folder(output_dir.parent)
    prepared = prepare(source, **options)
    size = sum(tensor.nbytes for tensor in prepared.tensors.values())
    _say("writing", f"{output_dir}: {size / 1e6:,.0f} MB, {_types(prepared.tensors)}")
    growing = growing_folder(output_dir)
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir()
    try:
        WRITERS[layout](prepared.skeleton, prepared.tensors, prepared.processor, growing)
        record = _record(source, prepared) | {"layout": layout}
        record["files"] = sorted([path.name for path in growing.iterdir()] + [RECORD])
        (growing / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        check_written(growing, prepared.tensors, prepared.processor, layout)
        _say("checking", f"{len(prepared.tensors)} weights read back equal to the bit, and the tokenizer")
        publish_folder(growing, output_dir)
    except SafetensorError as error:
        raise OSError(f"{output_dir} cannot be written ({error}); nothing was left there.") from None
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    return record


def load_published(source: str | Path, **options: Any) -> tuple[LRSCLIPModel, LRSCLIPProcessor]:
    """
    The same without a folder, to measure a published checkpoint.

    Args:
        source (`str` or `Path`): see [`prepare`].
        options: of [`prepare`].

    Returns:
        `(LRSCLIPModel, LRSCLIPProcessor)`: the model in evaluation mode, on the CPU, all its weights of one type.

    Raises:
        As [`prepare`].
    """
    prepared = prepare(source, **options)
    return prepared.build_model(), prepared.processor


@dataclass
class Prepared:
    """A checkpoint read, mapped and stretched, with its processor; nothing is written yet."""

    skeleton: LRSCLIPModel  # on the meta device: configuration and type, without memory
    tensors: dict[str, torch.Tensor]  # its weights; those of a file are memory-mapped where the format allows
    processor: LRSCLIPProcessor
    decisions: list[str]  # what was found and decided, a line each

    def build_model(self) -> LRSCLIPModel:
        """The model in evaluation mode, on the CPU, all its weights of one type."""
        config, dtype = self.skeleton.config, self.skeleton.dtype
        # Copies: the tensors are those of a mapped file, which may go away while the model lives.
        owned = {name: tensor.to(dtype, copy=True) for name, tensor in self.tensors.items()}
        return LRSCLIPModel.from_pretrained(None, config=config, state_dict=owned, dtype=dtype).eval()


def prepare(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    kept_positions: int = 20,
    stretch_ratio: int = 1,
    keep_stretched: bool = False,
    **reading: Any,
) -> Prepared:
    """
    Read a checkpoint, map its weights to LRSCLIP's, stretch its position table if asked for, and find its tokenizer.

    Args:
        source (`str` or `Path`): a published checkpoint file (see [`read_published_checkpoint`]), or the folder or Hub
            id of a CLIP or LRSCLIP in HuggingFace format.
        tokenizer (`str` or `Path`, *optional*): Hub id, folder, or the BPE file that the published code ships. By
            default the source's own; for a file, which has none, `openai/clip-vit-base-patch16`.
        dtype (`torch.dtype`, *optional*): type of all weights. By default each keeps the source's; where these differ
            (OpenAI's archives: fp16, but embeddings and norms fp32), `from_pretrained` loads all as the widest.
        kept_positions, stretch_ratio (`int`): see [`stretch_position_embedding`]; ratio 1 keeps the table as it is.
        keep_stretched (`bool`): whether a table that was stretched before is left as it is, instead of refused.
        reading: `preset`, `activation` and `heads` of [`read_published_checkpoint`], for a file.

    Returns:
        Model, processor and tokenizer in memory, with the record of what was decided.

    Raises:
        `ValueError`: as [`read_published_checkpoint`], [`read_pretrained`] and `LRSCLIPModel.from_clip`; for a
            tokenizer that does not fit the model, and weights too large for `dtype`.
        `OSError`: for a source or tokenizer out of reach.
    """
    reading = {name: value for name, value in reading.items() if value is not None}
    is_file = os.path.isfile(source)
    if is_file:
        _say("reading", f"{source} ({os.path.getsize(source) / 1e6:,.0f} MB)")
        checkpoint = read_published_checkpoint(source, **reading)
    elif reading:
        raise ValueError(f"{', '.join(reading)} are for checkpoint files; {source} is none, its config.json decides.")
    else:
        _say("reading", str(source))
        checkpoint = read_pretrained(_folder_or_hub_id(source))
    decisions, tensors = checkpoint.notes, checkpoint.tensors
    if keep_stretched and getattr(checkpoint.config.text_config, "stretch_ratio", 1) != 1:
        kept_positions, stretch_ratio = 20, 1
    model_class = LRSCLIPModel if isinstance(checkpoint.config, LRSCLIPConfig) else CLIPModel
    with torch.device("meta"):
        unstretched = model_class(checkpoint.config)
        skeleton = LRSCLIPModel.from_clip(unstretched, kept_positions=kept_positions, stretch_ratio=stretch_ratio)
    if stretch_ratio != 1:
        tensors[_TABLE] = stretch_position_embedding(tensors[_TABLE], kept_positions, stretch_ratio)
        decisions.append(f"stretched to {len(tensors[_TABLE])} positions: {kept_positions} kept, x {stretch_ratio}")
    for line in decisions:
        _say("mapping", line)

    name = tokenizer or (DEFAULT_TOKENIZER if is_file else source)
    loaded = _load_tokenizer(name, skeleton)
    _say("tokenizer", f"{name}: {len(loaded):,} entries, {loaded.model_max_length} tokens")
    if is_file:  # CLIP's mean and std, which the published code of all of them uses
        side = skeleton.config.vision_config.image_size
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        image_processor = LRSCLIPImageProcessor(**sizes)
    else:
        image_processor = LRSCLIPImageProcessor.from_pretrained(source)

    for key in tensors if dtype is not None else ():
        tensors[key] = _cast(key, tensors[key], dtype)
    widest = functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
    return Prepared(skeleton.to(widest), tensors, LRSCLIPProcessor(image_processor, loaded), decisions)


# --------------------------------------------------------------------------------------------------------------- steps


def _folder_or_hub_id(source: str | Path) -> str:
    if os.path.isdir(source):
        if not os.path.isfile(os.path.join(source, "config.json")):
            raise ValueError(registry.no_model_in(Path(source)))
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(?<!\.pt)(?<!\.pth)(?<!\.safetensors)", str(source)):
        kinds = "a checkpoint file, a model folder or the id of a Hub repository"
        raise OSError(f"{source} does not exist; give {kinds}.")
    return str(source)


def _load_tokenizer(name: str | Path, model: LRSCLIPModel) -> PreTrainedTokenizerBase:
    if os.path.isdir(name) and not any(os.path.isfile(os.path.join(name, file)) for file in TOKENIZER_FILES):
        raise OSError(
            f"no tokenizer at {name}, which has neither {' nor '.join(TOKENIZER_FILES)}; give --tokenizer a folder, or the "
            "BPE file."
        )
    text_config = model.config.text_config
    positions = text_config.max_position_embeddings
    if os.path.isfile(name):
        tokenizer = tokenizer_from_bpe(name, positions)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, model_max_length=positions)
        except (OSError, ValueError, ImportError):
            raise OSError(
                f"There is no tokenizer at {name}, or the Hub is out of reach; give --tokenizer a folder, or the BPE "
                "file of the published code (model/bpe_simple_vocab_16e6.txt.gz in MitsuiChen14/LRSCLIP)."
            ) from None
    if len(tokenizer) > text_config.vocab_size or tokenizer.eos_token_id != text_config.eos_token_id:
        raise ValueError(
            f"The tokenizer {name} has {len(tokenizer):,} entries and ends texts with {tokenizer.eos_token_id}, the "
            f"model reads {text_config.vocab_size:,} and pools at {text_config.eos_token_id}; give the one it was "
            "trained with."
        )
    return tokenizer


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all() and torch.isfinite(tensor).all():
        values = f"values up to {tensor.abs().max().item():.3g}, more than {dtype} holds"
        raise ValueError(f"{name} has {values}; leave --dtype out, or bf16.")
    return cast


def _check_output(output_dir: Path, source: str | Path, tokenizer: str | Path | None) -> None:
    if output_dir.is_dir() and os.path.exists(source) and output_dir.samefile(source):
        raise ValueError(f"{output_dir} is the source itself; give another folder to write.")
    for path in (source, tokenizer):
        if path is not None and os.path.exists(path) and Path(path).resolve().is_relative_to(output_dir):
            raise ValueError(f"{path} lies in {output_dir}, which would be replaced; give another folder to write.")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        try:
            written = set(json.loads((output_dir / RECORD).read_text(encoding="utf-8"))["files"])
        except (OSError, ValueError, KeyError, TypeError):
            other = "something else than an earlier conversion"
            raise ValueError(f"{output_dir} holds {other}; give a new folder.") from None
        if others := sorted(path.name for path in output_dir.iterdir() if path.name not in written):
            beside = f"{others[0]} beside an earlier conversion"
            raise ValueError(f"{output_dir} holds {beside}; move it away, or give a new folder.")
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"{output_dir} is a file; give a folder to write.")


def _record(source: str | Path, prepared: Prepared) -> dict[str, Any]:
    # The name alone: the folder is for the Hub, where nobody needs to see the paths of a machine.
    local = os.path.exists(source)
    return {
        "source": Path(source).name if local else str(source),
        "sha256": file_sha256(source) if os.path.isfile(source) else None,
        "decisions": prepared.decisions,
        "dtype": _types(prepared.tensors),
        "text_positions": prepared.skeleton.config.text_config.max_position_embeddings,
        "versions": {"torch": str(torch.__version__), "transformers": transformers_version},
    }


def _types(tensors: dict[str, torch.Tensor]) -> str:
    """`float32`, or `float16 and float32`."""
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))


def _say(stage: str, text: str) -> None:
    logger.info("%-9s  %s", stage, text)


# -------------------------------------------------------------------------------------------------------- command line


def carry_out(options: argparse.Namespace) -> None:
    """Convert as the options of the command say; what goes wrong ends the process with a sentence."""
    if options.check_published:
        _list_published()
        return
    stretching = {"stretch_ratio": 4} if options.stretch else {}
    for name in ("kept_positions", "stretch_ratio"):
        if getattr(options, name) is not None:
            stretching[name] = getattr(options, name)
    reading = {name: getattr(options, name) for name in ("tokenizer", "preset", "activation", "heads")}
    reading["dtype"] = DTYPES.get(options.dtype)
    say_once_that_the_hub_is_away()
    transformers_logging.disable_progress_bar()
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        record = convert(options.source, options.output_dir, options.layout or "lrsclip", **reading, **stretching)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    finally:
        logger.removeHandler(handler)
    print(f"{options.source} -> {options.output_dir}: {record['text_positions']} text positions")


def _list_published() -> None:
    """A line for each published model as it is answered; exits with a sentence where some are missing."""
    checks = []
    for model in registry.MODELS.values():
        checks += registry.check_published([model])
        print(checks[-1].line, flush=True)
    if missing := [check for check in checks if check.problem]:
        sys.exit(f"error: {len(missing)} of {len(checks)} published models are missing, moved or out of reach.")
