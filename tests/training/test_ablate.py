"""The ablations: what the arms differ in, what is trained only once, how orderings are judged, and one study whole."""

import json
import signal
import sys
import time

import numpy as np
import pytest
import yaml
from PIL import Image

from evaluation.bootstrap import differences
from evaluation.paper import ablation_figures, paper_tables
from tests import processes
from training.ablate import main, parse_arguments
from training.ablations.figure import draw_study
from training.ablations.models import PAPER_RECIPE, OwnModels, SmallModels
from training.ablations.outcome import Outcome, judge
from training.ablations.run_studies import WEIGHTS, draw_data, parse_seeds, parse_setting
from training.ablations.runs import Run, RunFolders, Source, checked, field_of, identify, with_starts
from training.ablations.studies import Ladders, Ordering, choose_studies


SCENES, GENERAL = Source("scenes", "scenes 1", 9600), Source("general", "general 1", 9000)


@pytest.fixture(scope="module")
def small_models() -> SmallModels:
    return SmallModels(None, {}, SCENES, GENERAL)


def plan(models, names="all", weights=WEIGHTS["quick"], seed=0):
    """(study, arm, run) of every arm."""
    studies = choose_studies(names, models.ladders(weights))
    return [(study, arm, models.run(arm, study.name, seed)) for study in studies for arm in study.arms]


def flat(values, prefix=""):
    fields = {}
    for name, value in values.items():
        inner = isinstance(value, dict) and name != "long_weight"  # a number, or a curriculum
        fields |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return fields


def changed(run, plain):
    """The fields that a run's recipe has otherwise than another one's, defaults filled in."""
    recipes = [flat(checked(each.values, "captions.jsonl")) for each in (run, plain)]
    return {name for name in recipes[0].keys() | recipes[1].keys() if recipes[0].get(name) != recipes[1].get(name)}


@pytest.mark.parametrize("ladders", [Ladders(), Ladders(long_weights=WEIGHTS["quick"])])
def test_arms_and_orderings_are_those_of_the_paper(ladders):
    for study in choose_studies("all", ladders):
        names = [arm.name for arm in study.arms]
        assert all({ordering.better, ordering.worse} <= set(names) for ordering in study.orderings)
        figures = ablation_figures(study.name)
        assert study.figure == (figures is None)
        if not figures:
            assert paper_tables()["ablations"][study.name]["stated"]
            continue
        assert names == list(figures)
        for ordering in study.orderings:  # as the paper's own figures have it
            better, worse = (figures[name][ordering.task] for name in (ordering.better, ordering.worse))
            assert abs(better / worse - 1) < 0.04 if ordering.alike else better > worse


def test_an_arm_differs_in_what_its_study_is_about(small_models):
    expected = {
        "pcm": {"loss.pcm_rank"},
        "framework": {"loss.long_weight", "model.stretch_ratio"},
        "short_text": {"loss.short_text"},
        "loss_weight": {"loss.long_weight"},
        "batch_size": {"loop.batch_size"},
        "subset_size": {"loop.epochs"},
        "model_size": set(),
        "init": set(),
        "curriculum": {"loss.long_weight"},
    }
    plain = next(run for study, arm, run in plan(small_models, "pcm") if arm.name == "False")
    for study, _, run in plan(small_models):
        fields = changed(run, plain)
        assert fields in (set(), expected[study.name]), study.name
        assert run.source is SCENES
        other_start = run.start.key != plain.start.key
        assert other_start == (study.name in ("model_size", "init") and run.key != plain.key)


def test_what_studies_share_is_trained_once(small_models):
    runs = [run for _, _, run in plan(small_models)]
    ordered = with_starts(runs)
    plain = [run for run in runs if run.label == "LRSCLIP seed 0"]
    assert len(plain) == 9 and len({run.key for run in plain}) == 1  # an arm of every study
    assert len({run.key for run in ordered}) == len(ordered) == len({run.name for run in ordered})
    # 3 CLIPs, a Long-CLIP, the plain one, and of the studies 1 + 2 + 1 + 4 + 3 + 3 + 2 + 1 + 2 arms
    assert len(ordered) == 24
    places = {run.key: number for number, run in enumerate(ordered)}
    assert all(places[run.start.key] < places[run.key] for run in ordered if run.start)


