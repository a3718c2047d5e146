"""The quantizer in plain torch: the oracle every other backend must equal byte for byte.

It walks the source in chunks of about a quarter million elements, so that the fp32 temporaries stay in cache and the
memory it needs does not grow with the weight. It runs on any device torch runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .audit import Audit
from .codes import decode, encode
from .formats import FP8_PER_CHANNEL, NonFinite, WeightFormat, ceil_div

CHUNK_ELEMENTS = 1 << 18


def quantize_into(
    source: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    audit: Audit | None = None,
    origin: int = 0,
    global_scale: torch.Tensor | None = None,
) -> None:
    """Quantize `source` `[..., N, K]` (any strides) into `qdata`, `scale` and, for formats with one, `global_scale`.

    Their shapes are the format's `qdata_shape`, `scale_shape` and `global_scale_shape`. The rows must be whole units of
    `fmt`: any rows per channel or group, a band that starts on a multiple of 128 per block, the entire matrix per
    tensor and for nvfp4. `origin` is the flat index of `source[0]` in the weight, for error messages.
    """
    audit = audit or Audit()
    if source.dim() == 3:
        step = source.shape[1] * source.shape[2]
        for e in range(source.shape[0]):
            matrix_scale = None if global_scale is None else global_scale[e]
            _quantize_matrix(source[e], qdata[e], scale[e], fmt, audit, origin + e * step, matrix_scale)
    else:
        _quantize_matrix(source, qdata, scale, fmt, audit, origin, global_scale)


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """qdata times its scale in fp32, rounded once to `dtype`: `[..., N, K]`.

    Where two elements share a byte, the last of an odd number of columns has a zero beside it, which `out` leaves off
    if it has one column less than qdata has elements.
    """
    if out is None:
        out = torch.empty((*qdata.shape[:-1], qdata.shape[-1] * fmt.per_byte), dtype=dtype, device=qdata.device)
    if qdata.dim() == 3:
        for e in range(qdata.shape[0]):
            dequantize(qdata[e], scale[e], fmt, dtype, out[e], None if global_scale is None else global_scale[e])
        return out
    height, cols = out.shape
    for rows in row_chunks(height, cols, fmt.block[0]):
        out[rows] = _restore(qdata[rows], scale[fmt.scale_rows(rows.start, rows.stop)], fmt, global_scale, cols)
    return out


def quantize_activation(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic activation quantization: x `[M, K]` → fp8 `[M, K]` and its scales.

    Per token (`[M, 1]`, fp32), per token and group of 128 (`[M, K/128]`, fp32) for a per-block weight, or per token and
    group of 32 with the weight's own formula (`[M, K/32]`, e8m0) for mxfp8: the granularities of vLLM's dynamic fp8
    activations. The first two: amax / F with the per-channel floor, divide, clamp, cast.
    """
    q, scale, _ = _quantize_groups(x, fmt)
    return q.flatten(1)[:, : x.shape[1]], scale


def round_trip_activation(x: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """What `quantize_activation` leaves of x `[M, K]`, in x's dtype: for devices that have no fp8 product."""
    q, _, step = _quantize_groups(x, fmt)
    return (q.float() * step).to(x.dtype).flatten(1)[:, : x.shape[1]]


def linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    bias: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    restore: Callable[..., torch.Tensor] = dequantize,
    band_elements: int = 4 * CHUNK_ELEMENTS,
) -> torch.Tensor:
    """x `[M, K]` times the weight `[N, K]` transposed, plus bias: dequantized (by `restore`) in bands of rows that stay
    in cache."""
    rows, cols = qdata.shape[0], x.shape[1]
    out = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    for band in row_chunks(rows, cols, fmt.block[0], band_elements):
        weight = torch.empty((band.stop - band.start, cols), dtype=x.dtype, device=x.device)
        restore(qdata[band], scale[fmt.scale_rows(band.start, band.stop)], fmt, x.dtype, weight, global_scale)
        out[:, band] = torch.nn.functional.linear(x, weight, None if bias is None else bias[band])
    return out


