"""Recipes: several files together, overrides, and mistakes told all at once."""

import pytest
import yaml

from training.lrs2m.captioners.prompts import load_prompts
from training.lrs2m.data_row import schema, split_of
from training.lrs2m.recipe import public_recipe, read_recipe, recipe_hash
from training.lrs2m.sources.records import normalise_key, table_rows


def written(tmp_path, name, **fields):
    path = tmp_path / f"{name}.yaml"
    captioner = {"kind": "openai", "model": "Qwen/Qwen2.5-7B-Instruct", "base_url": "http://gpu:8000/v1"}
    source = {
        "name": name,
        "route": "compress",
        "licence": "CC0-1.0",
        "read": {"kind": "table", "path": f"/data/{name}.csv"},
    }
    source["short"] = {"captioner": "llm", "prompt": "compress@1"}
    path.write_text(yaml.safe_dump({"name": name, "captioners": {"llm": captioner}, "sources": [source]} | fields))
    return path


def test_several_recipes_become_one(tmp_path):
    recipe = read_recipe([written(tmp_path, "a", seed=3), written(tmp_path, "b", seed=4)], ["sources.1.read.limit=5"])
    assert [source.name for source in recipe.sources] == ["a", "b"] and recipe.seed == 3
    assert recipe.sources[1].read.limit == 5 and recipe.sources[0].read.limit is None
    other = written(tmp_path, "c", captioners={"llm": {"kind": "transformers", "model": "x"}})
    with pytest.raises(ValueError, match="describes captioner llm otherwise"):
        read_recipe([written(tmp_path, "a"), other])


def test_mistakes_are_told_together(tmp_path):
    path = written(tmp_path, "a", sead=1, validation_fraction=2, captioners={"llm": {"kind": "openai", "model": "x"}})
    with pytest.raises(ValueError) as error:
        read_recipe([path])
    assert "sead is not a field; did you mean seed?" in str(error.value)
    assert "validation_fraction=2" in str(error.value) and "base_url belongs to a captioner of kind openai" in str(
        error.value
    )
    for overrides, message in (
        (["seed"], "has no value"),
        (["captioners={x"], r"captioners=.\{x.: input should be a valid dict"),
        (["captioners.llm.base_url=localhost:8000/v1"], "must begin with http:// or https://"),
        (["sources.7.name=x"], "the list has the places 0 to 0"),
        (["name.x=1"], "name is a single value and has no field x"),
        (["sources.0.read.pth=x"], "sources.0.read.pth is not a field; did you mean sources.0.read.path?"),
    ):
        with pytest.raises(ValueError, match=message):
            read_recipe([written(tmp_path, "a")], overrides)


def test_the_hash_follows_what_decides_the_rows(tmp_path):
    def hash_of(*overrides):
        recipe = read_recipe([written(tmp_path, "a")], overrides)
        return recipe_hash(recipe, load_prompts(recipe, tmp_path))

    assert hash_of() == hash_of("max_skipped_fraction=0.5", "captioners.llm.base_url=http://other/v1", "lookahead=3")
    assert len({hash_of(), hash_of("seed=1"), hash_of("captioners.llm.temperature=0"), hash_of("short_words=12")}) == 4
    prompt = tmp_path / "own.yaml"
    prompt.write_text("name: own\nversion: 1\nimage: false\nsystem: s\nuser: 'Shorten: {long_text}'\n")
    own_prompt = hash_of("sources.0.short.prompt=own.yaml")
    prompt.write_text(prompt.read_text().replace("Shorten", "Cut"))
    assert own_prompt != hash_of("sources.0.short.prompt=own.yaml")  # the words count, not the name


def test_what_is_published_names_no_machine(tmp_path):
    shown = str(public_recipe(read_recipe([written(tmp_path, "a")])))
    assert "http" not in shown and "/data" not in shown and "a.csv" in shown and "Qwen/Qwen2.5-7B-Instruct" in shown


def test_splits_follow_the_image():
    shares = [split_of(f"{index:064x}", 0, 0.1) for index in range(5000)]
    assert 0.087 < shares.count("validation") / 5000 < 0.113  # three standard deviations
    assert shares != [split_of(f"{index:064x}", 1, 0.1) for index in range(5000)]
    assert split_of("0" * 64, 0, 0.0) == "train" and b"huggingface" in schema().metadata


def test_keys_and_encodings(tmp_path):
    recipe = read_recipe(
        [written(tmp_path, "a")],
        ['sources.0.read.key={basename: true, stem: true, lower: true, replace: [["^p", ""]]}'],
    )
    assert normalise_key("Set\\P12.JPG", recipe.sources[0].read.key) == "12"
    (tmp_path / "c.csv").write_bytes("image,title\na.png,\u6e2f\u53e3\n".encode("gb18030"))
    assert list(table_rows(tmp_path / "c.csv", "train", "gb18030")) == [{"image": "a.png", "title": "\u6e2f\u53e3"}]
    entries = [{"image": f"{index}.png", "text": "x" * 5000} for index in range(600)]  # more than a piece of 1 MiB
    import json

    (tmp_path / "l.json").write_text(json.dumps(entries, indent=2))
    assert list(table_rows(tmp_path / "l.json", "train", "utf-8")) == entries
    (tmp_path / "l.json").write_text(json.dumps(entries)[:-9])
    with pytest.raises(ValueError, match="entry 600 is not valid JSON"):
        list(table_rows(tmp_path / "l.json", "train", "utf-8"))
