"""
Planted falsehoods that the checks of captions find, and true captions that they reject.

    python -m tests.speed.caption_checks [--tiles FOLDER] [--rows 50] [--true 300]

plants each kind of falsehood into captions of drawn scenes, whose truth is known, and with `--tiles` (a folder with images and
captions.jsonl: image, class_name, short_text, long_text) into those of real tiles. A check at level `warn` counts as finding.
Claims are asked back over HTTP from a judge that knows the drawn scenes: what is left is what the claims themselves miss.
"""

import argparse
import asyncio
import hashlib
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.benchmarks.aerial_scenes.data_set import plan_and_texts, scene_row
from evaluation.benchmarks.aerial_scenes.layout import COLOURS, KINDS, Scene
from tests.modeling_lrsclip.real_looking_captions import real_looking_captions
from tests.training.lrs2m.chat_server import ChatRequest, ChatServer
from training.lrs2m.captioners.captioner import AnswerStore, Gate
from training.lrs2m.captioners.openai_compatible import OpenAICaptioner
from training.lrs2m.captioners.prompts import load_prompt
from training.lrs2m.checks.across_rows import MOST_IMAGES, find_repeats
from training.lrs2m.checks.candidate import Candidate, Limits, split_sentences
from training.lrs2m.checks.classes import find_mentions, phrases_of, synonyms_of
from training.lrs2m.checks.cleaning import clean_answer
from training.lrs2m.checks.named_checks import CHECKS
from training.lrs2m.recipe import CaptionerConfig, TextConfig
from training.lrs2m.sources.anchors import Label, plural
from training.lrs2m.sources.images import Picture, read_picture
from training.lrs2m.verify import PROMPT, ClaimCheck


SEED, SIDE = 11, 64
PROMPTS = {
    name: load_prompt(TextConfig(captioner="x", prompt=name), Path()) for name in ("anchor@1", "compress@1", PROMPT)
}
PLACES = (
    "upper left",
    "upper middle",
    "upper right",
    "left edge",
    "centre",
    "right edge",
    "lower left",
    "lower middle",
    "lower right",
)
CANNED = (
    "The image shows an aerial view of an area with buildings, roads and green spaces between them, and the layout of the "
    "streets is regular, with trees on both sides of them and small gardens behind the walls."
)


@dataclass
class Example:
    """An image with its true captions and what is known of it."""

    short: str
    long: str
    labels: list[Label]
    classes: Sequence[str]
    scene: Scene | None = None
    content: bytes = b""  # of the image file


# Each kind of falsehood: which text it is in, and the text made of a true example and another one.
Plant = Callable[[random.Random, Example, Example], str | None]


def after(words: str) -> Plant:
    return lambda rng, one, other: f"{one.long} {words}"


def before(words: str) -> Plant:
    return lambda rng, one, other: f"{words} {one.long}"


def kinds_of(one: Example) -> list[str]:
    return list(dict.fromkeys(label.name for label in one.labels if label.box))


def without(one: Example, names: Sequence[str]) -> str:
    """The long caption without the sentences that name some classes."""
    phrases = phrases_of(tuple(names), "related")
    return " ".join(sentence for sentence in split_sentences(one.long) if not find_mentions(sentence, phrases))


def _count(rng: random.Random, one: Example, number: str) -> str | None:
    return (
        f"{one.long} In all, {number} {plural(rng.choice(kinds_of(one)))} can be counted." if kinds_of(one) else None
    )


def _denied(rng: random.Random, one: Example, other: Example) -> str | None:
    if not kinds_of(one):
        return None
    names = rng.sample(kinds_of(one), 2)
    return f"{without(one, names)} There is no {names[0]} and no {names[1]}."


