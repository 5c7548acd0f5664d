"""
Any dual encoder as model and processor of [`~.encoder.Encoder`]: CLIP and LRSCLIP as they are; SigLIP, Chinese CLIP, models
with code of their own, sentence-transformers folders and exported ONNX towers in a shell that has the same two methods.

The shell shows no towers, so the shortcuts of [`~.towers`], which are exact for CLIP's own layers alone, are not taken.

Shapes: N texts, L tokens, B images, D width of the shared space.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel

from .. import auto_classes  # noqa: F401  # so that the Auto classes know it
from ..files.documents import first_line
from ..files.hashing import file_sha256
from ..modeling_lrsclip import LRSCLIPModel
from ..published.registry import ModelSource
from .model_inputs import cut_tokens


FIXED_LENGTH = {"siglip"}  # model types whose texts are always padded to the whole table: so they were trained
# NaFlex: images of any shape; and a sibling without
BY_SEVERAL_INPUTS = {"siglip2": "google/siglip2-base-patch16-224"}
CODE_OF_ITS_OWN = "brings code of its own, which runs with --trust-remote-code only; read it first"
LONGEST_TEXT = 512  # tokens, where neither configuration nor tokenizer sets a limit


def load_model(source: ModelSource, tokenizer: str | None = None, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """
    Loads a model with float32 weights, and its processor.

    Args:
        source: folder, Hub id or published checkpoint file.
        tokenizer: for a checkpoint file: Hub id, folder, or the published BPE file.
        trust_remote_code: whether code that lies beside the weights may run.

    Returns:
        `(model, processor)`: with `get_text_features(input_ids, attention_mask)`, `get_image_features(pixel_values)`
        and `config`; and `tokenizer`, `image_processor`.

    Raises:
        `ValueError`: one sentence for what cannot be loaded, and why.
    """
    if source.is_file:
        return _load_file(source, tokenizer)
    folder = Path(source.path)
    if (folder / "export.json").is_file() and (folder / "onnx").is_dir():
        return _load_onnx(folder)
    if (folder / "modules.json").is_file():
        return _load_sentence_transformer(folder, trust_remote_code)
    model, processor = _load_pretrained(source, trust_remote_code)
    if type(model) in (CLIPModel, LRSCLIPModel):
        return model, processor
    for name in ("get_text_features", "get_image_features"):
        if not hasattr(model, name):
            kind = "a dual encoder, as CLIP is one, is needed here"
            raise ValueError(f"{source.path}: {type(model).__name__} has no {name}; {kind}.")
    for name in ("tokenizer", "image_processor"):
        if getattr(processor, name, None) is None:
            raise ValueError(f"{source.path}: its processor, {type(processor).__name__}, has no {name}.")
    model_type = model.config.model_type
    if sibling := BY_SEVERAL_INPUTS.get(model_type):
        raise ValueError(
            f"{source.path}: a {model_type} model takes images of any shape as patches with their places, not as pixels; its "
            f"siblings of one size, such as {sibling}, can be measured."
        )
    return _in_a_shell(model, processor, _positions(model.config, processor.tokenizer), source.path)


class DualEncoder(nn.Module):
    """
    A model with CLIP's two methods.

    Args:
        inner: the model; its methods return tensors, or outputs with `pooler_output`.
        positions: tokens that it reads of a text.
        pad_token_id: texts are always padded with it to `positions`, and no mask is given; None: they are not.
    """

    def __init__(self, inner: nn.Module, positions: int, pad_token_id: int | None = None):
        super().__init__()
        self.inner, self.pad_token_id = inner, pad_token_id
        self.config = ShellConfig(getattr(inner, "config", None), positions)

    @property
    def name(self) -> str:
        """Class of the model inside."""
        return type(self.inner).__name__

    @property
    def device(self) -> torch.device:
        return next(self.inner.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.inner.parameters()).dtype

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """(N, L), (N, L) -> (N, D)"""
        if self.pad_token_id is None:
            return self.inner.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        missing = self.config.text_config.max_position_embeddings - input_ids.shape[1]
        if attention_mask is not None:  # what another id was padded with
            input_ids = input_ids.masked_fill(attention_mask == 0, self.pad_token_id)
        input_ids = nn.functional.pad(input_ids, (0, missing), value=self.pad_token_id)
        return self.inner.get_text_features(input_ids=input_ids)

    def get_image_features(self, pixel_values: Tensor) -> Any:
        """(B, 3, H, W) -> (B, D)"""
        return self.inner.get_image_features(pixel_values=pixel_values)


class OnnxModel(DualEncoder):
    """The towers of `modeling_lrsclip.export_onnx`, run by onnxruntime on the CPU; a parameter stands for their type."""

    def __init__(self, folder: Path, config: Any):
        from ..onnx_towers import RECORD, TEXT, VISION, OnnxTowers, tower_file

        # Both files' SHA-256 as numbers, by which the hash of weights tells two exports apart.
        digests = [bytes.fromhex(file_sha256(tower_file(folder, name))) for name in (TEXT, VISION)]
        numbers = torch.tensor(list(b"".join(digests)), dtype=torch.float32)
        stand_in = nn.Module()
        stand_in.register_parameter("hash", nn.Parameter(numbers, requires_grad=False))
        stand_in.config = config
        super().__init__(stand_in, config.text_config.max_position_embeddings)
        self.parameter_count = json.loads((folder / RECORD).read_text(encoding="utf-8"))["parameters"]
        # Several threads of this process take a batch each: then a run needs one.
        self.towers = OnnxTowers(folder, threads=1 if torch.get_num_threads() > 1 else 0)

    @property
    def name(self) -> str:
        return type(self).__name__

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.towers.text(input_ids)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.towers.image(pixel_values)


class SentenceTransformerModules(nn.Module):
    """The modules of a sentence-transformers folder, one after the other, given what a processor makes."""

    def __init__(self, modules: Any):
        super().__init__()
        self.modules_in_order = modules

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        features = {"input_ids": input_ids, "modality": "text"}
        features |= {} if attention_mask is None else {"attention_mask": attention_mask}
        return self.modules_in_order(features)["sentence_embedding"]

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.modules_in_order({"pixel_values": pixel_values, "modality": "image"})["sentence_embedding"]


class ShellConfig:
    """The fields of a CLIP's configuration that encoding reads; `projection_dim` is set when the model has been tried."""

    def __init__(self, inner: Any, positions: int):
        self.inner, self.projection_dim = inner, 0
        text, vision = getattr(inner, "text_config", None), getattr(inner, "vision_config", None)
        width = _number(text, "intermediate_size", 3072)
        self.text_config = SimpleNamespace(max_position_embeddings=positions, intermediate_size=width)
        sizes = {"image_size": 224, "patch_size": 16, "intermediate_size": 3072}
        self.vision_config = SimpleNamespace(**{name: _number(vision, name, size) for name, size in sizes.items()})
        self._attn_implementation = getattr(inner, "_attn_implementation", None)

    def to_dict(self) -> dict[str, Any]:
        fields = self.inner.to_dict() if hasattr(self.inner, "to_dict") else {}
        return fields | {"positions": self.text_config.max_position_embeddings}


