"""The fast path for CPUs: the functions of `reference`, byte for byte, as fused loops that numba compiles.

One pass finds the amax, derives the scale and encodes while the row is still in cache; the linear reads one byte per
weight. The loops are in `cpu_jit`, which imports numba, so it is loaded at the first call.

Threads: numba's own parallel loops are not used. Its default pool crashes when two Python threads enter it at once, and
its OpenMP pool kills a process that forks. The loops release the GIL instead, and a plain thread pool shares the rows
out, `torch.get_num_threads()` at a time, together with the calling thread. Any number of threads may call at once, and
a forked child starts its own pool.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from . import reference
from .audit import Audit
from .formats import SOURCE_DTYPES, NonFinite, WeightFormat, ceil_div

LINEAR_BATCH = 16  # Beyond this many rows of x, dequantizing bands and multiplying those is faster.

_PIECE = 1 << 18  # Elements below which handing work to another thread costs more than it saves.
_PIECES_PER_THREAD = 4  # So that a thread which lost its core for a while does not hold up the others.
_SLAB = 1 << 22  # Elements of a source copied at a time when its columns are not adjacent in memory.
_TILE = 1 << 22  # Elements of weight dequantized at a time for a large batch.
_X_PADDING = 16  # Keeps rows of x from falling on the same cache sets when K is a power of two.
_INFINITY_BITS = 0x7F800000

# Element type → the integer type under which numba sees its bits (see `cpu_jit`).
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float8_e4m3fn: torch.uint8}

Array = np.ndarray[Any, Any]
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
    if not has_loops(fmt):
        reference.quantize_into(source, qdata, scale, fmt, audit, origin, global_scale)
        return
    _check(source, qdata, fmt)
    if source.numel() == 0:
        reference.quantize_into(source, qdata, scale, fmt, audit, origin)
        return
    small = source.dim() == 2 and source.numel() <= _PIECE and audit.refuse_nonfinite and not audit.measure_sqnr
    if small and _adjacent(source) and _adjacent(qdata) and scale.is_contiguous():
        _quantize_piece(source, qdata, scale, fmt, origin)
        return
    matrices = _matrices(source, qdata, scale, fmt)
    amax = [0] * len(matrices)
    if audit.refuse_nonfinite or fmt.granularity == "tensor":
        for i, (matrix, _, _) in enumerate(matrices):
            amax[i] = _amax(matrix, audit, origin)
            origin += matrix.numel()
    for (matrix, codes, scales), bits in zip(matrices, amax, strict=True):
        _quantize_matrix(matrix, codes, scales, fmt, audit, bits)


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.dequantize`."""
    if not has_loops(fmt):
        return reference.dequantize(qdata, scale, fmt, dtype, out, global_scale)
    out = torch.empty(qdata.shape, dtype=dtype, device=qdata.device) if out is None else out
    if qdata.numel() == 0 or out.dtype not in SOURCE_DTYPES:
        return reference.dequantize(qdata, scale, fmt, dtype, out)
    if qdata.dim() == 3:
        for e in range(qdata.shape[0]):
            dequantize(qdata[e], scale[e], fmt, dtype, out[e])
        return out
    qdata = qdata if _adjacent(qdata) else qdata.contiguous()
    target = out if _adjacent(out) else torch.empty(out.shape, dtype=out.dtype)
    rows, cols = qdata.shape
    down = rows if fmt.granularity == "tensor" else fmt.block[0]
    across = fmt.block[1] if fmt.granularity == "block" else cols
    codes, codes_stride = _flat(qdata)
    values, values_stride = _flat(target)
    scales = _flat(scale.contiguous().view(1, -1))[0]
    run = _jit().dequantize_rows
    _share(
        rows,
        qdata.numel(),
        lambda start, stop: run(codes, codes_stride, values, values_stride, cols, scales, down, across, start, stop),
    )
    return out if target is out else out.copy_(target)


