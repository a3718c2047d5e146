"""The quantizer in plain torch: the oracle every other backend must equal byte for byte.

It walks the source in chunks of about a quarter million elements, so that the fp32 temporaries stay in cache and the
memory it needs does not grow with the weight. It runs on any device torch runs on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch

from .audit import Audit
from .codes import decode, encode
from .formats import FP8_PER_BLOCK, FP8_PER_CHANNEL, LOWEST, NonFinite, Search, WeightFormat, ceil_div
from .parts import Parts, Pieces

CHUNK_ELEMENTS = 1 << 18


class Torch:
    """The backend "torch". The others inherit from it what they have no code of their own for.

    band_elements: `linear` dequantizes about so many at a time, so that they stay in cache.
    """

    name = "torch"
    own: tuple[str, ...] = ("quantize_into", "dequantize", "linear", "experts", "quantize_activation")
    band_elements = 4 * CHUNK_ELEMENTS

    def quantize_into(
        self, source: torch.Tensor, parts: Parts, fmt: WeightFormat, audit: Audit | None = None, origin: int = 0
    ) -> None:
        audit = audit or Audit()
        if source.dim() == 2:
            _quantize_matrix(source, parts, fmt, audit, origin)
            return
        step = source.shape[1] * source.shape[2]
        for e in range(source.shape[0]):
            _quantize_matrix(source[e], parts.matrix(e), fmt, audit, origin + e * step)

    def pieces(self, parts: Parts, fmt: WeightFormat, audit: Audit) -> Pieces | None:
        """What writes rows into a weight or a stack in few steps, where a loader sends many; None if nothing does."""
        return None

    def raise_amax(
        self, source: torch.Tensor, amax: torch.Tensor, fmt: WeightFormat, audit: Audit, origin: int
    ) -> None:
        """Raise `amax` (fp32 `[1]`) to the largest finite magnitude in some rows of a matrix."""
        torch.maximum(amax, _largest(source, fmt, audit, origin), out=amax)

    def quantize_rows(
        self, source: torch.Tensor, parts: Parts, fmt: WeightFormat, amax: torch.Tensor, audit: Audit, origin: int
    ) -> None:
        """Some rows of a matrix whose largest magnitude is known, for formats that need it; `parts` are theirs."""
        _quantize_matrix(source, parts, fmt, audit, origin, amax.view(()))

    def compile(self, fmt: WeightFormat, dtype: torch.dtype) -> None:
        pass

    def dequantize(
        self, parts: Parts, fmt: WeightFormat, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = room(parts, fmt, dtype) if out is None else out
        if out.dim() == 3:
            for e in range(out.shape[0]):
                self.dequantize(parts.matrix(e), fmt, dtype, out[e])
            return out
        height, cols = out.shape
        for rows in row_chunks(height, cols, fmt.block[0]):
            out[rows] = saturated(_restore(parts.rows(rows.start, rows.stop, fmt), fmt, cols), out.dtype)
        return out

    def linear(
        self, x: torch.Tensor, parts: Parts, fmt: WeightFormat, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows, cols = parts.qdata.shape[0], x.shape[1]
        out = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
        for band in row_chunks(rows, cols, fmt.block[0], self.band_elements):
            weight = torch.empty((band.stop - band.start, cols), dtype=x.dtype, device=x.device)
            self.dequantize(parts.rows(band.start, band.stop, fmt), fmt, x.dtype, weight)
            out[:, band] = torch.nn.functional.linear(x, weight, None if bias is None else bias[band])
        return out

    def experts(
        self,
        x: torch.Tensor,
        parts: Parts,
        fmt: WeightFormat,
        offsets: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = torch.empty((x.shape[0], parts.qdata.shape[1]), dtype=x.dtype, device=x.device)
        for e, (start, stop) in enumerate(pairwise([0, *offsets.tolist()])):
            if start < stop:
                own_bias = None if bias is None else bias[e]
                out[start:stop] = self.linear(x[start:stop], parts.matrix(e), fmt, own_bias)
        return out

    def quantize_activation(self, x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale, _ = _quantize_groups(x, fmt)
        return q.flatten(1)[:, : x.shape[1]], scale


TORCH = Torch()


def room(parts: Parts, fmt: WeightFormat, dtype: torch.dtype) -> torch.Tensor:
    """Memory for what `dequantize` returns when it is given none."""
    qdata = parts.qdata
    return torch.empty((*qdata.shape[:-1], qdata.shape[-1] * fmt.per_byte), dtype=dtype, device=qdata.device)


def saturated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values within the range of `dtype`: rounding up near its end would make infinity of a finite weight."""
    limit = torch.finfo(dtype).max if dtype.itemsize < 4 else torch.finfo(torch.float32).max
    return values.clamp(-limit, limit)


