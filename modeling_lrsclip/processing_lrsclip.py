# SPDX-License-Identifier: Apache-2.0
"""Captions and images to model inputs in one call: `processor(text=..., short_text=..., images=...)`."""

import html
import re
import unicodedata

from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, Unpack
from transformers.utils import logging


try:
    import ftfy
except ImportError:
    ftfy = None

logger = logging.get_logger(__name__)

# What of ftfy's work matters for captions, for machines without ftfy: curly quotes, ligatures, exotic line ends.
_WITHOUT_FTFY = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
        **{mark: unicodedata.normalize("NFKD", mark) for mark in "\ufb00\ufb01\ufb02\ufb03\ufb04\ufb05\ufb06"},
        **dict.fromkeys("\u2028\u2029\u0085", "\n"),
    }
)


def _fix_text(text: str) -> str:
    if ftfy is not None:
        return ftfy.fix_text(text)
    if not text.isascii():
        logger.warning_once(
            "ftfy is not installed: curly quotes and ligatures are still mended, but garbled encodings are not, so "
            "some token ids may differ from the published tokenizer's. `pip install ftfy` to have them equal."
        )
    return unicodedata.normalize("NFC", text.translate(_WITHOUT_FTFY))


def clean_text(text: str) -> str:
    """
    Cleans a caption as the published tokenizer does before its BPE (`MitsuiChen14/LRSCLIP`, `model/simple_tokenizer.py`,
    `basic_clean`, `whitespace_clean`): mends encodings and quotes (ftfy), resolves HTML entities twice, collapses
    white space, lower-cases. transformers' CLIP tokenizer does only the last two.
    """
    # Printable ASCII without an entity is left alone by ftfy and html: most captions can skip them.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(_fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


class LRSCLIPProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": True, "truncation": True}}


class LRSCLIPProcessor(ProcessorMixin):
    r"""
    Wraps [`LRSCLIPImageProcessor`] and a CLIP tokenizer.

    Texts are cleaned ([`clean_text`]), padded to the longest of the call and cut at `tokenizer.model_max_length`
    (248 tokens); one warning a call says how many captions were cut. The usual `padding`, `truncation`, `max_length`
    and `return_tensors` of a transformers processor override that.
    """

    valid_processor_kwargs = LRSCLIPProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        short_text: str | list[str] | None = None,
        **kwargs: Unpack[LRSCLIPProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: one image or a list: PIL, numpy, torch, path or URL.
            text (`str` or `list[str]`): N long captions (or class prompts, or any text).
            short_text (`str` or `list[str]`): N short captions of the same images.

        Returns:
            `BatchFeature`: `pixel_values` (B, 3, H, W); `input_ids`, `attention_mask` (N, L); `short_input_ids`,
            `short_attention_mask` (N, L_short), for what was given.

        Raises:
            `ValueError`: when nothing is given, for a text that is not a string, a text that `truncation=False`
                leaves longer than the table, or a row of tokens without end-of-text.
        """
        if images is None and text is None and short_text is None:
            raise ValueError("Nothing to process: give at least one of images, text and short_text.")
        known = {"tokenizer_init_kwargs": self.tokenizer.init_kwargs}
        merged = self._merge_kwargs(self.valid_processor_kwargs, **known, **kwargs)
        text_kwargs = merged["text_kwargs"]
        inputs = {}
        captions = cut = 0
        for prefix, texts in (("", text), ("short_", short_text)):
            if texts is None:
                continue
            cleaned = _clean_all(texts, f"{prefix}text")
            encoded = self.tokenizer(cleaned, **text_kwargs)
            inputs |= {f"{prefix}{key}": value for key, value in encoded.items()}
            captions += 1 if isinstance(texts, str) else len(cleaned)
            cut += self._count_cut(cleaned, encoded["input_ids"], text_kwargs)
        if cut:
            limit = text_kwargs.get("max_length") or self.tokenizer.model_max_length
            logger.warning(f"{cut} of {captions} captions are longer than {limit} tokens and were cut there.")
        if images is not None:
            inputs |= self.image_processor(images, **merged["images_kwargs"])
        return BatchFeature(inputs, tensor_type=text_kwargs.get("return_tensors"))

    def encode_text(self, texts: list[str]) -> list[list[int]]:
        """
        Token ids without padding, for callers that sort by length before they pad.

        Args:
            texts (`list[str]` of N): captions.

        Returns:
            `list[list[int]]` of N rows, start and end tokens included, cut where the model's table ends.
        """
        limit = self.tokenizer.model_max_length
        rows = self.tokenizer(_clean_all(texts, "texts"), verbose=False)["input_ids"]
        return [row if len(row) <= limit else row[: limit - 1] + row[-1:] for row in rows]

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of each caption before any cut, start and end tokens included; `len(texts)` numbers."""
        return [len(row) for row in self.tokenizer(_clean_all(texts, "texts"), verbose=False)["input_ids"]]

    def save_pretrained(self, save_directory, **kwargs):
        # The fast tokenizer remembers the last call's padding and truncation and would write them to the folder.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        saved = super().save_pretrained(save_directory, **kwargs)
        # It also leaves the folder's `auto_map` on the processor, which a loaded one does not have.
        self.__dict__.pop("auto_map", None)
        return saved

    def _count_cut(self, cleaned, input_ids, text_kwargs: dict) -> int:
        """Checks the rows that came out and counts those that truncation shortened."""
        if isinstance(cleaned, str):
            cleaned = [cleaned]
            input_ids = input_ids if hasattr(input_ids, "ndim") else [input_ids]
        table, eos_token_id = self.tokenizer.model_max_length, self.tokenizer.eos_token_id
        limit = text_kwargs.get("max_length") or table
        full = []
        for index, row in enumerate(input_ids):
            if not (row == eos_token_id).any() if hasattr(row, "ndim") else eos_token_id not in row:
                raise ValueError(
                    f"Text {index} ({cleaned[index][:40]!r}) has no end-of-text token ({eos_token_id}) after "
                    "tokenization, and the text tower pools there; use a CLIP tokenizer and leave add_special_tokens on."
                )
            if len(row) > table:
                raise ValueError(
                    f"Text {index} ({cleaned[index][:40]!r}) takes a row of {len(row)} tokens, the model reads "
                    f"{table}; leave truncation on, shorten it, or stretch the model further (LRSCLIPModel.from_clip)."
                )
            if len(row) == limit:
                full.append(cleaned[index])
        return sum(tokens > limit for tokens in self.count_tokens(full)) if full else 0


def _clean_all(texts: str | list[str], argument: str) -> str | list[str]:
    if isinstance(texts, str):
        return clean_text(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            got = f"{argument}[{index}] is {text!r} ({type(text).__name__})"
            raise ValueError(f"{got}; give one string or a list of strings.")
    return [clean_text(text) for text in texts]


__all__ = ["LRSCLIPProcessor"]
