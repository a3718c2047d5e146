"""The numba loops that quantize to fp8 per tensor, channel and block where those of `vectors` do not: small matrices in
one call, sources that may hold NaN, the error while quantizing, activations.

Nothing here knows torch. Arrays are flat and contiguous, a matrix is a flat array plus the distance between its rows,
and the element type of an array says what its bits mean: uint16 is bfloat16, int16 is float16, uint8 is e4m3fn. Each
loop runs over a range of rows without the GIL and starts no threads; `rows.share` shares the ranges out. All loops are
in one file because numba's cache notices a change only in the file that defines a function.

Integer steps are wrapped in uint32 one by one: numba widens integers to 64 bits, which would halve the vector width.
Fast-math is allowed only where sums may be reordered, never where it could change a stored byte.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, extending, types  # type: ignore[attr-defined]

from ..formats import BLOCK_FLOOR, CHANNEL_FLOOR, E4M3_MAX
from .compiling import Once, compiled

Array = np.ndarray[Any, Any]
F = TypeVar("F", bound=Callable[..., Any])

f32 = np.float32
u32 = np.uint32

BLOCK = 128

_MAX = f32(E4M3_MAX)
_CHANNEL_FLOOR = f32(CHANNEL_FLOOR)
_BLOCK_FLOOR = f32(BLOCK_FLOOR)
_INFINITY = u32(0x7F800000)
_MAX_BITS = u32(0x43E00000)  # 448
_SMALLEST_NORMAL = u32(0x3C800000)  # 2^-6
_SUBNORMAL_MAGIC = f32(2.0**14)  # One unit in the last place of this is 2^-9, the spacing of e4m3 subnormals.
_SUBNORMAL_MAGIC_BITS = u32(0x46800000)
_REBIAS_AND_ROUND = u32((0x7FFFF - (120 << 23)) % 2**32)
_DECODE_UNIT = f32(256.0)  # See `_decode_small`.
_REORDER = {"reassoc", "nsz", "contract"}


_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_INT, _BOOL = types.int64, types.boolean
_CODES, _FLOATS, _SUMS = (
    types.Array(numba.from_dtype(np.dtype(t)), 1, "C") for t in (np.uint8, np.float32, np.float64)
)
_SOURCE = object()  # an array of the source's element type


def _jit(**options: Any) -> Callable[[F], F]:
    """What loops are made of: compiled as part of each, and into no cache of its own."""

    def decorate(function: F) -> F:
        bare: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
        found: F = numba.njit(**bare, **_OPTIONS, **options)(function)
        return found

    return decorate


class Loop:
    """What torch's side calls: one function for each element type of the source, with the types of its arguments given,
    so that nothing is left to compile when it is called. Other loops may call it, too."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function, self._arguments = function, arguments
        self._dispatchers: list[Any] = [_jit()(function)]
        self._numba_type_ = self._dispatchers[0]._numba_type_  # for the loops that call it
        self.of = Once(self._compile)
        """By the element type of the source, a numpy dtype."""

    if TYPE_CHECKING:  # By other loops, for numba.

        def __call__(self, *arguments: Any) -> Any: ...

    def _compile(self, element: np.dtype[Any]) -> Callable[..., Any]:
        source = types.Array(numba.from_dtype(element), 1, "C")
        signature = tuple(source if argument is _SOURCE else argument for argument in self._arguments)

        def attempt(function: Callable[..., Any], cache: bool) -> Any:
            dispatcher = numba.njit(cache=cache, **_OPTIONS)(function)
            self._dispatchers.append(dispatcher)
            return dispatcher.compile(signature)

        return compiled(self._function, signature, attempt)  # type: ignore[no-any-return]


def _loop(*arguments: Any) -> Callable[[Callable[..., Any]], Loop]:
    return lambda function: Loop(function, arguments)


def _intrinsic(function: Callable[..., Any]) -> Any:
    """A scalar conversion that numba lacks, as LLVM instructions: `function` returns its signature and its code."""
    return extending.intrinsic(function)


