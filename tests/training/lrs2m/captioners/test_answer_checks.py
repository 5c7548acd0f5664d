"""Answers are cleaned of what is not caption and refused for what a caption must not be."""

import pytest

from training.lrs2m.captioners.answer_checks import Checks, clean_answer, find_fault
from training.lrs2m.sources.anchors import Label, anchor_text, labels_caption, mentioned_share, plural, position_of


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
        (LONG, LONG),
    ],
)
def test_cleaning(answer, cleaned):
    assert clean_answer(answer) == cleaned


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (LONG, None),
        ("", "empty"),
        ("I'm sorry, but I can't see the image.", "refusal"),
        ("I\u2019m sorry, but I can\u2019t assist with that.", "refusal"),
        ("As an AI language model I have no access to images.", "refusal"),
        ("I cannot provide a description of this picture.", "refusal"),
        ("Une grande route traverse le village et les maisons ont des toits rouges, derrière il y a des arbres.", "not English"),
        ("\u8fd9\u662f\u4e00\u4e2a\u6e2f\u53e3\u3002", "not English"),
        ("Boats at a pier \u8239\u8236\u7801\u5934 and a road.", "not English"),
        ("The boats boats boats boats lie at the pier.", "loop"),
        (" ".join(["A white boat lies at the pier near the road"] * 6), "loop"),
        ("A road.", "under 20 tokens"),
        (LONG + " North of it the forest is dense, and some fields in the west are bare, dry and brown after the harvest of the "
         "last summer, with narrow tracks between them.", "over 60 tokens"),
        (LONG.replace("harbour", "place"), "anchors not mentioned"),
    ],
)  # fmt: skip
def test_faults(text, fault):
    checks = Checks(min_tokens=20, max_tokens=60, label_names=("harbour", "helipad"), anchor_share=0.5)
    found = find_fault(text, checks, lambda words: len(words.split()) + 2)
    assert (found or "").split(" of ")[0] == (fault or "")


def test_words_and_ends():
    checks = Checks(max_words=5)
    count = lambda text: len(text.split())  # noqa: E731
    assert find_fault("Five words are just enough", checks, count) is None
    assert find_fault("Six words are one too many", checks, count) == "over 5 words"
    assert find_fault("A road", checks, count, finished=False) == "cut off"


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


def test_mentions_are_found_in_either_number_and_spelling():
    assert mentioned_share("Two storage tanks and a bus.", ["storage tank", "buses", "lorry"]) == pytest.approx(2 / 3)
    assert mentioned_share("A baseball diamond.", ["baseballdiamond"]) == 1
    assert mentioned_share("Lorries wait; airplanes too.", ["lorry", "air plane"]) == 1
    assert mentioned_share("A scar in the ground.", ["car"]) == 0
    assert mentioned_share("anything", []) == 1
