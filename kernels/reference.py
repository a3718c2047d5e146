"""The quantizer in plain torch: the oracle every other backend must equal byte for byte.

It walks the source in chunks of about a quarter million elements, so that the fp32 temporaries stay in cache and the
memory it needs does not grow with the weight. It runs on any device torch runs on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .audit import Audit
from .e4m3 import decode
from .formats import FP8_PER_CHANNEL, NonFinite, WeightFormat, ceil_div

CHUNK_ELEMENTS = 1 << 18


def quantize_into(
    source: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    audit: Audit | None = None,
    origin: int = 0,
) -> None:
    """Quantize `source` `[..., N, K]` (any strides) into `qdata` (same shape) and `scale` (`fmt.scale_shape`).

    The rows must be whole units of `fmt`: any rows per channel, a band that starts on a multiple of 128 per block, the
    entire matrix per tensor. `origin` is the flat index of `source[0]` in the weight, for error messages.
    """
    audit = audit or Audit()
    if source.dim() == 3:
        step = source.shape[1] * source.shape[2]
        for e in range(source.shape[0]):
            _quantize_matrix(source[e], qdata[e], scale[e], fmt, audit, origin + e * step)
    else:
        _quantize_matrix(source, qdata, scale, fmt, audit, origin)


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """qdata `[..., N, K]` times its scale in fp32, rounded once to `dtype`."""
    out = torch.empty(qdata.shape, dtype=dtype, device=qdata.device) if out is None else out
    if qdata.dim() == 3:
        for e in range(qdata.shape[0]):
            dequantize(qdata[e], scale[e], fmt, dtype, out[e])
        return out
    for rows in _row_chunks(qdata.shape[0], qdata.shape[1], 1 if fmt.granularity != "block" else fmt.block[0]):
        values = decode(qdata[rows], torch.float32)
        out[rows] = values.mul_(_expand_scale(scale, fmt, rows, qdata.shape[1]))
    return out


def quantize_activation(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic activation quantization: x `[M, K]` → fp8 `[M, K]` and fp32 scales.

    Per token (`[M, 1]`), or per token and group of 128 (`[M, K/128]`) for a per-block weight: the granularities of
    vLLM's dynamic fp8 activations. Formula as for the weight: amax / F with the per-channel floor, divide, clamp, cast.
    """
    q, scale = _quantize_groups(x, fmt)
    return q.flatten(1)[:, : x.shape[1]], scale