@_intrinsic
def _bits(context, value):
    """The bits of a float32."""
    return types.uint32(types.float32), lambda _c, llvm, _s, args: llvm.bitcast(args[0], ir.IntType(32))


@_intrinsic
def _float(context, bits):
    """The float32 with these bits."""
    return types.float32(types.uint32), lambda _c, llvm, _s, args: llvm.bitcast(args[0], ir.FloatType())


@_intrinsic
def _half_to_float(context, bits):
    def emit(_context, llvm, _signature, args):
        return llvm.fpext(llvm.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), emit


def _widen(value):
    """A source element as float32."""
    raise NotImplementedError


@extending.overload(_widen)
def _widen_overload(value):
    if value == types.uint16:
        return lambda value: _float(u32(u32(value) << u32(16)))
    if value == types.int16:
        return lambda value: _half_to_float(value)
    return lambda value: value


@_jit()
def _encode(value):
    """float32 → e4m3fn code: clamp to ±448, round to nearest even; NaN stays NaN."""
    bits = _bits(value)
    magnitude = u32(bits & u32(0x7FFFFFFF))
    clamped = min(magnitude, _MAX_BITS)
    subnormal = u32(_bits(_float(clamped) + _SUBNORMAL_MAGIC) - _SUBNORMAL_MAGIC_BITS)
    odd = u32(u32(clamped >> u32(20)) & u32(1))
    normal = u32(u32(u32(clamped + _REBIAS_AND_ROUND) + odd) >> u32(20))
    code = subnormal if clamped < _SMALLEST_NORMAL else normal
    code = u32(0x7F) if magnitude > _INFINITY else code
    return np.uint8(u32(code | u32(u32(bits >> u32(24)) & u32(0x80))))


@_jit()
def _decode_small(code):
    """e4m3fn code → its value / 256 in float32, except that the two NaN codes give ±480 / 256.

    The seven magnitude bits are those of a float16 with a smaller exponent bias; the shift of the sign-extended code
    puts the sign where it belongs and a copy of it in bit 14, which the mask clears.
    """
    wide = np.int16(np.int8(code))
    return _half_to_float(np.int16(np.int16(wide << np.int16(7)) & np.int16(0xBF80 - 0x10000)))


@_jit()
def _decode(code):
    """e4m3fn code → float32."""
    return f32(np.nan) if np.uint8(code & np.uint8(0x7F)) == np.uint8(0x7F) else _decode_small(code) * _DECODE_UNIT


@_jit()
def _magnitude(value):
    """|value| as bits: they order like the values, with infinity and then NaN above everything finite."""
    return u32(_bits(_widen(value)) & u32(0x7FFFFFFF))


@_jit()
def _amax(row):
    amax = u32(0)
    for i in range(row.size):
        amax = max(amax, _magnitude(row[i]))
    return amax


@_jit()
def _amax_finite(row):
    amax = u32(0)
    for i in range(row.size):
        magnitude = _magnitude(row[i])
        amax = max(amax, magnitude if magnitude < _INFINITY else u32(0))
    return amax


@_jit()
def _inverse(scale):
    inverse = f32(1) / scale
    return inverse if abs(inverse) < f32(np.inf) else f32(0)


@_jit()
def _encode_divided(row, scale, codes):
    for i in range(row.size):
        codes[i] = _encode(_widen(row[i]) / scale)


@_jit()
def _encode_times(row, factor, codes):
    for i in range(row.size):
        codes[i] = _encode(_widen(row[i]) * factor)


@_jit(fastmath=_REORDER)
def _sum_of_squares(values):
    total = 0.0
    for i in range(values.size):
        x = np.float64(_widen(values[i]))
        total += x * x
    return total


