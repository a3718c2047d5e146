"""Products of a few to many rows with quantized weights on a CPU, beside bf16, what others offer, and the memory.

    python bench/products.py [--schemes fp8 mxfp4 ...] [--rows 1 4 16 64 256 1024] [--shapes 4096x4096 ...]
                             [--experts] [--peers] [--own-time] [--seconds 0.3] [--out bench/results/products.json]

Weights take turns until more than 256 MB of them have passed, so that no product finds its weight in a cache. For each
number of rows all candidates take turns, one call each, and the median of their times counts; "of bf16" is the median
of F.linear's divided by it. The memory limit is the time in which the weight's bytes are read as fast as torch reads
memory in the same turns (a sum over int64). `--peers` adds torchao and bitsandbytes, as pip installs them, and says
which of them is missing.

On a machine that others use, two threads wait for each other while one of them has no core, and times are those of the
scheduler. `--own-time` measures what one thread takes of a core instead; ratios then still suffer from shared caches
and memory, alike for all.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from kernels_cpu import cpu_name, parse_shape, version
from torch import nn
from torch.nn import functional

from qtensor.kernels import FORMATS, Parts, WeightFormat, choose
from qtensor.schemes.scheme import SCHEMES

CACHES = 256 << 20
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]  # square, wide, tall
EXPERTS = (64, 768, 2048)  # of a small mixture: E, N, K
PER_TOKEN = 8
INT4_OF_TORCHAO = "PrototypeInt4WeightOnlyConfig"  # the one for CPUs


def copies(make: Callable[[], Any], nbytes: int) -> Iterator[Any]:
    """Weights in turn, of more bytes than any cache holds."""
    return cycle([make() for _ in range(max(2, CACHES // nbytes + 1))])


def clones(parts: Parts) -> Iterator[Parts]:
    return copies(lambda: parts.map(torch.clone), parts.nbytes)


clock = time.perf_counter


def medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Seconds of each call: the median over turns that take about `seconds` per call, at least three."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds * len(calls)
    turns = 0
    while turns < 3 or time.perf_counter() < end:
        turns += 1
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: statistics.median(found) for name, found in times.items()}


Product = Callable[[torch.Tensor], object]


def packed_by_torch(shape: tuple[int, int]) -> dict[str, tuple[Product, int]]:
    """torch's own packed kernels, and the bytes they read."""
    rows, cols = shape
    int8 = copies(lambda: torch.randint(-127, 128, shape, dtype=torch.int8), rows * cols)
    scales = torch.rand(rows).bfloat16()
    nibbles = torch.randint(0, 16, shape, dtype=torch.int32)
    packed = copies(lambda: torch._convert_weight_to_int4pack_for_cpu(nibbles, 1), rows * cols // 2)
    zeros = torch.rand(cols // 128, rows, 2).bfloat16()
    return {
        "torch._weight_int8pack_mm": (
            lambda x: torch._weight_int8pack_mm(x, next(int8), scales),
            int8_bytes(shape),
        ),
        "torch int4pack, groups of 128": (
            lambda x: torch._weight_int4pack_mm_for_cpu(x, next(packed), 128, zeros),
            rows * cols // 2 + zeros.nbytes,
        ),
    }


def int8_bytes(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1] + 2 * shape[0]


def torchao_layer(module: str, config: str, layer: nn.Linear) -> nn.Module:
    from torchao.quantization import quantize_

    holder = nn.Sequential(layer)
    quantize_(holder, getattr(importlib.import_module(f"torchao.{module}"), config)())
    return holder[0]


def nf4_layer(layer: nn.Linear) -> nn.Module:
    import bitsandbytes

    kind = bitsandbytes.nn.Linear4bit
    made = kind(layer.in_features, layer.out_features, False, compute_dtype=torch.bfloat16, quant_type="nf4")
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def int8_layer(layer: nn.Linear) -> nn.Module:
    import bitsandbytes

    made = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, False, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


PEERS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "torchao int8 weight-only": partial(torchao_layer, "quantization", "Int8WeightOnlyConfig"),
    "torchao fp8 weight-only": partial(torchao_layer, "quantization", "Float8WeightOnlyConfig"),
    "torchao int4, groups of 128": partial(torchao_layer, "prototype.quantization.int4", INT4_OF_TORCHAO),
    "bitsandbytes nf4": nf4_layer,
    "bitsandbytes int8": int8_layer,
}


def other_layers(source: torch.Tensor, missing: dict[str, str]) -> dict[str, tuple[Product, None]]:
    """What a user might install instead: its linear layers."""
    found: dict[str, tuple[Product, None]] = {}
    for name, make in PEERS.items():
        layer = nn.Linear(source.shape[1], source.shape[0], bias=False, dtype=source.dtype, device="meta")
        layer.weight = nn.Parameter(source.clone(), requires_grad=False)
        try:
            made = make(layer)
            made(torch.zeros(1, source.shape[1], dtype=source.dtype))
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
            continue
        turns = copies(lambda made=made: copy.deepcopy(made), source.numel() // (2 if "4" in name else 1))  # type: ignore[misc]
        found[name] = (lambda x, turns=turns: next(turns)(x)), None  # type: ignore[misc]
    return found


def dense_rows(
    shape: tuple[int, int], names: list[str], batches: list[int], seconds: float, missing: dict[str, str] | None
) -> list[dict[str, Any]]:
    """`missing` takes the peers that are not there; None for no peers."""
    backend = choose(torch.device("cpu"))
    source = torch.randn(shape, dtype=torch.bfloat16) * 0.02
    dense = copies(source.clone, source.nbytes)
    memory = torch.zeros(64 << 20, dtype=torch.uint8).view(torch.int64)
    candidates: dict[str, tuple[Product, int | None]] = {
        "bf16 F.linear": (lambda x: functional.linear(x, next(dense)), source.nbytes)
    }
    for name in names:
        fmt = SCHEMES[name].format
        parts = Parts.of(shape, fmt)
        backend.quantize_into(source, parts, fmt)
        turns = clones(parts)
        candidates[name] = (lambda x, fmt=fmt, turns=turns: backend.linear(x, next(turns), fmt)), parts.nbytes  # type: ignore[misc]
    candidates |= packed_by_torch(shape)
    if missing is not None:
        candidates |= other_layers(source, missing)
    table = []
    for batch in batches:
        x = torch.randn(batch, shape[1], dtype=torch.bfloat16)
        calls = {name: partial(product, x) for name, (product, _) in candidates.items()}
        with torch.inference_mode():
            found = medians(calls | {"reading 64 MiB": memory.sum}, seconds)
        per_byte = found.pop("reading 64 MiB") / memory.nbytes
        for name, took in found.items():
            nbytes = candidates[name][1]
            table.append(
                {
                    "shape": [batch, *shape],
                    "who": name,
                    "ms": took * 1e3,
                    "of_bf16_speed": found["bf16 F.linear"] / took,
                    "of_memory_limit": None if nbytes is None else nbytes * per_byte / took,
                }
            )
    return table


def expert_rows(names: list[str], tokens: list[int], seconds: float) -> list[dict[str, Any]]:
    """The first product of a mixture: each token meets `PER_TOKEN` experts. bf16 is torch's own grouped product."""
    backend = choose(torch.device("cpu"))
    experts, rows, cols = EXPERTS
    source = torch.randn(EXPERTS, dtype=torch.bfloat16) * 0.02
    dense = copies(source.clone, source.nbytes)
    weights: dict[str, tuple[WeightFormat, Iterator[Parts]]] = {}
    for name in names:
        fmt = SCHEMES[name].format
        parts = Parts.of(EXPERTS, fmt)
        backend.quantize_into(source, parts, fmt)
        weights[name] = fmt, clones(parts)
    table = []
    for count in tokens:
        chosen = torch.stack([torch.randperm(experts)[:PER_TOKEN] for _ in range(count)]).flatten()
        offsets = torch.bincount(chosen, minlength=experts).cumsum(0).to(torch.int32)
        x = torch.randn(count * PER_TOKEN, cols, dtype=torch.bfloat16)
        calls: dict[str, Callable[[], object]] = {
            "bf16 grouped_mm": lambda x=x, o=offsets: functional.grouped_mm(x, next(dense).mT, offs=o)  # type: ignore[misc]
        }
        for name, (fmt, turns) in weights.items():
            calls[name] = lambda x=x, o=offsets, fmt=fmt, turns=turns: backend.experts(x, next(turns), fmt, o)  # type: ignore[misc]
        with torch.inference_mode():
            found = medians(calls, seconds)
        for name, took in found.items():
            speed = found["bf16 grouped_mm"] / took
            shape = [count, experts, rows, cols]
            table.append({"shape": shape, "who": name, "ms": took * 1e3, "of_bf16_speed": speed})
    return table


def markdown(table: list[dict[str, Any]], batches: list[int]) -> str:
    """One shape: multiples of bf16's speed by rows (of the first line, ms), and the share of the memory limit at the
    fewest rows."""
    name = "x".join(map(str, table[0]["shape"][1:]))
    lines = [f"| {name}, rows of x | {' | '.join(map(str, batches))} | of memory, {batches[0]} row |"]
    lines.append("| --- |" + " ---: |" * (len(batches) + 1))
    for who in dict.fromkeys(entry["who"] for entry in table):
        found = {entry["shape"][0]: entry for entry in table if entry["who"] == who}
        first = who == table[0]["who"]
        figures = [f"{found[n]['ms']:.1f}" if first else f"{found[n]['of_bf16_speed']:.2f}" for n in batches]
        limit = found[batches[0]].get("of_memory_limit")
        figures.append("" if limit is None else f"{limit:.0%}")
        lines.append(f"| {who}{', ms' if first else ''} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(FORMATS), metavar="SCHEME")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="NxK")
    parser.add_argument("--experts", action="store_true", help="also a mixture of experts, rows being tokens")
    parser.add_argument("--peers", action="store_true", help="also torchao and bitsandbytes")
    parser.add_argument("--seconds", type=float, default=0.3, help="per candidate and number of rows")
    parser.add_argument("--threads", type=int, help="torch's threads, and so ours (default: torch's choice)")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--own-time", action="store_true", help="one thread, and the time it has a core")
    args = parser.parse_args()
    if args.own_time:
        global clock
        clock, args.threads = time.thread_time, 1
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    load_before = os.getloadavg()[0]
    table: list[dict[str, Any]] = []
    missing: dict[str, str] | None = {} if args.peers else None
    for shape in args.shapes:
        table += dense_rows(shape, args.schemes, args.rows, args.seconds, missing)
    if args.experts:
        table += expert_rows(args.schemes, args.rows, args.seconds)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "clock": "own time of one thread" if args.own_time else "wall",
        "load_before_and_after": [load_before, os.getloadavg()[0]],
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "numba", "llvmlite", "torchao", "bitsandbytes")},
        "missing": missing,
        "rows": table,
    }
    print(f"{result['cpu']}, {result['threads']} threads, torch {torch.__version__}, numba {version('numba')}")
    for name, why in (missing or {}).items():
        print(f"missing: {name} ({why})")
    for shape in dict.fromkeys(tuple(entry["shape"][1:]) for entry in table):
        print("\n" + markdown([entry for entry in table if tuple(entry["shape"][1:]) == shape], args.rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
