"""SHA-256 of weights: GB/s of hashlib, and of the loop that takes sixteen at once, on one core and on all.

    python bench/hashing.py [--mb 8] [--repeat 5]

Medians, in memory. "weights" is what `weight_checksums` takes for 7 matrices of each of 16 layers, `--mb` each, and an
embedding of eight times that: largest first, each thread takes sixteen at once or one, as it estimates. The last lines
are processes of their own that have imported torch and qtensor: until numba is imported, and from then until the loop
is ready, compiled and read from numba's cache. Nobody waits for either.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import machine
import torch

from qtensor import weight_checksums
from qtensor.kernels.cpu import hashing
from qtensor.tensor import digests

READY = """
import time

import torch

import qtensor

start = time.perf_counter()
import numba
print(time.perf_counter() - start)
qtensor.quantize(torch.ones(8, 8), qtensor.fp8)
start = time.perf_counter()
from qtensor.tensor import digests
digests._sixteen()
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=8, help="of a matrix, 2^20 bytes (default 8)")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    size = args.mb << 20
    weights = {
        f"{layer}.{i}": torch.randint(0, 256, (size,), dtype=torch.uint8) for layer in range(16) for i in range(7)
    }
    weights["embedding"] = torch.randint(0, 256, (8 * size,), dtype=torch.uint8)
    first = [weight.numpy().data for weight in list(weights.values())[:16]]
    total = sum(weight.nbytes for weight in weights.values())
    digests._sixteen()
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "one core, hashlib": (16 * size, lambda: [hashlib.sha256(run).digest() for run in first]),
        "one core, sixteen at once": (16 * size, lambda: hashing.digests([[run] for run in first])),
        "weights, hashlib in threads": (total, lambda: by_hashlib(weights)),
        "weights": (total, lambda: weight_checksums(weights)),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.repeat):
        for way, (_, run) in ways.items():
            start = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - start)
    rows = {way: ways[way][0] / statistics.median(found) / 1e9 for way, found in seconds.items()}
    print("| | GB/s |\n| --- | ---: |")
    for way, speed in rows.items():
        print(f"| {way} | {speed:.2f} |")
    with tempfile.TemporaryDirectory() as cache:
        times = {"compiled": fresh(cache), "read": fresh(cache)}
    for way, (numba, loop) in times.items():
        print(f"{way}: numba imported in {numba:.2f} s, the loop ready {loop:.2f} s after that")
    facts = {**machine.facts("torch", "numba"), "cores": os.cpu_count(), "GB/s": rows, "seconds": times}
    print(f"\nwritten: {os.path.relpath(machine.save('hashing', facts))}")


def by_hashlib(weights: dict[str, torch.Tensor]) -> None:
    together = digests._sixteen
    digests._sixteen = NotThere  # type: ignore[assignment]
    try:
        weight_checksums(weights)
    finally:
        digests._sixteen = together


class NotThere:
    begin = staticmethod(lambda: None)
    if_ready = staticmethod(lambda: None)


def fresh(cache: str) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", READY], env={**os.environ, "NUMBA_CACHE_DIR": cache}, capture_output=True, check=True
    )
    numba, loop = map(float, done.stdout.split())
    return numba, loop


if __name__ == "__main__":
    main()
