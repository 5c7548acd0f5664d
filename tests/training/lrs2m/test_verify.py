"""Second opinions become columns, survive a kill, and leave rows out only where a threshold says so; a person's sheet is read back."""

import csv
import io
import json
import shutil

import pytest
import torch
import yaml
from PIL import Image

from modeling_lrsclip.encoding import embed_images, embed_texts, load_encoder
from tests.training.lrs2m.chat_server import ChatServer, Fault
from tests.training.lrs2m.small_builds import build, entries, manifest_of, rows_of, source
from training.lrs2m.card import main as write_card
from training.lrs2m.checks.candidate import split_sentences
from training.lrs2m.checks.claims import claims_of, read_answer
from training.lrs2m.checks.sheet import read_sheet, wilson, write_sheet
from training.lrs2m.statistics import data_hash, statistics
from training.lrs2m.verify import main


def test_claims_of_a_caption():
    text = (
        "Three white jets stand on the apron. A red car is parked in the upper left. There is no stadium, and about ten houses "
        "line a street; the jets face west. Boats."
    )
    questions = [(claim.kind, claim.question) for claim in claims_of(text)]
    assert questions == [
        ("count", "Are there at least 3 white jets in this image?"),
        ("object", "Is there an apron in this image?"),
        ("position", "Is there a red car in the upper left of this image?"),
        ("object", "Is there a house in this image?"),
        ("object", "Is there a street in this image?"),
        ("object", "Is there a jet in this image?"),
        ("object", "Is there a boat in this image?"),
    ]
    assert len(set(questions)) == len(questions) and claims_of("Nothing stands here.") == []
    assert (
        len(claims_of("A road, a car, a boat. " * 3 + " ".join(f"Seen in {n}: {n} cars." for n in range(2, 40)))) == 16
    )


def test_answers_to_questions():
    answers = ["Yes.", "no, there is none", "**Yes**", "I think so", "", "Yesterday"]
    assert [read_answer(text) for text in answers] == [True, False, True, None, None, None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiles, _tokenizer_folder):
    """A finished data set of 24 rows with given captions."""
    folder = tmp_path_factory.mktemp("verified")
    read = {"kind": "table", "path": str(tiles / "captions.jsonl")}
    recipe = {"name": "test", "tokenizer": str(_tokenizer_folder), "sources": [source("merge", read, join=read)]}
    recipe |= {"duplicates": {"inside": False}, "validation_fraction": 0.2, "shard_rows": 6}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert build(folder / "recipe.yaml", folder / "set") == 0
    return folder / "set", recipe


def recipe_with(whole, path, section, url="http://127.0.0.1:9/v1") -> str:
    captioners = {"judge": {"kind": "openai", "model": "tiny/judge", "base_url": url, "timeout": 5, "tries": 1}}
    path.write_text(yaml.safe_dump(whole[1] | {"captioners": captioners, "verify": section}))
    return str(path)


