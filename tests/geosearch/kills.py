"""
Kills indexing at random moments, goes on, and compares the index with one that was left alone:
`python -m tests.geosearch.kills --kills 20`.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


BLOCK_WINDOWS = 24  # so that there are many blocks to be killed in
SCALES = ("64", "96")


def child(scenes: Path, output: Path, model: str, log: Path, fatal_step: int | None, shard: str | None = None) -> None:
    """Indexes, notes every batch that is encoded, and dies by SIGKILL at the given step of writing."""
    from geosearch import block_encoder, index, windows
    from geosearch.shards import run_shard
    from geosearch.windows import WindowSize
    from modeling_lrsclip.files import atomic
    from modeling_lrsclip.files.parts import parse_part

    windows.BLOCK_WINDOWS = BLOCK_WINDOWS
    embed, steps = block_encoder.embed_batches, []

    def noted(*arguments: Any):
        for embeddings in embed(*arguments):
            with log.open("a") as file:
                file.write(f"{len(embeddings)}\n")
            yield embeddings

    def counted(function):
        def call(*arguments: Any, **options: Any):
            steps.append(function)
            if len(steps) == fatal_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    block_encoder.embed_batches = noted
    os.replace, atomic.sync = counted(os.replace), counted(atomic.sync)
    job = index.IndexJob([str(scenes)], output, model, {"sizes": tuple(map(WindowSize.parse, SCALES))}, device="cpu")
    if shard:
        run_shard(job, *parse_part(shard))
    else:
        index.build_index(job)


def run(limit: float | None, *arguments: Any) -> int:
    """Runs [`child`] in a forked process, killed after `limit` seconds; its exit status, negative for a signal."""
    process = os.fork()
    if not process:
        status = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            child(*arguments)
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + (limit if limit is not None else 600)
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.005)


def parts_of(index: Path) -> list[dict[str, Any]]:
    """Names, sizes and hashes of an index's parts."""
    return json.loads((index / "index.json").read_text())["parts"]


def kill_and_compare(folder: Path, scenes: Path, model: str, kills: int, seed: int = 0) -> dict[str, Any]:
    """
    Indexes once alone and once through kills: half of them at a random time, half at a random step of writing.

    Returns:
        `kills` that hit, `windows`, and `encoded`: windows that went through the model in all runs together.

    Raises:
        `AssertionError`: where the two indexes differ, or more was encoded twice than what each kill had in hand.
    """
    import transformers.models.clip  # noqa: F401

    import geosearch.shards  # noqa: F401  once, before the forks
    import modeling_lrsclip.encoding.encoder  # noqa: F401

    rng = random.Random(seed)
    started = time.monotonic()
    assert run(None, scenes, folder / "alone", model, folder / "alone.log", None) == 0
    seconds = time.monotonic() - started
    hit, rounds, log = 0, 0, folder / "killed.log"
    while hit < kills:
        # Several indexes one after the other: a single one would be finished before it was killed often enough.
        output, status = folder / f"killed-{rounds}", -1
        while status:
            by_time = rng.random() < 0.5
            last = hit >= kills
            limit = rng.uniform(0.02, 1.1) * seconds if by_time and not last else None
            step = rng.randint(1, 60) if not by_time and not last else None
            status = run(limit, scenes, output, model, log, step)
            assert status in (0, -signal.SIGKILL), f"a run ended with status {status}"
            hit += status != 0
        assert parts_of(output) == parts_of(folder / "alone"), f"{output} differs after {hit} kills"
        left = {path.name for path in output.iterdir()}
        assert left == {"index.json", "parts", "skipped.jsonl", ".lock"}, left
        rounds += 1
    windows = sum(map(int, (folder / "alone.log").read_text().split()))
    encoded = sum(map(int, log.read_text().split()))
    assert encoded <= rounds * windows + hit * 3 * BLOCK_WINDOWS, f"{encoded} of {rounds} x {windows}"
    return {"kills": hit, "rounds": rounds, "windows": windows, "encoded": encoded}


def main() -> int:
    """Makes scenes and a model, and kills."""
    parser = argparse.ArgumentParser(prog="python -m tests.geosearch.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The model is made in a process of its own: torch's threads would not survive a fork.
        make = "from tests.geosearch.kills import make_material; import sys; make_material(sys.argv[1])"
        os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", make, name])
        print(
            json.dumps(kill_and_compare(folder, folder / "scenes", str(folder / "model"), options.kills, options.seed))
        )
    return 0


def make_material(folder: str) -> None:
    """Writes a tiny model and two scenes below a folder."""
    from tests.geosearch.small_scenes import noise, tiny_checkpoint, write_scene

    tiny_checkpoint(Path(folder, "model"))
    write_scene(Path(folder, "scenes", "a.tif"), noise(3, 700, 900))
    write_scene(Path(folder, "scenes", "b.tif"), noise(4, 500, 600, "uint16", seed=1), crs="EPSG:3857", nodata=0)


if __name__ == "__main__":
    sys.exit(main())
