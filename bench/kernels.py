"""Each quantization kernel over the shapes of real layers: bytes per second, and the share of what a copy reaches.

    python bench/kernels.py [--quick]

The bound is the bandwidth of a device-to-device copy measured in the same run. Beside our kernels stand the same
formulas in eager torch and under torch.compile, the per-block formula of transformers, and torchao where it is
installed. Every kernel's bytes are checked against the reference before it is timed. Needs a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import gpu
import torch

import qtensor.kernels as kernels
from qtensor.kernels import FORMATS, Audit, Parts, WeightFormat
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
    qdata = torch.empty(x.shape, dtype=fmt.dtype, device=x.device)
    scale = torch.empty(fmt.scale_shape(x.shape), device=x.device)
    formula = FORMULAS[fmt.name]
    compiled = torch.compile(formula, dynamic=False)
    plain, checked = Audit(refuse_nonfinite=False), Audit(measure_sqnr=True)
    found: dict[str, Callable[[], Any]] = {
        "qtensor": lambda: kernels.quantize_into(x, qdata, scale, fmt, plain),
        "qtensor, checks and SQNR": lambda: kernels.quantize_into(x, qdata, scale, fmt, checked),
        "torch.compile": lambda: compiled(x),
        "eager torch": lambda: formula(x),
    }
    if fmt.granularity == "block":
        found["transformers' formula"] = lambda: transformers_per_block(x)
    ao = torchao(fmt)
    if ao is not None and x.dim() == 2:
        found["torchao"] = lambda: ao(x)
    return found


def quantized_bytes(fmt: WeightFormat, x: torch.Tensor) -> int:
    """What must cross the memory bus: the source, the data and the scale, once each. per_tensor reads twice."""
    reads = 2 if fmt.granularity == "tensor" else 1
    scales = torch.Size(fmt.scale_shape(x.shape)).numel() * 4
    return x.numel() * (reads * x.element_size() + 1) + scales


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


def same_bytes(fmt: WeightFormat, x: torch.Tensor) -> bool:
    """Whether the kernels on this device give the bytes of the CPU reference."""
    wanted, found = (Parts.of(tuple(x.shape), fmt, device) for device in ("cpu", x.device))
    TORCH.quantize_into(x.cpu(), wanted, fmt, Audit(refuse_nonfinite=False))
    fast = kernels.choose(x.device)
    fast.quantize_into(x, found, fmt, Audit(refuse_nonfinite=False))
    expected, actual = (parts.qdata.cpu().view(torch.uint8) for parts in (wanted, found))
    nan = (expected & 0x7F == 0x7F) & (actual & 0x7F == 0x7F)
    same = bool(((expected == actual) | nan).all()) and torch.equal(wanted.scale, found.scale.cpu())
    for dtype in kernels.SOURCE_DTYPES:
        back = fast.dequantize(found, fmt, dtype).cpu()
        same &= torch.equal(back.nan_to_num(), TORCH.dequantize(wanted, fmt, dtype).nan_to_num())
    return same


def check(device: torch.device) -> list[str]:
    """Compare with the reference: odd shapes, strides, dtypes, non-finite values, and every bf16 up to 448."""
    failures = []
    generator = torch.Generator().manual_seed(0)
    for fmt in FORMATS.values():
        for shape in [(1, 1), (3, 1), (1, 257), (130, 257), (256, 4096), (5, 20000), (2, 130, 384), (300, 1408)]:
            for dtype in kernels.SOURCE_DTYPES:
                x = torch.randn(shape, generator=generator).to(device, dtype)
                wide = torch.randn(*shape[:-1], shape[-1] + 8, generator=generator).to(device, dtype)
                poisoned = x.clone()
                poisoned.view(-1)[:: max(1, x.numel() // 3)] = float("inf")
                poisoned.view(-1)[-1] = float("nan")
                sources = {"": x, "column slice": wide[..., 3:-5], "transposed": x.mT, "non-finite": poisoned}
                for layout, source in sources.items():
                    if not same_bytes(fmt, source):
                        failures.append(f"{fmt.name} {tuple(source.shape)} {dtype} {layout}")
    # With amax 448 the scale is 1, and the data are the encoder's own answers.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    dense = torch.arange(0, 2**32, 4099, dtype=torch.int64).to(torch.int32).view(torch.float32)
    for values in (every, dense):
        kept = values[(values.abs() <= F) | ~values.isfinite()]
        x = torch.cat([kept, torch.full((-len(kept) % 256,), F, dtype=values.dtype)]).view(-1, 256)
        x[0, 0] = F
        if not same_bytes(kernels.FP8_PER_TENSOR, x.to(device)):
            failures.append(f"encoder, {values.dtype}")
    for fmt in (kernels.FP8_PER_CHANNEL, kernels.FP8_PER_BLOCK):
        x = torch.randn(77, 1408, generator=generator).to(torch.bfloat16)
        expected, actual = TORCH.quantize_activation(x, fmt), kernels.quantize_activation(x.to(device), fmt)
        pairs = zip(expected, actual, strict=True)
        if not all(torch.equal(a.contiguous().view(torch.uint8), b.cpu().view(torch.uint8)) for a, b in pairs):
            failures.append(f"activation, {fmt.name}")
    x = torch.zeros(9, 300, dtype=torch.bfloat16, device=device)
    x[4, 7], x[6, 1] = float("inf"), float("nan")
    for fmt in FORMATS.values():
        q, s = (
            torch.empty(x.shape, dtype=fmt.dtype, device=device),
            torch.empty(fmt.scale_shape(x.shape), device=device),
        )
        try:
            kernels.quantize_into(x, q, s, fmt)
            failures.append(f"{fmt.name} accepted infinity")
        except kernels.NonFinite as refused:
            if refused.index != 4 * 300 + 7:
                failures.append(f"{fmt.name} named element {refused.index}")
    return failures


def measure(device: torch.device, bandwidth: float, quick: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for label, shape in list(SHAPES.items())[: 2 if quick else None]:
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        for fmt in FORMATS.values():
            moved = quantized_bytes(fmt, x)
            for name, work in contestants(fmt, x).items():
                rows.append(row(label, fmt.name, name, moved, milliseconds(work, quick), bandwidth, x.numel()))
            q = torch.empty(shape, dtype=fmt.dtype, device=device)
            s = torch.empty(fmt.scale_shape(shape), device=device)
            kernels.quantize_into(x, q, s, fmt, Audit(refuse_nonfinite=False))
            out = torch.empty_like(x)
            took = milliseconds(lambda q=q, s=s, f=fmt, o=out: kernels.dequantize(q, s, f, o.dtype, o), quick)
            rows.append(row(label, f"dequantize {fmt.name}", "qtensor", 3 * x.numel(), took, bandwidth, x.numel()))
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