def test_batch_sizes_see_equally_many_pairs_and_subsets_their_share(small_models):
    batches = {arm.name: run for _, arm, run in plan(small_models, "batch_size")}
    assert {run.samples for run in batches.values()} == {9600}
    assert {name: run.steps for name, run in batches.items()} == {"8": 1200, "16": 600, "32": 300, "64": 150}
    shares = {arm.name: run.samples for _, arm, run in plan(small_models, "subset_size")}
    assert shares["25%"] == pytest.approx(2400, abs=64) and shares["100%"] == 9600


def test_a_recipe_of_steps_is_scaled_and_one_of_several_epochs_refused(tmp_path):
    def models(loop):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"loop": loop}))
        return OwnModels(str(tmp_path / "recipe.yaml"), {}, SCENES)

    steps = models({"steps": 1000, "batch_size": 512})
    assert {arm.name: run.steps for _, arm, run in plan(steps, "batch_size")}["64"] == 8000
    assert {arm.name: run.steps for _, arm, run in plan(steps, "subset_size")}["25%"] == 250
    with pytest.raises(ValueError, match="loop.epochs 3; add --set loop.epochs=1"):
        plan(models({"epochs": 3}), "subset_size")


def test_keys_tell_runs_apart_by_what_decides_their_weights():
    def key(values, source=SCENES, start=None):
        return Run("any", values, source, start).key

    plain = {"loss": {"long_weight": 0.8}, "seed": 0}
    base = key(plain)
    assert key({"seed": 0}) == base  # 0.8 is the default
    assert key(plain, Source("elsewhere", SCENES.identity)) == base
    others = [key(plain | {"seed": 1}), key(plain, GENERAL), key(plain, start=Run("clip", {}, GENERAL))]
    assert len({base, *others}) == 4


def test_mistakes_are_told_before_anything_is_trained(small_models):
    with pytest.raises(ValueError, match=r"unknown study 'pmc'.*Did you mean pcm\?"):
        choose_studies("pmc", Ladders())
    with pytest.raises(ValueError, match="optim.learning_rat is not a field; did you mean optim.learning_rate"):
        plan(SmallModels(None, {"optim.learning_rat": 1e-3}, SCENES, GENERAL), "pcm")
    with pytest.raises(ValueError, match="--set loss has no value; write section.field=value"):
        parse_setting("loss")
    assert parse_setting("optim.learning_rate=1e-4") == ("optim.learning_rate", 1e-4)
    assert parse_seeds(parse_arguments(["--study", "pcm", "--full"])) == (0, 1, 2)
    with pytest.raises(ValueError, match="--seeds a must be whole numbers"):
        parse_seeds(parse_arguments(["--study", "pcm", "--seeds", "a"]))


def test_init_wants_a_long_clip_of_the_same_size(tmp_path, capsys):
    def starts(*settings):
        models = OwnModels(PAPER_RECIPE, dict(parse_setting(setting) for setting in settings), SCENES)
        return [field_of(run.values, "model.init") for _, _, run in plan(models, "init")]

    assert starts() == ["long-clip-vit-b-16", "openai/clip-vit-base-patch16"]
    with pytest.raises(ValueError, match="a Long-CLIP of the size of openai/clip-vit-large-patch14; name one with"):
        starts("model.init=openai/clip-vit-large-patch14")
    assert main(["--study", "init", "--long-clip", "x", "--output", str(tmp_path)]) == 2
    assert "--long-clip goes with your own --data" in capsys.readouterr().err


