"""What a first load waits for: CPU loops that compile, or are read from numba's cache.

Each run is a process of its own that imports qtensor and then loads a checkpoint of one size, with an empty cache and
with a full one. With `--beside FOLDER`, a checkout of another version, that one, too. Runs take turns; printed are the
medians of the whole load, its processor time, and the longest call of the loader, which is the first as a rule.

    python bench/first_load.py --beside ../qtensor-before --out bench/results/first_load.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"4 MB": (8, 512, 512), "1 GB": (32, 4096, 4096)}
STATES = ("empty cache", "full cache")


def one_load(file: str, layers: int, rows: int, cols: int, scheme: str) -> dict[str, float]:
    import torch
    from safetensors import safe_open
    from torch import nn

    from qtensor import online_quant

    longest, started, processor = 0.0, time.perf_counter(), time.process_time()
    with online_quant(scheme, device="cpu", progress=False), torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16) for _ in range(layers)))
        with safe_open(file, "pt") as tensors:
            for i, layer in enumerate(model):
                value = tensors.get_tensor(f"{i}.weight")
                before = time.perf_counter()
                layer.weight.data.copy_(value)
                longest = max(longest, time.perf_counter() - before)
    return {
        "seconds": time.perf_counter() - started,
        "longest_call": longest,
        "cpu_seconds": time.process_time() - processor,
    }


def package(tree: Path, folder: Path) -> Path:
    """A folder to import that checkout's qtensor from, whatever is installed."""
    (folder / "qtensor").mkdir(parents=True)
    for part in (*(tree / "qtensor").iterdir(), tree / "kernels", tree / "integrations"):
        if not (folder / "qtensor" / part.name).exists():
            (folder / "qtensor" / part.name).symlink_to(part)
    return folder


def run(tree: Path, cache: Path, file: Path, size: str, scheme: str) -> dict[str, float]:
    arguments = [str(file), *map(str, SHAPES[size]), scheme]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(tree)}
    command = [sys.executable, __file__, "--one", *arguments]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--scheme", default="fp8_per_channel")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--beside", type=Path, help="a checkout of another version")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.one:
        file, layers, rows, cols, scheme = args.one
        print(json.dumps(one_load(file, int(layers), int(rows), int(cols), scheme)))
        return
    import torch
    from safetensors.torch import save_file

    trees = {"this": ROOT} | ({"beside": args.beside.resolve()} if args.beside else {})
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        trees = {name: package(tree, Path(folder) / name) for name, tree in trees.items()}
        for size, (layers, rows, cols) in SHAPES.items():
            files[size] = Path(folder) / f"{rows}.safetensors"
            value = torch.randn(rows, cols, dtype=torch.bfloat16)
            save_file({f"{i}.weight": value.clone() for i in range(layers)}, files[size])
        for turn in range(args.runs):
            for size in SHAPES:
                for name, tree in trees.items():
                    for state in STATES:
                        cache = Path(folder) / f"cache {turn} {size} {name}"
                        found = run(tree, cache, files[size], size, args.scheme)
                        results.setdefault(f"{size}, {name}, {state}", []).append(found)
                        print(f"{size}, {name}, {state}: {found}", flush=True)
    rows: dict[str, Any] = {
        key: {what: statistics.median(r[what] for r in runs) for what in runs[0]} for key, runs in results.items()
    }
    for key, row in rows.items():
        print(f"{key:40}" + "".join(f"  {what} {value:.2f}" for what, value in row.items()))
    print("load average", os.getloadavg())
    if args.out:
        args.out.write_text(json.dumps({"scheme": args.scheme, "runs": args.runs, "medians": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