def round_trip_activation(x: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """What `quantize_activation` leaves of x, for devices that have no fp8 product.

    Args:
        x: `[M, K]`.
        fmt: The number format of the weight.

    Returns:
        `[M, K]` in x's dtype.
    """
    q, _, step = _quantize_groups(x, fmt)
    return (q.float() * step).to(x.dtype).flatten(1)[:, : x.shape[1]]


def _quantize_groups(x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x `[M, K]` → fp8 `[M, G, K/G]`, the last group padded with zeros, scales `[M, G]`, and those in fp32 `[M, G, 1]`.

    Compilers see through it.
    """
    rows, cols = x.shape
    group = fmt.block[1] if fmt.block[1] > 1 else max(cols, 1)
    groups = ceil_div(cols, group)
    x32 = torch.nn.functional.pad(x.float(), (0, groups * group - cols)).view(rows, groups, group)
    rule = fmt if fmt.granularity == "group" and not fmt.has_zero_point else FP8_PER_CHANNEL
    scale = rule.scale_from_amax(x32.abs().amax(-1))
    step = rule.step(scale).unsqueeze(-1)
    return (x32 / step).clamp(-fmt.max, fmt.max).to(fmt.dtype), scale, step


def _largest(source: torch.Tensor, fmt: WeightFormat, audit: Audit, origin: int) -> torch.Tensor:
    rows, cols = source.shape
    largest = torch.zeros((), dtype=torch.float32, device=source.device)
    for chunk in row_chunks(rows, cols, 1):
        largest = torch.maximum(largest, _amax(source[chunk].float(), fmt, audit, origin + chunk.start * cols).amax())
    return largest


def _quantize_matrix(
    source: torch.Tensor,
    parts: Parts,
    fmt: WeightFormat,
    audit: Audit,
    origin: int,
    amax: torch.Tensor | None = None,
) -> None:
    """`amax`: that of the matrix, if the source is only some rows of it."""
    rows, cols = source.shape
    gain = None
    if fmt.needs_whole_matrix:
        amax = _largest(source, fmt, audit, origin) if amax is None else amax
        if parts.global_scale is None:
            parts.scale.copy_(scale_of(amax, fmt, source.dtype))
        else:
            gain = gain_of(amax, fmt, source.dtype)
            parts.global_scale.copy_(1.0 / gain)
    elif source.numel() == 0 and fmt.has_zero_point:
        parts.scale.zero_()
    elif source.numel() == 0:
        parts.scale.copy_(scale_of(torch.zeros_like(parts.scale, dtype=torch.float32), fmt, source.dtype))
    for chunk in row_chunks(rows, cols, fmt.block[0]):
        x = source[chunk].float()
        here = parts.rows(chunk.start, chunk.stop, fmt)
        if fmt.granularity != "tensor":
            by_unit = _amax(x, fmt, audit, origin + chunk.start * cols)
            if fmt.has_zero_point:
                here.scale.copy_(_words(x, fmt, source.dtype))
            else:
                here.scale.copy_(scale_of(by_unit, fmt, source.dtype, gain))
            if fmt.search is not None:
                _search(x, by_unit, here, fmt, fmt.search, source.dtype)
        here.qdata.copy_(_quantized(x, here, fmt, source.dtype, gain))
        if audit.measure_sqnr:
            restored = _restore(here, fmt, cols)
            audit.signal += float(x.double().square().sum())
            audit.noise += float((x - restored).double().square().sum())


def scale_of(
    amax: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype, gain: torch.Tensor | None = None
) -> torch.Tensor:
    """The stored scales of a weight of `dtype` with those largest magnitudes; `gain`: that of the matrix."""
    if fmt.recipe is not None:
        return fmt.stored(fmt.recipe.scale(amax, dtype, gain))
    scale = fmt.scale_from_amax(amax, gain)
    return _round_through(scale, dtype) if fmt.element == "int8" else scale


def gain_of(amax: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype) -> torch.Tensor:
    """The gains of whole matrices of `dtype` with those largest magnitudes."""
    return fmt.gain_from_amax(amax) if fmt.recipe is None else fmt.recipe.gain(amax, dtype)


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


def _words(x: torch.Tensor, fmt: WeightFormat, dtype: torch.dtype) -> torch.Tensor:
    """The scale words of an fp32 chunk that comes from `dtype`."""
    blocks = _blocks(torch.where(torch.isfinite(x), x, 0.0), fmt)
    lowest, largest = blocks.amin((1, 3)), blocks.amax((1, 3))
    if fmt.recipe is not None:
        return fmt.word(*fmt.recipe.scale_and_zero(lowest, largest, dtype))
    return fmt.words_from_range(lowest, largest, dtype)


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


def _step(parts: Parts, fmt: WeightFormat) -> torch.Tensor:
    """`step_of`, broadcastable against `_blocks`."""
    step = step_of(parts.scale, fmt, parts.global_scale)
    return step.view(1, 1, 1, 1) if step.dim() == 1 else step[:, None, :, None]


def _zero(parts: Parts, fmt: WeightFormat) -> torch.Tensor:
    """Zero points, broadcastable against `_blocks`."""
    return fmt.zero(parts.scale)[:, None, :, None]


def _quantized(
    x: torch.Tensor, parts: Parts, fmt: WeightFormat, dtype: torch.dtype, gain: torch.Tensor | None
) -> torch.Tensor:
    """The elements to store of one fp32 chunk that came from `dtype`, by the scales in its `parts`; `gain`: that of the
    matrix."""
    rows, cols = x.shape
    if fmt.has_zero_point:
        cols += cols % 2  # What is beside an odd last element is 0, too.
    if fmt.recipe is not None:
        step = _step(Parts(parts.qdata, parts.scale), fmt)  # In units of the gain's inverse.
        scaled = fmt.recipe.units(_blocks(x, fmt), step if gain is None else step / gain, dtype)
        if fmt.has_zero_point:
            scaled = _round_through(scaled.masked_fill_(scaled.isnan(), 0.0) + _zero(parts, fmt), dtype)
        return encode(_unblock(scaled, rows, cols), fmt)
    scaled = _in_units(_blocks(x, fmt), _step(parts, fmt), fmt)
    if fmt.element == "int8":
        scaled = _round_through(scaled, dtype)
    if fmt.has_zero_point:
        scaled = scaled.masked_fill_(scaled.isnan(), 0.0).round_().add_(_zero(parts, fmt))
    return encode(_unblock(scaled, rows, cols), fmt)


def _in_units(x: torch.Tensor, step: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """fp32 values in units of their step, which 8-bit integers round to the weight's dtype yet."""
    if fmt.divides:
        return torch.where(step == 0.0, 0.0, x / step)
    inverse = 1.0 / step
    return x * torch.where(torch.isfinite(inverse), inverse, 0.0)


def _search(
    x: torch.Tensor, amax: torch.Tensor, parts: Parts, fmt: WeightFormat, search: Search, dtype: torch.dtype
) -> None:
    """Replace the plain scales in `parts`, of an fp32 chunk with those largest magnitudes, by the best candidates."""
    blocks = _blocks(torch.where(torch.isfinite(x), x, 0.0), fmt)  # What was let through counts for nothing.
    plain = parts.scale.clone()
    plain_step = step_of(plain, fmt, parts.global_scale)
    if fmt.element != "int4":
        blocks.abs_()
    fixed = _to_fixed(blocks, plain_step[:, None, :, None], search) if fmt.per_byte == 2 else None
    most = None if fixed is None else fixed.abs().amax((1, 3))
    turn = None if fixed is None else torch.where(fixed.amax((1, 3)) + fixed.amin((1, 3)) > 0, -1.0, 1.0)
    best, may = x.new_empty(0), x.new_empty(0)
    for i, candidate in enumerate(search.candidates):
        scale, usable = _candidate(plain, amax, candidate, fmt, dtype)
        if turn is not None and fmt.has_float_scale and candidate < 0:
            scale = scale * turn.to(scale.dtype)
        step = step_of(scale, fmt, parts.global_scale)
        if fixed is None or most is None:
            # As e4m3 is multiplied wherever its error is measured, divided or not where it is stored.
            rule = FP8_PER_BLOCK if fmt.element == "e4m3" else fmt
            usable &= _in_units(amax, step, rule) <= search.limit
            scaled = _in_units(blocks, step[:, None, :, None], rule)
            rounded = scaled.to(dtype) if fmt.element == "int8" else scaled
            codes = encode(rounded.to(torch.float32, copy=True), fmt)
            counted = (scaled - decode(codes, fmt)).mul_(search.resolution).round_()
        else:
            ratio = (plain_step / step * 8192.0).round().nan_to_num(0.0, 0.0, 0.0).clamp(-32767.0, 32767.0).int()
            usable &= (most < 32768) & (_rescaled(most, ratio.abs()) <= int(search.limit * search.resolution))
            counted = _distance(_rescaled(fixed, ratio[:, None, :, None]), fmt, int(search.resolution))
        error = counted.double().square_().sum((1, 3)) * step.double().square()
        if i == 0:
            best, may = error, usable
            continue
        better = may & usable & (error < best)
        best = torch.where(better, error, best)
        chosen = torch.where(better, _bits(scale), _bits(parts.scale))
        parts.scale.copy_(chosen.view(scale.dtype))


def _to_fixed(x: torch.Tensor, step: torch.Tensor, search: Search) -> torch.Tensor:
    """Elements in units of the plain step, times 4 * `resolution`, int32; 2^15 is more than is searched."""
    inverse = 1.0 / step
    scaled = x * torch.where(torch.isfinite(inverse), inverse, 0.0)
    return (scaled * (4.0 * search.resolution)).round_().clamp_(-32768.0, 32768.0).int()


def _rescaled(fixed: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    return (fixed * ratio + (1 << 14)) >> 15


def _distance(value: torch.Tensor, fmt: WeightFormat, unit: int) -> torch.Tensor:
    """From the value of the nearest code, in units of which `unit` are the number one."""
    if fmt.element == "int4":
        return value - ((value + unit // 2) & -unit).clamp(int(LOWEST) * unit, 7 * unit)
    # Codes are half of one apart below 2, one below 4, then two.
    span = torch.where(value < 2 * unit, unit // 2, torch.where(value < 4 * unit, unit, 2 * unit))
    return value - ((value + span // 2) & -span).clamp_max(6 * unit)


def _candidate(
    plain: torch.Tensor, amax: torch.Tensor, candidate: float, fmt: WeightFormat, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored scales that a candidate of a search stands for, and which of them there are."""
    if fmt.has_float_scale:
        unrounded = replace(fmt, scale_dtype=torch.float32).scale_from_amax(amax)
        scale = fmt.stored(unrounded * abs(candidate))
        scale = _round_through(scale, dtype) if fmt.element == "int8" else scale
        return scale, (scale >= torch.finfo(torch.float32).tiny) & torch.isfinite(scale)
    code = _bits(plain).int() + int(candidate)
    last = 254 if fmt.has_e8m0_scale else 126
    return code.clamp(0, last).to(torch.uint8).view(plain.dtype), (code >= 1) & (code <= last)


def _bits(scale: torch.Tensor) -> torch.Tensor:
    """Scales as integers, since not every operation takes every kind of them."""
    return scale.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[scale.itemsize])


def _restore(parts: Parts, fmt: WeightFormat, cols: int) -> torch.Tensor:
    """Stored elements times their scale, fp32 `[R, cols]`."""
    values = decode(parts.qdata, fmt)[:, :cols]
    blocks = _blocks(values, fmt)
    if fmt.has_zero_point:
        blocks.sub_(_zero(parts, fmt))
    return _unblock(blocks.mul_(_step(parts, fmt)), *values.shape)


def _round_through(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as it is after a computation in `dtype`."""
    return x if dtype == torch.float32 else x.to(dtype).float()