def test_arms_are_not_pushed_and_do_not_stop_early(tmp_path):
    recipe = {
        "push_to_hub": True,
        "push": {"repo": "a/b"},
        "loop": {"patience": 2, "validate_every": 5},
        "resume": True,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    models = OwnModels(str(tmp_path / "recipe.yaml"), {"push_to_hub": True}, SCENES)
    assert models.values == {"loop": {"validate_every": 5}}


def test_changed_data_is_other_data(tmp_path):
    file = tmp_path / "captions.jsonl"
    file.write_text("{}")
    before = identify(str(tmp_path)), identify([{"path": str(file), "weight": 2}])
    file.write_text("{}\n{}")
    assert identify(str(tmp_path)) != before[0] and identify([{"path": str(file), "weight": 2}]) != before[1]
    assert identify("someone/on-the-hub") == "someone/on-the-hub"


# ---------------------------------------------------------------------------------------------------------- orderings


def retrieval(share, seed, images=300):
    """A run's result whose text-to-image and image-to-text ranks are 0 for about a share of the images."""
    ranks = np.where(np.random.default_rng(seed).random((2, images)) < share, 0, 50)
    result = {"metrics": {}, "image_of_text": list(range(images)), "model": "tiny"}
    result["ranks"] = dict(zip(("text_to_image", "image_to_text"), ranks.tolist()))
    return {"zcrl": [result]}


@pytest.mark.parametrize(
    "better, worse, alike, word",
    [
        ([0.9, 0.9, 0.9], [0.5, 0.5, 0.5], False, "appears"),
        ([0.5, 0.5, 0.5], [0.9, 0.9, 0.9], False, "reversed"),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], False, "within noise"),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], True, "appears"),
        ([0.9, 0.9, 0.9], [0.5, 0.5, 0.5], True, "differs"),
        ([0.9, 0.7, 0.5], [0.4, 0.4, 0.4], False, "within noise"),  # all above, by far too different margins
        ([0.9], [0.5], False, "appears"),
    ],
)
def test_orderings_are_judged_by_queries_and_by_seeds(better, worse, alike, word):
    ordering = Ordering("zcrl", "a", "b", alike)
    ours, others = (
        [retrieval(share, seed + 10 * side) for seed, share in enumerate(shares)]
        for side, shares in enumerate((better, worse))
    )
    assert judge(ordering, ours, others).word == word


def test_one_seed_on_one_data_set_is_the_paired_bootstrap_of_compare():
    better, worse = retrieval(0.7, 1), retrieval(0.6, 2)
    expected = differences(worse["zcrl"][0], better["zcrl"][0])["mR"]
    verdict = judge(Ordering("zcrl", "a", "b"), [better], [worse])
    assert [verdict.difference, verdict.low, verdict.high] == pytest.approx(
        [expected.difference, expected.low, expected.high], abs=1e-9
    )


# ----------------------------------------------------------------------------------------------------------- processes


def test_a_run_that_fails_is_told_with_its_last_words(tmp_path):
    launch = [sys.executable, "-c", "import sys; print('error: no room'); sys.exit(3)"]
    folders = RunFolders(tmp_path, launch)
    with pytest.raises(ValueError, match="'any' ended with exit status 3: no room .*the same command goes on"):
        folders.train(Run("any", {}, SCENES))


def test_an_interrupted_run_may_save_its_state(tmp_path):
    code = (
        "import pathlib, signal, sys, time; folder = pathlib.Path(sys.argv[-1]).parent\n"
        "signal.signal(signal.SIGTERM, lambda *_: ((folder / 'saved').touch(), sys.exit(1)))\n"
        "(folder / 'started').touch(); time.sleep(60)"
    )
    folders = RunFolders(tmp_path, [sys.executable, "-c", code])

    def interrupt(*_):
        if not (tmp_path / "started").exists():
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            folders.train(Run("any", {}, SCENES))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "saved").exists()


# -------------------------------------------------------------------------------------------------------------- whole


def test_the_drawn_data_is_drawn_once_and_shows_half_of_the_classes_first(tmp_path):
    options = parse_arguments(["--study", "pcm", "--scenes", "40", "--test-scenes", "8", "--mosaics", "1"])
    said = []
    scenes, general, evaluation_data = draw_data(tmp_path, options, said.append)
    assert scenes.pairs == 40 and 20 <= general.pairs <= 60
    assert len(said) == 3 and len(evaluation_data) == 2
    assert draw_data(tmp_path, options, said.append)[0] == scenes and len(said) == 3
    assert scenes.identity != general.identity


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = {"init": "scratch", "tokenizer": "train", "vocab_size": 600, "projection_dim": 24, "text": width}
    model["vision"] = width | {"image_size": 32, "patch_size": 8}
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    loop = {"batch_size": 4, "steps": 2}
    path.write_text(yaml.safe_dump({"model": model, "loop": loop, "precision": "fp32"}))
    return path


