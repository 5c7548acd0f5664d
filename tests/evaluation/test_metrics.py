"""The `evaluate` modules: loaded by path in processes of their own, offline, from the clone and from elsewhere."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.localization import localization_metrics
from evaluation.retrieval import retrieval_recall
from tests import processes


pytestmark = pytest.mark.slow  # processes that import everything anew

ROOT = Path(__file__).parents[2]

SCRIPT = """
import doctest, json, sys
from pathlib import Path
import evaluate, numpy

folder, metrics = Path(sys.argv[1]), sys.argv[2]
given = numpy.load(folder / "given.npz")
said = {}
for name in ("retrieval_recall", "semantic_localization"):
    metric = evaluate.load(f"{metrics}/{name}")
    said[name] = {
        "features": sorted(metric.features), "description": metric.description, "citation": metric.citation,
        "inputs": metric.inputs_description,
    }
    if name == "retrieval_recall":
        compute = lambda **more: metric.compute(
            predictions=given["texts"], references=given["owners"], image_embeds=given["images"], **more)
        options = {"few": {"ks": [1, 3]}, "default": {}}
    else:
        regions = json.loads((folder / "regions.json").read_text())
        compute = lambda maps: metric.compute(predictions=maps, references=regions)
        options = {
            "arrays": {"maps": list(given["maps"])},
            "files": {"maps": [str(folder / f"{index}.png") for index in range(2)]},
            "floats": {"maps": [heat / 255 for heat in given["maps"]]},
        }
    for label, own in options.items():
        try:
            said[name][label] = compute(**own)
        except Exception as error:
            said[name][label] = f"{type(error).__name__}: {error}"
    if "default" not in said[name] or isinstance(said[name]["default"], dict):
        finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(verbose=False)
        for test in finder.find(type(metric), name, globs={}):
            runner.run(test)
        said[name]["examples"] = list(runner.summarize(verbose=False))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def metric_inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((4, 8)).astype(np.float32), rng.standard_normal((9, 8)).astype(np.float32)
    maps = rng.integers(0, 256, (2, 60, 90), dtype=np.uint8)
    maps[0, 20:40, 30:60] = 255
    regions = [
        [[[30, 20], [60, 20], [60, 40], [30, 40]]],
        [[[5, 5], [50.5, 5], [40, 50]], [[60, 10], [80, 10], [80, 30]]],
    ]
    np.savez(folder / "given.npz", images=images, texts=texts, owners=np.arange(9) % 4, maps=maps)
    (folder / "regions.json").write_text(json.dumps(regions))
    for index, heat in enumerate(maps):
        Image.fromarray(heat).save(folder / f"{index}.png")
    return folder, {"images": images, "texts": texts, "owners": np.arange(9) % 4, "maps": maps, "regions": regions}


def ask(folder, metrics, cwd):
    caches = {"HF_HOME": str(cwd / "hf"), "HF_MODULES_CACHE": str(cwd / "modules")}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= caches | {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if metrics == "evaluation/metrics":  # from the clone
        cwd = ROOT
    command = [sys.executable, "-c", SCRIPT, str(folder), metrics]
    done = processes.run(command, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_both_modules_in_the_clone(metric_inputs, tmp_path):
    folder, values = metric_inputs
    said = ask(folder, "evaluation/metrics", tmp_path)
    recall, localization = said["retrieval_recall"], said["semantic_localization"]
    arrays = (values["images"], values["texts"], values["owners"])
    assert recall["default"] == pytest.approx(retrieval_recall(*arrays))
    assert recall["few"] == pytest.approx(retrieval_recall(*arrays, ks=(1, 3)))
    per_map = [
        localization_metrics(heat, regions) for heat, regions in zip(values["maps"], values["regions"], strict=True)
    ]
    means = {name: np.mean([one[name] for one in per_map]) for name in per_map[0]}
    assert localization["arrays"] == pytest.approx(means) and localization["files"] == pytest.approx(means)
    assert "wanted (H, W) of uint8" in localization["floats"] or "TypeError" in localization["floats"]
    for module in said.values():
        assert module["features"] == ["predictions", "references"]
        assert "@article" in module["citation"] and "Returns:" in module["inputs"] and module["description"].strip()
        assert module["examples"][0] == 0 and module["examples"][1] >= 5  # failed, tried


def test_elsewhere_localization_works_and_recall_says_what_it_needs(metric_inputs, tmp_path):
    folder, _ = metric_inputs
    said = ask(folder, str(ROOT / "evaluation" / "metrics"), tmp_path)
    assert set(said["semantic_localization"]["arrays"]) == {"Rsu", "Ras", "Rda", "Rmi"}
    assert said["retrieval_recall"]["default"].startswith(
        "ModuleNotFoundError: retrieval_recall needs the folder evaluation/"
    )