@_jit()
def _add_sums(row, codes, scale, lost, sums):
    """Add Σx² and Σ(x - dequantized)² of one row with one scale to `sums`; `lost` is room for as many float32."""
    for i in range(row.size):
        lost[i] = _widen(row[i]) - _decode(codes[i]) * scale
    sums[0] += _sum_of_squares(row)
    sums[1] += _sum_of_squares(lost[: row.size])


@_loop(_SOURCE, _INT, _INT, _INT)
def first_nonfinite(source, stride, rows, cols):
    """Row-major index of the first NaN or infinity, or -1."""
    for r in range(rows):
        row = source[r * stride : r * stride + cols]
        if _amax(row) >= _INFINITY:
            for c in range(cols):
                if _magnitude(row[c]) >= _INFINITY:
                    return r * cols + c
    return -1


@_loop(_SOURCE, _INT, _INT, _INT, _INT, _BOOL)
def amax_rows(source, stride, cols, start, stop, skip_nonfinite):
    """The bits of the largest magnitude in rows start..stop; see `_magnitude`."""
    amax = u32(0)
    for r in range(start, stop):
        row = source[r * stride : r * stride + cols]
        bits = _amax(row)
        if bits >= _INFINITY and skip_nonfinite:
            bits = _amax_finite(row)
        amax = max(amax, bits)
    return amax


@_loop(_SOURCE, _INT, _CODES, _INT, _INT, _INT, _FLOATS, _INT, _INT, _BOOL, _BOOL, _SUMS)
def quantize_groups(
    source, stride, codes, codes_stride, cols, group, scale, start, stop, skip_nonfinite, measure, sums
):
    """Rows start..stop, one scale per row and `group` columns: a weight's rows, or activations per token.

    `scale` holds ceil(cols / group) values per row. NaN and infinity stay out of it if `skip_nonfinite`.
    """
    groups = (cols + group - 1) // group
    lost = np.empty(group if measure else 0, np.float32)
    for r in range(start, stop):
        for g in range(groups):
            left, right = g * group, min(g * group + group, cols)
            row = source[r * stride + left : r * stride + right]
            out = codes[r * codes_stride + left : r * codes_stride + right]
            bits = _amax(row)
            if bits >= _INFINITY and skip_nonfinite:
                bits = _amax_finite(row)
            amount = _float(bits) / _MAX
            amount = _CHANNEL_FLOOR if amount < _CHANNEL_FLOOR else amount  # max() would lose NaN
            scale[r * groups + g] = amount
            _encode_divided(row, amount, out)
            if measure:
                _add_sums(row, out, amount, lost, sums)


@_loop(_SOURCE, _INT, _CODES, _INT, _INT, _INT, _FLOATS, _INT, _INT, _BOOL, _SUMS)
def quantize_blocks(source, stride, codes, codes_stride, rows, cols, scale, start, stop, measure, sums):
    """Bands start..stop of 128 rows, one scale per 128 columns. NaN and infinity stay out of it.

    A band is read row by row in full, twice: narrower strips would fit a nearer cache but measured slower, as rows a
    power of two apart compete for the same cache sets and the prefetcher loses the thread.
    """
    across = (cols + BLOCK - 1) // BLOCK
    amax = np.empty(across, np.uint32)
    factors = np.empty(across, np.float32)
    lost = np.empty(BLOCK, np.float32)
    for band in range(start, stop):
        top, bottom = band * BLOCK, min(band * BLOCK + BLOCK, rows)
        band_scale = scale[band * across : band * across + across]
        amax[:] = u32(0)
        for r in range(top, bottom):
            row = source[r * stride : r * stride + cols]
            for b in range(across):
                amax[b] = max(amax[b], _amax(row[b * BLOCK : b * BLOCK + BLOCK]))
        for b in range(across):
            if amax[b] >= _INFINITY:
                amax[b] = u32(0)
                for r in range(top, bottom):
                    row = source[r * stride : r * stride + cols]
                    amax[b] = max(amax[b], _amax_finite(row[b * BLOCK : b * BLOCK + BLOCK]))
            band_scale[b] = max(_float(amax[b]), _BLOCK_FLOOR) / _MAX
            factors[b] = _inverse(band_scale[b])
        for r in range(top, bottom):
            row = source[r * stride : r * stride + cols]
            out = codes[r * codes_stride : r * codes_stride + cols]
            for b in range(across):
                part, target = row[b * BLOCK : b * BLOCK + BLOCK], out[b * BLOCK : b * BLOCK + BLOCK]
                _encode_times(part, factors[b], target)
                if measure:
                    _add_sums(part, target, band_scale[b], lost, sums)


