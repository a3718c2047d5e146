"""Each quantization kernel over the shapes of real layers: bytes per second, and the share of what a copy reaches.

    python bench/kernel_speed.py [--quick]

The bound is the bandwidth of a device-to-device copy measured in the same run. Beside our kernels stand the same
formulas in eager torch and under torch.compile, the per-block formula of transformers, and torchao where it is
installed. Every kernel's bytes are checked against the reference before it is timed. Needs a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import gpu
import torch

import qtensor.kernels as kernels
from qtensor.kernels import FORMATS, Audit, Backend, Parts, WeightFormat
from qtensor.kernels.reference import TORCH

SHAPES = {
    "small 2048x2048": (2048, 2048),
    "attention 4096x4096": (4096, 4096),
    "gate-up 28672x8192": (28672, 8192),
    "down 8192x28672": (8192, 28672),
    "experts 128x1536x2048": (128, 1536, 2048),
    "experts 60x2816x2048": (60, 2816, 2048),
}
LARGE = 1 << 26
F = 448.0


def per_tensor(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula of vLLM's online quantization, as one would write it in torch."""
    scale = x.float().abs().amax((-2, -1)) / F
    q = (x.float() * (1.0 / scale)[..., None, None]).clamp(-F, F).to(torch.float8_e4m3fn)
    return q, scale.unsqueeze(-1)


