"""Accuracy counted by hand, ties, prompts of several templates, and the task from images to its table and picture."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from evaluation.benchmarks.class_names import Templates
from evaluation.classification import (
    ClassificationTask,
    class_embeddings,
    classification_metrics,
    classification_table,
    classify,
    confusion_matrix,
)
from evaluation.figures.classification import draw_confusion_matrix
from evaluation.paper import beside_paper
from evaluation.results import markdown
from modeling_lrsclip.encoding import Encoder, embed_images, embed_texts
from modeling_lrsclip.files.atomic import replace_json


TASK = ClassificationTask()


def classify_scores(scores, labels):
    """For a matrix of scores (M images, C classes), by way of embeddings that have it as their product."""
    scores = torch.as_tensor(scores)
    predicted, correct = classify(scores, torch.eye(scores.shape[1]), labels)
    return predicted.tolist(), correct.tolist()


def test_the_most_similar_class_wins():
    predicted, correct = classify_scores([[0.9, 0.1, 0.2], [0.3, 0.2, 0.4], [-0.5, -0.2, -0.3]], [0, 1, 1])
    assert predicted == [0, 2, 1] and correct == [True, False, True]


def test_ties_count_against_the_model():
    scores = [[0.5, 0.5, 0.1], [0.5, 0.5, 0.1], [0.2, 0.7, 0.7], [0.4, 0.4, 0.4]]
    predicted, correct = classify_scores(scores, [0, 1, 0, 1])
    assert correct == [False, False, False, False]
    assert predicted == [1, 0, 1, 0]  # the first class that scores as high, never the right one
    assert classify_scores([[0.7, 0.2, 0.2]], [0]) == ([0], [True])  # wrong classes may tie with each other


def test_a_model_that_cannot_tell_anything_apart_is_never_right():
    predicted, correct = classify(torch.ones(6, 4), torch.ones(3, 4) / 3, [0, 1, 2] * 2)
    assert not correct.any() and (predicted != torch.tensor([0, 1, 2] * 2)).all()


@pytest.mark.parametrize("images, classes", [(1, 45), (40, 3), (5, 7)])
def test_equal_embeddings_tie_exactly_wherever_they_stand(images, classes):
    generator = torch.Generator().manual_seed(0)
    class_embeds = F.normalize(torch.randn(classes, 512, generator=generator), dim=1)
    image_embeds = F.normalize(torch.randn(images, 512, generator=generator), dim=1)
    best = (image_embeds.double() @ class_embeds.double().T).argmax(dim=1)
    assert classify(image_embeds, class_embeds, best).correct.all()
    doubled = torch.cat([class_embeds, class_embeds, class_embeds[:1]])  # float32 sums differ between the copies
    assert not classify(image_embeds, doubled, best).correct.any()


def test_last_bits_do_not_break_a_tie():
    boundary = 0.75 + 2.0**-25  # between two numbers of float32: one score below it, one above
    for bits in ([1e-15, 0, -1e-15], [-1e-15, 0, 1e-15]):
        predicted, correct = classify_scores(torch.tensor([bits], dtype=torch.float64) + boundary, [0])
        assert (predicted, correct) == ([1], [False])


def test_metrics_and_confusion_by_hand():
    labels, predicted = [0, 0, 0, 0, 1, 1, 3], [0, 0, 0, 1, 1, 0, 3]
    confusion = confusion_matrix(labels, predicted, 4)
    assert confusion.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    metrics = classification_metrics(confusion)  # class 2 has no image
    assert metrics == pytest.approx({"accuracy": 500 / 7, "mean_per_class_accuracy": 100 * (0.75 + 0.5 + 1) / 3})


def test_equal_to_scikit_learns_way_of_counting():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    slow = np.zeros((5, 5), int)
    for true, guess in zip(labels, predicted, strict=True):
        slow[true, guess] += 1
    assert confusion_matrix(labels, predicted, 5).tolist() == slow.tolist()
    assert classification_metrics(slow)["accuracy"] == pytest.approx(100 * np.mean(labels == predicted))


GOOD = torch.eye(3)


@pytest.mark.parametrize(
    "images, classes, labels, problem",
    [
        (GOOD[0], GOOD, [0], r"image_embeds has shape \(3,\)"),
        (GOOD, GOOD[:1], [0, 0, 0], r"class_embeds has shape \(1, 3\); wanted \(n, D\) with n of at least 2"),
        (GOOD, GOOD[:, :2], [0, 1, 2], "image_embeds are 3 wide, class_embeds 2"),
        (GOOD / 0, GOOD, [0, 1, 2], "image_embeds has NaN or infinite values in 3 of 3 rows"),
        (GOOD, GOOD, [0, 1], "labels must be 3 class indices"),
        (GOOD, GOOD, [0.0, 1.0, 2.0], "float32"),
        (GOOD, GOOD, [0, 1, 3], r"labels\[2\] is 3; with 3 classes it must be from 0 to 2"),
        (GOOD, GOOD, [0, -1, 2], r"labels\[1\] is -1"),
    ],
)
def test_bad_input_is_one_clear_sentence(images, classes, labels, problem):
    with pytest.raises(ValueError, match=problem):
        classify(images, classes, labels)


def test_a_confusion_matrix_without_images_is_an_error():
    with pytest.raises(ValueError, match="counts no image"):
        classification_metrics(torch.zeros(3, 3))


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture
def encoder(tiny_model, tiny_processor):
    return Encoder(tiny_model, tiny_processor, "tiny")


def test_several_templates_are_averaged_as_unit_vectors(encoder):
    templates = Templates("two", None, ("a photo of {class_name}", "{} from above"))
    embeds, _ = class_embeddings(encoder, ["road", "field"], templates)
    for row, name in zip(embeds, ["road", "field"], strict=True):
        prompts = [f"a photo of {name}", f"{name} from above"]
        by_hand = F.normalize(embed_texts(encoder.model, encoder.processor, prompts).mean(dim=0), dim=0)
        torch.testing.assert_close(row, by_hand, atol=1e-6, rtol=0)
        assert row.norm().item() == pytest.approx(1, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------- task


@pytest.fixture
def folder(tmp_path, images):
    """Two images each of two of WHU-RS19's classes."""
    for index, (image, name) in enumerate(zip(images, ["Airport", "Airport", "commercialArea", "commercialArea"])):
        (tmp_path / "WHU-RS19" / name).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "WHU-RS19" / name / f"{index}.png")
    return tmp_path / "WHU-RS19"


