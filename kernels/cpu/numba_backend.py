"""The fast path for CPUs: the functions of `reference`, byte for byte, as fused loops that numba compiles.

For fp8 per tensor, channel and block one pass finds the amax, derives the scale and encodes while the row is still in
cache, and the linear reads one byte per weight. The other formats' scales are the reference's own, between a loop that
finds the amax of each group and one that encodes; their linear dequantizes bands of rows. The loops are in
`jit`, which imports numba, so it is loaded at the first call; `cpu_rows` shares the rows out among threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch

from qtensor.errors import WeightDtypeError, WeightShapeError

from .. import reference
from ..audit import Audit
from ..formats import SOURCE_DTYPES, NonFinite, WeightFormat, ceil_div
from .rows import PIECE, Array, adjacent, as_array, flat_rows, share, slabs

LINEAR_BATCH = 16  # Beyond this many rows of x, dequantizing bands and multiplying those is faster.

_TILE = 1 << 22  # Elements of weight dequantized at a time for a large batch.
_X_PADDING = 16  # Keeps rows of x from falling on the same cache sets when K is a power of two.
_INFINITY_BITS = 0x7F800000


_LIKE: dict[torch.dtype, Array] = {
    torch.bfloat16: np.empty(0, np.uint16),
    torch.float16: np.empty(0, np.int16),
    torch.float32: np.empty(0, np.float32),
}


@functools.cache
def available() -> bool:
    """Whether numba can be imported here."""
    try:
        _jit()
    except ImportError:
        return False
    return True


def quantize_into(
    source: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    audit: Audit | None = None,
    origin: int = 0,
    global_scale: torch.Tensor | None = None,
) -> None:
    """As `reference.quantize_into`. A source with NaN or infinity is refused before anything is stored."""
    audit = audit or Audit()
    _check(source, qdata, fmt)
    fused = is_fused(fmt)
    if source.numel() == 0 or not (fused or (audit.refuse_nonfinite and not audit.measure_sqnr)):
        reference.quantize_into(source, qdata, scale, fmt, audit, origin, global_scale)
        return
    small = source.dim() == 2 and source.numel() <= PIECE and audit.refuse_nonfinite and not audit.measure_sqnr
    if fused and small and adjacent(source) and adjacent(qdata) and scale.is_contiguous():
        _quantize_piece(source, qdata, scale, fmt, origin)
        return
    matrices = _matrices(source, qdata, scale, fmt)
    amax = [0] * len(matrices)
    if audit.refuse_nonfinite or fmt.granularity == "tensor":
        for i, (matrix, _, _) in enumerate(matrices):
            amax[i] = _amax(matrix, audit, origin)
            origin += matrix.numel()
    for i, (matrix, codes, scales) in enumerate(matrices):
        if fused:
            _quantize_matrix(matrix, codes, scales, fmt, audit, amax[i])
        else:
            whole = None if global_scale is None else global_scale.view(-1)[i]
            _quantize_groups(matrix, codes, scales, fmt, amax[i], whole)


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.dequantize`."""
    if out is None:
        out = torch.empty((*qdata.shape[:-1], qdata.shape[-1] * fmt.per_byte), dtype=dtype, device=qdata.device)
    if qdata.numel() == 0 or out.dtype not in SOURCE_DTYPES:
        return reference.dequantize(qdata, scale, fmt, dtype, out, global_scale)
    if qdata.dim() == 3:
        for e in range(qdata.shape[0]):
            dequantize(qdata[e], scale[e], fmt, dtype, out[e], None if global_scale is None else global_scale[e])
        return out
    qdata = qdata if adjacent(qdata) else qdata.contiguous()
    target = out if adjacent(out) else torch.empty(out.shape, dtype=out.dtype, device="cpu")
    if not is_fused(fmt):
        scale, global_scale = scale.detach(), None if global_scale is None else global_scale.detach()
        share(out.shape[0], out.numel(), functools.partial(_decode_rows, qdata, scale, fmt, target, global_scale))
        return out if target is out else out.copy_(target)
    rows, cols = qdata.shape
    down = rows if fmt.granularity == "tensor" else fmt.block[0]
    across = fmt.block[1] if fmt.granularity == "block" else cols
    codes, codes_stride = flat_rows(qdata)
    values, values_stride = flat_rows(target)
    scales = flat_rows(scale.contiguous().view(1, -1))[0]
    run = _jit().dequantize_rows
    share(
        rows,
        qdata.numel(),
        lambda start, stop: run(codes, codes_stride, values, values_stride, cols, scales, down, across, start, stop),
    )
    return out if target is out else out.copy_(target)


