"""Answers are cleaned of what is not caption, and judged by named checks, each with texts that it finds and texts it leaves."""

from dataclasses import fields
from pathlib import Path

import pytest

from evaluation.benchmarks.aerial_scenes.data_set import plan_and_texts
from evaluation.benchmarks.aerial_scenes.layout import KINDS
from modeling_lrsclip.files.configuration import ConfigurationError, validate
from tests.speed.caption_checks import LONG as LONG_PLANTS
from tests.speed.caption_checks import SHORT as SHORT_PLANTS
from tests.speed.caption_checks import drawn_examples, falsehoods
from training.lrs2m.captioners.prompts import FOLDER, load_prompt
from training.lrs2m.checks.candidate import Candidate, Limits
from training.lrs2m.checks.cleaning import clean_answer
from training.lrs2m.checks.labels import label_scores
from training.lrs2m.checks.named_checks import CHECKS, judge
from training.lrs2m.recipe import ChecksConfig, TextConfig
from training.lrs2m.sources.anchors import Label, anchor_text, labels_caption, plural, position_of


LONG = (
    "The image shows a small harbour. White boats lie along two piers, and a grey road runs behind them from left to "
    "right. In the upper part there are houses with orange roofs between round trees."
)


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        ('Sure! Here is a caption:\n\n"A **red** roof beside the road."', "A red roof beside the road."),
        ("Here\u2019s a caption: a lake.", "A lake."),
        ("**Caption:** A lake.", "A lake."),
        ("```\nA field.\n```", "A field."),
        ("# Description\n\nA field by a *large* lake.", "A field by a large lake."),
        ("The image shows a port. Word count: 12", "The image shows a port."),
        ("Here are the main points:\n- A road\n- A lake.", "A road. A lake."),
        ("1. A road\n2. A lake", "A road. A lake."),
        ("Short caption (18 words): Two planes wait.", "Two planes wait."),
        ("<think>It is a port.</think>\n\u201cTwo ships at a quay.\u201d", "Two ships at a quay."),
        ("Certainly, here's the summary: two ships.", "Two ships."),
        ("Two planes wait.\n\nLet me know if you need more!", "Two planes wait."),
        ('A sign says "Airport" beside a road.', 'A sign says "Airport" beside a road.'),
        ("The caption on the roof reads H: a helipad.", "The caption on the roof reads H: a helipad."),
        ("Here a river meets the sea.", "Here a river meets the sea."),
        ("This is a dense residential area with roads.", "This is a dense residential area with roads."),
        ("A 5*3 grid of tanks", "A 5*3 grid of tanks"),
        (
            "\ufeffA road &amp; a field\u200b, \uff13 \ufb01elds, it\u00e2\u20ac\u2122s dry.",
            "A road & a field, 3 fields, it\u2019s dry.",
        ),
        (LONG, LONG),
    ],
)
def test_cleaning(answer, cleaned):
    assert clean_answer(answer) == cleaned