def _halved(rng: random.Random, one: Example, other: Example) -> str | None:
    names = kinds_of(one)
    return without(one, rng.sample(names, (len(names) + 1) // 2)) if names else None


def _absent_class(rng: random.Random, one: Example, other: Example) -> str | None:
    absent = [name for name in one.classes if name not in kinds_of(one) and name != "stadium"]
    return f"{one.long} There are two {plural(rng.choice(absent))} beside it." if absent else None


def _stadium(rng: random.Random, one: Example, other: Example) -> str | None:
    return None if "stadium" in kinds_of(one) else f"{one.long} A large stadium stands in the corner."


def _colour(rng: random.Random, one: Example, other: Example) -> str | None:
    if one.scene is None:
        return None
    used = {item.colour for item in one.scene.objects}
    new = rng.choice([colour for colour in COLOURS if colour not in used])
    return re.sub(rf"\b{one.scene.objects[0].colour}\b", new, one.long)


def _mirrored(rng: random.Random, one: Example, other: Example) -> str | None:
    if one.scene is None:
        return None
    swap = {"left": "right", "right": "left"}
    return re.sub(r"\b(left|right)\b(?! of| to)", lambda word: swap[word[1]], one.long)


LONG: dict[str, Plant] = {
    "the prompt echoed": after(PROMPTS["anchor@1"].instructions.partition("Take the list")[2].strip()),
    "a system prompt": before("You are a helpful assistant that describes remote sensing images."),
    "HTML": lambda rng, one, other: f"<p>{one.long}</p>",
    "a JSON wrapper": lambda rng, one, other: json.dumps({"caption": one.long}),
    "a Markdown table": lambda rng, one, other: f"| object | number |\n|---|---|\n| road | 1 |\n{one.long}",
    "an end-of-turn token": after("<|im_end|>"),
    "a role name": before("ASSISTANT:"),
    "a URL": after("See https://maps.example.org/tile for more."),
    "words about the task": before("According to the provided caption and the list of objects, this is the scene."),
    "an error message": lambda rng, one, other: f"Error: rate limit exceeded, retry after 20 s. {one.long[:200]}",
    "a refusal": before("I'm sorry, but I cannot see the image."),
    "a refusal at the end": after("I cannot provide further details."),
    "a soft refusal": after("It is difficult to determine what the buildings are for without more context."),
    "a Chinese sentence": after("\u8fd9\u662f\u4e00\u4e2a\u6e2f\u53e3\u3002"),
    "an emoji": after("A fine view \U0001f6e9\ufe0f."),
    "a Spanish sentence": after("Hay muchos \u00e1rboles cerca de la carretera."),
    "a sentence repeated": lambda rng, one, other: f"{one.long} {split_sentences(one.long)[1]}",
    "a place name": after("It lies near the centre of Rotterdam."),
    "a date": after("The picture was taken in June 2017."),
    "the north": after("A hill rises in the north."),
    "one answer for all": lambda rng, one, other: CANNED,
    "nearly one answer for all": lambda rng, one, other: f"{CANNED} It is area {rng.randrange(10**6)}.",
    "a count in digits": lambda rng, one, other: _count(rng, one, "27"),
    "a count in words": lambda rng, one, other: _count(rng, one, rng.choice(["seven", "nine", "twelve"])),
    "labelled classes denied": _denied,
    "half the labelled classes": _halved,
    "a class that the labels exclude": _absent_class,
    "an invented stadium": _stadium,
    "another image's long caption": lambda rng, one, other: other.long,
    "a wrong colour": _colour,
    "left and right exchanged": _mirrored,
}  # fmt: skip
SHORT: dict[str, Plant] = {
    "N/A for a short caption": lambda rng, one, other: "N/A",
    "a Spanish short caption": lambda rng, one, other: "Un aeropuerto con muchos aviones y una pista.",
    "a short caption of another image": lambda rng, one, other: other.short,
    "a short caption without content": lambda rng, one, other: "A remote sensing image seen from above.",
    "a refusal for a short caption": lambda rng, one, other: "Unable to determine the main objects.",
}  # fmt: skip


# Falsehoods about the image, for which its judge is asked.
OF_THE_IMAGE = [*LONG][[*LONG].index("a count in digits") :]


def drawn_examples(count: int, images: bool = False) -> list[Example]:
    examples = []
    for index in range(count):
        scene, short, long = plan_and_texts(SEED, "test", index)
        boxes = [(item.cell % 3, item.cell // 3) for item in scene.objects]
        labels = [
            Label(item.kind, (x / 3, y / 3, (x + 1) / 3, (y + 1) / 3)) for item, (x, y) in zip(scene.objects, boxes)
        ]
        content = scene_row(SEED, "test", index, SIDE)["image"]["bytes"] if images else b""
        examples.append(Example(short.text, long, [*labels, Label(scene.class_name)], KINDS, scene, content))
    return examples


def tile_examples(folder: Path) -> list[Example]:
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    return [Example(row["short_text"], row["long_text"], [Label(row["class_name"])], ()) for row in rows]


def candidate(text: str, which: str, one: Example) -> Candidate:
    prompt = PROMPTS["anchor@1" if which == "long" else "compress@1"]
    known = {"instructions": prompt.instructions, "labels": one.labels, "classes": one.classes}
    limits = Limits(anchor_share=0.8) if which == "long" else Limits(max_words=40)
    other = one.short if which == "long" else one.long
    return Candidate(clean_answer(text), which, other=other, limits=limits, **known)


def found_by(text: str, which: str, one: Example) -> list[str]:
    judged = candidate(text, which, one)
    return [name for name, find in CHECKS.items() if find(judged)]


def repeated(texts: Sequence[str]) -> list[bool]:
    """Which of some long answers, each of another image, serve too many."""
    rows = [
        {
            "image_sha256": hashlib.sha256(str(index).encode()).hexdigest(),
            "long_text": text,
            "short_text": "",
            "long_captioner": "m",
        }
        for index, text in enumerate(texts)
    ]
    with tempfile.TemporaryDirectory() as work:
        return (find_repeats(iter(rows), len(rows), Path(work)).images > MOST_IMAGES).tolist()


class Judge:
    """Answers questions about drawn scenes as one that sees them perfectly; of what is no object of theirs it is not sure."""

    def __init__(self, examples: Sequence[Example]):
        self.scenes = {one.content: one.scene for one in examples}
        self.kinds = {phrase: kind for kind in KINDS for phrase in synonyms_of(kind, related=False)}
        self.kinds |= {"tennis court": "court", "tree": "trees", "wind turbine": "turbine", "storage tank": "tank"}

    def __call__(self, request: ChatRequest) -> str:
        import base64

        scene = self.scenes[base64.b64decode(request.image.partition(",")[2])]
        (mention,) = find_mentions(request.text.partition("?")[0], self.kinds) or (None,)
        if mention is None:
            return "I cannot tell."
        kind = self.kinds[mention.phrase]
        there = [item for item in scene.objects if item.kind == kind and mention.colour in (None, item.colour)]
        if mention.position:
            there = [item for item in there if _lies_in(item.cell, mention.position)]
        return "Yes." if len(there) >= (mention.number or 1) else "No."


def _lies_in(cell: int, position: str) -> bool:
    words = position.replace("top", "upper").replace("bottom", "lower").replace("center", "centre").split()
    row, column = divmod(cell, 3)
    rows = {"upper": 0, "lower": 2}
    columns = {"left": 0, "right": 2}
    return all(rows.get(word, row) == row and columns.get(word, column) == column for word in words) and (
        row == 1 or any(word in rows for word in words) or "half" in words
    )


async def denied_claims(texts: Sequence[str], examples: Sequence[Example]) -> list[bool]:
    """Whether the judge denies a claim of each text."""
    pictures: list[Picture] = [read_picture(one.content, 1) for one in examples]
    with tempfile.TemporaryDirectory() as work, ChatServer(answer=Judge(examples)) as server:
        gate = Gate()
        captioner = OpenAICaptioner(CaptionerConfig(kind="openai", model="judge", base_url=server.url))
        answers = AnswerStore(Path(work) / "answers.sqlite", gate)
        try:
            check = ClaimCheck(captioner, PROMPTS[PROMPT], answers, gate, 16)
            columns = await check.score(pictures, [{"long_text": text} for text in texts])
        finally:
            answers.close()
            await captioner.close()
    return [(one["claims_confirmed"] if one["claims_confirmed"] is not None else 1) < 1 for one in columns]


def falsehoods(examples: Sequence[Example], rows: int) -> Iterator[list[str]]:
    """Table rows: kind, planted, share found by any check, the checks and their shares, share found by claims."""
    for which, plants in (("long", LONG), ("short", SHORT)):
        for kind, plant in plants.items():
            rng = random.Random(kind)
            planted = []
            for index in range(rows):
                one, other = examples[index % len(examples)], examples[(index * 7 + 3) % len(examples)]
                if (text := plant(rng, one, other)) is not None and text != getattr(one, which):
                    planted.append((text, one))
            if not planted:
                continue
            flags = [found_by(text, which, one) for text, one in planted]
            if which == "long":
                for names, again in zip(flags, repeated([clean_answer(text) for text, _ in planted])):
                    names += ["repeated_answer"] * again
            by_check = Counter(name for names in flags for name in names)
            shares = ", ".join(f"{name} {100 * times / len(flags):.0f}" for name, times in by_check.most_common(4))
            claims = ""
            if kind in OF_THE_IMAGE and planted[0][1].content:
                texts, ones = zip(*planted)
                denied = asyncio.run(denied_claims(texts, ones))
                claims = f"{100 * sum(denied) / len(denied):.0f}"
            yield [kind, str(len(planted)), f"{100 * sum(map(bool, flags)) / len(flags):.0f}", shares, claims]


def true_captions(count: int, tiles: Sequence[Example]) -> Iterator[list[str]]:
    """Table rows: captions, how many, how many are rejected and by which checks."""
    drawn = drawn_examples(count)
    unlabelled = Example("", "", [], ())
    sets: dict[str, list[tuple[str, str, Example]]] = {
        "drawn scenes, long, with labels": [(one.long, "long", one) for one in drawn],
        "drawn scenes, short, with labels": [(one.short, "short", one) for one in drawn],
        "captions in the style of RSICD and RSITMD": [(text, "short", unlabelled) for text in styled_captions(count)],
        "real-looking (entities, curly quotes, Markdown; 2 % spoilt)": [
            (text, "long", unlabelled) for text in real_looking_captions(2 * count)
        ],
        "real tiles, long": [(one.long, "long", one) for one in tiles],
        "real tiles, short": [(one.short, "short", one) for one in tiles],
    }
    for name, texts in sets.items():
        began = time.process_time()
        flags = [[check for check in found_by(*text) if check != "invented_landmark"] for text in texts]
        seconds = time.process_time() - began
        by_check = ", ".join(
            f"{check} {times}" for check, times in Counter(one for names in flags for one in names).items()
        )
        if texts:
            yield [name, str(len(texts)), str(sum(map(bool, flags))), by_check, f"{1e3 * seconds / len(texts):.1f}"]


def styled_captions(count: int) -> list[str]:
    """Sentences as people wrote them for RSICD and RSITMD, by their patterns."""
    things = (
        "planes",
        "buildings",
        "cars",
        "boats",
        "storage tanks",
        "houses",
        "green trees",
        "tennis courts",
        "containers",
    )
    places = (
        "an airport",
        "a dense residential area",
        "a port",
        "a square",
        "a piece of farmland",
        "a school",
        "a river",
        "a park",
    )
    patterns = (
        "many {things} are in {place} near some {others} .",
        "{place} with some {things} is surrounded by many {others} .",
        "several {things} and {others} are around {place} .",
        "some {things} are parked in {place} .",
        "there are two rows of {things} beside {place} .",
        "{things} are neatly arranged on both sides of the road in {place} .",
        "it is {place} with many {things} and a curved road .",
        "four white {things} stand on the bare land near {place} .",
    )
    rng = random.Random(SEED)
    captions: dict[str, None] = {}
    while len(captions) < count:
        filled = rng.choice(patterns).format(
            things=rng.choice(things), others=rng.choice(things), place=rng.choice(places)
        )
        captions[filled] = None
    return list(captions)


def print_table(head: Sequence[str], rows: Iterator[list[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + " :-- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=Path, help="folder with real tiles and captions.jsonl")
    parser.add_argument("--rows", type=int, default=50, help="of each kind of falsehood")
    parser.add_argument("--true", type=int, default=300, help="true captions of each kind")
    options = parser.parse_args()
    tiles = tile_examples(options.tiles) if options.tiles else []
    head = ["falsehood", "planted", "found, %", "by check, %", "claims denied, %"]
    print("\nDrawn scenes")
    print_table(head, falsehoods(drawn_examples(options.rows, images=True), options.rows))
    drawn = drawn_examples(options.rows, images=True)
    denied = asyncio.run(denied_claims([one.long for one in drawn], drawn))
    print(f"\nTrue long captions of which the judge denies a claim: {sum(denied)} of {len(denied)}")
    if tiles:
        print("\nReal tiles")
        print_table(head[:4], (row[:4] for row in falsehoods(tiles, options.rows)))
    print_table(
        ["true captions", "captions", "rejected", "by check", "CPU ms each"], true_captions(options.true, tiles)
    )


if __name__ == "__main__":
    main()
