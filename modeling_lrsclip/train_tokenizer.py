# SPDX-License-Identifier: Apache-2.0
"""A BPE tokenizer of CLIP's kind, trained on one's own captions: for other languages, and where the Hub is out of reach."""

import json
import re
from collections.abc import Iterable

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from .processing_lrsclip import clean_text


LONGEST_WORD = 256  # characters that merges are learnt within; the time for one word grows with its square
_LONG_WORDS = re.compile(rf"\S{{{LONGEST_WORD}}}(?=\S)")
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1000, model_max_length: int = 248) -> CLIPTokenizer:
    """
    Trains a byte-level BPE with CLIP's normalization, word split and end-of-word mark.

    Args:
        texts (iterable of `str`): captions to learn the merges from; cleaned as the processor cleans them. A word of
            more than `LONGEST_WORD` characters counts as several.
        vocab_size (`int`, defaults to 1000): entries, at least 514: 256 bytes, each also as a word's end, and the two
            special tokens, which come last as in CLIP's own vocabulary.
        model_max_length (`int`, defaults to 248): tokens at which the processor cuts a text.

    Returns:
        `transformers.CLIPTokenizer` with at most `vocab_size` entries (fewer when the texts offer no more merges).

    Raises:
        `ValueError`: for a smaller `vocab_size`.
    """
    smallest = 2 * 256 + 2
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is too small for a byte-level BPE; it must be at least {smallest}.")
    template = CLIPTokenizer()  # its normalizer and word split are CLIP's
    alphabet = sorted(ByteLevel.alphabet())
    endings = [f"{byte}</w>" for byte in alphabet]
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False))
    bpe.normalizer = template.backend_tokenizer.normalizer
    bpe.pre_tokenizer = template.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=alphabet,
        # Not special, but so they get their ids before the texts are read: else in the order of a hash table, and
        # pairs of equal count, which the ids decide between, would merge differently in every run.
        special_tokens=endings,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator((_LONG_WORDS.sub(r"\g<0> ", clean_text(text)) for text in texts), trainer)

    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    entries = [*alphabet, *endings, *("".join(merge) for merge in merges), START, END]
    vocab = {entry: index for index, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length)
