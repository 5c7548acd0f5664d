# SPDX-License-Identifier: Apache-2.0
"""
An LRSCLIP as a stock CLIP with a longer position table, which transformers, and what builds on it, read without remote
code. No weight differs; of the processor, that part of the text cleaning is kept which a tokenizer's normalizer can do.
"""

import html
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..configuration_lrsclip import LRSCLIPConfig
from ..modeling_lrsclip import LRSCLIPModel
from ..processing_lrsclip import LRSCLIPProcessor
from .state_dict_keys import Tensors


_PLAIN = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " "}
# UTF-8 that was read as Windows-1252, the commonest cases; ftfy mends others too.
_MARKS = "\u2019\u2018\u201c\u2013\u2014\u2026\u00b0\u00b2\u00e9\u00d7"
_GARBLED = {mark.encode().decode("cp1252"): _PLAIN.get(mark, mark) for mark in _MARKS}
_GARBLED["\u00e2\u20ac\u009d"] = '"'  # from U+201D, whose last byte Windows-1252 does not know
# `amp` last, so that one pass over them is one call of html.unescape.
_ENTITY_NAMES = (
    "lt gt quot #34 apos #39 #x27 lsquo rsquo #8216 #8217 ldquo rdquo #8220 #8221 ndash mdash hellip deg times nbsp #160 "
    "#38 amp"
)
_ENTITIES = {f"&{name};": html.unescape(f"&{name};") for name in _ENTITY_NAMES.split()}
_ENTITIES |= {entity: _PLAIN[meant] for entity, meant in _ENTITIES.items() if meant in _PLAIN}
_LIGATURES = {"\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl"}
# What captioners that were trained on Chinese write between English words; ftfy narrows full-width letters too.
_FULL_WIDTH = {chr(ord(narrow) + 0xFEE0): narrow for narrow in "!%&(),.:;?"}
_CLASSES = {  # regular expression -> replacement
    "\x1b\\[[0-9;]*[a-zA-Z]": "",  # colours of a terminal
    "[\u02bc\u2018-\u201b]": "'",
    "[\u201c-\u201f]": '"',
    "[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]": "",  # control characters
}


def _cleaning() -> Iterator[normalizers.Normalizer]:
    """Yield the replacements of `clean_text` before collapsing white space and lower-casing, as far as replacements reach."""
    for pairs in (_ENTITIES, _GARBLED, _LIGATURES, _FULL_WIDTH):
        yield from (normalizers.Replace(old, new) for old, new in pairs.items())
    yield from (normalizers.Replace(Regex(old), new) for old, new in _CLASSES.items())
    yield from (normalizers.Replace(old, new) for old, new in _ENTITIES.items())  # the published code unescapes twice


def plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """
    A CLIP tokenizer that cleans texts itself.

    Its class is not `CLIPTokenizer`, which builds its own normalizer whatever `tokenizer.json` says.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): of an [`LRSCLIPProcessor`], which cleans before it calls it.

    Returns:
        `PreTrainedTokenizerFast`: same ids for most texts; those whose encoding was damaged in rare ways, with rare
        HTML entities or with full-width letters get others.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.normalizer = normalizers.Sequence([*_cleaning(), backend.normalizer])
    steps = [decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)]
    backend.decoder = decoders.Sequence(steps)
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "model_max_length")
    kept = {name: getattr(tokenizer, name) for name in names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **kept, padding_side="right")


def plain_processor(processor: LRSCLIPProcessor) -> CLIPProcessor:
    """The processor as a `CLIPProcessor`: [`plain_tokenizer`] and CLIP's own image processor with the same numbers."""
    fields = processor.image_processor.to_dict()
    names = {"size", "crop_size", "image_mean", "image_std", "resample"}
    kept = {name: value for name, value in fields.items() if name in names}
    return CLIPProcessor(CLIPImageProcessorPil(**kept), plain_tokenizer(processor.tokenizer))


def plain_config(config: LRSCLIPConfig) -> CLIPConfig:
    """`model_type: clip`, with the long position table."""
    fields = config.to_dict()
    ours = {"model_type", "kept_positions", "stretch_ratio", "long_weight", "auto_map", "architectures"}
    for tower in ("text_config", "vision_config"):
        fields[tower] = {key: value for key, value in fields[tower].items() if key not in ours}
    return CLIPConfig(**{key: value for key, value in fields.items() if key not in ours})


def write_plain_clip(skeleton: LRSCLIPModel, tensors: Tensors, processor: LRSCLIPProcessor, folder: Path) -> None:
    """
    Writes a folder for `CLIPModel` and everything that reads it.

    Args:
        skeleton (`LRSCLIPModel`): configuration and type; its weights are not looked at.
        tensors (`dict`): the weights.
        processor (`LRSCLIPProcessor`): whose numbers and vocabulary are kept.
        folder (`Path`): exists; config, weights, processor and tokenizer files are put there.
    """
    with torch.device("meta"):
        model = CLIPModel(plain_config(skeleton.config))
    model.to(skeleton.dtype).save_pretrained(folder, state_dict=dict(tensors))
    plain = plain_processor(processor)
    plain.save_pretrained(folder)
    plain.image_processor.save_pretrained(folder)  # preprocessor_config.json, for readers older than transformers 5
    plain.tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for older ones still
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