SEEN = (
    "Two rows of white boats lie along a pier. Behind them a grey road runs from left to right; a narrow track, hardly wider than "
    "a car, branches off. The H of a helipad and an L-shaped hall stand out, with one exception: the corner is empty."
)
GOOD = (LONG, SEEN, "A road crosses from north to south between fields.", "Some planes and many cars at a caf\u00e9.")
# By check: what it finds, and what looks like it and is none.
FIXTURES = {
    "cut_off": ((), ()),
    "refusal": (
        (
            "I'm sorry, but I can't see the image.",
            "I\u2019m sorry, but I can\u2019t assist with that.",
            "As an AI language model I have no access to images.",
            f"{LONG} {SEEN} I cannot provide further details.",
            f"{LONG} It is not possible to determine what the buildings are for.",
            "The image is too blurry to describe.",
            "Please provide the image.",
            "It is unclear whether the area is residential.",
            "No further details can be discerned.",
            "My capabilities do not include viewing images.",
            "The image quality makes it difficult to describe the scene.",
            "There is insufficient information to describe the buildings.",
            "The exact number of vehicles cannot be determined.",
            "It is hard to make out.",
            "Too blurry to describe.",
            "No details are available.",
        ),
        (
            "The track cannot be told from the soil.",
            "It is hard to tell the field from the meadow.",
            "No car can be seen and no bridge is visible.",
            "The lane markings are hard to make out.",
            "No details are visible on the dark roofs.",
            "Some boats are too small to count.",
            "A dark hall without any details lies at the left.",
        ),
    ),
    "error_words": (
        (
            "Error: rate limit exceeded, retry after 20 s.",
            "HTTP 500 Internal Server Error",
            "Boats. ValueError: bad image",
        ),
        ("All roofs are red, with one exception: a white one.", "The road is exceeded in width by the river."),
    ),
    "special_tokens": (("Two ships at a quay.<|im_end|>", "<s> Two ships.", "[INST] Two ships"), ("The area < 2 ha",)),
    "role_names": (
        ("ASSISTANT: Two ships lie here.", "Two ships lie here. User: thanks", "Two ships. ### Response: a road"),
        ("There are two models: a jet and a glider.", "It has one user: the port."),
    ),
    "prompt_echo": (
        ("Keep to what the caption says about the scene and describe it.", "Two ships. Do not use lists or headings."),
        ("This is a remote sensing image, seen from above, of the main road and its bridges.",),
    ),
    "boilerplate": (
        (
            "According to the provided caption and the list of objects, two ships lie here.",
            "Based on the given image, a road runs there.",
            "Two ships, as mentioned in the list, lie here.",
            "You are a helpful assistant.",
            "As described, the harbour has two piers.",
            "The labels indicate a storage tank.",
            "The user wants a harbour described.",
            "Note that two ships lie here.",
            "I see two ships.",
        ),
        (
            "The image shows two ships.",
            "A list of the roofs would be long.",
            "The picture is dark.",
            "Two ships lie near the white labels on the tarmac.",
        ),
    ),
    "tags": (("<p>Two ships</p>", "Two ships<br/>", "Two &nbsp; ships"), ("A & B are two ships.",)),
    "urls": (
        ("See https://example.org for two ships.", "www.ships.net", "tile_01.png shows ships"),
        ("Two ships.Then one",),
    ),
    "structure": (
        (
            '{"caption": "Two ships"}',
            "| ships | two |",
            "Objects: two ships. Colours: white.",
            "## Ships",
            "[two ships]",
            "~~Two~~ ships",
        ),
        ("One thing stands out: a ship.", "A 5 - 10 m wide road", "A road ~10 m wide"),
    ),
    "script": (
        ("Boats at a pier \u8239\u8236.", "Two ships \U0001f6a2", "\u0414\u0432\u0430"),
        ("A caf\u00e9 at 25\u00b0, 3 km\u00b2 \u2014 10\u00d720 m",),
    ),
    "language": (
        (
            "Une grande route traverse le village et les maisons ont des toits rouges, derri\u00e8re il y a des arbres.",
            "Un aeropuerto con muchos aviones y una pista.",
            f"{LONG} El puerto est\u00e1 junto a una carretera.",
            "zwei Schiffe liegen auf dem Wasser",
        ),
        ("Two ships.", "Red roofs, green lawns, grey streets.", "White delivery van, grey roof."),
    ),
    "repetition": (
        (
            "The boats boats boats boats lie at the pier.",
            " ".join(["A white boat lies at the pier near the road"] * 6),
            "A white boat lies at the pier. It is long. A white boat lies at the pier.",
        ),
        ("A boat is here. A boat is here.",),
    ),
    "length": (("", "N/A", "none.", "Ship"), ("Two ships.",)),
    "unknowable": (
        (
            "The port of Rotterdam lies here.",
            "It was taken in 2017.",
            "A lake lies in the north.",
            "Taken in March, it is wet.",
            "A stadium lies in the south-east.",
            "A north-facing hall has a red roof.",
        ),
        (
            "A path leads from the north-east to the south-west past a Ferris wheel.",
            "A north-south road is grey.",
            "A track runs from east to west.",
            "A 2000 m long runway, a T-shaped pier, an H.",
            'A sign says "Airport".',
        ),
    ),
}
LABELS = [Label("plane", (x / 4, 0, x / 4 + 0.2, 0.2)) for x in range(3)] + [Label("storage tank", (0, 0.8, 0.2, 1))]
LABELS.append(Label("runway"))
TRUE = "Three white jets stand on the runway, two of them at its end, and one tank is seen at the lower left."
LABEL_FIXTURES = {
    "negated_class": (
        (
            "There is no plane and no runway, only a tank.",
            "Planes are absent; a tank stands at a runway.",
            "Two tanks without any plane or runway.",
            "No large, white planes wait here.",
            "A field without trees, planes or tanks.",
        ),
        (
            "On a field without trees, planes wait in rows.",
            TRUE,
            "No car stands beside the planes.",
            "No planes stand on the runway, but three planes wait beside it.",
        ),
    ),
    "missing_class": (
        ("Three planes and a tank.", "Three planes wait at the gate."),
        (TRUE, "Aircraft, a fuel tank, an airstrip."),
    ),
    "count": (
        (
            "27 planes wait on the runway.",
            "Twenty-seven planes wait.",
            "Thirty planes.",
            "Forty two planes.",
            "A hundred planes.",
            "1,000 planes.",
            "Several hundred planes.",
            "Dozens of planes.",
            "Two planes wait.",
            "Two storage tanks.",
        ),
        (
            TRUE,
            "Two planes wait in the upper left.",
            "About three planes",
            "Several planes",
            "Two rows of planes",
            "Three planes and two cars.",
            "Two cars, planes and a runway are visible.",
            "One plane taxis on the runway. Two planes wait at the gate.",
            "One plane taxis on the runway. The planes are white.",
            "A 30 m long plane.",
            "A two lane runway.",
        ),
    ),
    "excluded_class": (("Three planes and two ships.", "A blue boat lies there."), (TRUE, "Three planes, no ships.")),
    "invented_landmark": (
        ("Three planes near a stadium.",),
        (TRUE, "There is no stadium.", "Three planes at an airport."),
    ),
}
AGREEMENT = (
    (
        "A desert with sand dunes.",
        "Two planes at the pier.",
        "A stadium beside white boats.",
        "A remote sensing image.",
    ),
    (
        "White ships at two piers.",
        "A harbor with roads and orange roofs.",
        "Small boats and some trees behind a road.",
    ),
)