def per_channel(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (x.float().abs().amax(-1, keepdim=True) / F).clamp_min(1.0 / (F * 512.0))
    return (x.float() / scale).clamp(-F, F).to(torch.float8_e4m3fn), scale


def _as_blocks(x: torch.Tensor) -> torch.Tensor:
    *lead, rows, cols = x.shape
    x = torch.nn.functional.pad(x, (0, -cols % 128, 0, -rows % 128))
    return x.view(*lead, x.shape[-2] // 128, 128, x.shape[-1] // 128, 128)


def per_block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = _as_blocks(x.float())
    scale = blocks.abs().amax((-3, -1)).clamp_min(1e-4) / F
    q = (blocks * (1.0 / scale)[..., :, None, :, None]).clamp(-F, F).to(torch.float8_e4m3fn)
    return q.flatten(-2).flatten(-3, -2)[..., : x.shape[-2], : x.shape[-1]], scale


def transformers_per_block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The arithmetic of transformers' Fp8Quantize (integrations/finegrained_fp8.py)."""
    blocks = _as_blocks(x.float())
    amax = blocks.abs().amax((-3, -1))
    scale = torch.where(amax > 0, F / torch.where(amax > 0, amax, 1.0), 1.0)
    q = (blocks * scale[..., :, None, :, None]).clamp(-F, F).to(torch.float8_e4m3fn)
    return q.flatten(-2).flatten(-3, -2)[..., : x.shape[-2], : x.shape[-1]], 1.0 / scale


FORMULAS = {"fp8_per_tensor": per_tensor, "fp8_per_channel": per_channel, "fp8_per_block": per_block}


def torchao(fmt: WeightFormat) -> Callable[[torch.Tensor], Any] | None:
    """torchao's quantizer of this granularity, or None."""
    try:
        from torchao.quantization import Float8Tensor, PerRow, PerTensor
    except ImportError:
        return None
    granularity = {"fp8_per_channel": PerRow(), "fp8_per_tensor": PerTensor()}.get(fmt.name)
    return None if granularity is None else lambda x: Float8Tensor.from_hp(x, granularity=granularity)


def contestants(fmt: WeightFormat, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Each way to quantize `x`, as a call without arguments. Ours writes into memory it is given, as when loading."""
    parts = Parts.of(tuple(x.shape), fmt, x.device)
    plain, checked = Audit(refuse_nonfinite=False), Audit(measure_sqnr=True)
    fast = kernels.choose(x.device)
    found: dict[str, Callable[[], Any]] = {
        "qtensor": lambda: fast.quantize_into(x, parts, fmt, plain),
        "qtensor, checks and SQNR": lambda: fast.quantize_into(x, parts, fmt, checked),
    }
    formula = FORMULAS.get(fmt.name)
    if formula is None:
        return found
    compiled = torch.compile(formula, dynamic=False)
    found |= {"torch.compile": lambda: compiled(x), "eager torch": lambda: formula(x)}
    if fmt.granularity == "block":
        found["transformers' formula"] = lambda: transformers_per_block(x)
    ao = torchao(fmt)
    if ao is not None and x.dim() == 2:
        found["torchao"] = lambda: ao(x)
    return found


def quantized_bytes(fmt: WeightFormat, x: torch.Tensor) -> int:
    """What must cross the memory bus: the source, codes and scales, once each. What has one scale reads twice."""
    reads = 2 if fmt.needs_whole_matrix else 1
    return reads * x.nbytes + Parts.of(tuple(x.shape), fmt, "meta").nbytes


def milliseconds(work: Callable[[], Any], quick: bool) -> float:
    """Median time of one call, caches flushed before each."""
    from triton.testing import do_bench

    times = do_bench(work, warmup=10 if quick else 50, rep=50 if quick else 300, quantiles=[0.5])
    return times[0] if isinstance(times, list | tuple) else times


def copy_bandwidth(device: torch.device, quick: bool) -> float:
    """Bytes per second of a copy of 2 GiB within the device, reads and writes counted."""
    a = torch.empty(1 << 31, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / (milliseconds(lambda: b.copy_(a), quick) * 1e-3)


def same_bytes(fast: Backend, fmt: WeightFormat, x: torch.Tensor) -> bool:
    """Whether the kernels on this device give the bytes of the CPU reference, and restore its values."""
    wanted, found = (Parts.of(tuple(x.shape), fmt, device) for device in ("cpu", x.device))
    TORCH.quantize_into(x.cpu(), wanted, fmt, Audit(refuse_nonfinite=False))
    fast.quantize_into(x, found, fmt, Audit())  # A GPU stores what it will refuse.
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    back, expected = fast.dequantize(found, fmt, x.dtype, out), TORCH.dequantize(wanted, fmt, x.dtype, out.cpu())
    pairs = zip(wanted, (part.cpu() for part in found), strict=True)
    return all(_same(a, b) for a, b in pairs) and torch.equal(back.cpu().nan_to_num(), expected.nan_to_num())


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bytes, but for the sign of NaN in e4m3."""
    nan = torch.zeros(a.shape, dtype=torch.bool)
    a8, b8 = a.view(torch.uint8), b.view(torch.uint8)
    if a.dtype == torch.float8_e4m3fn:
        nan = (a8 & 0x7F == 0x7F) & (b8 & 0x7F == 0x7F)
        return bool(((a8 == b8) | nan).all())
    return torch.equal(a8, b8)


SOURCES: list[tuple[tuple[int, ...], torch.dtype, str, tuple[str, ...]]] = [
    ((64, 1024), torch.bfloat16, "contiguous", tuple(FORMATS)),
    ((130, 257), torch.float32, "column slice", tuple(FORMATS)),
    ((300, 48), torch.float16, "transposed", ("fp8_per_block", "int8_per_channel")),
    ((2, 130, 1408), torch.bfloat16, "contiguous", ("fp8_per_channel", "nvfp4")),
    ((3, 20000), torch.bfloat16, "contiguous", ("fp8_per_channel",)),
]
"""What is compared with the reference: what a kernel is compiled for, each once or twice. Compiling is what takes time:
these take fewer than 70 kernels, a minute or so."""


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, reached by other strides."""
    if layout == "column slice":
        return torch.nn.functional.pad(x, (3, 5))[..., 3:-5]
    return x.mT.contiguous().mT if layout == "transposed" else x


def check(device: torch.device, fast: Backend | None = None) -> list[str]:
    """What differs from the reference: quantized bytes and restored values of every format, finite and not, encoders,
    activations, refusals and products."""
    fast = fast or kernels.choose(device)
    generator = torch.Generator().manual_seed(0)
    failures = []
    for shape, dtype, layout, names in SOURCES:
        x = torch.randn(shape, generator=generator).to(dtype)
        poisoned = x.clone()
        poisoned[..., -1, -1], poisoned[..., 1, 7], poisoned[..., 0, 0] = float("nan"), float("inf"), -float("inf")
        for name in names:
            for kind, values in {"": x, " small": x * 1e-5, " with inf and NaN": poisoned}.items():
                if not same_bytes(fast, FORMATS[name], laid_out(values.to(device), layout)):
                    failures.append(f"{name} {tuple(shape)} {dtype} {layout}{kind}")
    # With amax 448 the scale is 1, and the data are the encoder's own answers.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    dense = torch.arange(0, 2**32, 4099, dtype=torch.int64).to(torch.int32).view(torch.float32)
    for values in (every, dense):
        kept = values[(values.abs() <= F) | ~values.isfinite()]
        x = torch.cat([kept, torch.full((-len(kept) % 256,), F, dtype=values.dtype)]).view(-1, 256)
        x[0, 0] = F
        if not same_bytes(fast, kernels.FP8_PER_TENSOR, x.to(device)):
            failures.append(f"encoder, {values.dtype}")
    for fmt in (kernels.FP8_PER_CHANNEL, kernels.FP8_PER_BLOCK):
        x = torch.randn(77, 1408, generator=generator).to(torch.bfloat16)
        expected, actual = TORCH.quantize_activation(x, fmt), fast.quantize_activation(x.to(device), fmt)
        if not all(_same(a.contiguous(), b.cpu()) for a, b in zip(expected, actual, strict=True)):
            failures.append(f"activation, {fmt.name}")
    return failures + refusals(device, fast) + products(device, fast)


def refusals(device: torch.device, fast: Backend) -> list[str]:
    """What is not refused as it should be: infinity, by its index."""
    failures = []
    x = torch.zeros(64, 1024, dtype=torch.bfloat16, device=device)
    x[4, 7], x[6, 1] = float("inf"), float("nan")
    for name, fmt in FORMATS.items():
        try:
            fast.quantize_into(x, Parts.of((64, 1024), fmt, device), fmt)
            failures.append(f"{name} accepted infinity")
        except kernels.NonFinite as refused:
            if refused.index != 4 * 1024 + 7:
                failures.append(f"{name} named element {refused.index}")
    return failures


def products(device: torch.device, fast: Backend) -> list[str]:
    """Products of few and of many rows that are further from the reference's than rounding."""
    failures = []
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 160, 1024, generator=generator).to(torch.bfloat16)
    for name in ("fp8_per_channel", "nvfp4"):
        fmt = FORMATS[name]
        parts = Parts.of((3, 160, 1024), fmt)
        TORCH.quantize_into(weight, parts, fmt)
        there = parts.map(lambda part: part.to(device))
        for rows in (1, 7, 100):
            x = torch.randn(rows, 1024, generator=generator).to(torch.bfloat16)
            expected = TORCH.linear(x, parts.matrix(1), fmt)
            if not torch.allclose(fast.linear(x.to(device), there.matrix(1), fmt).cpu(), expected, 0.02, 0.5):
                failures.append(f"product, {name}, {rows} rows")
        x, ends = torch.randn(9, 1024, generator=generator).to(torch.bfloat16), torch.tensor([4, 4, 9])
        found = fast.experts(x.to(device), there, fmt, ends.to(device)).cpu()
        if not torch.allclose(found, TORCH.experts(x, parts, fmt, ends), 0.02, 0.5):
            failures.append(f"product of experts, {name}")
    return failures


def measure(device: torch.device, bandwidth: float, quick: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for label, shape in list(SHAPES.items())[: 2 if quick else None]:
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        fast = kernels.choose(device)
        for fmt in FORMATS.values():
            moved = quantized_bytes(fmt, x)
            for name, work in contestants(fmt, x).items():
                rows.append(row(label, fmt.name, name, moved, milliseconds(work, quick), bandwidth, x.numel()))
            parts = Parts.of(shape, fmt, device)
            fast.quantize_into(x, parts, fmt, Audit(refuse_nonfinite=False))
            out = torch.empty_like(x)
            took = milliseconds(partial(fast.dequantize, parts, fmt, x.dtype, out), quick)
            moved = parts.nbytes + x.nbytes
            rows.append(row(label, f"dequantize {fmt.name}", "qtensor", moved, took, bandwidth, x.numel()))
            if len(shape) == 2:
                few = torch.randn(1, shape[1], device=device, dtype=torch.bfloat16)
                ways = {
                    "qtensor": partial(fast.linear, few, parts, fmt),
                    "bf16 F.linear": partial(torch.nn.functional.linear, few, x),
                }
                for name, work in ways.items():
                    moved = parts.nbytes if name == "qtensor" else x.nbytes
                    took = milliseconds(work, quick)
                    rows.append(row(label, f"one row times {fmt.name}", name, moved, took, bandwidth, x.numel()))
        torch.compiler.reset()
    for tokens, width in ((1, 4096), (16, 8192), (8192, 4096), (8192, 28672)):
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
        for fmt in (kernels.FP8_PER_CHANNEL, kernels.FP8_PER_BLOCK):
            kind = "activation per token" if fmt.granularity == "channel" else "activation per 1x128"
            compiled = torch.compile(lambda x, f=fmt: TORCH.quantize_activation(x, f), dynamic=False)
            ways = {
                "qtensor": lambda x=x, f=fmt: kernels.quantize_activation(x, f),
                "torch.compile": lambda x=x, c=compiled: c(x),
            }
            for name, work in ways.items():
                took = milliseconds(work, quick)
                rows.append(row(f"{tokens}x{width}", kind, name, 3 * x.numel(), took, bandwidth, x.numel()))
    return rows


def row(shape: str, what: str, who: str, moved: int, ms: float, bandwidth: float, elements: int) -> dict[str, Any]:
    rate = moved / (ms * 1e-3)
    return {
        "shape": shape,
        "kernel": what,
        "by": who,
        "us": ms * 1e3,
        "GB/s": rate / 1e9,
        "of copy": rate / bandwidth,
        "elements": elements,
    }


def goals_met(rows: list[dict[str, Any]]) -> list[str]:
    """The goals, and each row that misses one."""
    took = {(r["shape"], r["kernel"], r["by"]): r["us"] for r in rows}
    lines = []
    for r in rows:
        if r["by"] != "qtensor":
            continue
        rival = took.get((r["shape"], r["kernel"], "torch.compile"))
        what = f"{r['kernel']} {r['shape']}"
        if r["elements"] >= LARGE and r["of copy"] < 0.9:
            lines.append(f"missed: {what} reaches {r['of copy']:.0%} of the copy bandwidth (goal 90 %)")
        if rival is not None and rival < r["us"]:
            lines.append(f"missed: {what} is slower than torch.compile ({r['us']:.1f} against {rival:.1f} us)")
        if rival is not None and r["kernel"] == "fp8_per_block" and r["elements"] >= LARGE and rival < 2 * r["us"]:
            lines.append(f"missed: {what} is {rival / r['us']:.2f} times as fast as torch.compile (goal 2)")
    return lines or ["all goals met"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, short timings")
    parser.add_argument("--check-only", action="store_true", help="compare with the reference and time nothing")
    parser.add_argument("--no-save", action="store_true", help="write no file under bench/results/")
    options = parser.parse_args()
    device = gpu.require_gpu()
    failures = check(device)
    print("bytes:", "all equal to the reference" if not failures else "DIFFER: " + "; ".join(failures[:20]))
    if failures or options.check_only:
        return int(bool(failures))
    bandwidth = copy_bandwidth(device, options.quick)
    about = gpu.machine()
    print(f"{about['chip']}: a copy moves {bandwidth / 1e9:.0f} GB/s\n")
    rows = measure(device, bandwidth, options.quick)
    goals = goals_met(rows)
    print(gpu.table(rows), *goals, sep="\n")
    if not options.no_save:
        record = {"machine": about, "copy_bytes_per_second": bandwidth, "rows": rows, "goals": goals}
        print("written to", gpu.save("kernels", record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
