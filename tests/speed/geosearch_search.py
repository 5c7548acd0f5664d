"""
How long an exact search takes over a large index, and how much memory, beside torch's own product of float16.

    python -m tests.speed.geosearch_search [--windows 1000000] [--dimensions 512] [--folder DIR]

The vectors are random unit rows in a file like the index's `vectors.f16`; a process of its own maps it and asks. What is
timed is what `geosearch search` does after its model is loaded: every similarity in float32 and the exact ranking of the
first places, from the page cache. `peak` is that process's highest memory, imports included.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from geosearch.exact_search import ranked_rows, similarities


AT_ONCE = 50_000  # rows written
ROUNDS = 5


def write_vectors(path: Path, windows: int, dimensions: int) -> None:
    rng = np.random.default_rng(0)
    block = rng.standard_normal((AT_ONCE, dimensions), dtype=np.float32)
    with path.open("wb") as file:
        for start in range(0, windows, AT_ONCE):
            # Columns in another order, and other signs, make other rows of the same ones.
            rows = block[: windows - start, rng.permutation(dimensions)] * rng.choice([-1, 1], dimensions)
            file.write((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16).tobytes())


def peak_memory() -> float:
    """Gigabytes; of this process alone, where `getrusage` has its parent's too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e6


def ask(path: Path, windows: int, dimensions: int) -> None:
    vectors = np.memmap(path, np.float16, "r", shape=(windows, dimensions))
    rng = np.random.default_rng(1)
    before = peak_memory()
    times, products = [], []
    for _ in range(ROUNDS):
        query = rng.standard_normal(dimensions).astype(np.float32)
        query /= np.linalg.norm(query)
        started, worked = time.perf_counter(), time.process_time()
        scores = similarities(vectors, query)
        rows, _ = next(ranked_rows(vectors, query, scores))
        times.append((time.perf_counter() - started, time.process_time() - worked))
    peak = peak_memory()
    assert (np.diff(vectors[rows].astype(np.float64) @ query) < 1e-7).all()
    half = torch.from_numpy(query).half()
    mapped = torch.from_file(str(path), size=windows * dimensions, dtype=torch.float16).view(windows, dimensions)
    for _ in range(ROUNDS):
        started = time.perf_counter()
        torch.mv(mapped, half)
        products.append(time.perf_counter() - started)
    best, cpu = min(times)[0], min(worked for _, worked in times)
    print(
        f"{windows:,} x {dimensions} on {torch.get_num_threads()} threads: {best:.3f} s (median {np.median(times, axis=0)[0]:.3f}, "
        f"processor time {cpu:.3f} s), torch's float16 product alone {min(products):.3f} s; "
        f"peak {peak:.2f} GB, of which {before:.2f} GB imports"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="for the file of vectors, which is removed")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        ask(options.ask, options.windows, options.dimensions)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "vectors.f16"
        write_vectors(path, options.windows, options.dimensions)
        sizes = ["--windows", str(options.windows), "--dimensions", str(options.dimensions)]
        command = [sys.executable, "-m", "tests.speed.geosearch_search", "--ask", str(path), *sizes]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
