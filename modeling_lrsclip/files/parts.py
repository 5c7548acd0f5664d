"""Work that is cut into numbered parts, each of which goes on where it stopped, and the parts as tasks of a Ray cluster."""

import sys
from collections.abc import Callable
from typing import Any

from .documents import first_line


RETRIES = 5  # of a Ray task whose worker or machine dies
PARTS_PER_WORKER = 4  # so that nobody waits long for the slowest


def parse_part(text: str, word: str = "part") -> tuple[int, int]:
    """
    `3/16` -> (3, 16).

    Raises:
        `ValueError`: for anything else, or a number outside 1 to n; `word` is what the part is called there.
    """
    first, _, second = text.partition("/")
    try:
        part, parts = int(first), int(second)
    except ValueError as error:
        raise ValueError(f"{word} {text!r}: write which of how many, for example 3/16.") from error
    if not 1 <= part <= parts:
        raise ValueError(f"{word} {text!r}: the first number goes from 1 to the second.")
    return part, parts


def run_on_ray(
    run: Callable[[Any, int, int], Any],
    job: Any,
    address: str | None = None,
    parts: int | None = None,
    word: str = "part",
    gpus: bool = True,
) -> list[Any]:
    """
    Run the parts of a job as tasks of a Ray cluster, whose machines see all files and the code under the same paths.

    Args:
        run: called as `run(job, part, parts)`, by another worker again where one dies; must go on where it was.
        job: the same for all parts.
        address: of a running cluster; None: `$RAY_ADDRESS`, else a new one on this machine.
        parts: into how many the work is cut; None: a few for each worker.
        word: what a part is called in messages.
        gpus: give each task a GPU where the cluster has any.

    Returns:
        What `run` returned, by part.

    Raises:
        `ValueError`: naming the parts that failed for good, after the others are done.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--on ray needs Ray: pip install '.[ray]' in the clone.") from error
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(f"no Ray cluster answers at {address} ({first_line(error)}).") from error
    try:
        resources = ray.cluster_resources()
        gpu_count = int(resources.get("GPU", 0)) if gpus else 0
        parts = parts or PARTS_PER_WORKER * max(1, gpu_count or int(resources.get("CPU", 1)))
        task = ray.remote(num_cpus=1, num_gpus=1 if gpu_count else 0, max_retries=RETRIES)(run)
        numbers = {task.remote(job, number, parts): number for number in range(1, parts + 1)}
        results, failed = {}, {}
        while numbers:
            ready, _ = ray.wait(list(numbers), num_returns=1)
            number = numbers.pop(ready[0])
            try:
                results[number] = ray.get(ready[0])
                print(f"{word} {number} of {parts} is done", file=sys.stderr, flush=True)
            except ray.exceptions.RayError as error:
                failed[number] = first_line(getattr(error, "cause", None) or error)
    finally:
        if started:
            ray.shutdown()
    if failed:
        number, reason = next(iter(failed.items()))
        raise ValueError(f"{len(failed)} of {parts} {word}s failed, run the command again; {word} {number}: {reason}")
    return [results[number] for number in sorted(results)]