@_loop(_SOURCE, _INT, _CODES, _INT, _INT, _FLOATS, _INT, _INT, _BOOL, _SUMS)
def quantize_rows(source, stride, codes, codes_stride, cols, scale, start, stop, measure, sums):
    """Rows start..stop with `scale[0]` for the whole matrix."""
    factor = _inverse(scale[0])
    lost = np.empty(cols if measure else 0, np.float32)
    for r in range(start, stop):
        row = source[r * stride : r * stride + cols]
        out = codes[r * codes_stride : r * codes_stride + cols]
        _encode_times(row, factor, out)
        if measure:
            _add_sums(row, out, scale[0], lost, sums)


@_intrinsic
def _pointer(context, address, like):
    """An address as a pointer to elements of the array `like`."""
    pointer = types.CPointer(like.dtype)

    def emit(emit_context, llvm, _signature, args):
        return llvm.inttoptr(args[0], emit_context.get_value_type(pointer))

    return pointer(address, like), emit


@_jit()
def _matrices(source_at, stride, like, codes_at, codes_stride, scale_at, scales, rows, cols):
    """The arrays at these addresses. `like` is any array of the source's element type."""
    source = carray(_pointer(source_at, like), (rows - 1) * stride + cols)
    codes = carray(_pointer(codes_at, np.empty(0, np.uint8)), (rows - 1) * codes_stride + cols)
    return source, codes, carray(_pointer(scale_at, np.empty(0, np.float32)), scales)


# A whole matrix, from addresses: for pieces so small that making arrays takes longer than quantizing. Each returns the
# row-major index of the first NaN or infinity, with nothing stored, or -1.
_PIECE = _INT, _INT, _SOURCE, _INT, _INT, _INT, _INT, _INT, _INT


@_loop(*_PIECE)
def quantize_piece_per_tensor(source_at, stride, like, codes_at, codes_stride, scale_at, scales, rows, cols):
    source, codes, scale = _matrices(source_at, stride, like, codes_at, codes_stride, scale_at, scales, rows, cols)
    bad = first_nonfinite(source, stride, rows, cols)
    if bad < 0:
        scale[0] = _float(amax_rows(source, stride, cols, 0, rows, False)) / _MAX
        quantize_rows(source, stride, codes, codes_stride, cols, scale, 0, rows, False, np.empty(2))
    return bad


@_loop(*_PIECE)
def quantize_piece_per_channel(source_at, stride, like, codes_at, codes_stride, scale_at, scales, rows, cols):
    source, codes, scale = _matrices(source_at, stride, like, codes_at, codes_stride, scale_at, scales, rows, cols)
    bad = first_nonfinite(source, stride, rows, cols)
    if bad < 0:
        quantize_groups(source, stride, codes, codes_stride, cols, cols, scale, 0, rows, False, False, np.empty(2))
    return bad


@_loop(*_PIECE)
def quantize_piece_per_block(source_at, stride, like, codes_at, codes_stride, scale_at, scales, rows, cols):
    source, codes, scale = _matrices(source_at, stride, like, codes_at, codes_stride, scale_at, scales, rows, cols)
    bad = first_nonfinite(source, stride, rows, cols)
    if bad < 0:
        bands = (rows + BLOCK - 1) // BLOCK
        quantize_blocks(source, stride, codes, codes_stride, rows, cols, scale, 0, bands, False, np.empty(2))
    return bad