def test_the_task_agrees_with_embedding_by_hand(encoder, folder, images, tmp_path):
    data = TASK.load(str(folder))
    result = TASK.evaluate(encoder, data)
    names = data.dataset.wordings()
    prompts = [f"a satellite photo of {name}" for name in names]
    scores = (
        embed_images(encoder.model, encoder.processor, images)
        @ embed_texts(encoder.model, encoder.processor, prompts).T
    )
    assert result["predictions"] == scores.argmax(dim=1).tolist()
    assert result["labels"] == [0, 0, 3, 3]
    assert result["correct"] == [int(a == b) for a, b in zip(result["predictions"], result["labels"], strict=True)]
    assert result["metrics"]["accuracy"] == 25 * sum(result["correct"])
    assert result["prompts"]["first"] == prompts[0] and result["prompts"]["template_set"] == "paper"
    assert result["class_names"]["file"].endswith("classes/whu_rs19.json") and result["class_names"]["version"] == 1
    assert (result["images"], result["classes"], len(result["per_class"])) == (4, 19, 19)
    assert result["per_class"][3]["name"] == "commercial area" and result["per_class"][1]["accuracy"] is None
    assert np.array(result["confusion"]).sum(axis=1).tolist() == [row["images"] for row in result["per_class"]]
    assert result["share_truncated"] == 0 and result["seconds"]["images"] > 0
    replace_json(tmp_path / "result.json", {"results": [result]})
    assert json.loads((tmp_path / "result.json").read_text())["results"][0]["metrics"] == result["metrics"]


def test_templates_and_wording_change_the_prompts_and_are_recorded(encoder, folder, tmp_path):
    data = TASK.load(str(folder))
    human, folders = (task.evaluate(encoder, data) for task in (TASK, ClassificationTask(wording="folder")))
    assert folders["prompts"]["first"] == "a satellite photo of airport"
    assert folders["class_names"]["wording"] == "folder" and folders["prompts"]["sha256"] != human["prompts"]["sha256"]
    (tmp_path / "own.txt").write_text("{class_name} seen from space\n\nan aerial view of {}\n")
    result = ClassificationTask(str(tmp_path / "own.txt")).evaluate(encoder, data)
    assert result["prompts"]["templates"] == ["{class_name} seen from space", "an aerial view of {}"]
    assert result["prompts"]["first"] == "airport seen from space"
    with pytest.raises(ValueError, match="Did you mean paper"):
        ClassificationTask("papers")
    with pytest.raises(ValueError, match="human or folder"):
        ClassificationTask(wording="short").evaluate(encoder, data)