class TextsAndImages:
    """
    A tokenizer and an image processor with the methods that encoding looks for.

    Args:
        tokenizer, image_processor: of the model.
        positions: tokens that the model reads of a text.
    """

    def __init__(self, tokenizer: Any, image_processor: Any, positions: int):
        self.tokenizer, self.image_processor, self.positions = tokenizer, image_processor, positions

    def encode_text(self, texts: list[str]) -> list[list[int]]:
        """Token ids without padding, cut with the end token put back."""
        return cut_tokens(self._rows(texts), self.positions)

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens before any cut."""
        return [len(row) for row in self._rows(texts)]

    def _rows(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]


# --------------------------------------------------------------------------------------------------------------- kinds


def _load_file(source: ModelSource, tokenizer: str | None) -> tuple[Any, Any]:
    from ..conversion import load_published

    try:
        return load_published(source.path, tokenizer=tokenizer, dtype=torch.float32, **source.load_options)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(reason if source.path in reason else f"{source.path}: {reason}") from error


def _load_pretrained(source: ModelSource, trust_remote_code: bool) -> tuple[Any, Any]:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoProcessor, PreTrainedConfig

    from modeling_lrsclip.configuration_lrsclip import check_layers

    path, hub = source.path, {"revision": source.revision} if source.revision else {}
    options = hub | {"trust_remote_code": trust_remote_code}
    try:
        fields = PreTrainedConfig.get_config_dict(path, **hub)[0]
        check_layers(*((fields.get(f"{tower}_config") or {}).get("num_hidden_layers") for tower in ("text", "vision")))
        model, report = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **options)
        processor = AutoProcessor.from_pretrained(path, **options)
    except StrictDataclassError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}; mend its config.json.") from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, SafetensorError) as error:
        reason = first_line(error)
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ValueError(f"{path} {CODE_OF_ITS_OWN}.") from error
        raise ValueError(f"{path}: not loadable with AutoModel and AutoProcessor ({reason})") from error
    # transformers would evaluate them at random values, with no more than a warning.
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{path}: {len(missing)} weights are missing from the checkpoint, first: {missing[0]}")
    return model, processor


def _load_onnx(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoProcessor

    try:
        processor, config = AutoProcessor.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: {first_line(error)}") from error
    return _checked(OnnxModel(folder, config), processor, str(folder))


def _load_sentence_transformer(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        advice = "`pip install sentence-transformers` to measure it"
        raise ValueError(f"{folder} is a sentence-transformers folder; {advice}.") from None
    try:
        modules = SentenceTransformer(str(folder), device="cpu", trust_remote_code=trust_remote_code).eval().float()
    except Exception as error:  # of any of its modules
        reason = first_line(error)
        if "trust_remote_code" in str(error) and not trust_remote_code:
            reason = f"it {CODE_OF_ITS_OWN}"
        raise ValueError(f"{folder}: {reason}.") from error
    processor = getattr(modules[0], "processor", None)
    if not {"text", "image"} <= set(getattr(modules[0], "modality_config", {})) or processor is None:
        raise ValueError(f"{folder} embeds texts alone; a dual encoder, of texts and images, is needed here.")
    inner = SentenceTransformerModules(modules)
    inner.config = modules[0].model.config
    positions = min(modules.max_seq_length or LONGEST_TEXT, _positions(inner.config, processor.tokenizer))
    return _in_a_shell(inner, processor, positions, str(folder))


# --------------------------------------------------------------------------------------------------------------- helpers


def _in_a_shell(inner: nn.Module, processor: Any, positions: int, path: str) -> tuple[DualEncoder, TextsAndImages]:
    """A foreign model with the methods and fields of CLIP, and its processor."""
    fixed_length = inner.config.model_type in FIXED_LENGTH
    shell = DualEncoder(inner, positions, processor.tokenizer.pad_token_id if fixed_length else None)
    return _checked(shell, processor, path)


def _checked(model: DualEncoder, processor: Any, path: str) -> tuple[DualEncoder, TextsAndImages]:
    """Tries a model on a word and a grey image; raises one sentence where they do not meet in one space."""
    positions = model.config.text_config.max_position_embeddings
    processor = TextsAndImages(processor.tokenizer, processor.image_processor, positions)
    ids = torch.tensor(processor.encode_text(["a road"]))
    try:
        pixels = processor.image_processor([Image.new("RGB", (64, 48), "grey")], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            outputs = model.eval().get_text_features(ids, torch.ones_like(ids)), model.get_image_features(pixels)
        text, image = (getattr(output, "pooler_output", output) for output in outputs)
        widths = [tuple(embeds.shape) for embeds in (text, image)]
    except Exception as error:  # of foreign code
        raise ValueError(f"{path}: {model.name} cannot embed a text and an image ({first_line(error)}).") from error
    if widths[0] != widths[1] or len(widths[0]) != 2:
        raise ValueError(f"{path}: a text becomes {widths[0]}, an image {widths[1]}; they must share one space.")
    model.config.projection_dim = widths[0][1]
    return model, processor


def _positions(config: Any, tokenizer: Any) -> int:
    table = _number(getattr(config, "text_config", None), "max_position_embeddings", LONGEST_TEXT)
    return min(table, tokenizer.model_max_length)


def _number(config: Any, name: str, default: int) -> int:
    fields = config if isinstance(config, dict) else vars(config) if config is not None else {}
    value = fields.get(name)
    return value if isinstance(value, int) and value > 0 else default