def quantize_activation(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.quantize_activation`."""
    if x.numel() == 0 or x.dtype not in SOURCE_DTYPES or not is_fused(fmt):
        return reference.quantize_activation(x, fmt)
    rows, cols = x.shape
    group = fmt.block[1] if fmt.granularity == "block" else cols
    q = torch.empty((rows, cols), dtype=fmt.dtype, device="cpu")
    scale = torch.empty((rows, ceil_div(cols, group)), dtype=torch.float32, device="cpu")
    x = x if adjacent(x) else x.contiguous()
    _run_groups(x, q, scale, group, False, Audit())
    return q, scale


def linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    bias: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x `[M, K]` times the dequantized weight `[N, K]` transposed, plus bias `[N]`: `[M, N]` in x's dtype.

    Up to `LINEAR_BATCH` rows fp8 is decoded in registers and summed in fp32. Above that, where x needs a gradient, and
    for other formats, the weight is dequantized to x's dtype a band of rows at a time.
    """
    batch, cols = x.shape
    rows = qdata.shape[0]
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    in_registers = is_fused(fmt) and 0 < batch <= LINEAR_BATCH and not needs_grad and adjacent(qdata)
    if qdata.numel() == 0 or x.dtype not in SOURCE_DTYPES or not in_registers:
        return reference.linear(x, qdata, scale, fmt, bias, global_scale, dequantize, _TILE)
    padded = 1 if batch == 1 else 4 if batch <= 4 else 8 * ceil_div(batch, 8)
    x32 = torch.zeros((padded, cols + _X_PADDING), dtype=torch.float32, device="cpu")
    x32[:batch, :cols] = x
    out = torch.empty((padded, rows), dtype=torch.float32, device="cpu")
    codes, codes_stride = flat_rows(qdata)
    values, x_stride = flat_rows(x32)
    sums, sums_stride = flat_rows(out)
    jit = _jit()
    if fmt.granularity == "block":
        scales = flat_rows(scale.contiguous().view(1, -1))[0]
        share(
            ceil_div(rows, fmt.block[0]),
            qdata.numel(),
            lambda start, stop: jit.linear_bands(
                codes, codes_stride, rows, cols, values, x_stride, padded, scales, sums, sums_stride, start, stop
            ),
        )
    else:
        scales = flat_rows(scale.reshape(1, -1).expand(1, rows).contiguous())[0]
        share(
            rows,
            qdata.numel(),
            lambda start, stop: jit.linear_rows(
                codes, codes_stride, cols, values, x_stride, padded, scales, sums, sums_stride, start, stop
            ),
        )
    result = out[:batch]
    if bias is not None:
        result += bias
    return result.to(x.dtype)


def _jit() -> ModuleType:
    from . import jit

    return jit


def is_fused(fmt: WeightFormat) -> bool:
    """Whether `jit` has loops that do all of the format's work in one pass."""
    return fmt.element == "e4m3" and fmt.granularity != "group"


def _check(source: torch.Tensor, qdata: torch.Tensor, fmt: WeightFormat) -> None:
    if qdata.shape != fmt.qdata_shape(tuple(source.shape)):
        raise WeightShapeError(f"source is {list(source.shape)} but qdata is {list(qdata.shape)}")
    if source.dtype not in SOURCE_DTYPES:
        raise WeightDtypeError(f"cannot quantize {source.dtype}; supported: {', '.join(map(str, SOURCE_DTYPES))}")
    if qdata.dtype != fmt.dtype:
        raise WeightDtypeError(f"{fmt.name} stores {fmt.dtype}, not {qdata.dtype}")


def _quantize_piece(
    source: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, origin: int
) -> None:
    """A small matrix in one call: loaders that deliver a weight in many slices spend their time between the calls."""
    jit = _jit()
    kind = {"tensor": jit.TENSOR, "channel": jit.CHANNEL, "block": jit.BLOCKS}[fmt.granularity]
    rows, cols = source.shape
    bad = jit.quantize_piece(
        kind,
        source.data_ptr(),
        source.stride(0),
        _LIKE[source.dtype],
        qdata.data_ptr(),
        qdata.stride(0),
        scale.data_ptr(),
        scale.numel(),
        rows,
        cols,
    )
    if bad >= 0:
        raise NonFinite(origin + bad, float(source[bad // cols, bad % cols]))


def _matrices(
    source: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The matrices to quantize one by one, with their scales: the experts of a stack, or all of it if that is one."""
    source, qdata = source.detach(), qdata.detach()
    if source.dim() == 2:
        return [(source, qdata, scale)]
    experts, rows, _ = source.shape
    whole = not fmt.needs_whole_matrix and rows % fmt.block[0] == 0
    if whole and all(t.stride(0) == rows * t.stride(1) for t in (source, qdata)):
        return [(source.flatten(0, 1), qdata.flatten(0, 1), scale)]
    return [(source[e], qdata[e], scale[e]) for e in range(experts)]


def _amax(source: torch.Tensor, audit: Audit, origin: int) -> int:
    """The bits of the largest finite magnitude; raises NonFinite if `audit` refuses what is not finite."""
    cols = source.shape[1]
    jit = _jit()
    found: list[int] = []
    for first, slab in slabs(source, 1):
        values, stride = flat_rows(slab)

        def scan(start: int, stop: int, values: Array = values, stride: int = stride) -> None:
            found.append(int(jit.amax_rows(values, stride, cols, start, stop, not audit.refuse_nonfinite)))

        share(slab.shape[0], slab.numel(), scan)
        if max(found) >= _INFINITY_BITS:
            index = int(jit.first_nonfinite(values, stride, slab.shape[0], cols))
            raise NonFinite(origin + first * cols + index, float(slab[index // cols, index % cols]))
    return max(found)


def _quantize_matrix(
    source: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, audit: Audit, amax: int
) -> None:
    """Quantize one matrix; `amax` is as `_amax` gives it and used per tensor only."""
    target = qdata if adjacent(qdata) else torch.empty(qdata.shape, dtype=qdata.dtype, device="cpu")
    unit = fmt.block[0]
    # Written to a tensor of our own first: a loop over its rows need not know the strides of `scale`.
    scales = torch.empty(scale.shape, dtype=torch.float32, device="cpu")
    if fmt.granularity == "tensor":
        scales.copy_(fmt.scale_from_amax(torch.tensor(amax, dtype=torch.int32, device="cpu").view(torch.float32)))
    flat_scales = scales.view(-1, scales.shape[-1])
    for first, slab in slabs(source, unit):
        codes = target[first : first + slab.shape[0]]
        if fmt.granularity == "tensor":
            _run_rows(slab, codes, scales, audit)
        elif fmt.granularity == "channel":
            _run_groups(slab, codes, flat_scales[first : first + slab.shape[0]], slab.shape[1], True, audit)
        else:
            _run_blocks(slab, codes, flat_scales[first // unit :], audit)
    scale.copy_(scales)
    if target is not qdata:
        qdata.copy_(target)


def _quantize_groups(
    source: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    amax: int,
    global_scale: torch.Tensor | None,
) -> None:
    """Quantize one finite matrix of a format that is not fused; `amax` is as `_amax` gives it."""
    target = qdata if adjacent(qdata) else torch.empty(qdata.shape, dtype=qdata.dtype, device="cpu")
    stored = torch.empty(scale.shape, dtype=scale.dtype, device="cpu")
    scales = (stored.view(torch.uint8) if scale.dtype.itemsize == 1 else stored).view(-1, scale.shape[-1])
    gain = None
    if global_scale is not None:
        gain = fmt.gain_from_amax(torch.tensor(amax, dtype=torch.int32, device="cpu").view(torch.float32))
        global_scale.copy_(1.0 / gain)
    for first, slab in slabs(source, 1):
        rows = slice(first, first + slab.shape[0])
        work = functools.partial(_encode_rows, slab, target[rows], scales[rows], fmt, gain)
        share(slab.shape[0], slab.numel(), work)
    scale.copy_(stored)
    if target is not qdata:
        qdata.copy_(target)


def _encode_rows(
    source: torch.Tensor,
    qdata: torch.Tensor,
    scales: torch.Tensor,
    fmt: WeightFormat,
    gain: torch.Tensor | None,
    start: int,
    stop: int,
) -> None:
    """Rows start..stop, in bands that stay in cache. `scales` are those to store, one byte as uint8."""
    jit, cols = _jit(), source.shape[1]
    (values, stride), (codes, codes_stride) = flat_rows(source), flat_rows(qdata)
    stored = as_array(scales)  # This thread may not write to a tensor that was made under inference mode.
    for band in reference.row_chunks(stop - start, cols, 1, PIECE):
        rows, count = slice(start + band.start, start + band.stop), band.stop - band.start
        here, codes_here = values[rows.start * stride :], codes[rows.start * codes_stride :]
        amax = torch.empty((count, scales.shape[1]), dtype=torch.float32, device="cpu")
        jit.amax_groups(here, stride, cols, _group(fmt, cols), as_array(amax.view(-1)), 0, count)
        new = reference.scale_of(amax, fmt, source.dtype, gain)
        stored[rows] = as_array(new.view(scales.dtype))
        steps = reference.step_of(new, fmt, None if gain is None else 1.0 / gain).reshape(-1)
        jit.encode_groups(
            _element(fmt),
            fmt.divides,
            here,
            stride,
            codes_here,
            codes_stride,
            cols,
            _group(fmt, cols),
            as_array(steps),
            0,
            count,
        )


def _decode_rows(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    out: torch.Tensor,
    global_scale: torch.Tensor | None,
    start: int,
    stop: int,
) -> None:
    """Rows start..stop of a format that is not fused, into `out`; both are `adjacent`."""
    jit, cols = _jit(), out.shape[1]
    (codes, codes_stride), (values, stride) = flat_rows(qdata), flat_rows(out)
    for band in reference.row_chunks(stop - start, cols, 1, PIECE):
        rows, count = slice(start + band.start, start + band.stop), band.stop - band.start
        steps = as_array(reference.step_of(scale[rows], fmt, global_scale).reshape(-1))
        here, codes_here = values[rows.start * stride :], codes[rows.start * codes_stride :]
        jit.decode_groups(
            _element(fmt), codes_here, codes_stride, here, stride, cols, _group(fmt, cols), steps, 0, count
        )


def _group(fmt: WeightFormat, cols: int) -> int:
    """How many columns share a scale."""
    return fmt.block[1] if fmt.granularity == "group" else cols


def _element(fmt: WeightFormat) -> int:
    jit = _jit()
    return {"e4m3": jit.E4M3, "e2m1": jit.E2M1, "int8": jit.INT8, "int4": jit.INT4}[fmt.element]


def _run_rows(source: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, audit: Audit) -> None:
    values, stride = flat_rows(source)
    codes, codes_stride = flat_rows(qdata)
    rows, cols = source.shape
    run, scales = _jit().quantize_rows, flat_rows(scale.reshape(1, 1))[0]
    _share_and_sum(
        rows,
        source.numel(),
        audit,
        lambda start, stop, sums: run(
            values, stride, codes, codes_stride, cols, scales, start, stop, audit.measure_sqnr, sums
        ),
    )


def _run_groups(
    source: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, group: int, skip_nonfinite: bool, audit: Audit
) -> None:
    values, stride = flat_rows(source)
    codes, codes_stride = flat_rows(qdata)
    rows, cols = source.shape
    run, scales = _jit().quantize_groups, flat_rows(scale.contiguous().view(1, -1))[0]
    _share_and_sum(
        rows,
        source.numel(),
        audit,
        lambda start, stop, sums: run(
            values,
            stride,
            codes,
            codes_stride,
            cols,
            group,
            scales,
            start,
            stop,
            skip_nonfinite,
            audit.measure_sqnr,
            sums,
        ),
    )


def _run_blocks(source: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, audit: Audit) -> None:
    values, stride = flat_rows(source)
    codes, codes_stride = flat_rows(qdata)
    rows, cols = source.shape
    jit, scales = _jit(), flat_rows(scale.contiguous().view(1, -1))[0]
    _share_and_sum(
        ceil_div(rows, jit.BLOCK),
        source.numel(),
        audit,
        lambda start, stop, sums: jit.quantize_blocks(
            values, stride, codes, codes_stride, rows, cols, scales, start, stop, audit.measure_sqnr, sums
        ),
    )


def _share_and_sum(count: int, elements: int, audit: Audit, work: Callable[[int, int, Array], None]) -> None:
    """`share`, with an array for work to add (signal, noise) to, which end up in `audit`."""
    parts: list[Array] = []

    def piece(start: int, stop: int) -> None:
        sums = np.zeros(2)
        work(start, stop, sums)
        parts.append(sums)

    share(count, elements, piece)
    if audit.measure_sqnr:
        signal, noise = np.sum(parts, axis=0)
        audit.signal += float(signal)
        audit.noise += float(noise)
