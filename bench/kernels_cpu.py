"""CPU kernels beside what people do without them: quantize and dequantize, one run, one table. Products: products.py.

    python bench/kernels_cpu.py [--quick] [--formats | --recipes] [--own-time] [--shapes 4096x4096 ...]
                                [--out bench/results/kernels_cpu.json]

GB/s counts bytes of the high-precision side: read when quantizing, written when dequantizing. "of memcpy" sets the time
beside that of a torch copy which reads and writes as many bytes as the kernel must move at least, 3 per bf16 element.
All figures are the best of many repetitions, the copy and all candidates taken in turns, so that a busy moment of the
machine hits them alike. Even so they mean something on an idle machine only: the load average is recorded with them.
On one that others use, `--own-time` measures what one thread takes of a core. `--formats` has all formats beside
the reference in plain torch, and leaves out what others do; `--recipes` quantizes by other tools' recipes, beside the
same formats' own formulas and the recipes in plain torch.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtensor.kernels import (
    FORMATS,
    FP8_PER_BLOCK,
    FP8_PER_CHANNEL,
    FP8_PER_TENSOR,
    RECIPES,
    Audit,
    Backend,
    Parts,
    WeightFormat,
    choose,
)
from qtensor.kernels.reference import TORCH

FUSED = (FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_PER_BLOCK)
SHAPES = [(4096, 4096), (8192, 28672)]
QUICK_SHAPES = [(2048, 4096)]
CHUNK_BYTES = 64 << 20
MAX = 448.0

Call = Callable[[], object]

clock = time.perf_counter


def best_of(calls: dict[str, Call], budget: float) -> dict[str, float]:
    """Seconds of the fastest run of each call. They take turns for about `budget` seconds, each at least once."""
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + budget
    while True:
        for name, call in calls.items():
            if best[name] == float("inf") or best[name] < budget / 40:
                call()  # Warm up; what takes long is run once, without.
            elif best[name] > budget / 10:
                continue
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
        if time.perf_counter() > end:
            return best


def naive(weight: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook: the whole weight in fp32, a temporary at every step."""
    x = weight.float()
    if fmt.granularity == "channel":
        scale = (x.abs().amax(-1, keepdim=True) / MAX).clamp_min(1 / (MAX * 512))
        return (x / scale).clamp(-MAX, MAX).to(fmt.dtype), scale
    if fmt.granularity == "tensor":
        scale = x.abs().amax() / MAX
        return (x * (1 / scale)).clamp(-MAX, MAX).to(fmt.dtype), scale
    rows, cols = x.shape
    blocks = x.view(rows // 128, 128, cols // 128, 128)
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp_min(1e-4) / MAX
    return (blocks * (1 / scale)).clamp(-MAX, MAX).to(fmt.dtype).view(rows, cols), scale


def chunked(weight: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor) -> None:
    """vLLM's online per-channel formula in chunks of 64 MiB of fp32: amax, / 448, clamp_min, divide, clamp, cast."""
    step = max(1, CHUNK_BYTES // 4 // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        x = weight[start : start + step].float()
        s = (x.abs().amax(-1, keepdim=True) / MAX).clamp_min(1 / (MAX * 512))
        qdata[start : start + step] = (x / s).clamp(-MAX, MAX).to(qdata.dtype)
        scale[start : start + step] = s


def naive_dequantize(qdata: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (qdata.float() * scale).bfloat16()


def numba() -> Backend:
    return choose(torch.device("cpu"), "numba")


def torchao_per_row(weight: torch.Tensor) -> dict[str, Call]:
    try:
        from torchao.quantization import Float8Tensor, PerRow
    except ImportError:
        return {}
    return {"torchao Float8Tensor per row": partial(Float8Tensor.from_hp, weight, torch.float8_e4m3fn, PerRow())}


def memcpy(elements: int) -> Call:
    """A copy that reads and writes 3 bytes per element in all."""
    source, target = torch.ones(elements * 3 // 2, dtype=torch.uint8), torch.zeros(elements * 3 // 2, dtype=torch.uint8)
    return partial(target.copy_, source)


def quantize_rows(shape: tuple[int, int], budget: float) -> list[dict[str, Any]]:
    weight = torch.randn(shape, dtype=torch.bfloat16) * 0.02
    table = []
    for fmt in FUSED:
        parts = Parts.of(shape, fmt)
        ours = partial(numba().quantize_into, weight, parts, fmt)
        calls: dict[str, Call] = {
            "qtensor numba": ours,
            "qtensor numba, non-finite kept": partial(ours, Audit(refuse_nonfinite=False)),
            "qtensor numba, SQNR measured": partial(ours, Audit(measure_sqnr=True)),
            "qtensor torch reference": partial(TORCH.quantize_into, weight, parts, fmt),
            "naive torch": partial(naive, weight, fmt),
        }
        if fmt is FP8_PER_CHANNEL:
            calls["vLLM's formula, 64 MiB chunks"] = partial(chunked, weight, parts.qdata, parts.scale)
            calls |= torchao_per_row(weight)
        table += rows_of("quantize " + fmt.name, shape, calls, budget)
    return table


def dequantize_rows(shape: tuple[int, int], budget: float) -> list[dict[str, Any]]:
    table = []
    for fmt in FUSED:
        parts = Parts.of(shape, fmt)
        numba().quantize_into(torch.randn(shape, dtype=torch.bfloat16), parts, fmt)
        out = torch.empty(shape, dtype=torch.bfloat16)
        calls: dict[str, Call] = {
            "qtensor numba": partial(numba().dequantize, parts, fmt, torch.bfloat16, out),
            "qtensor torch reference": partial(TORCH.dequantize, parts, fmt, torch.bfloat16, out),
        }
        if fmt.granularity != "block":
            calls["naive torch"] = partial(naive_dequantize, *parts)
        table += rows_of("dequantize " + fmt.name, shape, calls, budget)
    return table


def format_rows(shape: tuple[int, int], budget: float, formats: list[WeightFormat]) -> list[dict[str, Any]]:
    """Formats both ways, beside the reference."""
    table = []
    weight = torch.randn(shape, dtype=torch.bfloat16) * 0.02
    for fmt in formats:
        parts, out = Parts.of(shape, fmt), torch.empty_like(weight)
        backends = {"qtensor numba": numba(), "qtensor torch reference": TORCH}
        quantize: dict[str, Call] = {name: partial(b.quantize_into, weight, parts, fmt) for name, b in backends.items()}
        table += rows_of("quantize " + fmt.name, shape, quantize, budget)
        dequantize: dict[str, Call] = {
            name: partial(b.dequantize, parts, fmt, torch.bfloat16, out) for name, b in backends.items()
        }
        table += rows_of("dequantize " + fmt.name, shape, dequantize, budget)
    return table


def recipe_rows(shape: tuple[int, int], budget: float) -> list[dict[str, Any]]:
    """Other tools' recipes, beside the format's own formula, and the reference."""
    table = []
    weight = torch.randn(shape, dtype=torch.bfloat16) * 0.02
    for tool, formats in RECIPES.items():
        for name, own in formats.items():
            if own is None:
                continue
            plain, fmt = FORMATS[name], replace(FORMATS[name], recipe=own)
            parts = Parts.of(shape, fmt)
            calls: dict[str, Call] = {
                "qtensor numba": partial(numba().quantize_into, weight, parts, fmt),
                "qtensor numba, own formula": partial(numba().quantize_into, weight, parts, plain),
                "qtensor torch reference": partial(TORCH.quantize_into, weight, parts, fmt),
            }
            table += rows_of(f"quantize {name}:{tool}", shape, calls, budget)
    return table


def rows_of(task: str, shape: tuple[int, int], calls: dict[str, Call], budget: float) -> list[dict[str, Any]]:
    """Measure `calls`, the first of them ours, together with a copy of as many bytes."""
    elements = shape[0] * shape[1]
    best = best_of({"memcpy": memcpy(elements), **calls}, budget)
    ours = best[next(iter(calls))]
    return [
        {
            "task": task,
            "shape": list(shape),
            "who": name,
            "ms": seconds * 1e3,
            "gb_per_s": 2 * elements / seconds / 1e9,
            "of_memcpy": best["memcpy"] / seconds,
            "times_ours": seconds / ours,
        }
        for name, seconds in best.items()
    ]


def warm_up() -> dict[str, float]:
    """Seconds of the first quantize, dequantize and linear in fp8, compilation included, per source dtype."""
    os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp()
    seconds = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        start = time.perf_counter()
        weight = torch.ones(128, 128, dtype=dtype)
        for fmt in FUSED:
            parts = Parts.of((128, 128), fmt)
            numba().quantize_into(weight, parts, fmt)
            numba().dequantize(parts, fmt, dtype)
            numba().linear(weight[:1], parts, fmt)
        seconds[str(dtype).removeprefix("torch.")] = time.perf_counter() - start
    return seconds


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def parse_shape(text: str) -> tuple[int, int]:
    rows, cols = map(int, text.split("x"))
    return rows, cols


def print_table(table: list[dict[str, Any]]) -> None:
    heading = None
    for entry in table:
        title = f"{entry['task']} {'x'.join(map(str, entry['shape']))}"
        if title != heading:
            heading = title
            print(f"\n{title}")
        figures = f"{entry['ms']:10.2f} ms"
        if "gb_per_s" in entry:
            figures += f" {entry['gb_per_s']:7.2f} GB/s {entry['of_memcpy']:5.0%} of memcpy"
            figures += f"   x{entry['times_ours']:.1f} the time"
        print(f"  {entry['who']:44s}{figures}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape, few repetitions")
    parser.add_argument("--threads", type=int, help="torch threads, and so ours (default: torch's choice)")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds per group of candidates")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="NxK", help="weights to quantize")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--formats", action="store_true", help="all formats, beside the reference only")
    only.add_argument("--recipes", action="store_true", help="other tools' recipes only")
    parser.add_argument("--own-time", action="store_true", help="one thread, and the time it has a core")
    args = parser.parse_args()
    if args.own_time:
        global clock
        clock, args.threads = time.thread_time, 1
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    budget = 0.5 if args.quick else args.budget
    load_before = os.getloadavg()[0]
    first_call = {} if args.formats or args.recipes else warm_up()
    table: list[dict[str, Any]] = []
    shapes = args.shapes or (QUICK_SHAPES if args.quick else SHAPES)
    if args.recipes:
        table += recipe_rows(shapes[0], budget)
    elif not args.formats:
        for shape in shapes:
            table += quantize_rows(shape, budget) + dequantize_rows(shape, budget)
    if not args.recipes:
        table += format_rows(shapes[0], budget, [fmt for fmt in FORMATS.values() if args.formats or fmt not in FUSED])
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "clock": "own time of one thread" if args.own_time else "wall",
        "load_before_and_after": [load_before, os.getloadavg()[0]],
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "numba", "llvmlite", "numpy", "torchao")},
        "first_call_seconds": first_call,
        "rows": table,
    }
    print(f"{result['cpu']}, {result['threads']} threads, torch {torch.__version__}, numba {version('numba')}")
    print("load average before and after: {:.1f} {:.1f}".format(*result["load_before_and_after"]))
    if first_call:
        print("first calls, compilation included: " + ", ".join(f"{k} {v:.1f} s" for k, v in first_call.items()))
    print_table(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