def test_similarities_are_those_of_the_model(whole, tiny_checkpoint, tmp_path):
    """Of the whole text by a model of 248 positions; rows below a threshold are listed."""
    recipe = recipe_with(whole, tmp_path / "r.yaml", {"model": str(tiny_checkpoint)})
    assert main([str(whole[0]), "--config", recipe, "--output", str(tmp_path / "out")]) == 0
    before, after = rows_of(whole[0]), rows_of(tmp_path / "out")
    scores = ("long_similarity", "short_similarity", "sentence_similarities")
    assert [{name: None if name in scores else value for name, value in row.items()} for row in after] == before
    encoder = load_encoder(str(tiny_checkpoint))
    for row in after[:3]:
        texts = [row["long_text"], row["short_text"], *split_sentences(row["long_text"])]
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            images = embed_images(encoder.model, encoder.processor, [image.convert("RGB")])
        expected = (embed_texts(encoder.model, encoder.processor, texts) @ images.T)[:, 0]
        row_scores = torch.tensor([row["long_similarity"], row["short_similarity"], *row["sentence_similarities"]])
        assert torch.allclose(row_scores, expected, atol=1e-4)
    median = sorted(row["long_similarity"] for row in after)[12]
    limit = [f"verify.min_similarity={median:.4f}"]
    assert main([str(whole[0]), "--config", recipe, "--output", str(tmp_path / "few"), "--set", *limit]) == 0
    kept, failed = rows_of(tmp_path / "few"), entries(tmp_path / "few", "failed")
    assert {row["id"] for row in kept} == {
        row["id"] for row in after if min(row["long_similarity"], row["short_similarity"]) > median - 1e-6
    }
    assert len(kept) + len(failed) == 24 and {entry["reason"] for entry in failed} == {"similarity"}
    described = statistics(tmp_path / "few")
    assert (
        described["checks"]["similarity"]["failed"] == len(failed) == manifest_of(tmp_path / "few")["totals"]["failed"]
    )
    assert described["scores"]["long_similarity"]["rows"] == len(kept)


def test_a_model_of_77_positions_reads_sentences(whole, tiny_clip, tiny_processor, tmp_path):
    tiny_clip.save_pretrained(tmp_path / "clip")
    tiny_processor.save_pretrained(tmp_path / "clip")
    recipe = recipe_with(whole, tmp_path / "r.yaml", {"model": str(tmp_path / "clip")})
    assert main([str(whole[0]), "--config", recipe, "--output", str(tmp_path / "out")]) == 0
    for row in rows_of(tmp_path / "out"):
        each = row["sentence_similarities"]
        assert row["long_similarity"] == pytest.approx(sum(each) / len(each), abs=1e-4) and len(each) == 3


def test_claims_are_asked_once_and_a_kill_changes_nothing(whole, tmp_path):
    """A judge that denies cars; it goes away after 20 questions, and the second run asks for the others only."""

    def answer(request):
        return "No." if "car" in request.text else "Perhaps." if "field" in request.text else "Yes"

    section = {"captioner": "judge"}
    with ChatServer(answer=answer) as server:
        recipe = recipe_with(whole, tmp_path / "r.yaml", section, server.url)
        assert main([str(whole[0]), "--config", recipe, "--output", str(tmp_path / "out")]) == 0
        asked = len(server.requests)
        assert all(
            request.image and request.system.startswith("You answer questions") for request, _ in server.requests
        )
    with ChatServer(
        answer=answer, faults=lambda request: Fault(status=401) if len(server.requests) >= 20 else None
    ) as server:
        recipe = recipe_with(whole, tmp_path / "r.yaml", section, server.url)
        assert main([str(whole[0]), "--config", recipe, "--output", str(tmp_path / "again")]) == 2
        assert not (tmp_path / "again" / "manifest.json").exists()
        answered = sum(sent in ("No.", "Yes", "Perhaps.") for _, sent in server.requests)
    with ChatServer(answer=answer) as server:
        recipe = recipe_with(whole, tmp_path / "r.yaml", section, server.url)
        assert main([str(whole[0]), "--config", recipe, "--output", str(tmp_path / "again")]) == 0
        assert len(server.requests) == asked - answered and 20 <= answered < asked
    assert manifest_of(tmp_path / "again")["splits"] == manifest_of(tmp_path / "out")["splits"]
    row = rows_of(tmp_path / "out")[0]
    claims = json.loads(row["claims"])
    assert {"kind": "count", "question": "Are there at least 3 red cars in this image?", "answer": False} in claims
    said = [claim["answer"] for claim in claims if claim["answer"] is not None]
    assert len(said) < len(claims) and row["claims_confirmed"] == pytest.approx(sum(said) / len(said))
    with ChatServer(answer=answer) as server:
        recipe = recipe_with(whole, tmp_path / "r.yaml", section | {"min_confirmed": 0.9}, server.url)
        assert main([str(whole[0]), "--config", recipe, "--output", str(tmp_path / "none")]) == 0
    assert len(entries(tmp_path / "none", "failed")) == 24


