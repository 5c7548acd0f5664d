# SPDX-License-Identifier: Apache-2.0
"""A model's two towers as ONNX files, and run from them: what `modeling_lrsclip.export_onnx` does."""

import argparse
import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from .conversion import load_published
from .files.atomic import growing_folder, make_folder, publish_folder
from .files.documents import first_line
from .modeling_lrsclip import LRSCLIPModel
from .processing_lrsclip import LRSCLIPProcessor
from .published.plain_clip import plain_config, plain_processor


FOLDER = "onnx"  # where transformers.js looks
QUANTIZED = "_quantized"  # ends the name of a tower in int8: transformers.js' "q8"
TEXT, VISION = "text_model", "vision_model"  # huggingface/transformers.js src/models.js, CLIPTextModelWithProjection
METHODS = {TEXT: "get_text_features", VISION: "get_image_features"}
INPUTS = {TEXT: "input_ids", VISION: "pixel_values"}
OUTPUTS = {TEXT: "text_embeds", VISION: "image_embeds"}
RECORD = "export.json"
TOLERANCE = 1e-4  # of the cosine distance to torch in fp32
_PROBES = ["a lake", "A grey runway; four white aeroplanes wait at its end, ready and fuelled. " * 4]

logger = logging.getLogger("modeling_lrsclip.export_onnx")


class _Tower(nn.Module):
    """
    Module of one of a model's methods that embed. A text needs no attention mask: the tower is causal and pools at the first
    end-of-text token, so padding is never seen.
    """

    def __init__(self, model: LRSCLIPModel, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, inputs: Tensor) -> Tensor:
        return getattr(self.model, self.method)(inputs).pooler_output  # (N, D)