def test_images_are_encoded_once_whatever_the_prompts(encoder, folder, monkeypatch):
    import modeling_lrsclip.encoding.encoder as encoding

    calls = []
    original = encoding.embed_images
    monkeypatch.setattr(encoding, "embed_images", lambda *args: calls.append(len(args[2])) or original(*args))
    data = TASK.load(str(folder))
    for templates in ("paper", "plain", "ensemble"):
        ClassificationTask(templates).evaluate(encoder, data)
    assert calls == [4]


# --------------------------------------------------------------------------------------------------- table and picture


def result(model, dataset, accuracy, images, whole=True):
    measured = {
        "model": model,
        "task": "zic",
        "dataset": dataset,
        "images": images,
        "metrics": {"accuracy": accuracy, "mean_per_class_accuracy": accuracy - 1},
        "prompts": {"template_set": "paper", "first": "a satellite photo of airplane"},
        "class_names": {"wording": "human"},
        "data": {"expected": {"images": images}, "whole": whole},
    }
    return measured | beside_paper(measured)


PAPER_SETS = {
    "RESISC45": 31500,
    "EuroSAT": 27000,
    "PatternNet": 30400,
    "WHU-RS19": 1005,
    "OPTIMAL-31": 1860,
    "RS_C11": 1232,
}


def test_the_table_has_the_papers_columns_its_row_and_the_gap():
    results = [result("lrsclip-vit-b-16", "UC Merced", 90.0, 2100)]
    results += [result("lrsclip-vit-b-16", name, 70.0, count) for name, count in reversed(PAPER_SETS.items())]
    results += [result("mine", name, 71.0, count) for name, count in PAPER_SETS.items()]
    table = classification_table("ZIC", results)
    assert [column.name for column in table.columns] == ["model", *PAPER_SETS, "UC Merced", "mean"]
    measured, paper, gap, farslip, mine = table.rows
    assert measured == ["lrsclip-vit-b-16", *[70.0] * 6, "90.0 †", 70.0]
    assert paper[0] == "  paper" and paper[1:8] == [73.12, 57.55, 74.30, 87.16, 85.27, 76.79, ""]
    assert paper[8] == pytest.approx(75.70, abs=0.01) and gap[8] == pytest.approx(70 - 75.70, abs=0.01)
    # FarSLIP measured other images of EuroSAT, and all with other prompts: beside ours, without a gap and a mean.
    assert farslip == ["  FarSLIP", 74.28, 44.52, 77.89, "", "", "", "", ""] and "FarSLIP: NJU-LHRS" in table.note
    assert mine == ["mine", *[71.0] * 6, None, 71.0]
    assert "† seen, not zero-shot: LRS2M" in table.note and "of the paper's 6 data sets" in table.note
    assert "| **71.00** | **71.00** |" in markdown(table)


def test_a_mean_needs_every_figure_and_none_that_was_seen():
    table = classification_table(
        "ZIC",
        [result("lrsclip-vit-b-16", "AID", 60.0, 10000), result("lrsclip-vit-b-16", "UC Merced", 90.0, 2100)]
        + [result("mine", "AID", 50.0, 10000)],
    )
    assert [row[-1] for row in table.rows if row[0] != "  FarSLIP"] == [None, None]


def test_one_data_set_shows_the_mean_over_its_classes_and_says_when_it_is_a_part():
    table = classification_table("ZIC", [result("mine", "EuroSAT", 61.0, 270, whole=False)])
    assert table.title == "ZIC · EuroSAT" and table.rows == [["mine", 61.0, 60.0]]
    assert "Only a part of EuroSAT was here" in table.note


@pytest.mark.parametrize("classes", [2, 33])
def test_the_confusion_matrix_is_drawn(tmp_path, classes):
    confusion = torch.eye(classes, dtype=torch.long) * 7
    confusion[0, 1], confusion[1, 1] = 3, 0
    drawn = {
        "metrics": classification_metrics(confusion),
        "images": confusion.sum().item(),
        "per_class": [
            {"class": f"c{index}", "name": f"class ${index}$_", "images": images, "accuracy": 50.0 if images else None}
            for index, images in enumerate(confusion.sum(dim=1).tolist())
        ],
        "confusion": confusion.tolist(),
        "prompts": {"templates": ["a $photo of {class_name}", "{class_name}"]},
    }
    path = draw_confusion_matrix(drawn, tmp_path / "confusion.png", "a_model$", "data")
    image = Image.open(path).convert("RGB")
    assert image.width > 1000 and image.height > 400
    assert len(image.getcolors(maxcolors=2**24)) > 50
