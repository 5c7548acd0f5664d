"""
An index built by several processes or machines. A shard is every n-th block of every scene, encoded into a folder of its own
with a marker that is written last; `geosearch merge` unites the shards. Processes of `accelerate launch` and tasks of
Ray are shards too.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_lrsclip.files.atomic import replace_text
from modeling_lrsclip.files.parts import run_on_ray

from .block_encoder import check_skipped, encode_blocks
from .index import BLOCKS, SHARDS, IndexJob, finish_index, locked, tell_plan
from .index_store import IndexProblem
from .index_writer import finish_publishing
from .plan import Plan


DONE = "done.json"
POLL_SECONDS = 0.5


def run_shard(job: IndexJob, shard: int, shards: int) -> dict[str, Any]:
    """
    Encodes one shard into INDEX/shards/`shard`-of-`shards`; run again, it goes on where it was.

    Args:
        job: the same for all shards.
        shard, shards: which of how many, from 1.

    Returns:
        `encoded` and `seconds` as of [`~geosearch.index.encode_blocks`], and `fingerprint` of the plan.

    Raises:
        `ValueError`: one sentence for what cannot be done; finished blocks stay for the next run.
    """
    folder = job.output / SHARDS / f"{shard}-of-{shards}"
    with locked(folder):
        encoder = job.load_encoder()
        plan = job.plan(encoder)
        done = _read_done(folder)
        if done and done["fingerprint"] == plan.fingerprint:
            return {"encoded": 0, "seconds": 0.0, "fingerprint": plan.fingerprint}
        (folder / DONE).unlink(missing_ok=True)
        if shard == 1:
            tell_plan(plan)
        check_skipped(plan.skipped, job.max_skipped, folder)
        blocks = plan.blocks(shard, shards)
        encoded = encode_blocks(plan, blocks, encoder, folder / BLOCKS, job.readers, job.max_skipped)
        marker = {"shard": shard, "shards": shards, "fingerprint": plan.fingerprint, "plan": plan.to_dict()}
        replace_text(folder / DONE, json.dumps(marker))
        return {**encoded, "fingerprint": plan.fingerprint}


def merge_shards(output: Path, others: Sequence[Path] = ()) -> dict[str, Any]:
    """
    Unites finished shards, as one process would have made the index, to the byte.

    Args:
        output: folder of the index; its own shards are taken.
        others: folders with further shards, copied from other machines: a shard's own, or one with `shards` below.

    Returns:
        Content of `index.json`.

    Raises:
        [`~geosearch.index_store.IndexProblem`]: where shards are missing or belong to different commands.
    """
    with locked(output):
        finish_publishing(output)
        finished = {}
        for folder in _shard_folders([output, *others]):
            if (done := _read_done(folder)) is not None:
                finished.setdefault((done["fingerprint"], done["shards"]), {})[done["shard"]] = folder, done["plan"]
        if not finished:
            advice = "run geosearch index ... --shard i/n for each i first"
            raise IndexProblem(f"{output} has no finished shards: {advice}.")
        complete = [key for key, shards in finished.items() if len(shards) == key[1]]
        if not complete:
            (_, count), shards = max(finished.items(), key=lambda item: len(item[1]))
            missing = [str(shard) for shard in range(1, count + 1) if shard not in shards]
            raise IndexProblem(
                f"of {count} shards {', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''} are not finished for the "
                f"same scenes, model and options: run geosearch index ... --shard {missing[0]}/{count} again."
            )
        shards = finished[complete[0]]
        plan = Plan.from_dict(shards[1][1])
        content = finish_index(output, plan, [folder / BLOCKS for folder, _ in shards.values()])
        shutil.rmtree(output / SHARDS, ignore_errors=True)
        return content


def _shard_folders(roots: Sequence[Path]) -> list[Path]:
    folders = []
    for root in roots:
        if (root / DONE).is_file():
            folders.append(root)
        folders += sorted(path for path in (root / SHARDS).glob("*-of-*") if path.is_dir())
    return folders


def _read_done(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / DONE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise IndexProblem(f"{folder / DONE} cannot be read ({error}): remove it and run that shard again.") from error


# ------------------------------------------------------------------------------------------------ accelerate launch


def launched_processes() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, as `accelerate launch` or `torchrun` tell; 0, 1, 0 without."""
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    return tuple(int(os.environ.get(name, default)) for name, default in alone.items())


def build_by_processes(job: IndexJob, shard: tuple[int, int] = (1, 1)) -> dict[str, Any] | None:
    """
    Encodes this process's part of an index, or of a shard of one; the first process of an index waits for the others and
    unites them.

    Args:
        job: its device is this process's GPU where there is one.
        shard: which of how many, from 1, that the processes share.

    Returns:
        Content of `index.json` in the first process of a whole index, else None.
    """
    import torch

    rank, world, local_rank = launched_processes()
    if job.device is None and torch.cuda.is_available():
        job = dataclasses.replace(job, device=f"cuda:{local_rank % torch.cuda.device_count()}")
    (number, count), parent = shard, os.getppid()
    came = run_shard(job, (number - 1) * world + rank + 1, count * world)
    if rank or count > 1:
        return None
    waiting = [job.output / SHARDS / f"{number}-of-{world}" for number in range(1, world + 1)]
    while waiting := [f for f in waiting if (_read_done(f) or {}).get("fingerprint") != came["fingerprint"]]:
        if os.getppid() != parent:
            advice = f"run the same command again for {job.output}"
            raise ValueError(f"the launcher ended before all processes were done: {advice}.")
        time.sleep(POLL_SECONDS)
    return {**merge_shards(job.output), "encoded": came["encoded"] * world, "seconds": came["seconds"]}


# --------------------------------------------------------------------------------------------------------------- Ray


def build_on_ray(job: IndexJob, address: str | None = None, shards: int | None = None) -> dict[str, Any]:
    """
    Encodes the shards of an index as tasks of a Ray cluster, whose machines all see the scenes, the model and the index
    under the same paths, and unites them. A task whose worker dies is run again and goes on where it was.

    Args:
        job: the whole index.
        address: of a running cluster; None: `$RAY_ADDRESS`, else a new one on this machine.
        shards: into how many the work is cut; None: a few for each worker.

    Returns:
        Content of `index.json`.

    Raises:
        `ValueError`: naming the shards that failed for good, after the others are done.
    """
    model = os.path.abspath(job.model) if job.model and os.path.exists(job.model) else job.model
    scenes = [os.path.abspath(scene) for scene in job.scenes]
    here = dataclasses.replace(job, scenes=scenes, output=job.output.absolute(), model=model)
    begun = time.perf_counter()
    encoded = sum(came["encoded"] for came in run_on_ray(run_shard, here, address, shards, "shard"))
    return {**merge_shards(here.output), "encoded": encoded, "seconds": time.perf_counter() - begun}
