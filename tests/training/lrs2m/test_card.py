"""The card says what the data set holds, and stops where a licence is unknown."""

import json

import pytest
from huggingface_hub import DatasetCard

from tests.training.lrs2m.small_builds import build, source
from training.lrs2m.card import build_card, main
from training.lrs2m.statistics import statistics


@pytest.fixture
def folder(write_recipe, tiles, tmp_path):
    read = {"kind": "table", "path": str(tiles / "captions.jsonl")}
    terms = {"licence": "CC-BY-4.0", "licence_url": "https://example.org/terms"}
    recipe = write_recipe(
        [source("merge", read, join=read, name="UCMerced", **terms), source("merge", read, join=read, name="mine")]
    )
    assert build(recipe, tmp_path / "set") == 0
    return tmp_path / "set"


def test_a_card_that_loads_as_it_was_written(folder, capsys):
    assert main([str(folder)]) == 0 and str(folder / "README.md") in capsys.readouterr().out
    card = DatasetCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "other" and data["pretty_name"] == "test" and data["size_categories"] == ["n<1K"]
    assert data["license_name"] == "licences-of-the-sources" and data["license_link"] == "LICENSE.md"
    licences = (folder / "LICENSE.md").read_text()  # the file of the repository that the Hub then shows
    assert "- UCMerced: CC-BY-4.0 ([terms](https://example.org/terms))" in licences and "- mine: CC0-1.0" in licences
    (config,) = data["configs"]
    assert {"split": "train", "path": "data/train-*.parquet"} in config["data_files"]
    described = statistics(folder)
    mean = f"{described['sources'][0]['long_mean_tokens']:.2f}"
    assert f"| UCMerced | 1 | 24 | given | {mean} | given |" in card.text
    assert "| UCMerced | CC-BY-4.0 ([terms](https://example.org/terms)) | yes |" in card.text
    assert "| mine | CC0-1.0 | yes |" in card.text
    assert "not yet" not in card.text.replace("nothing yet", "") and "![Captions by their number" in card.text
    assert "UC Merced, on which some evaluate" in card.text and "BigEarthNet is European" not in card.text
    assert str(folder.parent) not in card.content and "licence: CC-BY-4.0" in card.text
    assert "{{" not in card.content and "{%" not in card.content


def test_a_card_changed_by_hand_is_kept(folder, capsys):
    assert main([str(folder)]) == main([str(folder)]) == 0  # its own may be written again
    path = folder / "README.md"
    (folder / "LICENSE.md").write_text("Terms of my own.")
    assert main([str(folder)]) == 0 and (folder / "LICENSE.md").read_text() == "Terms of my own."
    written = path.read_text()
    path.write_text(written.replace("## Limits", "## My limits"))
    assert main([str(folder)]) == 2 and "written or changed by somebody" in capsys.readouterr().err
    assert "## My limits" in path.read_text()
    assert main([str(folder), "--replace"]) == 0 and path.read_text() == written


def test_a_source_without_licence_stops(folder):
    described, manifest = statistics(folder), json.loads((folder / "manifest.json").read_text())
    described["sources"][1]["licence"] = " "
    with pytest.raises(ValueError, match="1 sources have no licence, first: mine"):
        build_card(described, manifest)


def test_what_others_wrote_is_plain_text_in_the_body(folder):
    described, manifest = statistics(folder), json.loads((folder / "manifest.json").read_text())
    described["name"] = described["sources"][0]["licence"] = described["sources"][0]["name"] = (
        "a <b>\n# c ![d](e) | [f](g)"
    )
    manifest["versions"]["x"] = "<i>\n```"
    body = build_card(described, manifest).partition("\n---\n")[2]
    assert r"# a &lt;b&gt; # c !\[d\](e) \| \[f\](g)" in body
    assert "<b>" not in body and "<i>" not in body and "\n# c" not in body and "![d]" not in body


def test_an_unfinished_data_set_has_no_card(folder, capsys):
    (folder / "manifest.json").unlink()
    assert main([str(folder)]) == 2 and "holds no manifest.json" in capsys.readouterr().err
