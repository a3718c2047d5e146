"""What loaders' writes cost: small slices beside a plain tensor and vLLM's counting; boolean masks beside plain copies.

    python bench/overhead.py [--rounds 30] [--profile] [--docs]

A loader call is the view chain and one copy_, as in `param.data[e].narrow(0, o, n).copy_(src)`; each round fills a
fresh weight once, slice by slice. "plain" writes to an ordinary tensor and quantizes nothing. "qtensor" includes the
quantization of the slice, and "kernel" is the part of that spent in quantize_into alone. "count + copy" is what vLLM's
online quantization does before it quantizes anything: the call runs on a meta tensor under a TorchDispatchMode that
adds up what copy_ moves, and runs again on the real tensor once the layer is full. It is written here from that
description, without vLLM's own bookkeeping of buffered calls, which comes on top. Each figure is the best round, in CPU
time of all threads; the candidates take turns. The goal is at most 50 µs over plain, and that what is not kernel costs
less than count + copy, which quantizes nothing.

A mask is random; the write through it and the write through its complement fill the weight. The goal is at most 20
times the copy of the whole weight.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qtensor import fp8, online_quant
from qtensor.kernels import FP8_PER_CHANNEL, quantize_into

GOAL = 50.0
MASK_GOAL = 20.0
Write = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Case:
    """One way a loader cuts a weight: `write(param, source, *place)` for every place fills it exactly once."""

    label: str
    shape: tuple[int, ...]
    piece: tuple[int, int]
    write: Callable[..., Any]

    def places(self) -> Iterator[tuple[int, ...]]:
        *lead, rows, cols = self.shape
        for e in range(lead[0] if lead else 1):
            for row in range(0, rows, self.piece[0]):
                for col in range(0, cols, self.piece[1]):
                    yield e, row, col


CASES = (
    Case(
        "expert rows: data[e].narrow(0, o, 16)",
        (16, 512, 256),
        (16, 256),
        lambda p, src, e, row, col: p.data[e].narrow(0, row, 16).copy_(src),
    ),
    Case(
        "fused rows: data.narrow(0, o, 16)",
        (4096, 256),
        (16, 256),
        lambda p, src, e, row, col: p.data.narrow(0, row, 16).copy_(src),
    ),
    Case(
        "columns: data.narrow(1, o, 64), staged",
        (64, 16384),
        (64, 64),
        lambda p, src, e, row, col: p.data.narrow(1, col, 64).copy_(src),
    ),
    Case(
        "whole expert: data[e].copy_",
        (256, 64, 256),
        (64, 256),
        lambda p, src, e, row, col: p.data[e].copy_(src),
    ),
)


class CountCopies(TorchDispatchMode):
    """Adds up how many elements copy_ writes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.numel += args[0].numel()
        return func(*args, **(kwargs or {}))