def _quantize_groups(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x `[M, K]` → fp8 `[M, G, K/G]`, the last group padded with zeros, scales `[M, G]`, and those in fp32 `[M, G, 1]`.

    Compilers see through it.
    """
    rows, cols = x.shape
    group = fmt.block[1] if fmt.block[1] > 1 else max(cols, 1)
    groups = ceil_div(cols, group)
    x32 = torch.nn.functional.pad(x.float(), (0, groups * group - cols)).view(rows, groups, group)
    rule = fmt if fmt.granularity == "group" else FP8_PER_CHANNEL
    scale = rule.scale_from_amax(x32.abs().amax(-1))
    step = rule.step(scale).unsqueeze(-1)
    return (x32 / step).clamp(-fmt.max, fmt.max).to(fmt.dtype), scale, step


def _quantize_matrix(
    source: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    audit: Audit,
    origin: int,
    global_scale: torch.Tensor | None,
) -> None:
    rows, cols = source.shape
    gain = None
    if fmt.needs_whole_matrix:
        amax = torch.zeros((), dtype=torch.float32, device=source.device)
        for chunk in row_chunks(rows, cols, 1):
            amax = torch.maximum(amax, _amax(source[chunk].float(), fmt, audit, origin + chunk.start * cols).amax())
        if global_scale is None:
            scale.copy_(fmt.scale_from_amax(amax))
        else:
            gain = fmt.gain_from_amax(amax)
            global_scale.copy_(1.0 / gain)
    elif source.numel() == 0:
        scale.copy_(fmt.scale_from_amax(torch.zeros_like(scale, dtype=torch.float32)))
    for chunk in row_chunks(rows, cols, fmt.block[0]):
        x = source[chunk].float()
        chunk_scale = scale[fmt.scale_rows(chunk.start, chunk.stop)]
        if fmt.granularity != "tensor":
            amax = _amax(x, fmt, audit, origin + chunk.start * cols)
            chunk_scale.copy_(scale_of(amax, fmt, source.dtype, gain))
        qdata[chunk] = _quantized(x, chunk_scale, fmt, global_scale, source.dtype)
        if audit.measure_sqnr:
            restored = _restore(qdata[chunk], chunk_scale, fmt, global_scale, cols)
            audit.signal += float(x.double().square().sum())
            audit.noise += float((x - restored).double().square().sum())


def scale_of(
    amax: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype, gain: torch.Tensor | None = None
) -> torch.Tensor:
    """The stored scales of a weight of `dtype` with those largest magnitudes; `gain`: that of the matrix."""
    scale = fmt.scale_from_amax(amax, gain)
    return _round_through(scale, dtype) if fmt.element == "int8" else scale


def step_of(scale: torch.Tensor, fmt: WeightFormat, global_scale: torch.Tensor | None) -> torch.Tensor:
    """What one unit of the element format is worth, fp32, by stored scale."""
    return fmt.step(scale) if global_scale is None else fmt.step(scale) * global_scale


def row_chunks(rows: int, cols: int, unit: int, elements: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    """Slices of whole units that hold about `elements` elements each."""
    step = unit * max(1, elements // max(1, unit * cols))
    for start in range(0, rows if cols else 0, step):
        yield slice(start, min(start + step, rows))


def _amax(x: torch.Tensor, fmt: WeightFormat, audit: Audit, origin: int) -> torch.Tensor:
    """Largest magnitude per scale of the fp32 chunk `x`, shaped as the scale (per row for per_tensor)."""
    magnitude = x.abs()
    amax = _blocks(magnitude, fmt).amax((1, 3))
    if not torch.isfinite(amax).all():
        if audit.refuse_nonfinite:
            flat = x.flatten()
            first = int((~torch.isfinite(flat)).nonzero()[0])
            raise NonFinite(origin + first, float(flat[first]))
        amax = _blocks(torch.where(torch.isfinite(x), magnitude, 0.0), fmt).amax((1, 3))
    return amax


def _blocks(x: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """`[R, K]` → `[R/d, d, K/a, a]` for blocks of d rows and a columns, edge blocks padded with zeros."""
    rows, cols = x.shape
    height, width = fmt.block[0], fmt.block[1] if fmt.block[1] > 1 else cols
    down, across = ceil_div(rows, height), ceil_div(cols, width)
    pad = (0, across * width - cols, 0, down * height - rows)
    if any(pad):
        x = torch.nn.functional.pad(x, pad)
    return x.reshape(down, height, across, width)


def _unblock(blocks: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The inverse of `_blocks`."""
    return blocks.flatten(2).flatten(0, 1)[:rows, :cols]


def _step(scale: torch.Tensor, fmt: WeightFormat, global_scale: torch.Tensor | None) -> torch.Tensor:
    """`step_of`, broadcastable against `_blocks`."""
    step = step_of(scale, fmt, global_scale)
    return step.view(1, 1, 1, 1) if step.dim() == 1 else step[:, None, :, None]


def _quantized(
    x: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, global_scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The stored elements of one fp32 chunk that came from `dtype`."""
    step, blocks = _step(scale, fmt, global_scale), _blocks(x, fmt)
    if fmt.divides:
        scaled = torch.where(step == 0.0, 0.0, blocks / step)
        if fmt.element == "int8":
            scaled = _round_through(scaled, dtype)
    else:
        inverse = 1.0 / step
        scaled = blocks * torch.where(torch.isfinite(inverse), inverse, 0.0)
    return encode(_unblock(scaled, *x.shape), fmt)


def _restore(
    codes: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, global_scale: torch.Tensor | None, cols: int
) -> torch.Tensor:
    """Stored elements times their scale, fp32 `[R, cols]`."""
    values = decode(codes, fmt)[:, :cols]
    return _unblock(_blocks(values, fmt).mul_(_step(scale, fmt, global_scale)), *values.shape)


def _round_through(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as it is after a computation in `dtype`."""
    return x if dtype == torch.float32 else x.to(dtype).float()
