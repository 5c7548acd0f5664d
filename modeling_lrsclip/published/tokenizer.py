# SPDX-License-Identifier: Apache-2.0
"""The BPE file that the published code ships, as a tokenizer of transformers."""

import gzip
import zlib
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer


START, END = "<|startoftext|>", "<|endoftext|>"

# openai/CLIP clip/simple_tokenizer.py, unchanged in MitsuiChen14/LRSCLIP model/simple_tokenizer.py: the first line is a
# heading, the next 48,894 are merges, the rest of the file is not used.
MERGES = 49152 - 256 - 2


def tokenizer_from_bpe(path: str | Path, model_max_length: int) -> CLIPTokenizer:
    """
    The published tokenizer's 49,408 entries: 256 bytes, each also as a word's end, 48,894 merges, start and end of text.

    What the published tokenizer does to a text before its BPE is split in two here. Lower-casing, white space and the
    word split are this tokenizer's, saved in `tokenizer.json`; mending of encodings and quotes (which needs `ftfy`) and
    HTML entities are `LRSCLIPProcessor`'s (`clean_text`), so captions go through the processor.

    Args:
        path (`str` or `Path`): `bpe_simple_vocab_16e6.txt.gz`, or the text inside it.
        model_max_length (`int`): tokens at which the processor cuts a text: the model's positions.

    Raises:
        `ValueError`: for a file with fewer merges, or that is no such file.
    """
    merges = _read_merges(Path(path))
    # The published order of bytes: printable ones first. `ByteLevel` writes the others as the characters after U+00FF.
    alphabet = sorted(ByteLevel.alphabet(), key=ord)
    entries = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(merge) for merge in merges), START, END]
    vocab = {entry: index for index, entry in enumerate(entries)}
    if len(vocab) != len(entries):
        repeated = len(entries) - len(vocab)
        raise ValueError(f"{path} repeats {repeated} of its merges; it is not the published BPE file.")
    try:
        return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length)
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{path} is not the published BPE file ({error}).") from None


def _read_merges(path: Path) -> list[tuple[str, str]]:
    content = path.read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        lines = content.decode("utf-8").split("\n")[1 : MERGES + 1]
    except (OSError, EOFError, zlib.error):
        raise ValueError(f"{path} is a damaged gzip file; download it again.") from None
    except UnicodeDecodeError:
        advice = "--tokenizer takes bpe_simple_vocab_16e6.txt.gz of the published code"
        raise ValueError(f"{path} is not text; {advice}.") from None
    merges = [tuple(line.split()) for line in lines]
    for number, merge in enumerate(merges, start=2):
        if len(merge) != 2 and not (number == len(merges) + 1 and not merge):  # a final line end
            raise ValueError(
                f"{path}, line {number}: {lines[number - 2][:40]!r} is not a merge of two symbols; --tokenizer takes "
                "bpe_simple_vocab_16e6.txt.gz of the published code, a folder or a Hub id."
            )
    merges = [merge for merge in merges if merge]
    if len(merges) < MERGES:
        raise ValueError(
            f"{path} has {len(merges):,} merges, CLIP's tokenizer takes {MERGES:,}; give the whole "
            "bpe_simple_vocab_16e6.txt.gz of the published code."
        )
    return merges
