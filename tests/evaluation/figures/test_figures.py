"""Figures of unusual results: one model, nothing found, many equal curves, texts with odd signs."""

import matplotlib.figure
import pytest
from PIL import Image

from evaluation.figures.retrieval import draw_recall_vs_tokens, draw_retrieval_gallery, draw_token_lengths
from evaluation.tasks import _best


def curve(**points):
    return [{"tokens": int(tokens[1:]), "text_to_image_R@1": value} for tokens, value in points.items()]


@pytest.mark.parametrize(
    "curves",
    [
        {"one": curve(t77=94.2)},
        {"zero": curve(t20=0.0, t77=0.0), "longer": curve(t20=0.0, t77=0.0, t305=0.0)},
        {f"model {index}": curve(t20=100.0, t248=100.0) for index in range(10)},
    ],
    ids=["one point", "nothing found", "ten equal curves"],
)
def test_curves_of_any_shape_are_drawn_inside_the_picture(curves, tmp_path):
    image = Image.open(draw_recall_vs_tokens(curves, tmp_path / "curve.png", "scenes", longest=200)).convert("L")
    assert image.width > image.height > 500
    frame = [image.crop((0, y, image.width, y + 1)).getextrema()[0] for y in (0, image.height - 1)]
    assert frame == [255, 255]  # labels that are pushed apart stay on the page


@pytest.mark.parametrize("retrieved", [[0], [3, 2, 1], [1, 2, 0]])
def test_galleries_of_few_images_and_texts_with_dollars_are_drawn(retrieved, images, tmp_path):
    text = "A $5 and $6 road with 100% _sand_ \\alpha " + "verylongword" * 12
    words = list(range(1, 1 + len(text.split())))
    example = {"text": text, "word_tokens": words, "image": 0, "rank": 3, "found": retrieved}
    path = draw_retrieval_gallery([example] * 2, images, tmp_path / "gallery.png", "a_model$", positions=77)
    assert Image.open(path).width > 1000


@pytest.mark.parametrize("bins, announced", [(9, False), (24, False), (25, True), (31, True)])
def test_only_lines_that_are_drawn_are_announced(bins, announced, tmp_path, monkeypatch):
    written = []
    text = matplotlib.figure.Figure.text
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "text",
        lambda figure, x, y, s, **kind: (written.append(s), text(figure, x, y, s, **kind)),
    )
    draw_token_lengths([1] * bins, tmp_path / "lengths.png", "scenes")
    assert any("what CLIP reads (77)" in line for line in written)
    assert any("and LRSCLIP (248)" in line for line in written) == announced


def test_the_picture_of_one_of_several_models_says_which():
    results = [{"model": name, "metrics": {"mR": recall}} for name, recall in (("a", 1.0), ("b", 3.0), ("c", 2.0))]
    assert _best(results, "mR") == (results[1], "b (best mR of 3 models)")
    assert _best(results[:1], "mR") == (results[0], "a")