def round_trip_activation(x: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """What `quantize_activation` leaves of x `[M, K]`, in x's dtype: for devices that have no fp8 product."""
    q, scale = _quantize_groups(x, fmt)
    return (q.float() * scale.unsqueeze(-1)).to(x.dtype).flatten(1)[:, : x.shape[1]]


def linear(
    x: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x `[M, K]` times the weight `[N, K]` transposed, plus bias: dequantized in bands of rows that stay in cache."""
    rows, cols = qdata.shape
    out = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    unit = fmt.block[0]
    for band in _row_chunks(rows, cols, unit, 4 * CHUNK_ELEMENTS):
        band_scale = scale if fmt.granularity == "tensor" else scale[band.start // unit : ceil_div(band.stop, unit)]
        weight = dequantize(qdata[band], band_scale, fmt, x.dtype)
        out[:, band] = torch.nn.functional.linear(x, weight, None if bias is None else bias[band])
    return out


def _quantize_groups(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """x `[M, K]` → fp8 `[M, G, K/G]`, the last group padded with zeros, and fp32 scales `[M, G]`."""
    rows, cols = x.shape
    group = fmt.block[1] if fmt.granularity == "block" else max(cols, 1)
    groups = ceil_div(cols, group)
    x32 = torch.nn.functional.pad(x.float(), (0, groups * group - cols)).view(rows, groups, group)
    scale = FP8_PER_CHANNEL.scale_from_amax(x32.abs().amax(-1))
    return (x32 / scale.unsqueeze(-1)).clamp(-fmt.max, fmt.max).to(fmt.dtype), scale


def _quantize_matrix(
    source: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, audit: Audit, origin: int
) -> None:
    rows, cols = source.shape
    if fmt.granularity == "tensor":
        amax = torch.zeros((), dtype=torch.float32, device=source.device)
        for chunk in _row_chunks(rows, cols, 1):
            amax = torch.maximum(amax, _amax(source[chunk].float(), fmt, audit, origin + chunk.start * cols).amax())
        scale.copy_(fmt.scale_from_amax(amax))
        for chunk in _row_chunks(rows, cols, 1):
            _encode(source[chunk].float(), scale, qdata[chunk], fmt, audit)
        return
    unit = fmt.unit_rows(rows)
    if source.numel() == 0:
        scale.copy_(fmt.scale_from_amax(torch.zeros_like(scale)))
        return
    for chunk in _row_chunks(rows, cols, unit):
        x = source[chunk].float()
        chunk_scale = fmt.scale_from_amax(_amax(x, fmt, audit, origin + chunk.start * cols))
        scale[chunk.start // unit : ceil_div(chunk.stop, unit)] = chunk_scale
        _encode(x, chunk_scale, qdata[chunk], fmt, audit)


def _row_chunks(rows: int, cols: int, unit: int, elements: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    """Slices of whole units that hold about `elements` elements each."""
    step = unit * max(1, elements // max(1, unit * cols))
    for start in range(0, rows if cols else 0, step):
        yield slice(start, min(start + step, rows))


def _amax(x: torch.Tensor, fmt: WeightFormat, audit: Audit, origin: int) -> torch.Tensor:
    """Largest magnitude per scale of the fp32 chunk `x`, shaped as the scale (per row for per_tensor)."""
    magnitude = x.abs()
    amax = _reduce(magnitude, fmt)
    if not torch.isfinite(amax).all():
        if audit.refuse_nonfinite:
            flat = x.flatten()
            first = int((~torch.isfinite(flat)).nonzero()[0])
            raise NonFinite(origin + first, float(flat[first]))
        amax = _reduce(torch.where(torch.isfinite(x), magnitude, 0.0), fmt)
    return amax


def _reduce(magnitude: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    if fmt.granularity == "block":
        return _blocks(magnitude, fmt).amax((1, 3))
    return magnitude.amax(-1, keepdim=True)


def _blocks(x: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """`[R, K]` → `[R/128, 128, K/128, 128]`, edge blocks padded with zeros."""
    rows, cols = x.shape
    down, across = ceil_div(rows, fmt.block[0]), ceil_div(cols, fmt.block[1])
    pad = (0, across * fmt.block[1] - cols, 0, down * fmt.block[0] - rows)
    if any(pad):
        x = torch.nn.functional.pad(x, pad)
    return x.reshape(down, fmt.block[0], across, fmt.block[1])


def _encode(x: torch.Tensor, scale: torch.Tensor, qdata: torch.Tensor, fmt: WeightFormat, audit: Audit) -> None:
    """Scale, clamp and cast one fp32 chunk into `qdata`."""
    rows, cols = x.shape
    if fmt.granularity == "channel":
        scaled = x / scale
    else:
        inverse = 1.0 / scale
        inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)
        if fmt.granularity == "tensor":
            scaled = x * inverse
        else:
            scaled = (_blocks(x, fmt) * inverse[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :cols]
    qdata.copy_(scaled.clamp_(-fmt.max, fmt.max))
    if audit.measure_sqnr:
        restored = decode(qdata, torch.float32) * _expand_scale(scale, fmt, slice(0, rows), cols)
        audit.signal += float(x.double().square().sum())
        audit.noise += float((x - restored).double().square().sum())


def _expand_scale(scale: torch.Tensor, fmt: WeightFormat, rows: slice, cols: int) -> torch.Tensor:
    """The part of one matrix's scale that multiplies `rows`, broadcastable against `[rows, cols]`."""
    if fmt.granularity == "tensor":
        return scale
    if fmt.granularity == "channel":
        return scale[rows]
    down, across = fmt.block
    band = scale[rows.start // down : ceil_div(rows.stop, down)]
    band = band.repeat_interleave(down, 0)[: rows.stop - rows.start]
    return band.repeat_interleave(across, 1)[:, :cols]
