"""The paper's figures are what the paper prints, and stand beside ours only where they belong."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation import run
from evaluation.paper import (
    ablation_figures,
    beside_paper,
    dataset_key,
    model_key,
    paper_figures,
    paper_tables,
    seen_in_training,
)
from evaluation.results import markdown, retrieval_table


# --------------------------------------------------------------------------------------------------- the file itself


def cells(tables: dict, of: str = "tables"):
    """(task, data set, model, metric, value) of every printed figure of Tables II to V, or of the `further` ones."""
    for table in tables[of].values() if of == "tables" else tables[of]:
        task, metrics = table["task"], tables["metrics"][table["task"]]
        if "columns" in table:
            for model, row in table["rows"].items():
                for dataset, value in zip(table["columns"], row, strict=True):
                    yield (task, dataset, model, metrics[0]), value
        else:
            for dataset, rows in table["rows"].items():
                for model, row in rows.items():
                    for metric, value in zip(metrics, row, strict=True):
                        yield (task, dataset, model, metric), value


def disagreements(tables: dict) -> set[tuple[str, ...]]:
    """The cells that the arithmetic contradicts: means, Rmi of eq. (6), hits out of so many, R@1 <= R@5 <= R@10."""
    figures, wrong = dict(cells(tables)), set()
    counts = tables["datasets"]
    for (task, dataset, model, metric), value in figures.items():
        key = (task, dataset, model, metric)
        row = {name: figures[task, dataset, model, name] for name in tables["metrics"][task]}
        recalls = [number for name, number in row.items() if "@" in name]
        if metric == "mR":  # half a unit of the last place for the mean, half for what it was taken of
            agrees = abs(value - sum(recalls) / 6) <= 0.01
        elif dataset == "mean":
            six = [number for other, number in figures.items() if other[2] == model and other[0] == "zic"]
            agrees = abs(value - sum(six[:-1]) / 6) <= 0.01
        elif metric == "Rmi":
            agrees = abs(value - (0.4 * row["Rsu"] + 0.35 * (1 - row["Ras"]) + 0.25 * row["Rda"])) <= 0.0001
        elif task == "selo":
            agrees = 0 < value < 1
        else:
            one_item = 100 / counts[dataset]["texts" if metric.startswith("text_to") else "images"]
            agrees = abs(value - round(value / one_item) * one_item) <= 0.0051
        if not agrees or recalls[:3] != sorted(recalls[:3]) or recalls[3:] != sorted(recalls[3:]):
            wrong.add(key)
    return wrong


def test_only_the_listed_errata_contradict_the_arithmetic():
    listed = {tuple(cell) for erratum in paper_tables()["errata"] for cell in erratum.get("cells", ())}
    assert disagreements(paper_tables()) == listed


def test_a_wrong_figure_anywhere_would_be_found():
    clean, unnoticed = disagreements(paper_tables()), []
    for name in paper_tables()["tables"]:
        tables = copy.deepcopy(paper_tables())
        rows = tables["tables"][name]["rows"].values()
        for row in rows if name == "IV" else [row for models in rows for row in models.values()]:
            for index, value in enumerate(row):
                row[index] = value + (0.003 if name == "V" else 0.33)
                if disagreements(tables) == clean:
                    unnoticed.append(value)
                row[index] = value
    assert unnoticed == [45.43]  # contradicted as it is printed, so no more when changed


def test_every_row_is_there():
    assert {name: len(list(table["rows"])) for name, table in paper_tables()["tables"].items()} == {
        "II": 2, "III": 2, "IV": 10, "V": 1,
    }  # fmt: skip
    assert len(dict(cells(paper_tables()))) == 2 * 4 * 7 + 2 * 8 * 7 + 10 * 7 + 12 * 4
    printed = {model for of in ("tables", "further") for (_, _, model, _), _ in cells(paper_tables(), of)}
    assert printed | {"dgtrs-clip-vit-l-14"} == set(paper_tables()["names"])  # no figure of that one is known yet


def test_the_further_figures_agree_with_their_arithmetic():
    for table in paper_tables()["further"]:
        assert table["source"] in paper_tables()["sources"]
        if "columns" in table:
            for model, row in table["rows"].items():
                assert abs(row[-1] - sum(row[:-1]) / (len(row) - 1)) <= 0.0051, model
                for name, figure in zip(table["columns"], row, strict=True):
                    images = paper_tables()["sources"][table["source"]]["datasets"].get(name, {}).get("images")
                    hits = round(figure * images / 100) if images else 0
                    assert not images or abs(figure - 100 * hits / images) <= 0.0051, (model, name)
        for dataset, models in table["rows"].items() if "columns" not in table else ():
            known = paper_tables()["datasets"][dataset]
            for model, row in models.items():
                assert abs(row[6] - sum(row[:6]) / 6) <= 0.0051, model
                for figure, items in zip(row, [known["texts"]] * 3 + [known["images"]] * 3):
                    assert abs(figure - 100 * round(figure * items / 100) / items) <= 0.0051, (model, figure)


def test_the_figures_that_the_text_repeats():
    """Abstract and Section V-C: gains of LRSCLIP over GeoRSCLIP, and the two headline figures."""
    said = {
        ("rsitmd", "l-14", "l-14"): (0.17, 0.67, 0.92),
        ("rsicd", "l-14", "l-14"): (0.04, 2.93, 1.28),
        ("rsitmd", "b-16", "b-32"): (0.71, 2.43, 0.49),
        ("rsicd", "b-16", "b-32"): (-0.41, 1.55, 0.29),
    }
    for (dataset, ours, theirs), gains in said.items():
        better = paper_figures(f"lrsclip-vit-{ours}", "zcrs", dataset)
        worse = paper_figures(f"georsclip-vit-{theirs}", "zcrs", dataset)
        for name, gain in zip(("text_to_image_R@1", "image_to_text_R@1", "mR"), gains, strict=True):
            assert better[name] - worse[name] == pytest.approx(gain, abs=1e-9)
    assert paper_figures("lrsclip-vit-l-14", "zic", "mean") == {"accuracy": 75.75}
    assert paper_figures("lrsclip-vit-l-14", "selo", "air-slt")["Rmi"] == 0.7653


def test_ablations_end_at_the_final_model():
    final = {
        "zcrl": paper_figures("lrsclip-vit-b-16", "zcrl", "rsitmd-l")["mR"],
        "zcrs": paper_figures("lrsclip-vit-b-16", "zcrs", "rsitmd")["mR"],
        "zic": paper_figures("lrsclip-vit-b-16", "zic", "mean")["accuracy"],
        "selo": paper_figures("lrsclip-vit-b-16", "selo", "air-slt")["Rmi"],
    }
    for study, row in paper_tables()["ablations"]["final"].items():
        assert ablation_figures(study)[row] == final
    assert ablation_figures("batch_size") is None
    with pytest.raises(ValueError, match="no ablation 'note'; it has pcm, framework, "):
        ablation_figures("note")


def test_the_data_set_table_and_its_errata():
    table = paper_tables()["lrs2m"]
    rows, stated = table["rows"], table["stated"]
    pairs = sum(row[0] for row in rows.values())
    routes = {str(route): sum(row[0] for row in rows.values() if row[5] == route) for route in (1, 2, 3, 4)}
    errata = " ".join(erratum["says"] for erratum in paper_tables()["errata"])
    assert {route for route in routes if routes[route] != stated["pairs_by_route"][route]} == {"3"}
    for figure in (pairs, stated["pairs"], sum(stated["pairs_by_route"].values()), routes["3"]):
        assert f"{figure:,}" in errata
    for column, said in ((2, stated["long_text_mean_tokens"]), (4, stated["short_text_mean_tokens"])):
        mean = sum(row[0] * row[column] for row in rows.values()) / pairs
        assert f"{mean:.2f}" in errata and f"{said}" in errata


def test_counts_agree_with_the_class_lists():
    names = set()
    for path in (Path(run.__file__).parent / "benchmarks" / "classes").glob("*.json"):
        described = json.loads(path.read_text(encoding="utf-8"))
        known = paper_tables()["datasets"].get(dataset_key("zic", described.get("name", "")))
        if known:
            assert known["images"] == described["images"], path
            names.add(known["name"])
    assert len(names) == 6


# ------------------------------------------------------------------------------------------------------ beside ours


@pytest.mark.parametrize(
    "label, key",
    [
        ("lrsclip-vit-b-16", "lrsclip-vit-b-16"),
        ("cwz14/LRSCLIP_ViT-L-14", "lrsclip-vit-l-14"),
        ("LRSCLIP_ViT-B-16.pt", "lrsclip-vit-b-16"),
        ("openai/clip-vit-large-patch14", "clip-vit-l-14"),
        ("openai/clip-vit-base-patch32", "clip-vit-b-32"),
        ("RemoteCLIP-ViT-L-14.pt", "remoteclip-vit-l-14"),
        ("openai/clip-vit-large-patch14-336", None),
        ("openai/clip-vit-base-patch16", "clip-vit-b-16"),
        ("DGTRS-CLIP-ViT-B-16.pt", "dgtrs-clip-vit-b-16"),
        ("MitsuiChen14/DGTRS-CLIP-ViT-L-14", "dgtrs-clip-vit-l-14"),
        ("runs/lrsclip", None),
    ],
)
def test_labels_of_the_paper(label, key):
    assert model_key(label) == key


def test_data_sets_of_the_paper():
    assert dataset_key("zcrl", "RSITMD") == dataset_key("zcrl", "rsitmd_l") == "rsitmd-l"
    assert dataset_key("zcrs", "RSICD-L") == dataset_key("zcrs", "rsicd") == "rsicd"
    assert dataset_key("zic", "RS_C11") == "rs-c11" and dataset_key("selo", "AIR_SLT") == "air-slt"
    assert dataset_key("zic", "UCMerced") == "uc-merced"
    assert dataset_key("zcrl", "scenes") is None
    assert paper_figures("lrsclip-vit-b-16", "zcrs", "scenes") is None
    assert paper_figures("selo-v1", "zcrs", "rsitmd") is None


def result(model: str, dataset: str = "RSITMD", texts: int = 2260, **metrics: float) -> dict:
    return {"model": model, "task": "zcrs", "dataset": dataset, "images": 452, "texts": texts, "metrics": metrics}


def test_figures_and_gap():
    beside = beside_paper(result("lrsclip-vit-b-16", mR=36.0, **{"text_to_image_R@1": 15.0}))
    assert beside["paper"]["image_to_text_R@10"] == 50.22
    assert beside["gap"] == {"mR": -0.17, "text_to_image_R@1": 0.13}
    assert beside.keys() == {"paper_model", "paper", "gap"} and beside["paper_model"] == "lrsclip-vit-b-16"
    (remark,) = beside_paper(result("long-clip-vit-b-16", mR=26.0))["remarks"]
    assert "8.98 is no multiple of 1/452" in remark
    long = result("long-clip-vit-b-16", texts=452, mR=26.0) | {"task": "zcrl"}
    assert [text[:9] for text in beside_paper(long)["remarks"]] == ["The paper", "Table II,"]


def test_version_2_and_an_independent_run_stand_beside_dgtrs_clip():
    beside = beside_paper(result("dgtrs-clip-vit-b-16", mR=37.0))
    assert beside["paper"]["mR"] == 37.58 and beside["gap"] == {"mR": -0.58}
    (other,) = beside["others"]
    assert other["source"] == "Mateen880" and other["gap"] == {"mR": -0.23}
    assert paper_figures("dgtrs-clip-vit-b-16", "zcrs", "rsicd") is None  # not known
    recalls = {f"{way}_R@{k}": 50.0 for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    row = result("dgtrs-clip-vit-b-16", mR=37.0, **recalls) | {
        "share_truncated": 0,
        "tokens": {"mean": 1, "longest": 2},
    }
    table = retrieval_table("Title", [row | beside_paper(row)], [{"label": row["model"], "positions": 248}])
    assert [cells[0] for cells in table.rows] == ["dgtrs-clip-vit-b-16", "  paper", "  gap", "  Mateen880", "  gap"]
    assert [cells[8] for cells in table.rows[1:]] == pytest.approx([37.58, -0.58, 37.23, -0.23])
    assert "DGTRS-CLIP: README of Mateen880" in table.note and "\nMateen880: README of" in table.note


def test_farslips_figures_are_told_apart_from_the_papers():
    def classified(dataset: str, images: int, templates: str) -> dict:
        result = {"model": "lrsclip-vit-b-16", "task": "zic", "dataset": dataset, "images": images}
        return result | {"metrics": {"accuracy": 60.0}, "prompts": {"template_set": templates}}

    beside = beside_paper(classified("EuroSAT", 27000, "paper"))
    assert beside["paper"] == {"accuracy": 57.55}
    (other,) = beside["others"]  # on other images, with other prompts: shown, without a gap
    assert other["source"] == "FarSLIP" and other["figures"] == {"accuracy": 44.52} and "gap" not in other
    assert "no gap is shown" in other["remark"]
    for dataset, images, figure in (("EuroSAT", 2700, 44.52), ("RESISC45", 31500, 74.28), ("RSI-CB256", 24747, 54.75)):
        (other,) = beside_paper(classified(dataset, images, "skyscript"))["others"]
        assert other["figures"]["accuracy"] == figure and other["gap"]["accuracy"] == pytest.approx(60 - figure)
    beside = beside_paper(classified("SkyScript", 6900, "skyscript"))
    assert beside.keys() == {"others"} and beside["others"][0]["gap"]["accuracy"] == pytest.approx(4.27)
    assert "MillionAID" in beside_paper(classified("MillionAID", 10000, "skyscript"))["seen"]


def test_other_data_under_the_same_name_is_not_compared():
    beside = beside_paper(result("lrsclip-vit-b-16", texts=452, mR=36.0))
    assert beside == {"remarks": ["Not compared with the paper: its RSITMD has 2,260 texts (here 452)."]}
    assert beside_paper(result("lrsclip-vit-b-16", "scenes", mR=36.0)) == {}
    assert beside_paper(result("mine", mR=36.0)) == {}


def test_another_procedure_is_not_compared():
    located = {"model": "lrsclip-vit-b-16", "task": "selo", "dataset": "AIR-SLT", "metrics": {"Rmi": 0.7}}
    assert beside_paper(located | {"protocol": "v1"})["gap"] == {"Rmi": -0.0582}
    (remark,) = beside_paper(located | {"protocol": "v2"})["remarks"]
    assert remark == "Not compared with the paper: its SeLo follows protocol v1, this result v2."
    classified = {"model": "lrsclip-vit-b-16", "task": "zic", "dataset": "EuroSAT", "images": 27000}
    classified |= {"metrics": {"accuracy": 57.0}, "prompts": {"template_set": "plain"}}
    assert "one prompt template, this result the set 'plain'." in beside_paper(classified)["remarks"][0]
    assert beside_paper(classified | {"prompts": {"template_set": "paper"}})["paper"] == {"accuracy": 57.55}


def test_models_that_saw_a_benchmark_are_flagged():
    assert "trained on RSITMD" in beside_paper(result("remoteclip-vit-b-32", mR=60.0))["seen"]
    assert seen_in_training("lrsclip-vit-l-14", "uc-merced") and seen_in_training("remoteclip-vit-l-14", "uc-merced")
    assert seen_in_training("remoteclip-vit-l-14", "rsicd-l")
    assert not seen_in_training("lrsclip-vit-l-14", "rsitmd") and not seen_in_training("clip-vit-l-14", "uc-merced")


def test_the_paper_stands_below_a_models_row():
    recalls = {f"{way}_R@{k}": 50.0 for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    rows = []
    for model in ("lrsclip-vit-b-16", "remoteclip-vit-b-32", "mine"):
        row = result(model, mR=36.0, **recalls) | {"share_truncated": 0.25, "tokens": {"mean": 15, "longest": 60}}
        rows.append(row | beside_paper(row))
    table = retrieval_table("Title", rows, [{"label": row["model"], "positions": 248} for row in rows])
    lines = markdown(table).splitlines()
    assert "|   paper |  | 14.87 | 37.61 | 52.12 | 21.46 | 40.71 | 50.22 | 36.17 |  |" in lines
    assert "|   gap |  | +35.13 | +12.39 | -2.12 | +28.54 | +9.29 | -0.22 | -0.17 |  |" in lines
    assert any(line.startswith("| remoteclip-vit-b-32 † | 248 |") for line in lines)
    assert not any("**" in line for line in lines)  # the paper's 52.12 is no rival of our 50.00
    assert lines[-1].startswith("† seen, not zero-shot: RemoteCLIP was trained on RSITMD")


def test_the_command_sets_the_paper_beside_its_figures(tiny_model, tiny_processor, tmp_path, capsys):
    model, data = tmp_path / "lrsclip-vit-b-16", tmp_path / "rsitmd.jsonl"
    tiny_model.save_pretrained(model)
    tiny_processor.save_pretrained(model)
    rng = np.random.default_rng(0)
    rows = []
    for index in range(452):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
        rows.append({"image": f"{index}.png", "long_text": f"a road {index}", "short_text": [f"a {index}"] * 5})
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "--model",
        str(model),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "out"),
        "--tokens-kept",
        "none",
    ]
    assert run.main(arguments) == 0

    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["command"].startswith("python -m evaluation.run --model ")
    long, short = document["results"]
    for measured, printed in ((long, 64.79), (short, 36.17)):
        assert measured["paper"]["mR"] == printed
        assert measured["gap"]["mR"] == pytest.approx(measured["metrics"]["mR"] - printed, abs=1e-4)
    out = capsys.readouterr().out
    assert re.search(r"^  paper +38.5 .*\n  gap +-3\d\.\d ", out, re.M), out
    assert "RSITMD-L and RSICD-L were not published" in out
    assert max(len(line) for line in out.splitlines() if "/" not in line) <= 100