def test_rows_without_an_answer_are_counted_and_pass_no_threshold(whole, tmp_path, capsys):
    """A server that refuses all requests of one image, or says neither yes nor no of any; one that refuses all ends the run."""
    refused: list[str] = []

    def fault(request):
        refused.append(request.image) if not refused else None
        return Fault(status=400) if request.image == refused[0] else None

    section = {"captioner": "judge", "min_confirmed": 0.5}
    with ChatServer(answer=lambda request: "Yes", faults=fault) as server:
        recipe = recipe_with(whole, tmp_path / "r.yaml", section, server.url)
        assert main([str(whole[0]), "--config", recipe, "--output", str(tmp_path / "one")]) == 0
    (entry,) = entries(tmp_path / "one", "failed")
    assert (entry["reason"], entry["attempts"][0]["detail"]) == ("claims", "no answer")
    assert manifest_of(tmp_path / "one")["totals"]["unanswered"] == 1
    with ChatServer(faults=lambda request: Fault(status=400)) as server:
        recipe = recipe_with(whole, tmp_path / "r.yaml", {"captioner": "judge"}, server.url)
        command = [str(whole[0]), "--config", recipe, "--set", "max_failures_in_a_row=7", "--output"]
        assert main([*command, str(tmp_path / "dead")]) == 2
        assert "left 7 rows in a row without an answer" in capsys.readouterr().err
        command = [str(whole[0]), "--config", recipe, "--output", str(tmp_path / "dead, fewer rows than the limit")]
        assert main(command) == 2 and "left 24 rows in a row" in capsys.readouterr().err
    with ChatServer(answer=lambda request: "Perhaps") as server:
        recipe = recipe_with(whole, tmp_path / "r.yaml", {"captioner": "judge"}, server.url)
        command = [str(whole[0]), "--config", recipe, "--set", "max_failures_in_a_row=7", "--output"]
        assert main([*command, str(tmp_path / "vague")]) == 0
    assert "24 without any answer" in capsys.readouterr().out
    assert manifest_of(tmp_path / "vague")["totals"]["unanswered"] == len(rows_of(tmp_path / "vague")) == 24


def test_a_sheet_is_filled_in_and_read_back(whole, capsys):
    folder = whole[0]
    assert main([str(folder), "--sheet", "10"]) == 0
    path = folder / "sheet" / "sheet.csv"
    rows = list(csv.DictReader(path.open(encoding="utf-8-sig")))
    assert len(rows) == 10 and len({row["id"] for row in rows}) == 10
    for row in rows:
        with Image.open(folder / "sheet" / row["thumbnail"]) as thumbnail:
            assert thumbnail.format == "JPEG" and max(thumbnail.size) <= 512
        assert row["thumbnail"] in (folder / "sheet" / "sheet.html").read_text()
    assert main([str(folder), "--sheet", "10"]) == 2 and "exists and may be filled in" in capsys.readouterr().err
    assert main([str(folder), "--read-sheet"]) == 2 and "no row with numbers" in capsys.readouterr().err
    for index, row in enumerate(rows[:8]):
        row["long_false"], row["short_false"] = str(2 * (index < 3)), str(int(index == 7))
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # as a spreadsheet of another country saves it
        lines = csv.DictWriter(file, rows[0], delimiter=";")
        lines.writeheader()
        lines.writerows(rows)
    assert main([str(folder), "--read-sheet"]) == 0 and "long: 3 of 8" in capsys.readouterr().out
    rates = read_sheet(path, data_hash(manifest_of(folder)))
    assert rates["rows"] == 8 and (rates["long"]["false"], rates["short"]["false"], rates["either"]["false"]) == (
        3,
        1,
        4,
    )
    assert write_card([str(folder), "--replace"]) == 0
    card = (folder / "README.md").read_text()
    assert "of 8 rows, a false statement stands in 37.5 % of the long captions (95 % interval 13.7 to 69.4 %)" in card
    assert "37.5 % of the long" in (folder / "statistics.md").read_text()
    rows[0]["long_false"] = "x"
    with path.open("w", newline="") as file:
        lines = csv.DictWriter(file, rows[0])
        lines.writeheader()
        lines.writerows(rows)
    assert (
        main([str(folder), "--read-sheet"]) == 2
        and "row 2: long_false and short_false hold 'x'" in capsys.readouterr().err
    )
    (folder / "sheet" / "drawn_from.json").write_text('{"data_sha256": "of other data"}')
    assert main([str(folder), "--read-sheet"]) == 2 and "was not drawn from the data" in capsys.readouterr().err