class Holder(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"), requires_grad=False)


def plain(case: Case, source: torch.Tensor) -> float:
    param = torch.empty(case.shape, dtype=torch.bfloat16)
    return timed(case, lambda place: case.write(param, source, *place))


def with_qtensor(case: Case, source: torch.Tensor) -> float:
    model = Holder(case.shape)
    with online_quant(fp8, model, targets=["up_proj"], progress=False):
        return timed(case, lambda place: case.write(model.up_proj, source, *place))


def count_and_copy(case: Case, source: torch.Tensor) -> float:
    meta = torch.empty(case.shape, dtype=torch.bfloat16, device="meta")
    param = torch.empty(case.shape, dtype=torch.bfloat16)

    def call(place: tuple[int, ...]) -> None:
        with CountCopies():
            case.write(meta, source, *place)
        case.write(param, source, *place)

    return timed(case, call)


def kernel(case: Case, source: torch.Tensor) -> float:
    qdata = torch.empty(case.piece, dtype=torch.float8_e4m3fn)
    scale = torch.empty(case.piece[0], 1)
    return timed(case, lambda place: quantize_into(source, qdata, scale, FP8_PER_CHANNEL))


CANDIDATES = {"plain": plain, "qtensor": with_qtensor, "kernel": kernel, "count_and_copy": count_and_copy}


def timed(case: Case, call: Callable[[tuple[int, ...]], Any]) -> float:
    """Microseconds per call, over all places of the weight."""
    places = list(case.places())
    start = time.process_time()
    for place in places:
        call(place)
    return (time.process_time() - start) / len(places) * 1e6


def masks(size: int, rounds: int) -> dict[str, float]:
    """CPU milliseconds to fill a weight `[size, size]`: through a mask and its complement, and with one copy. On one
    thread, as threads that wait for others' ends would count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source, mask = torch.randn(size, size).to(torch.bfloat16), torch.rand(size, size) < 0.5
    chosen, rest = source[mask], source[~mask]

    def through_masks(param: torch.Tensor) -> None:
        param[mask] = chosen
        param[~mask] = rest

    def in_one(param: torch.Tensor) -> None:
        param.copy_(source)

    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for way in (through_masks, in_one):
            model = Holder((size, size))
            with online_quant(fp8, model, targets=["up_proj"], progress=False):
                times.setdefault(f"qtensor, {way.__name__}", []).append(spent(way, model.up_proj.data))
            plain_param = torch.empty(size, size, dtype=torch.bfloat16)
            times.setdefault(f"plain, {way.__name__}", []).append(spent(way, plain_param))
    torch.set_num_threads(threads)
    return {name: min(found) for name, found in times.items()}


def spent(write: Callable[[torch.Tensor], None], param: torch.Tensor) -> float:
    start = time.process_time()
    write(param)
    return (time.process_time() - start) * 1e3


def masks_table(size: int, times: dict[str, float]) -> str:
    lines = [
        f"| {size}², CPU ms | mask and complement | one copy | ratio | ≤ {MASK_GOAL:.0f} |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for who, goal in (("qtensor", True), ("plain", False)):
        masked, copy = times[f"{who}, through_masks"], times[f"{who}, in_one"]
        ok = ("yes" if masked <= MASK_GOAL * copy else "no") if goal else ""
        lines.append(f"| {who} | {masked:.1f} | {copy:.1f} | {masked / copy:.1f} | {ok} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="fresh weights per candidate and case (default 30)")
    parser.add_argument("--profile", action="store_true", help="profile the qtensor calls instead of timing them")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/benchmarks.md")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.profile:
        for case in CASES:
            profile(case)
        return
    rows = []
    for case in CASES:
        source = torch.randn(case.piece).to(torch.bfloat16)
        times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
        for _ in range(args.rounds):
            for name, run in CANDIDATES.items():
                times[name].append(run(case, source))
        best = {name: min(found) for name, found in times.items()}
        rows.append({"case": case.label, **best, "over_plain": best["qtensor"] - best["plain"]})
    masked = masks(2048, args.rounds)
    tables = {"overhead": table(rows), "masks": masks_table(2048, masked)}
    print("\n\n".join(tables.values()))
    if args.docs:
        for name, text in tables.items():
            machine.into_page(Path(__file__).parent.parent / "docs" / "benchmarks.md", name, text)
    results = {**machine.facts("torch", "numba"), "rounds": args.rounds, "goal_us": GOAL, "rows": rows, "masks": masked}
    print(f"\nwritten: {os.path.relpath(machine.save('overhead', results))}")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| µs per loader call | plain | qtensor | of it kernel | count + copy | over plain | ≤ 50 | rest < counting |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        numbers = (row["plain"], row["qtensor"], row["kernel"], row["count_and_copy"], row["over_plain"])
        cells = " | ".join(f"{value:.1f}" for value in numbers)
        near, less = row["over_plain"] <= GOAL, row["qtensor"] - row["kernel"] < row["count_and_copy"]
        lines.append(f"| `{row['case']}` | {cells} | {'yes' if near else 'no'} | {'yes' if less else 'no'} |")
    return "\n".join(lines)


def profile(case: Case) -> None:
    source = torch.randn(case.piece).to(torch.bfloat16)
    with_qtensor(case, source)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(5):
        with_qtensor(case, source)
    profiler.disable()
    print(f"\n{case.label}")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