def quantize_activation(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.quantize_activation`."""
    if x.numel() == 0 or x.dtype not in SOURCE_DTYPES or not has_loops(fmt):
        return reference.quantize_activation(x, fmt)
    rows, cols = x.shape
    group = fmt.block[1] if fmt.granularity == "block" else cols
    q = torch.empty((rows, cols), dtype=fmt.dtype)
    scale = torch.empty((rows, ceil_div(cols, group)), dtype=torch.float32)
    x = x if _adjacent(x) else x.contiguous()
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

    Up to `LINEAR_BATCH` rows the weight is decoded in registers and summed in fp32. Above that, and where x needs a
    gradient, it is dequantized to x's dtype a band of rows at a time.
    """
    batch, cols = x.shape
    rows = qdata.shape[0]
    if not has_loops(fmt) or (x.requires_grad and torch.is_grad_enabled()):
        return reference.linear(x, qdata, scale, fmt, bias, global_scale)
    if qdata.numel() == 0 or batch == 0 or x.dtype not in SOURCE_DTYPES or not _adjacent(qdata):
        return reference.linear(x, qdata, scale, fmt, bias)
    if batch > LINEAR_BATCH:
        return _linear_by_tiles(x, qdata, scale, fmt, bias)
    padded = 1 if batch == 1 else 4 if batch <= 4 else 8 * ceil_div(batch, 8)
    x32 = torch.zeros((padded, cols + _X_PADDING), dtype=torch.float32)
    x32[:batch, :cols] = x
    out = torch.empty((padded, rows), dtype=torch.float32)
    codes, codes_stride = _flat(qdata)
    values, x_stride = _flat(x32)
    sums, sums_stride = _flat(out)
    jit = _jit()
    if fmt.granularity == "block":
        scales = _flat(scale.contiguous().view(1, -1))[0]
        _share(
            ceil_div(rows, fmt.block[0]),
            qdata.numel(),
            lambda start, stop: jit.linear_bands(
                codes, codes_stride, rows, cols, values, x_stride, padded, scales, sums, sums_stride, start, stop
            ),
        )
    else:
        scales = _flat(scale.reshape(1, -1).expand(1, rows).contiguous())[0]
        _share(
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


def _linear_by_tiles(
    x: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, bias: torch.Tensor | None
) -> torch.Tensor:
    rows, cols = qdata.shape
    unit = fmt.block[0]
    step = unit * max(1, _TILE // (unit * cols))
    out = torch.empty((x.shape[0], rows), dtype=x.dtype)
    for start in range(0, rows, step):
        tile = slice(start, min(start + step, rows))
        tile_scale = scale if fmt.granularity == "tensor" else scale[start // unit : ceil_div(tile.stop, unit)]
        weight = dequantize(qdata[tile], tile_scale, fmt, x.dtype)
        out[:, tile] = torch.nn.functional.linear(x, weight, None if bias is None else bias[tile])
    return out


def _jit() -> ModuleType:
    from . import cpu_jit

    return cpu_jit


def has_loops(fmt: WeightFormat) -> bool:
    """Whether `cpu_jit` has loops for the format; the others take the reference."""
    return fmt.element == "e4m3" and fmt.granularity != "group"


def _check(source: torch.Tensor, qdata: torch.Tensor, fmt: WeightFormat) -> None:
    if source.shape != qdata.shape:
        raise ValueError(f"source is {list(source.shape)} but qdata is {list(qdata.shape)}")
    if source.dtype not in SOURCE_DTYPES:
        raise TypeError(f"cannot quantize {source.dtype}; supported: {', '.join(map(str, SOURCE_DTYPES))}")
    if fmt.dtype != torch.float8_e4m3fn or qdata.dtype != fmt.dtype:
        raise TypeError(f"the numba kernels store float8_e4m3fn, not {qdata.dtype} ({fmt.name})")


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
    whole = fmt.granularity != "tensor" and rows % fmt.block[0] == 0
    if whole and all(t.stride(0) == rows * t.stride(1) for t in (source, qdata)):
        return [(source.flatten(0, 1), qdata.flatten(0, 1), scale)]
    return [(source[e], qdata[e], scale[e]) for e in range(experts)]


def _amax(source: torch.Tensor, audit: Audit, origin: int) -> int:
    """The bits of the largest finite magnitude; raises NonFinite if `audit` refuses what is not finite."""
    cols = source.shape[1]
    jit = _jit()
    found: list[int] = []
    for first, slab in _slabs(source, 1):
        values, stride = _flat(slab)

        def scan(start: int, stop: int, values: Array = values, stride: int = stride) -> None:
            found.append(int(jit.amax_rows(values, stride, cols, start, stop, not audit.refuse_nonfinite)))

        _share(slab.shape[0], slab.numel(), scan)
        if max(found) >= _INFINITY_BITS:
            index = int(jit.first_nonfinite(values, stride, slab.shape[0], cols))
            raise NonFinite(origin + first * cols + index, float(slab[index // cols, index % cols]))
    return max(found)


def _quantize_matrix(
    source: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat, audit: Audit, amax: int
) -> None:
    """Quantize one matrix; `amax` is as `_amax` gives it and used per tensor only."""
    target = qdata if _adjacent(qdata) else torch.empty(qdata.shape, dtype=qdata.dtype)
    unit = fmt.block[0]
    # Written to a tensor of our own first: a loop over its rows need not know the strides of `scale`.
    scales = torch.empty(scale.shape, dtype=torch.float32)
    if fmt.granularity == "tensor":
        scales.copy_(fmt.scale_from_amax(torch.tensor(amax, dtype=torch.int32).view(torch.float32)))
    flat_scales = scales.view(-1, scales.shape[-1])
    for first, slab in _slabs(source, unit):
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


def _run_rows(source: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, audit: Audit) -> None:
    values, stride = _flat(source)
    codes, codes_stride = _flat(qdata)
    rows, cols = source.shape
    run, scales = _jit().quantize_rows, _flat(scale.reshape(1, 1))[0]
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
    values, stride = _flat(source)
    codes, codes_stride = _flat(qdata)
    rows, cols = source.shape
    run, scales = _jit().quantize_groups, _flat(scale.contiguous().view(1, -1))[0]
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
    values, stride = _flat(source)
    codes, codes_stride = _flat(qdata)
    rows, cols = source.shape
    jit, scales = _jit(), _flat(scale.contiguous().view(1, -1))[0]
    _share_and_sum(
        ceil_div(rows, jit.BLOCK),
        source.numel(),
        audit,
        lambda start, stop, sums: jit.quantize_blocks(
            values, stride, codes, codes_stride, rows, cols, scales, start, stop, audit.measure_sqnr, sums
        ),
    )


def _adjacent(matrix: torch.Tensor) -> bool:
    """Whether numba can read the matrix in place: columns next to each other, elements at aligned addresses."""
    return (matrix.stride(1) == 1 or matrix.shape[1] == 1) and matrix.data_ptr() % matrix.element_size() == 0


def _flat(matrix: torch.Tensor) -> tuple[Array, int]:
    """The memory of an `_adjacent` matrix as one flat array of bits, and the distance between its rows."""
    rows, cols = matrix.shape
    stride = matrix.stride(0)
    flat = matrix.detach().as_strided((max(0, (rows - 1) * stride + cols),), (1,))
    # `numpy()` fixes the size of a storage for good, and FSDP frees gathered weights by resizing theirs: this one is
    # another storage, of the same memory.
    alias = from_dlpack(to_dlpack(flat.view(_BITS.get(matrix.dtype, matrix.dtype))))
    array: Array = alias.numpy()
    return array, stride


def _slabs(source: torch.Tensor, unit: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of the source: all of it, or bounded copies of whole units when its columns lie apart."""
    rows, cols = source.shape
    if _adjacent(source):
        yield 0, source
        return
    step = unit * max(1, _SLAB // (unit * cols))
    for first in range(0, rows, step):
        yield first, source[first : first + step].clone(memory_format=torch.contiguous_format)


_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _helpers() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="qtensor-cpu")
        return _pool


def _after_fork() -> None:
    """A child has none of its parent's threads, and perhaps a lock that one of them held."""
    global _pool, _pool_lock
    _pool = None
    _pool_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _share(count: int, elements: int, work: Callable[[int, int], None]) -> None:
    """Call work(start, stop) until the pieces cover range(count), on this thread and on idle ones of the pool.

    The calling thread takes pieces too and never waits for one that has not begun, so calls from many threads make
    progress however busy the pool is.
    """
    threads = torch.get_num_threads()
    pieces = max(1, min(count, elements // _PIECE, threads * _PIECES_PER_THREAD if threads > 1 else 1))
    if pieces == 1:
        work(0, count)
        return
    starts = iter(range(0, count, ceil_div(count, pieces)))
    step = ceil_div(count, pieces)
    lock = threading.Lock()

    def drain() -> None:
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            work(start, min(start + step, count))

    pool = _helpers()
    helpers = [pool.submit(drain) for _ in range(min(threads, pieces) - 1)]
    try:
        drain()
    finally:
        with lock:
            starts = iter(range(0))
        running = [helper for helper in helpers if not helper.cancel()]
        for helper in running:
            helper.result()


def _share_and_sum(count: int, elements: int, audit: Audit, work: Callable[[int, int, Array], None]) -> None:
    """`_share`, with an array for work to add (signal, noise) to, which end up in `audit`."""
    parts: list[Array] = []

    def piece(start: int, stop: int) -> None:
        sums = np.zeros(2)
        work(start, stop, sums)
        parts.append(sums)

    _share(count, elements, piece)
    if audit.measure_sqnr:
        signal, noise = np.sum(parts, axis=0)
        audit.signal += float(signal)
        audit.noise += float(noise)