def test_a_sheet_runs_no_formula_and_may_come_back_from_excel(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    texts = ['=HYPERLINK("http://a.example")', "+1", "-1", "@a", "\ta", "\ra", "A caf\u00e9 = a house"]
    rows = [
        {"id": f"{index}", "image": {"bytes": buffer.getvalue()}, "long_text": text, "short_text": "A road"}
        for index, text in enumerate(texts)
    ]
    write_sheet(rows, len(rows), tmp_path, "test", "hash")
    path = tmp_path / "sheet.csv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = sorted(csv.DictReader(file), key=lambda line: line["id"])
    assert [line["long_text"] for line in lines] == [*("'" + text for text in texts[:-1]), texts[-1]]
    with path.open("w", encoding="cp1252", newline="") as file:
        table = csv.DictWriter(file, lines[0], delimiter=";")
        table.writeheader()
        table.writerows(line | {"long_false": "1", "short_false": "0"} for line in lines)
    assert read_sheet(path, "hash")["long"]["false"] == len(rows)


def test_the_interval_is_wilsons():
    """By the formula, at z = 1.96."""
    for false, rows in ((0, 20), (3, 8), (17, 200)):
        z, share = 1.959964, false / rows
        middle = (share + z**2 / 2 / rows) / (1 + z**2 / rows)
        half = z / (1 + z**2 / rows) * (share * (1 - share) / rows + z**2 / 4 / rows**2) ** 0.5
        interval = wilson(false, rows)
        assert (interval["low"], interval["high"]) == pytest.approx((max(0, middle - half), middle + half), abs=1e-6)


def test_what_is_in_a_folder_is_not_overwritten(whole, tmp_path, capsys):
    folder = whole[0]
    recipe = recipe_with(whole, tmp_path / "r.yaml", {"captioner": "judge"})
    shutil.copytree(folder / "data", tmp_path / "own" / "data")
    assert main([str(folder), "--config", recipe, "--output", str(folder / "data" / "..")]) == 2
    assert "is the data set that is read" in capsys.readouterr().err
    assert main([str(folder), "--config", recipe, "--output", str(tmp_path / "own")]) == 2
    for more in ([], ["--restart"]):
        assert build(folder.parent / "recipe.yaml", tmp_path / "own", *more) == 1
    assert capsys.readouterr().err.count("own holds data of something else; take another --output.") == 3
    assert rows_of(folder) and len(list((tmp_path / "own" / "data").iterdir())) > 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "verify needs a model, a captioner or both"),
        ({"captioner": "nobody"}, "verify asks captioner nobody; the recipe has judge"),
        ({"model": "x", "min_confirmed": 0.5}, "verify.min_confirmed needs verify.captioner"),
        ({"model": "nothing-here"}, "nothing-here"),
    ],
)
def test_mistakes(whole, tmp_path, capsys, section, message):
    recipe = recipe_with(whole, tmp_path / "r.yaml", section)
    assert main([str(whole[0]), "--config", recipe, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert main([str(whole[0])]) == 2 and "give --config RECIPE and --output" in capsys.readouterr().err
