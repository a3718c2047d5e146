"""What agreeing on scales costs a sharded load: collectives, bytes, staging and time on 1, 2, 4 ranks of one machine.

    python bench/distributed.py [--gb 0.5] [--ranks 1 2 4] [--repeat 3]

Every rank reads its shards of one checkpoint file (rows of q, k, v, gate, up; columns of o and down) and copies them
into its part of the model: in plain bf16, quantized with scales of its own, and with scales that the ranks agree on.
The last two differ in the row-parallel weights alone. Times are the slowest rank's, medians over the repetitions; the
ranks share the cores of the machine, so they do not fall as ranks are added.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from qtensor import Sharding, online_quant

DATA = Path(__file__).parent / ".data"
HIDDEN, INNER = 2048, 8192
SHAPES = {
    "q": (HIDDEN, HIDDEN, 0),
    "k": (HIDDEN, HIDDEN, 0),
    "v": (HIDDEN, HIDDEN, 0),
    "o": (HIDDEN, HIDDEN, 1),
    "gate": (INNER, HIDDEN, 0),
    "up": (INNER, HIDDEN, 0),
    "down": (HIDDEN, INNER, 1),
}
"""Rows, columns, and the dimension that ranks split."""
LAYER_BYTES = sum(rows * cols * 2 for rows, cols, _ in SHAPES.values())
WAYS = ("bf16", "own scales", "agreed scales")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.5, help="bytes of the checkpoint, 10^9 (default 0.5)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--scheme", default="fp8_per_channel")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    layers = max(1, round(args.gb * 1e9 / LAYER_BYTES))
    path = checkpoint(layers)
    rows: list[dict[str, Any]] = []
    for world in args.ranks:
        rows += machine.on_ranks(work, world, str(path), layers, args.scheme, args.repeat)
    print(table(rows))
    results = {
        **machine.facts("torch", "safetensors", "numba"),
        "checkpoint_bytes": layers * LAYER_BYTES,
        "scheme": args.scheme,
        "repeat": args.repeat,
        "rows": rows,
    }
    print(f"\nwritten: {os.path.relpath(machine.save('distributed', results))}")


def checkpoint(layers: int) -> Path:
    path = DATA / f"shards-{layers}.safetensors"
    if not path.exists():
        DATA.mkdir(exist_ok=True)
        print(f"generating {layers * LAYER_BYTES / 1e9:.1f} GB of random weights in {os.path.relpath(path)}")
        tensors = {
            f"layers.{i}.{name}.weight": torch.randn(rows, cols).bfloat16()
            for i in range(layers)
            for name, (rows, cols, _) in SHAPES.items()
        }
        save_file(tensors, path)
    return path


def build(layers: int, world: int) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList()
    for _ in range(layers):
        layer = nn.Module()
        for name, (rows, cols, dim) in SHAPES.items():
            size = [rows, cols]
            size[dim] //= world
            layer.add_module(name, nn.Linear(size[1], size[0], bias=False, dtype=torch.bfloat16, device="meta"))
        model.layers.append(layer)
    return model


def load(model: nn.Module, path: str, rank: int, world: int) -> None:
    with safe_open(path, "pt") as file:
        for name, param in model.named_parameters():
            rows, cols, dim = SHAPES[name.split(".")[2]]
            step = (rows, cols)[dim] // world
            span = slice(rank * step, (rank + 1) * step)
            piece = file.get_slice(name)
            param.data.copy_(piece[span] if dim == 0 else piece[:, span])


def work(rank: int, world: int, path: str, layers: int, scheme: str, repeat: int) -> list[dict[str, Any]]:
    dims = {f"re:.*\\.{name}\\.weight": dim for name, (_, _, dim) in SHAPES.items()}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(repeat + 1):  # the first warms up
        for way in WAYS:
            model = build(layers, world)
            dist.barrier()
            started = time.perf_counter()
            found: dict[str, float] = {"collectives": 0, "collective_bytes": 0, "peak_staged_bytes": 0}
            if way == "bf16":
                load(model.to_empty(device="cpu"), path, rank, world)
            else:
                group = Sharding(dims=dims) if way == "agreed scales" else None
                with online_quant(scheme, model, process_group=group) as session:
                    load(model, path, rank, world)
                report = session.report()
                found = {key: getattr(report, key) for key in found}
            found["seconds"] = time.perf_counter() - started
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, found)
            if turn:
                runs[way].append({key: max(one[key] for one in everyone) for key in found})
    plain = statistics.median(run["seconds"] for run in runs["bf16"])
    rows = []
    for way in WAYS:
        seconds = statistics.median(run["seconds"] for run in runs[way])
        rows.append({"ranks": world, "way": way, **runs[way][-1], "seconds": seconds, "ratio": seconds / plain})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| ranks | way | seconds | of bf16 | collectives | their bytes | staged at most, MB per rank |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['ranks']} | {row['way']} | {row['seconds']:.2f} | {row['ratio']:.2f} | {row['collectives']:.0f} | "
            f"{row['collective_bytes']:,.0f} | {row['peak_staged_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
