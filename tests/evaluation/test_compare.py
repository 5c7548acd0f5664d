"""The command: what is compared with what, and what it refuses."""

import copy
import json

import pytest

from evaluation.compare import main, pair_labels, read_results
from tests.evaluation.test_bootstrap import classification_result, localization_result, retrieval_result


HASHES = ("images_sha256", "texts_sha256", "labels_sha256", "queries_sha256")


def document(path, **models):
    """`label=result` or `label=[results]`."""
    results = []
    for label, entry in models.items():
        for result in entry if isinstance(entry, list) else [entry]:
            known = {"task": "zcrl", "dataset": "tiles"} | dict.fromkeys(HASHES, "0") | result
            results.append(known | {"model": label})
    path.write_text(json.dumps({"results": results}), encoding="utf-8")
    return path


def run(capsys, *arguments):
    status = main([str(argument) for argument in (*arguments, "--resamples", "200")])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def rows(printed):
    return {words[0]: line for line in printed.splitlines() if len(words := line.split()) > 6}


def test_a_better_model_is_found_out(tmp_path, capsys):
    first = document(tmp_path / "a.json", weak=retrieval_result(0, images=100))
    second = document(tmp_path / "b.json", strong=retrieval_result(0, images=100, lift=3))
    status, printed = run(capsys, first, second)
    assert status == 0 and "A: weak" in printed and "B: strong" in printed
    assert "B better" in rows(printed)["mR"]
    status, printed = run(capsys, second, first)
    assert "A better" in rows(printed)["mR"]


def test_the_same_model_twice_differs_nowhere(tmp_path, capsys):
    results = [
        retrieval_result(0),
        classification_result(0) | {"task": "zic"},
        localization_result(0) | {"task": "selo"},
    ]
    file = document(tmp_path / "a.json", one=results)
    status, printed = run(capsys, file, document(tmp_path / "b.json", one=results))
    assert status == 0 and "better" not in printed.replace("better:", "")
    assert printed.count("not significant") == 7 + 2 + 4 and "1.000" in rows(printed)["Rmi"]
    assert "+0.0 … +0.0" in rows(printed)["accuracy"]


def test_lower_is_better_for_the_attention_shift(tmp_path, capsys):
    low, high = ({"per_query": {name: [v] * 9 for name in ("Rsu", "Ras", "Rda", "Rmi")}} for v in (0.2, 0.7))
    _, printed = run(capsys, document(tmp_path / "a.json", a=low), document(tmp_path / "b.json", b=high))
    assert "A better" in rows(printed)["Ras"] and "B better" in rows(printed)["Rsu"]
    assert "+0.5000 … +0.5000" in rows(printed)["Rmi"]


def test_models_are_paired_by_label_or_by_choice(tmp_path, capsys):
    first = document(tmp_path / "a.json", x=retrieval_result(0), y=retrieval_result(0, lift=1))
    second = document(tmp_path / "b.json", y=retrieval_result(0, lift=2), x=retrieval_result(0))
    a, b = read_results(str(first)), read_results(str(second))
    assert pair_labels(a, b) == [("x", "x"), ("y", "y")]
    assert pair_labels(a, b, "x", "y") == [("x", "y")]
    status, printed = run(capsys, first, "--a", "x", "--b", "y")
    assert status == 0 and "zcrl on tiles · A: x · B: y" in printed
    assert run(capsys, first) == (status, printed)  # the only two
    more = document(tmp_path / "more.json", x=retrieval_result(0), y=retrieval_result(0), z=retrieval_result(0))
    status, printed = run(capsys, more)
    assert status == 2 and "choose the models with --a and --b" in printed and "has x, y, z" in printed
    status, printed = run(capsys, first, second, "--a", "z")
    assert (status, printed) == (2, f"error: --a z: {first} has x, y.\n")
    third = document(tmp_path / "c.json", u=retrieval_result(0), v=retrieval_result(0))
    status, printed = run(capsys, first, third)
    assert status == 2 and "choose the models" in printed


def test_a_folder_stands_for_its_results(tmp_path, capsys):
    document(tmp_path / "results.json", x=retrieval_result(0), y=retrieval_result(0))
    assert run(capsys, tmp_path, "--a", "x", "--b", "y")[0] == 0


def test_the_spread_of_several_seeds(tmp_path, capsys):
    files = []
    for seed, recall in enumerate((60.0, 62.0, 67.0)):
        result = retrieval_result(0) | {
            "metrics": {"text_to_image_R@1": recall, "mR": 50.0},
            "texts_sha256": str(seed),
        }
        files.append(document(tmp_path / f"{seed}.json", x=result))
    status, printed = run(capsys, *files, "--seeds")
    assert status == 0 and "3 seeds" in printed and "63.0±3.6" in printed and "50.0±0.0" in printed
    assert run(capsys, "--seeds", *files) == (status, printed)
    for option in ("--a", "--b"):
        status, printed = run(capsys, *files, option, "x", "--seeds")
        assert status == 2 and "--seeds shows every model: leave out one of them" in printed
    other = document(tmp_path / "other.json", y=retrieval_result(0))
    assert run(capsys, files[0], other, "--seeds") == (2, f"error: {other} has no zcrl on tiles of x.\n")
    status, printed = run(capsys, files[0], "--seeds")
    assert status == 2 and "--seeds takes the results of two seeds or more" in printed
    assert run(capsys, *files) == (2, "error: 3 results were given; two are compared, and more with --seeds.\n")


@pytest.mark.parametrize("name, what", [("images_sha256", "images"), ("texts_sha256", "texts")])
def test_other_data_are_not_compared(tmp_path, capsys, name, what):
    result = retrieval_result(0)
    other = copy.deepcopy(result) | {name: "1"}
    files = document(tmp_path / "a.json", x=result), document(tmp_path / "b.json", x=other)
    expected = f"error: zcrl on tiles: x and x were not measured on the same {what}; measure both on the same data.\n"
    assert run(capsys, *files) == (2, expected)


def test_what_cannot_be_compared_is_one_clear_sentence(tmp_path, capsys):
    good = document(tmp_path / "a.json", x=retrieval_result(0))
    assert "cannot be read (No such file" in run(capsys, good, tmp_path / "no.json")[1]
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json cannot be read" in run(capsys, good, tmp_path / "broken.json")[1]
    for text in ("{}", '{"results": []}', '{"results": {}}', '{"results": "none"}'):
        (tmp_path / "empty.json").write_text(text)
        for words in ([tmp_path / "empty.json"], [good, tmp_path / "empty.json"]):
            for option in ([], [good, "--seeds"]):
                status, printed = run(capsys, *words, *option)
                assert status == 2 and "empty.json" in printed and printed.count("\n") == 1, (words, option)
    elsewhere = document(tmp_path / "b.json", x=retrieval_result(0) | {"dataset": "scenes"})
    status, printed = run(capsys, good, elsewhere)
    assert status == 2 and "no task and data set in common: x has zcrl on tiles; x has zcrl on scenes" in printed
    assert main([str(good), str(good), "--resamples", "5"]) == 2
