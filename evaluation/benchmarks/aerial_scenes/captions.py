"""Short and long captions of a scene's plan, and how well the short ones can be told apart.

Every sentence of a long caption stands on its own (no pronoun refers to another sentence), so the sentences keep
their meaning in any order. Each object's sentence carries facts that no other sentence repeats in full.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .layout import Scene, SceneLine, SceneObject, pick, pick_number


# (singular, plural) with room for the colour
NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    "house": (("{} house", "{} houses"), ("{} cottage", "{} cottages")),
    "tank": (("{} storage tank", "{} storage tanks"), ("{} tank", "{} tanks")),
    "boat": (("{} boat", "{} boats"), ("{} ship", "{} ships")),
    "plane": (("{} plane", "{} planes"), ("{} aircraft", "{} aircraft")),
    "court": (("{} tennis court", "{} tennis courts"), ("{} court", "{} courts")),
    "turbine": (("{} wind turbine", "{} wind turbines"), ("{} turbine", "{} turbines")),
    "greenhouse": (("{} greenhouse", "{} greenhouses"), ("{} glasshouse", "{} glasshouses")),
    "tent": (("{} tent", "{} tents"), ("{} pavilion", "{} pavilions")),
    "trees": (("clump of {} trees", "clumps of {} trees"), ("group of {} trees", "groups of {} trees")),
    "cars": (("block of {} cars", "blocks of {} cars"), ("set of {} cars", "sets of {} cars")),
    "stadium": (("{} stadium", "{} stadiums"), ("{} arena", "{} arenas")),
    "warehouse": (("{} warehouse", "{} warehouses"), ("{} factory", "{} factories")),
}

# (singular, plural)
VERBS: dict[str, tuple[tuple[str, str], ...]] = {
    "house": (("stands", "stand"), ("is built", "are built")),
    "tank": (("stands", "stand"), ("is placed", "are placed")),
    "boat": (("floats", "float"), ("lies", "lie")),
    "plane": (("is parked", "are parked"), ("waits", "wait")),
    "court": (("lies", "lie"), ("is marked out", "are marked out")),
    "turbine": (("turns", "turn"), ("stands", "stand")),
    "greenhouse": (("stands", "stand"), ("is built", "are built")),
    "tent": (("is pitched", "are pitched"), ("stands", "stand")),
    "trees": (("grows", "grow"), ("stands", "stand")),
    "cars": (("is parked", "are parked"), ("waits", "wait")),
    "stadium": (("lies", "lie"), ("is built", "are built")),
    "warehouse": (("stands", "stand"), ("is placed", "are placed")),
}

# names of the cells 0..8, row by row
PLACES = (
    ("upper left", "top left"),
    ("upper middle", "top centre"),
    ("upper right", "top right"),
    ("middle left", "centre left"),
    ("middle", "centre"),
    ("middle right", "centre right"),
    ("lower left", "bottom left"),
    ("lower middle", "bottom centre"),
    ("lower right", "bottom right"),
)

NUMBERS = {2: "two", 3: "three", 6: "six", 7: "seven", 8: "eight"}

OPENINGS = (
    "This aerial image shows {a_class}.",
    "The picture shows {a_class} seen from above.",
    "This is a view of {a_class} taken from the air.",
    "Seen from above, the scene is {a_class}.",
    "An aerial photo of {a_class} with several objects.",
)

# how one says that something is there
IN_CLASS = {"airport": "at", "campsite": "at", "farm": "on", "oil depot": "at", "sports park": "at", "wind farm": "on"}

GROUND_PHRASES = {
    "asphalt": "dark asphalt",
    "concrete": "pale concrete",
    "crops": "a field of crops",
    "forest": "a dark forest floor",
    "grass": "short grass",
    "gravel": "rough gravel",
    "meadow": "a wild meadow",
    "sand": "bright sand",
    "soil": "ploughed soil",
    "water": "open water",
}
GROUND_SENTENCES = (
    "All around the objects there is {ground}.",
    "Most of the area is covered by {ground}.",
    "The space between the objects is {ground}.",
    "In the background there is {ground}.",
    "The whole {name} lies on {ground}.",
)

LINE_NOUNS = {
    "road": ("grey road", "road with white marks"),
    "river": ("narrow river", "winding river"),
    "railway": ("railway line", "railway track"),
    "path": ("sandy path", "narrow path"),
}
LINE_SENTENCES = {
    "vertical": (
        "A {line} runs from top to bottom through the {side} half.",
        "On the {side} side, a {line} crosses the scene from north to south.",
        "There is a {line} in the {side} half, going up and down.",
    ),
    "horizontal": (
        "A {line} runs from side to side through the {side} half.",
        "In the {side} part, a {line} crosses the scene from east to west.",
        "There is a {line} in the {side} half, going from one side to the other.",
    ),
}
LINE_SIDES = {"vertical": ("left", "right"), "horizontal": ("upper", "lower")}
NO_LINE = ("No road or river crosses the scene.", "There is no road, river or railway in this picture.")

EMPTY_CELLS = (
    "Nothing stands in the {place}.",
    "The {place} is empty.",
    "No object stands in the {place}.",
    "There is an open space in the {place}.",
)

FILLERS = (
    "Every object casts a short shadow.",
    "The light is clear and the shadows are short.",
    "The objects are spread over the whole scene.",
    "The picture was taken from above on a clear day.",
    "All objects are easy to see from the air.",
)
COUNTS = (
    "In all, {number} objects can be counted.",
    "There are {number} objects in the picture.",
    "The scene holds {number} objects.",
)

BESIDE = {
    (0, -1): ("above", "just above"),
    (0, 1): ("below", "just below"),
    (-1, 0): ("left of", "to the left of"),
    (1, 0): ("right of", "to the right of"),
}


@dataclass(frozen=True)
class ShortText:
    """A short caption and the facts it states: the class and (kind, colour or "") of the objects it mentions."""

    text: str
    facts: tuple[tuple[str, str], ...]


def with_article(phrase: str) -> str:
    """`a` or `an` before a phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def sentence(text: str) -> str:
    """The text with a capital at its start."""
    return text[0].upper() + text[1:]


