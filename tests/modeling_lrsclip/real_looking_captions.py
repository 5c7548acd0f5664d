"""
Captions of drawn scenes, dressed as captioners and web pages dress theirs: typographic quotes, entities, damage.

    python -m tests.modeling_lrsclip.real_looking_captions bpe_simple_vocab_16e6.txt.gz

counts how many of 10,000 get other token ids from the tokenizer of a `--plain-clip` folder than from the published one.
"""

import random
import sys
from collections.abc import Sequence

from evaluation.benchmarks.aerial_scenes.data_set import plan_and_texts
from modeling_lrsclip import LRSCLIPImageProcessor, LRSCLIPProcessor
from modeling_lrsclip.published.plain_clip import plain_tokenizer
from modeling_lrsclip.published.tokenizer import tokenizer_from_bpe


def _curly(text: str) -> str:
    return text.replace("'", "\u2019")


def _garbled(text: str) -> str:
    """UTF-8 read as Windows-1252, where that is possible at all."""
    return text.encode("utf-8").decode("cp1252", errors="replace")


# (share of captions, what is done to one): by eye, after captions of public data sets written by models and people.
DRESSES = [
    (0.20, lambda rng, text: text.replace(" is ", " isn\u2019t ", 1)),
    (0.20, lambda rng, text: f"The image shows the area\u2019s layout: {text}"),
    (0.15, lambda rng, text: text.replace(" the ", " the \u201cmain\u201d ", 1)),
    (0.10, lambda rng, text: text.replace(", ", " \u2014 ", 1)),
    (0.10, lambda rng, text: text + " It\u2019s about 10\u201320 m wide."),
    (0.05, lambda rng, text: text.replace(". ", "\u2026 ", 1)),
    (0.05, lambda rng, text: text.replace(". ", ".\n\n", 1)),
    (0.05, lambda rng, text: f"**Scene:**\n- {text}"),
    (0.04, lambda rng, text: text.replace(" ", "\u00a0", 2)),
    (0.04, lambda rng, text: text.replace(" and ", " &amp; ", 1)),
    (0.02, lambda rng, text: text.replace(" the ", " the &quot;main&quot; ", 1) + " It&#39;s dry."),
    (0.01, lambda rng, text: text.replace(" and ", " &amp;amp; ", 1)),
    (0.03, lambda rng, text: text + " It covers 3 km\u00b2 at 25\u00b0 N, 10\u00d720 m each."),
    (0.02, lambda rng, text: text.replace(" a ", " a caf\u00e9-like ", 1)),
    (0.01, lambda rng, text: text.replace(" field", " \ufb01eld", 1)),
    (0.01, lambda rng, text: text.replace(", ", "\uff0c", 1).replace(". ", "\uff0e", 1)),
    (0.01, lambda rng, text: _garbled(text + " It\u2019s dry \u2013 25\u00b0C.")),
    (0.005, lambda rng, text: _garbled(text + " Na\u00efve \u00fcber-r\u00e9gion \u0160.")),
    (0.005, lambda rng, text: text + " \U0001f6e9\ufe0f \u98de\u673a"),
    (0.003, lambda rng, text: "\ufeff" + text + "\u200b"),
    (0.002, lambda rng, text: text + " &eacute;t&#233; &#x2014; &frac12;"),
    (0.002, lambda rng, text: text + " \uff34\uff4f\uff57\uff4e \uff13"),
]


def real_looking_captions(count: int, seed: int = 0) -> list[str]:
    """`count` captions, every second one long; the same for the same seed."""
    captions = []
    for index in range(count):
        rng = random.Random(f"{seed}/{index}")
        _, short, long = plan_and_texts(seed, "train", index)
        text = long if index % 2 else short.text
        for share, dress in DRESSES:
            if rng.random() < share:
                text = dress(rng, text)
        captions.append(text)
    return captions


def count_different_ids(processor: LRSCLIPProcessor, captions: Sequence[str]) -> tuple[list[str], int]:
    """The captions whose ids differ between processor and plain tokenizer, and how many differ without its cleaning."""
    published = processor.encode_text(captions)
    cut = {"truncation": True, "max_length": processor.tokenizer.model_max_length}
    plain = plain_tokenizer(processor.tokenizer)(captions, **cut)["input_ids"]
    stock = processor.tokenizer(captions, **cut)["input_ids"]
    differ = [text for text, row, wanted in zip(captions, plain, published, strict=True) if row != wanted]
    return differ, sum(row != wanted for row, wanted in zip(stock, published, strict=True))


if __name__ == "__main__":
    of_the_file = LRSCLIPProcessor(LRSCLIPImageProcessor(), tokenizer_from_bpe(sys.argv[1], 248))
    different, uncleaned = count_different_ids(of_the_file, real_looking_captions(10_000))
    print(f"of 10,000 captions {len(different)} get other ids; {uncleaned:,} without the cleaning in tokenizer.json")
    for caption in different[:10]:
        print(repr(caption))