def export_onnx(source: str | Path, output_dir: str | Path, int8: bool = False) -> dict[str, Any]:
    """
    Writes the folder. It appears when both files were run by onnxruntime and agree with torch, or not at all.

    Args:
        source (`str` or `Path`): model folder, Hub id or checkpoint file, as [`~.convert.load_published`] takes.
        output_dir (`str` or `Path`): folder to write; an earlier export there is replaced, anything else is not.
        int8 (`bool`): quantizes both towers, when they have agreed with torch; what that costs is in the record.

    Returns:
        `dict`: the record, as in the folder's `export.json`: source, versions, sizes, and the largest cosine distance to
        torch by tower.

    Raises:
        `ValueError`: as [`~.convert.load_published`]; for an `output_dir` that holds something else, and for a tower
            that differs from torch by more than 1e-4.
        `OSError`: for a source out of reach or a disk that fails.
    """
    output_dir = Path(output_dir).resolve()
    if output_dir.exists() and (not (output_dir / RECORD).is_file() or output_dir == Path(source).resolve()):
        raise ValueError(f"{output_dir} holds something else than an earlier export; give a new folder.")
    make_folder(output_dir.parent)
    model, processor = load_published(source, dtype=torch.float32)
    model.config._attn_implementation = "eager"  # its operations have names in every opset
    growing = growing_folder(output_dir)
    shutil.rmtree(growing, ignore_errors=True)
    (growing / FOLDER).mkdir(parents=True)
    try:
        inputs = _probe(processor)
        for name in (TEXT, VISION):
            logger.info("exporting  %s", name)
            _export(model, name, inputs[INPUTS[name]], growing / FOLDER / f"{name}.onnx")
        plain_config(model.config).save_pretrained(growing)
        plain = plain_processor(processor)
        plain.save_pretrained(growing)
        plain.image_processor.save_pretrained(growing)  # preprocessor_config.json, which transformers.js reads
        differences = _compare(model, inputs, growing)
        if worst := [name for name, value in differences.items() if value > TOLERANCE]:
            raise ValueError(f"{worst[0]} differs from torch by a cosine distance of {differences[worst[0]]:.1e}.")
        if int8:
            for name in (TEXT, VISION):
                logger.info("int8       %s", name)
                quantize(growing / FOLDER / f"{name}.onnx", growing / FOLDER / f"{name}{QUANTIZED}.onnx")
                (growing / FOLDER / f"{name}.onnx").unlink()
            differences = _compare(model, inputs, growing)
        local = os.path.exists(source)
        record = {"source": Path(source).name if local else str(source), "cosine_distance": differences}
        record |= {"parameters": sum(weight.numel() for weight in model.parameters())}
        sizes = {str(path.relative_to(growing)): path.stat().st_size for path in growing.rglob("*") if path.is_file()}
        record |= {"versions": {"torch": str(torch.__version__)}, "files": dict(sorted(sizes.items()))}
        (growing / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        publish_folder(growing, output_dir)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    return record


def _probe(processor: LRSCLIPProcessor) -> dict[str, Tensor]:
    """Two texts of different length and two images, to trace and to compare with."""
    size = processor.image_processor.crop_size["height"]
    gradient = Image.linear_gradient("L").resize((size + 20, size)).convert("RGB")
    return dict(processor(text=_PROBES, images=[gradient, gradient.rotate(90)], return_tensors="pt"))


def _export(model: LRSCLIPModel, name: str, example: Tensor, path: Path) -> None:
    """Write a tower by torch's own exporter, with batch and length left open."""
    axes: dict[int, Any] = {0: torch.export.Dim("batch_size", min=1, max=4096)}
    if name == TEXT:
        axes[1] = torch.export.Dim("sequence_length", min=2, max=model.config.text_config.max_position_embeddings)
    # The exporter reports that torchvision, which nothing here needs, is absent.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Tower(model, METHODS[name]).eval(),
            (example,),
            path,
            input_names=[INPUTS[name]],
            output_names=[OUTPUTS[name]],
            dynamic_shapes=(axes,),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def quantize(source: Path, target: Path) -> None:
    """A tower in int8, by onnxruntime's own quantizer: weights a channel each, activations by their range in each call."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    del model.graph.value_info[:]  # the quantizer turns weights around and then finds their old shapes there
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantizer advises, through the root logger, what is for models of static shapes
    try:
        quantize_dynamic(model, target, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"])
    finally:
        root.setLevel(level)


def _compare(model: LRSCLIPModel, inputs: dict[str, Tensor], folder: Path) -> dict[str, float]:
    """Largest cosine distance between onnxruntime and torch by tower."""
    towers = OnnxTowers(folder)
    with torch.no_grad():
        expected = {name: _Tower(model, METHODS[name])(inputs[INPUTS[name]]) for name in (TEXT, VISION)}
    computed = {TEXT: towers.text(inputs["input_ids"]), VISION: towers.image(inputs["pixel_values"])}
    similarity = {name: nn.functional.cosine_similarity(computed[name], expected[name]) for name in expected}
    return {name: max(0.0, float(f"{1 - value.min().item():.3g}")) for name, value in similarity.items()}


def tower_file(folder: str | Path, name: str) -> Path:
    """The file of a tower in an exported folder: in fp32, or where that is not there, in int8."""
    path = Path(folder) / FOLDER / f"{name}.onnx"
    return path if path.exists() else path.with_stem(name + QUANTIZED)


class OnnxTowers:
    """
    The two towers of an exported folder, run by onnxruntime on the CPU.

    Args:
        folder: of [`export_onnx`].
        threads: of each tower's work; 0: all cores.

    Raises:
        `ValueError`: without onnxruntime, or for a file that it cannot read.
    """

    def __init__(self, folder: str | Path, threads: int = 0):
        try:
            import onnxruntime
        except ImportError:
            raise ValueError(f"{folder} holds ONNX files; `pip install onnxruntime` to run them.") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Idle threads leave the cores to others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.sessions = {}
        for name in (TEXT, VISION):
            path = tower_file(folder, name)
            try:
                self.sessions[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's errors have no common class
                raise ValueError(f"{path} cannot be run ({first_line(error)}); export it again.") from None

    def text(self, input_ids: Tensor) -> Tensor:
        """(N, L) -> (N, D)"""
        return self._run(TEXT, {"input_ids": input_ids.numpy().astype(np.int64)})

    def image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)"""
        return self._run(VISION, {"pixel_values": pixel_values.numpy().astype(np.float32)})

    def _run(self, name: str, inputs: dict[str, np.ndarray]) -> Tensor:
        return torch.from_numpy(self.sessions[name].run(None, inputs)[0])


def carry_out(options: argparse.Namespace) -> None:
    """Export as the options of the command say; what goes wrong ends the process with a sentence."""
    transformers_logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    try:
        record = export_onnx(options.source, options.output_dir, options.int8)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for name, size in record["files"].items():
        print(f"{size / 1e6:10,.1f} MB  {name}")
    distances = record["cosine_distance"]
    print(f"cosine distance to torch: text {distances[TEXT]:.1e}, image {distances[VISION]:.1e}")