def candidate(text: str, **known) -> Candidate:
    known = {"which": "long", "finished": True, "instructions": INSTRUCTIONS} | known
    return Candidate(text, **known)


INSTRUCTIONS = " ".join(
    load_prompt(TextConfig(captioner="x", prompt=str(path)), Path()).instructions
    for path in sorted(FOLDER.glob("*.yaml"))
)


@pytest.mark.parametrize("name", FIXTURES)
def test_forms(name):
    bad, good = FIXTURES[name]
    for text in bad:
        assert CHECKS[name](candidate(text)), text
    for text in (*good, *GOOD):
        assert CHECKS[name](candidate(text)) is None, text


@pytest.mark.parametrize("name", LABEL_FIXTURES)
def test_truth_from_labels(name):
    known = {
        "labels": LABELS,
        "classes": ["plane", "storage tank", "ship", "runway"],
        "limits": Limits(anchor_share=0.8),
    }
    bad, good = LABEL_FIXTURES[name]
    for text in bad:
        assert CHECKS[name](candidate(text, **known)), text
    for text in good:
        assert CHECKS[name](candidate(text, **known)) is None, text


def test_mentions_of_a_class_add_up():
    planes = [Label("plane", (0, 0, 0.1, 0.1))]
    for text, fewest, most in (
        ("Two planes taxi. Two jets wait.", 2, 4),
        ("Two planes taxi. Some jets wait.", 2, 9),
        ("Two planes taxi. Two jets wait in the upper left.", 2, 9),
    ):
        kept = [n for n in range(1, 10) if not CHECKS["count"](candidate(text, labels=planes * n))]
        assert kept == [*range(fewest, most + 1)], text


def test_vehicles_may_be_cars_or_trucks():
    trucks = [Label("truck", (0, 0, 0.1, 0.1))] * 2
    known = {"labels": trucks, "classes": ["car", "truck"]}
    assert CHECKS["excluded_class"](candidate("Trucks and other vehicles wait.", **known)) is None
    assert CHECKS["excluded_class"](candidate("Trucks and cars wait.", **known)) == "car"
    labels = [*trucks, Label("car", (0.5, 0.5, 0.6, 0.6))]
    assert CHECKS["count"](candidate("Three vehicles wait.", labels=labels)) is None
    assert CHECKS["count"](candidate("Three automobiles wait.", labels=labels))
    assert (
        CHECKS["missing_class"](candidate("Three vehicles wait.", labels=labels, limits=Limits(anchor_share=1)))
        is None
    )


def test_agreement():
    bad, good = AGREEMENT
    for text in bad:
        assert CHECKS["agreement"](candidate(text, which="short", other=LONG)), text
        assert CHECKS["agreement"](candidate(LONG, other=text)) or text == "A remote sensing image.", text
    for text in good:
        assert CHECKS["agreement"](candidate(text, which="short", other=LONG)) is None, text
    assert CHECKS["agreement"](candidate("A dense forest.", which="short")) is None


def test_every_prompt_is_noticed_where_it_is_echoed():
    for path in FOLDER.glob("*.yaml"):
        prompt = load_prompt(TextConfig(captioner="x", prompt=str(path)), Path())
        for words in (prompt.system, prompt.user * (path.stem != "verify")):  # which is a claim and four words
            if not words:
                continue
            assert CHECKS["prompt_echo"](candidate(clean_answer(words), instructions=prompt.instructions)), words


def test_limits_and_ends():
    def found(text, finished=True, **limits):
        fault, _ = judge(candidate(text, finished=finished, limits=Limits(**limits)), ChecksConfig())
        return fault and tuple(fault)

    assert found("Five words are just enough", max_words=5) is None
    assert found("Six words are one too many", max_words=5) == ("length", "over 5 words")
    assert found("A road", finished=False) == ("cut_off", "ended by max_tokens")
    assert found(LONG, min_tokens=60) == ("length", "under 60 tokens")
    assert found(LONG, max_tokens=20) == ("length", "over 20 tokens")


