"""Shards, processes of accelerate launch and tasks of Ray make the index that one process makes, to the byte."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from geosearch.index import IndexJob
from geosearch.index_store import IndexProblem, open_index
from geosearch.shards import build_on_ray, merge_shards, run_shard
from geosearch.windows import WindowSize
from modeling_lrsclip.files.parts import parse_part
from tests import processes
from tests.geosearch.kills import kill_and_compare
from tests.geosearch.small_scenes import noise, write_scene


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scene(folder / "a.tif", noise(3, 700, 1500))
    write_scene(folder / "b.tif", noise(4, 500, 600, "uint16", seed=1), crs="EPSG:3857", nodata=0)
    (folder / "c.tif").write_text("no image")
    return folder


@pytest.fixture
def job(scenes, checkpoint, tmp_path):
    return IndexJob([str(scenes)], tmp_path / "index", checkpoint, {"sizes": (WindowSize(64),)}, device="cpu")


@pytest.fixture
def alone(make_index, scenes, tmp_path):
    """Parts of the index that one process makes."""
    return make_index(scenes, output=tmp_path / "alone")["parts"]


def test_shards_are_a_partition_and_merge_gives_the_index_of_one_process(job, alone, tmp_path):
    came = [run_shard(job, shard, 3) for shard in (2, 3, 1)]
    assert sum(each["encoded"] for each in came) == sum(part["rows"] for part in alone) and came[0]["encoded"] > 0
    names = [{path.name for path in (job.output / "shards" / f"{i}-of-3" / "blocks").iterdir()} for i in (1, 2, 3)]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    assert run_shard(job, 2, 3)["encoded"] == 0  # done already
    # One of the shards was made on another machine, and copied here.
    shutil.move(job.output / "shards" / "2-of-3", tmp_path / "copied")
    with pytest.raises(IndexProblem, match=r"of 3 shards 2 are not finished .* --shard 2/3 again"):
        merge_shards(job.output)
    content = merge_shards(job.output, [tmp_path / "copied"])
    assert content["parts"] == alone and not (job.output / "shards").exists() and (tmp_path / "copied").is_dir()
    skipped = (job.output / "skipped.jsonl").read_text()
    assert json.loads(skipped)["scene"].endswith("c.tif")
    with pytest.raises(IndexProblem, match="has no finished shards"):
        merge_shards(job.output)


def test_shards_add_to_an_index(job, alone, make_index, scenes):
    make_index(scenes / "b.tif")
    for shard in (1, 2):
        run_shard(job, shard, 2)
    assert merge_shards(job.output)["parts"] == alone


def test_an_interrupted_merge_is_merged_again(job, alone, monkeypatch):
    for shard in (1, 2):
        run_shard(job, shard, 2)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    kept = job.output.parent / "kept"
    shutil.copytree(job.output / "shards", kept)
    merge_shards(job.output)
    shutil.copytree(kept, job.output / "shards")  # as if it had been killed before it took the shards away
    assert merge_shards(job.output)["parts"] == alone and len(open_index(job.output)) == sum(p["rows"] for p in alone)


def test_shards_of_different_commands_are_not_united(job, checkpoint):
    run_shard(job, 1, 2)
    other = IndexJob(job.scenes, job.output, checkpoint, {"sizes": (WindowSize(96),)}, device="cpu")
    run_shard(other, 2, 2)
    with pytest.raises(IndexProblem, match="not finished for the same scenes, model and options"):
        merge_shards(job.output)


@pytest.mark.parametrize("text", ["3", "0/2", "3/2", "a/b", "1/0", "-1/2", "1/2/3"])
def test_shards_that_are_none(text):
    with pytest.raises(ValueError, match="shard"):
        parse_part(text, "shard")
    assert parse_part("2/5") == (2, 5)


def test_kills_change_nothing(scenes, tmp_path, checkpoint):
    code = "import sys; from pathlib import Path; from tests.geosearch.kills import kill_and_compare; print(kill_and_compare(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], 3))"
    command = [sys.executable, "-c", code, str(tmp_path), str(scenes), checkpoint]
    run = processes.run(command, cwd=ROOT, project=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert kill_and_compare.__name__ and "'kills': 3" in run.stdout


def test_processes_of_accelerate_launch_share_the_work(job, alone, scenes, checkpoint):
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "geosearch", "index"),
    ]
    command += [str(scenes), "--model", checkpoint, "--output", str(job.output), "--window", "64", "--device", "cpu"]
    run = processes.run(command, cwd=ROOT, project=True)  # the launcher; it starts the two
    assert run.returncode == 0, run.stderr[-3000:]
    assert open_index(job.output).metadata["parts"] == alone and "windows of 2 scenes" in run.stdout


def test_a_worker_of_ray_that_is_killed_changes_nothing(job, alone, tmp_path):
    ray = pytest.importorskip("ray")
    import psutil

    # Two workers; the driver watches from a process of its own, this one kills.
    code = """
import json, sys
from pathlib import Path
import ray
from geosearch.index import IndexJob
from geosearch.shards import build_on_ray
from geosearch.windows import WindowSize
if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    print("started", flush=True)
    scenes, output, model = sys.argv[1:]
    job = IndexJob([scenes], Path(output), model, {"sizes": (WindowSize(64),)}, device="cpu")
    print(json.dumps(build_on_ray(job, shards=4)["parts"]))
"""
    (tmp_path / "drive.py").write_text(code)
    command = [sys.executable, str(tmp_path / "drive.py"), job.scenes[0], str(job.output), job.model]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    reading, writing = os.pipe()
    with open(reading) as printed:
        with open(writing, "w") as stdout:
            driver = processes.start(command, cwd=ROOT, env=env, stdout=stdout, project=True)
        assert printed.readline() == "started\n"
        killed, deadline = 0, time.monotonic() + 300
        while not killed and driver.poll() is None and time.monotonic() < deadline:
            for process in psutil.Process(driver.pid).children(recursive=True):
                try:
                    with_task = "".join(process.cmdline())
                except psutil.Error:  # it has just ended
                    continue
                if "ray::run_shard" in with_task and any(job.output.glob("shards/*/.lock")):
                    os.kill(process.pid, signal.SIGKILL)
                    killed += 1
                    break
            time.sleep(0.02)
        output = printed.read()
        driver.wait(timeout=300)
    assert killed == 1 and driver.returncode == 0
    assert json.loads(output.splitlines()[-1]) == alone == open_index(job.output).metadata["parts"]
    assert build_on_ray.__name__ and ray.__version__
