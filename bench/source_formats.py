"""Weights in the quantized formats that checkpoints come in, made by rounding to nearest: what files hold, without the
packages that write them. How much of a weight is left in each of them is what their second quantization starts from.

`ENCODERS` has a function for each format, which makes the parts (qtensor/sources names them) of a weight `[N, K]` in
fp32; N and K are multiples of 256. They round as the formats' own tools do without data: the largest magnitude of a
group gives its scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from qtensor import quantize
from qtensor.sources.bitsandbytes import CODES

Tensors = dict[str, torch.Tensor]
E4M3_MAX = 448.0


def fp8(weight: torch.Tensor, rows: int | None, cols: int | None, powers: bool = False) -> tuple[torch.Tensor, ...]:
    """e4m3 values, and the scales `[N / rows, K / cols]` of blocks of that size; None: all of them."""
    (n, k), rows, cols = weight.shape, rows or weight.shape[0], cols or weight.shape[1]
    blocks = weight.view(n // rows, rows, k // cols, cols)
    scale = blocks.abs().amax((1, 3), keepdim=True) / E4M3_MAX
    scale = torch.exp2(scale.log2().ceil()) if powers else scale
    return (blocks / scale).to(torch.float8_e4m3fn).view(n, k), scale.view(n // rows, k // cols)


class Integers(NamedTuple):
    """Codes without sign `[N, K]`, and scales and zero points `[N, groups]`."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def integers(
    weight: torch.Tensor, bits: int, group: int | None, symmetric: bool = True, dtype: torch.dtype = torch.float32
) -> Integers:
    """In groups of so many columns; None: all. dtype: of the scales."""
    runs, top, half = weight.unflatten(1, (-1, group or weight.shape[1])), 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        scale = (runs.abs().amax(-1) * 2 / top).to(dtype)
        zero = torch.full(scale.shape, half)
    else:
        low, high = runs.amin(-1).clamp(max=0), runs.amax(-1).clamp(min=0)
        scale = ((high - low) / top).to(dtype)
        zero = (-low / scale.float()).round().clamp(0, top).int()
    codes = ((runs / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, top)
    return Integers(codes.flatten(1).int(), scale, zero)


def in_order(weight: torch.Tensor, bits: int, group: int, **more: Any) -> tuple[Integers, torch.Tensor]:
    """In groups whose columns lie anywhere, and the group of each column."""
    cols = weight.shape[1]
    groups = (torch.arange(cols) // group)[torch.randperm(cols, generator=torch.Generator().manual_seed(1))]
    order = groups.argsort(stable=True)
    made = integers(weight[:, order], bits, group, **more)
    return made._replace(codes=made.codes[:, order.argsort()]), groups.int()


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers `[N, K]` in words of 32 bits `[N, K * bits / 32]`, the first in the lowest bits, without gaps."""
    held = (codes.long().unsqueeze(-1) >> torch.arange(bits) & 1).flatten(1)
    held = torch.nn.functional.pad(held, (0, -held.shape[1] % 32)).unflatten(1, (-1, 32))
    return (held << torch.arange(32)).sum(-1).to(torch.int32)


def packed(
    weight: torch.Tensor,
    bits: int,
    group: int | None,
    symmetric: bool = True,
    ordered: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """compressed-tensors' "pack-quantized"."""
    groups = None
    if ordered:
        made, groups = in_order(weight, bits, group or weight.shape[1], symmetric=symmetric)
    else:
        made = integers(weight, bits, group, symmetric, dtype)
    found = {"*_packed": words(made.codes, bits), "*_scale": made.scale, "*_shape": torch.tensor(weight.shape)}
    if not symmetric:
        found["*_zero_point"] = words(made.zero.t(), bits).t().contiguous()
    return found if groups is None else {**found, "*_g_idx": groups}


def bytes_each(weight: torch.Tensor, group: int | None, symmetric: bool) -> Tensors:
    """compressed-tensors' "int-quantized"."""
    made = integers(weight, 8, group, symmetric)
    found = {"*": (made.codes - 128).to(torch.int8), "*_scale": made.scale}
    return found if symmetric else {**found, "*_zero_point": (made.zero - 128).to(torch.int8)}


def gptq(weight: torch.Tensor, bits: int, group: int | None, symmetric: bool = True, ordered: bool = False) -> Tensors:
    """As files of the first version have it: zero points less one."""
    size = group or weight.shape[1]
    groups = (torch.arange(weight.shape[1]) // size).int()
    if ordered:
        made, groups = in_order(weight, bits, size, symmetric=symmetric, dtype=torch.float16)
    else:
        made = integers(weight, bits, size, symmetric, torch.float16)
    zeros = (made.zero.t() - 1) % 2**bits
    return {
        "qweight": words(made.codes, bits).t().contiguous(),
        "qzeros": words(zeros, bits),
        "scales": made.scale.t().contiguous(),
        "g_idx": groups,
    }


def awq(weight: torch.Tensor, group: int) -> Tensors:
    made = integers(weight, 4, group, False, torch.float16)
    where = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]) * 4

    def interleaved(values: torch.Tensor) -> torch.Tensor:
        return (values.t().long().unflatten(1, (-1, 8)) << where).sum(-1).to(torch.int32)

    return {
        "qweight": interleaved(made.codes),
        "qzeros": interleaved(made.zero),
        "scales": made.scale.t().contiguous(),
    }


def modelopt_int4(weight: torch.Tensor, group: int) -> Tensors:
    made = integers(weight, 4, group)
    pairs = (made.codes - 8 & 0xF).unflatten(0, (-1, 2))
    return {"*": (pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8), "*_scale": made.scale}


def four_bit(weight: torch.Tensor, kind: str, nested: bool) -> Tensors:
    """bitsandbytes', in blocks of 64."""
    runs, table = weight.reshape(-1, 64), torch.tensor(CODES[kind])
    absmax = runs.abs().amax(1)
    state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    found = {"*.quant_map": table, "*.absmax": absmax}
    if nested:
        mean, levels = float(absmax.mean()), torch.linspace(-1, 1, 256)
        outer = (absmax - mean).view(-1, 256).abs().amax(1)
        inner = ((absmax - mean).view(-1, 256) / outer.unsqueeze(1) * 127.5 + 127.5).round().flatten()
        absmax = (levels[inner.int()].view(-1, 256) * outer.unsqueeze(1)).flatten() + mean
        found |= {"*.absmax": inner.to(torch.uint8), "*.nested_absmax": outer, "*.nested_quant_map": levels}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": mean}
    codes = ((runs / absmax.unsqueeze(1)).unsqueeze(-1) - table).abs().argmin(-1).flatten()
    found["*"] = (codes[::2] << 4 | codes[1::2]).to(torch.uint8).unsqueeze(1)
    found[f"*.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return found


def rows_int8(weight: torch.Tensor) -> Tensors:
    """bitsandbytes' int8."""
    absmax = weight.abs().amax(1)
    return {"*": (weight * 127 / absmax.unsqueeze(1)).round().to(torch.int8), "SCB": absmax}


def torchao_integers(weight: torch.Tensor, bits: int, group: int | None) -> Tensors:
    made = integers(weight, bits, group)
    zeros = torch.zeros(made.scale.shape, dtype=torch.int8)
    return {
        "_*_qdata": (made.codes - 2 ** (bits - 1)).to(torch.int8),
        "_*_scale": made.scale,
        "_*_zero_point": zeros,
    }


def torchao_fp8(weight: torch.Tensor) -> Tensors:
    codes, scale = fp8(weight, 1, None)
    return {"_*_qdata": codes, "_*_scale": scale}


def nvfp4(weight: torch.Tensor, divides: bool) -> Tensors:
    codes, scale, whole = quantize(weight.bfloat16(), "nvfp4").parts()
    if divides:
        return {"*_packed": codes, "*_scale": scale, "*_global_scale": whole.reciprocal()}
    return {"*": codes, "*_scale": scale, "*_scale_2": whole.reshape(())}


def mxfp4(weight: torch.Tensor, blocks: bool) -> Tensors:
    codes, scale = quantize(weight.bfloat16(), "mxfp4").parts()
    return (
        {"*_blocks": codes.unflatten(1, (-1, 16)), "*_scales": scale}
        if blocks
        else {"*_packed": codes, "*_scale": scale}
    )


def named(made: tuple[torch.Tensor, ...], scale: str = "*_scale", dtype: torch.dtype | None = None) -> Tensors:
    return {"*": made[0], scale: made[1] if dtype is None else made[1].to(dtype)}


# GGUF -----------------------------------------------------------------------------------------------------------------


def fields(values: torch.Tensor, run: int, bits: int) -> torch.Tensor:
    """Integers in bytes: the lowest fields of `run` bytes, then the next of the same ones."""
    held = values.int().unflatten(1, (-1, 8 // bits, run)) << torch.arange(0, 8, bits).view(-1, 1)
    return held.sum(2).flatten(1).to(torch.uint8)


def halves(numbers: torch.Tensor) -> torch.Tensor:
    """fp16 numbers `[blocks]` as bytes `[blocks, 2]`."""
    return numbers.half().unsqueeze(1).view(torch.uint8)


def _signed(runs: torch.Tensor) -> torch.Tensor:
    """The value of the largest magnitude of each run, with its sign."""
    return runs.gather(1, runs.abs().argmax(1, keepdim=True)).squeeze(1)


def _q_0(runs: torch.Tensor, bits: int) -> torch.Tensor:
    half = 2 ** (bits - 1)
    d = (_signed(runs) / -half).half()
    codes = (runs / d.float().unsqueeze(1) + half).round().clamp(0, 2 * half - 1)
    return torch.cat([halves(d), *_low_bits(codes, bits)], 1)


def _q_1(runs: torch.Tensor, bits: int) -> torch.Tensor:
    low = runs.amin(1).half()
    d = ((runs.amax(1) - low.float()) / (2**bits - 1)).half()
    codes = ((runs - low.float().unsqueeze(1)) / d.float().unsqueeze(1)).round().clamp(0, 2**bits - 1)
    return torch.cat([halves(d), halves(low), *_low_bits(codes, bits)], 1)


def _low_bits(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """The fifth bits of 32 values, if they have five, and their lower four."""
    codes = codes.int()
    fifth = [(codes.unflatten(1, (-1, 8)) >> 4 << torch.arange(8)).sum(-1).to(torch.uint8)] if bits == 5 else []
    return [*fifth, fields(codes & 0xF, 16, 4)]


def _q8_0(runs: torch.Tensor) -> torch.Tensor:
    d = (runs.abs().amax(1) / 127).half()
    return torch.cat([halves(d), (runs / d.float().unsqueeze(1)).round().to(torch.int8).view(torch.uint8)], 1)


def _scaled(runs: torch.Tensor, count: int, half: int, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of `count` runs in a block: one fp16 number, an integer scale for each up to `most`, and codes around zero."""
    each = runs.unflatten(1, (count, -1))
    step = each.abs().amax(-1) / half
    d = (step.amax(1) / most).half()
    scale = (step / d.float().unsqueeze(1)).round().clamp(0, most)
    wide = (d.float().unsqueeze(1) * scale).unsqueeze(-1)
    codes = torch.where(wide > 0, each / wide, 0).round().clamp(-half, half - 1)
    return d, scale.int(), codes.flatten(1).int()


def _with_lows(runs: torch.Tensor, count: int, top: int, most: int) -> tuple[torch.Tensor, ...]:
    """The same with two fp16 numbers, and two integers for each run: a scale, and what is taken away."""
    each = runs.unflatten(1, (count, -1))
    low = -each.amin(-1).clamp(max=0)
    step = (each.amax(-1) + low) / top
    d, dmin = (step.amax(1) / most).half(), (low.amax(1) / most).half()
    scale = (step / d.float().unsqueeze(1)).round().clamp(0, most)
    lows = torch.where(dmin.float().unsqueeze(1) > 0, low / dmin.float().unsqueeze(1), 0).round().clamp(0, most)
    wide = (d.float().unsqueeze(1) * scale).unsqueeze(-1)
    above = each + (dmin.float().unsqueeze(1) * lows).unsqueeze(-1)
    codes = torch.where(wide > 0, above / wide, 0).round().clamp(0, top)
    return d, dmin, scale.int(), lows.int(), codes.flatten(1).int()


def _q2_k(runs: torch.Tensor) -> torch.Tensor:
    d, dmin, scale, lows, codes = _with_lows(runs, 16, 3, 15)
    return torch.cat([(scale | lows << 4).to(torch.uint8), fields(codes, 32, 2), halves(d), halves(dmin)], 1)


def _q3_k(runs: torch.Tensor) -> torch.Tensor:
    d, scale, codes = _scaled(runs, 16, 4, 31)
    scale, codes = scale + 32, codes + 4
    six = torch.cat([fields(scale & 0xF, 8, 4), fields(scale >> 4, 4, 2)], 1)
    return torch.cat([fields(codes >> 2, 32, 1), fields(codes & 3, 32, 2), six, halves(d)], 1)


def _q45_k(runs: torch.Tensor, bits: int) -> torch.Tensor:
    d, dmin, scale, lows, codes = _with_lows(runs, 8, 2**bits - 1, 63)
    first, second = (part[:, :4] | part[:, 4:] >> 4 << 6 for part in (scale, lows))
    third = scale[:, 4:] & 0xF | (lows[:, 4:] & 0xF) << 4
    six = torch.cat([first, second, third], 1).to(torch.uint8)
    fifth = [fields(codes >> 4, 32, 1)] if bits == 5 else []
    return torch.cat([halves(d), halves(dmin), six, *fifth, fields(codes & 0xF, 32, 4)], 1)


def _q6_k(runs: torch.Tensor) -> torch.Tensor:
    d, scale, codes = _scaled(runs, 16, 32, 127)
    codes = codes + 32
    return torch.cat([fields(codes & 0xF, 64, 4), fields(codes >> 4, 32, 2), scale.to(torch.uint8), halves(d)], 1)


GGUF: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "Q4_0": (32, lambda runs: _q_0(runs, 4)),
    "Q4_1": (32, lambda runs: _q_1(runs, 4)),
    "Q5_0": (32, lambda runs: _q_0(runs, 5)),
    "Q5_1": (32, lambda runs: _q_1(runs, 5)),
    "Q8_0": (32, _q8_0),
    "Q2_K": (256, _q2_k),
    "Q3_K": (256, _q3_k),
    "Q4_K": (256, lambda runs: _q45_k(runs, 4)),
    "Q5_K": (256, lambda runs: _q45_k(runs, 5)),
    "Q6_K": (256, _q6_k),
}


def gguf(kind: str) -> Callable[[torch.Tensor], Tensors]:
    values, encode = GGUF[kind]
    return lambda weight: {f"*.{kind}": encode(weight.reshape(-1, values)).view(len(weight), -1)}


ENCODERS: dict[str, Callable[[torch.Tensor], Tensors]] = {
    "fp8 per tensor": lambda w: named(tuple(t.reshape(()) if t.numel() == 1 else t for t in fp8(w, None, None))),
    "fp8 per channel": lambda w: named(fp8(w, 1, None)),
    "fp8 blocks of 128 × 128": lambda w: named(fp8(w, 128, 128), "*_scale_inv"),
    "fp8 blocks, powers of two": lambda w: named(fp8(w, 128, 128, True), "*_scale_inv", torch.float8_e8m0fnu),
    "mxfp8": lambda w: dict(zip(("*", "*_scale"), quantize(w.bfloat16(), "mxfp8").parts(), strict=True)),
    "mxfp4": lambda w: mxfp4(w, False),
    "mxfp4 of gpt-oss": lambda w: mxfp4(w, True),
    "nvfp4 of compressed-tensors": lambda w: nvfp4(w, True),
    "nvfp4 of ModelOpt": lambda w: nvfp4(w, False),
    "int8 per channel": lambda w: bytes_each(w, None, True),
    "int8 per channel, zero points": lambda w: bytes_each(w, None, False),
    "int8, groups of 128": lambda w: bytes_each(w, 128, True),
    "int4 per channel": lambda w: packed(w, 4, None),
    "int4, groups of 128": lambda w: packed(w, 4, 128),
    "int4, groups of 128, zero points": lambda w: packed(w, 4, 128, False),
    "int4, groups of 128, another order": lambda w: packed(w, 4, 128, True, True),
    "int4, groups of 32": lambda w: packed(w, 4, 32),
    "int4, groups of 32, scales in bf16": lambda w: packed(w, 4, 32, dtype=torch.bfloat16),
    "int3, groups of 128": lambda w: packed(w, 3, 128),
    "ModelOpt int4, groups of 128": lambda w: modelopt_int4(w, 128),
    "GPTQ int8 per channel": lambda w: gptq(w, 8, None),
    "GPTQ int4, groups of 128": lambda w: gptq(w, 4, 128),
    "GPTQ int4, groups of 128, desc_act": lambda w: gptq(w, 4, 128, True, True),
    "GPTQ int4, groups of 128, zero points": lambda w: gptq(w, 4, 128, False),
    "GPTQ int3, groups of 128": lambda w: gptq(w, 3, 128),
    "GPTQ int2, groups of 128": lambda w: gptq(w, 2, 128),
    "AWQ int4, groups of 128": lambda w: awq(w, 128),
    "bitsandbytes nf4, nested": lambda w: four_bit(w, "nf4", True),
    "bitsandbytes fp4": lambda w: four_bit(w, "fp4", False),
    "bitsandbytes int8": rows_int8,
    "torchao fp8": torchao_fp8,
    "torchao int8": lambda w: torchao_integers(w, 8, None),
    "torchao int4 in int8, groups of 32": lambda w: torchao_integers(w, 4, 32),
    **{f"GGUF {kind}": gguf(kind) for kind in GGUF},
}
"""By the name that docs/sources.md has."""