def test_levels():
    """`warn` keeps and tells, `off` does not look; YAML's bare on and off are understood, other words are mistakes."""
    spoilt = candidate("Two ships lie here, see www.ships.net.")
    assert judge(spoilt, ChecksConfig())[0].check == "urls"
    assert judge(spoilt, ChecksConfig(urls="warn")) == (None, ["urls"])
    assert judge(spoilt, validate(ChecksConfig, {"urls": False, "tags": True})) == (None, [])
    with pytest.raises(ConfigurationError, match="urls='maybe'.*\n.*url is not a field; did you mean urls"):
        validate(ChecksConfig, {"urls": "maybe", "url": "on"})
    over_the_set = {"repeated_answer", "repeated_row"}
    assert {one.name for one in fields(ChecksConfig)} == {*CHECKS, *over_the_set}
    assert {*FIXTURES, *LABEL_FIXTURES, "agreement"} == set(CHECKS)  # each has fixtures


def test_true_captions_of_drawn_scenes_pass():
    for index in range(40):
        scene, short, long = plan_and_texts(3, "train", index)
        boxes = [
            ((item.cell % 3) / 3, item.cell // 3 / 3, (item.cell % 3 + 1) / 3, (item.cell // 3 + 1) / 3)
            for item in scene.objects
        ]
        labels = [Label(item.kind, box) for item, box in zip(scene.objects, boxes)] + [Label(scene.class_name)]
        known = {"labels": labels, "classes": KINDS, "limits": Limits(anchor_share=1)}
        assert judge(candidate(long, other=short.text, **known), ChecksConfig(invented_landmark="on"))[0] is None, long
        assert judge(candidate(short.text, which="short", other=long, **known), ChecksConfig())[0] is None, short.text


def test_planted_falsehoods_are_found():
    """All kinds, but for those that only the image tells (claims are asked for them) and unlucky choices of another caption."""
    seen = {kind: int(count) for kind, _, count, *_ in falsehoods(drawn_examples(5), 5)}
    blind = ("a wrong colour", "left and right exchanged")
    assert {*LONG_PLANTS, *SHORT_PLANTS} == set(seen) and [seen[kind] for kind in blind] == [0, 0]
    chance = ("a sentence repeated", "a short caption of another image")
    assert {kind: count for kind, count in seen.items() if count < 100} == {
        kind: seen[kind] for kind in (*blind, *chance) if seen[kind] < 100
    }
    assert all(seen[kind] >= 40 for kind in chance)


def test_precision_and_recall_of_the_classes_named():
    assert label_scores("Two ships, no tank, three planes.", LABELS, ["ship", "plane"]) == (1 / 2, 1 / 3)
    assert label_scores("Three planes near a stadium.", LABELS, []) == (1 / 2, 1 / 3)
    assert label_scores("A road.", LABELS, []) == (None, 0)
    assert label_scores("A road.", [], ["road"]) == (None, None)
    examples = [
        ("Two storage tanks and a bus.", "storage tanks"),
        ("A baseball diamond.", "baseballdiamond"),
        ("Lorries wait.", "lorry"),
        ("Airplanes.", "air plane"),
    ]
    assert [label_scores(text, [Label(name)], [])[1] for text, name in examples] == [1, 1, 1, 1]
    assert label_scores("A scar in the ground, two green houses.", [Label("car"), Label("greenhouse")], [])[1] == 0


def test_labels_become_anchors():
    labels = [
        Label("car", (0, 0, 0.1, 0.1)),
        Label("car", (0.9, 0.9, 1, 1)),
        Label("bus", (0.45, 0.45, 0.55, 0.55)),
        Label("harbour"),
    ]
    assert anchor_text(labels, 6) == "2 cars (upper left, lower right), 1 bus (centre), harbour"
    assert anchor_text(labels, 1) == "2 cars (upper left, elsewhere), 1 bus (centre), harbour"
    assert anchor_text(labels, 0) == "2 cars, 1 bus, harbour"
    assert labels_caption(labels) == "An aerial image of two cars, a bus and harbour."
    assert [position_of((x, y, x, y)) for x, y in ((0.5, 0.1), (0.1, 0.5), (0.9, 0.5), (0.5, 0.9))] == [
        "upper middle", "left edge", "right edge", "lower middle",
    ]  # fmt: skip
    assert [plural(word) for word in ("bus", "bridge", "lorry", "bush", "water", "roundabout")] == [
        "buses", "bridges", "lorries", "bushes", "water", "roundabouts",
    ]  # fmt: skip