def noun_phrase(rng: random.Random, kind: str, colour: str, count: int = 1) -> str:
    """
    `a red house`, `two clumps of blue trees`, or without a colour `a house`.

    Args:
        rng: chooses among the words for the kind.
        kind: of object.
        colour: empty for none.
        count: of objects.

    Returns:
        The phrase with its article or number.
    """
    singular, plural = pick(rng, NOUNS[kind])
    phrase = (singular if count == 1 else plural).format(colour).replace("  ", " ").strip()
    return with_article(phrase) if count == 1 else f"{NUMBERS[count]} {phrase}"


def _in_place(rng: random.Random, cell: int) -> str:
    phrase = f"in the {pick(rng, PLACES[cell])}"
    chance = rng.random()
    if cell in (0, 2, 6, 8) and chance < 0.25:
        return f"{phrase} corner"
    if chance > 0.85:
        return f"{phrase} of the {pick(rng, ('image', 'picture', 'scene'))}"
    return phrase


def _relation(rng: random.Random, scene: Scene, item: SceneObject) -> str:
    """Say how an object lies to one of its neighbours, as `, just above a tank`; empty where it has none."""
    column, row = item.cell % 3, item.cell // 3
    neighbours = []
    for other in scene.objects:
        step = (column - other.cell % 3, row - other.cell // 3)
        if step in BESIDE and other.kind != item.kind:
            neighbours.append((other, step))
    if not neighbours:
        return ""
    other, step = pick(rng, neighbours)
    return f", {pick(rng, BESIDE[step])} {noun_phrase(rng, other.kind, '')}"


def _single(rng: random.Random, scene: Scene, item: SceneObject) -> str:
    """The sentence about an object that has no twin."""
    thing = noun_phrase(rng, item.kind, item.colour)
    verb = pick(rng, VERBS[item.kind])[0]
    where = _in_place(rng, item.cell)
    relation = _relation(rng, scene, item) if rng.random() < 0.8 else ""
    sentences = (
        f"{thing} {verb} {where}{relation}.",
        f"{where}, there is {thing}{relation}.",
        f"{where} you can see {thing}{relation}.",
        f"there is {thing} {where}{relation}.",
        f"{thing} can be seen {where}{relation}.",
    )
    pattern = pick_number(rng, 7)
    if pattern < 5:
        return sentences[pattern]
    cell = pick(rng, PLACES[item.cell])
    return f"the {cell} holds {thing}{relation}." if pattern == 5 else f"{thing} fills the {cell}{relation}."


def _several(rng: random.Random, group: Sequence[SceneObject]) -> str:
    """The sentence about two or three objects of one kind and colour."""
    kind, colour = group[0].kind, group[0].colour
    things = noun_phrase(rng, kind, colour, len(group))
    verb = pick(rng, VERBS[kind])[1]
    cells = [item.cell for item in group]
    rng.shuffle(cells)
    phrases = [f"in the {pick(rng, PLACES[cell])}" for cell in cells]
    listed = ", ".join(phrases[:-1]) + f" and {phrases[-1]}"
    each = ", ".join(f"one {phrase}" for phrase in phrases[:-1]) + f" and one {phrases[-1]}"
    sentences = (
        f"{things} {verb} here, {each}.",
        f"{things} can be seen, {each}.",
        f"there are {things} {listed}.",
        f"{listed} there are {things}.",
        f"{listed} you can see {things}.",
    )
    return pick(rng, sentences)


def _line_sentence(rng: random.Random, line: SceneLine | None) -> str:
    if line is None:
        return pick(rng, NO_LINE)
    pattern = pick(rng, LINE_SENTENCES[line.orientation])
    return pattern.format(line=pick(rng, LINE_NOUNS[line.kind]), side=LINE_SIDES[line.orientation][line.gap])


def write_long_text(rng: random.Random, scene: Scene) -> str:
    """A long caption: a general opening, then one sentence for each fact of the scene in random order."""
    a_class = with_article(scene.class_name)
    sentences = [_line_sentence(rng, scene.line)]
    pattern = pick(rng, GROUND_SENTENCES)
    sentences.append(pattern.format(name=scene.class_name, ground=GROUND_PHRASES[scene.ground]))
    for group in scene.groups():
        sentences.append(_single(rng, scene, group[0]) if len(group) == 1 else _several(rng, group))
    for cell in rng.sample(scene.empty_cells(), 2 if rng.random() < 0.3 and len(scene.objects) < 8 else 1):
        if rng.random() < 0.85:
            sentences.append(pick(rng, EMPTY_CELLS).format(place=pick(rng, PLACES[cell])))
    if rng.random() < 0.5:
        sentences.append(pick(rng, COUNTS).format(number=NUMBERS[len(scene.objects)]))
    if rng.random() < 0.7:
        sentences.append(pick(rng, FILLERS))
    rng.shuffle(sentences)
    sentences.insert(0, pick(rng, OPENINGS).format(a_class=a_class))
    return " ".join(sentence(text) for text in sentences)


def write_short_text(rng: random.Random, scene: Scene) -> ShortText:
    """A short caption: the class, the main objects and one or two others; several scenes may share it."""
    groups = scene.groups()
    others = rng.sample(groups[1:], 2 if rng.random() < 0.3 else 1)
    # (kind, colour, number) of the main objects and of the others; the colour of the last of three is not named
    named = [(group[0].kind, group[0].colour, len(group)) for group in (groups[0], others[0])]
    named += [(group[0].kind, "", len(group)) for group in others[1:]]
    a_class = with_article(scene.class_name)
    in_class = f"{IN_CLASS.get(scene.class_name, 'in')} {a_class}"
    things, *extras = (noun_phrase(rng, *objects) for objects in named)
    extra = " and ".join(extras)
    joined = f"{things}, {extra}" if len(extras) > 1 else f"{things} and {extra}"
    sentences = (
        f"{a_class} with {joined}.",
        f"{joined} {in_class}.",
        f"{things} {in_class}, with {extra}.",
        f"aerial view of {a_class} with {joined}.",
        f"{a_class} from above, with {joined}.",
    )
    facts = ((scene.class_name, "class"), *((kind, f"{colour} x{count}") for kind, colour, count in named))
    return ShortText(sentence(pick(rng, sentences)), facts)


def true_facts(scene: Scene) -> set[tuple[str, str]]:
    """Every fact a short caption could state about a scene."""
    facts = {(scene.class_name, "class")}
    for group in scene.groups():
        facts |= {(group[0].kind, f"{colour} x{len(group)}") for colour in (group[0].colour, "")}
    return facts


def short_text_ceiling(scenes: Sequence[Scene], texts: Sequence[ShortText]) -> dict[str, float]:
    """
    Best expected text-to-image recall (percent) of the short texts among these scenes.

    Nothing tells apart the scenes for which a short text is true, so with n of them the right one is among the first
    k with probability min(1, k / n).

    Args:
        scenes: M plans.
        texts: their M short texts.

    Returns:
        `R@1`, `R@5` and `R@10`.
    """
    holders: dict[tuple[str, str], set[int]] = {}
    for index, scene in enumerate(scenes):
        for fact in true_facts(scene):
            holders.setdefault(fact, set()).add(index)
    matches = [len(set.intersection(*(holders[fact] for fact in text.facts))) for text in texts]
    return {f"R@{k}": 100 * sum(min(1.0, k / count) for count in matches) / len(matches) for k in (1, 5, 10)}