def test_a_study_whole_and_again(tmp_path, captioned_folder, recipe, capsys, monkeypatch):
    monkeypatch.setattr("training.ablations.runs.subprocess", processes.as_subprocess(project=True))
    output = tmp_path / "out"
    words = [
        "--study",
        "short_text",
        "--config",
        str(recipe),
        "--data",
        str(captioned_folder),
        "--output",
        str(output),
    ]
    words += ["--set", "optim.learning_rate=1e-3", "--device", "cpu"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "run 1 of 2" in printed and "not held out" in printed and "SeLo Rmi: no data for it" in printed

    document = json.loads((output / "short_text" / "results.json").read_text())
    arms = {arm["name"]: arm for arm in document["arms"]}
    assert list(arms) == ["First Text", "Short Text"] and document["seeds"] == [0]
    assert arms["Short Text"]["paper"] == ablation_figures("short_text")["Short Text"]
    for arm in arms.values():
        (run,) = arm["runs"]
        assert field_of(run["recipe"], "optim.learning_rate") == 1e-3
        trained = json.loads((output / "arms" / run["folder"].split("/")[-1] / "run.json").read_text())
        short_text = {"First Text": "first_sentence", "Short Text": "own"}[arm["name"]]
        assert trained["config"]["loss"]["short_text"] == short_text and trained["steps"] == 2
        assert 0 <= arm["mean"]["zcrl"] <= 100
    assert {ordering["task"] for ordering in document["orderings"]} == {"zcrl", "zcrs"}  # no labels, no landscapes
    table = (output / "short_text" / "table.md").read_text()
    assert "| First Text | " in table and "| 64.82 | " in table and "Orderings of the paper: 2." in table
    with Image.open(output / "short_text" / "figure.png") as figure:
        assert figure.width > 600

    began = time.time()
    assert main(words) == 0  # nothing is trained or measured again
    assert "2 runs in all, 2 of them finished before" in capsys.readouterr().out
    assert all(file.stat().st_mtime < began for file in (output / "arms").rglob("*.json"))
    assert json.loads((output / "short_text" / "results.json").read_text())["arms"] == document["arms"]


def test_three_seeds_are_told_as_mean_and_spread(tmp_path):
    (study,) = choose_studies("batch_size", Ladders(batch_sizes=(8, 64)))
    arms = {}
    for arm, share in zip(study.arms, (0.5, 0.9), strict=True):
        arms[arm.name] = [retrieval(share, seed) for seed in range(3)]
        for seed, results in enumerate(arms[arm.name]):
            results["zcrl"][0] |= {"dataset": "tiles", "metrics": {"mR": 100 * share + seed}}
    outcome = Outcome(study, arms, ["SeLo Rmi"], "", (0, 1, 2))
    table, closing = outcome.table(), outcome.closing()
    assert [column.name for column in table.columns] == ["pairs a step", *["here"] * 4]  # the paper prints no figures
    assert table.rows == [["8", "51.0 ± 1.0", None, None, None], ["64", "91.0 ± 1.0", None, None, None]]
    assert "The paper prints no figures here" in table.note and "SeLo Rmi: no data" in table.note
    assert "Appear here: 1;" in closing[0] and "64 > 8: appears" in closing[1] and "by seed" in closing[1]
    assert "the t interval of the seeds' differences" in closing[2]
    here = {"zcrl": {name: outcome.point(name, "zcrl") for name in arms}}
    assert here["zcrl"]["8"] == pytest.approx((51, 50, 52))
    with Image.open(draw_study(study, here, None, tmp_path / "figure.png", "mean ± s")) as figure:
        assert len(np.unique(np.asarray(figure.convert("RGB")).reshape(-1, 3), axis=0)) > 10  # something is drawn
