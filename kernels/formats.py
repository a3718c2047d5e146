"""What a quantized weight is made of: element format, which elements share a scale, and how that scale is derived.

A `WeightFormat` is pure description. The reference quantizer, the Triton kernels and the CPU kernels all read their
formulas from here, so that "byte-exact" has one meaning. Shapes: a weight is `[..., N, K]` (`[N, K]`, or `[E, N, K]`
for a stack of E experts, each quantized as a matrix of its own).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from qtensor.errors import QTensorError

from .recipes import Recipe

Granularity = Literal["tensor", "channel", "block", "group"]
Element = Literal["e4m3", "e2m1", "int8", "int4"]


@dataclass(frozen=True)
class Search:
    """That each scale is chosen among candidates, by the error that its elements have with it.

    The error is a sum of integers, and so the same whatever adds it up, in whichever order and pieces: the sum of d^2
    of all elements that share the scale, times the square of the scale's step in fp64. The first candidate with the
    least error is taken.

    With e4m3, r = x * (1 / step) and d = (r - q) * `resolution`, rounded, where q is the value of r's code. With int8,
    r = x / step, and q is the value of the code that is stored, for which r is first rounded to the weight's dtype.

    With 4-bit elements, X = |x| * (1 / plain step) * 4 * `resolution`, rounded: of 15 bits. With a candidate, an
    element is R = (X * M + 2^14) >> 15, where M = 8192 * (plain step / its step), rounded; d is R's distance from the
    nearest of all codes' values times `resolution`. With int4, x takes the place of |x|, and -8 is one of the codes.

    A candidate that is no normal scale, or with which the largest r (R, in units of `resolution`) exceeds `limit`, is
    none. Where the plain scale is such, or its largest X is 2^15 or more, it stays.

    Attributes:
        candidates: The plain scale first. Of e8m0 scales: what is added to the exponent; of e4m3: to the code; of fp32
            and bfloat16: factors of the plain formula, rounded as that is. A negative one, of int4: the scale has the
            sign with which the element of the largest |X| is below zero (of two, the positive sign), so that it may be
            -8.
        resolution: A power of two, with which the d^2 of 128 elements (of 32, in e2m1) add up to less than 2^31.
        limit: The largest element, in units of the scale.
    """

    candidates: tuple[float, ...]
    resolution: float
    limit: float


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class NonFinite(QTensorError, ValueError):
    """The source holds NaN or infinity.

    Attributes:
        index: The flat, row-major position in the whole weight.
        value: What stands there.
    """

    def __init__(self, index: int, value: float) -> None:
        super().__init__(f"non-finite value {value} at flat index {index}")
        self.index = index
        self.value = value


@dataclass(frozen=True)
class WeightFormat:
    """An element format plus the rule that gives each group of elements its scale.

    With F = `max` and amax the largest magnitude among the elements that share a scale, all in fp32:

    ================= =========================================== ================= ============================
    format            scale                                       data              shape of the scale
    ================= =========================================== ================= ============================
    fp8_per_tensor    amax / F                                    x * (1 / scale)   `[..., 1]`
    fp8_per_channel   max(amax / F, 1 / (F * 512))                x / scale         `[..., N, 1]`
    fp8_per_block     max(amax, 1e-4) / F                         x * (1 / scale)   `[..., N/128, K/128]`, rounded up
    mxfp8             the power of two at or above amax / F       x / scale         `[..., N, K/32]`, rounded up
    mxfp4             2^-2 of amax rounded to a power of two      x / scale         `[..., N, K/32]`, rounded up
    nvfp4             e4m3(G * (amax * (1 / F))), see below       x * (1 / step)    `[..., N, K/16]`, rounded up
    int8_per_channel  amax / F, in the weight's dtype             x / scale         `[..., N, 1]`
    int4_per_group    amax / F                                    x / scale         `[..., N, K/128]`, rounded up
    int4_per_group_32 amax / F, in bfloat16, see below            x / scale         `[..., N, K/32]`, rounded up
    int4_asymmetric   (largest - lowest) / 15, see below          x / scale         `[..., N, K/128]`, rounded up
    ================= =========================================== ================= ============================

    then clamp to ±F and round to nearest even. Where the factor of x is not finite, or the scale is 0, the data is 0.
    NaN that was let through stays NaN in e4m3 and becomes 0 in formats that have none.

    nvfp4 has a second, fp32 scale per matrix: the gain G = (1 / max(amax of the matrix, 1e-8)) * (F * 448) spreads the
    e4m3 scales over their range; its inverse is stored as `global_scale` `[..., 1]`, and step = scale * global_scale.
    mxfp4 rounds up from 1.75 times a power of two. int8_per_channel rounds scale and quotient to the weight's dtype.

    int4_per_group_32 rounds amax / F to the nearest bfloat16, half to even, whatever the weight's dtype; where that
    makes 0 of what is not, the scale is 2^-133, the smallest there is. None becomes infinite.

    int4_asymmetric has a zero point z for each scale: an element is (q - z) * scale, where q and z are -8 to 7. With
    the lowest and the largest element of a group, or 0 where there is none below or above it, the scale is (largest -
    lowest) / 15, rounded to the weight's dtype, of fp32 to 20 significant bits; z = -8 - lowest / scale, rounded, and
    q = x / scale, rounded, + z, both clamped to -8..7. They are stored in one int32, the scale word: the bits of the
    scale in fp32, of which the lowest four, always 0, are those of z. Where the scale is 0, so are q and z.

    These are the formulas of vLLM's online quantization (vllm/model_executor/layers/quantization/online/, and
    utils/mxfp8_utils.py, mxfp4_utils.py, nvfp4_emulation_utils.py there); it has no online int4.

    Attributes:
        dtype: Of the tensor that stores the elements; two 4-bit elements share a byte, the first in the low nibble.
        scale_dtype: float32 and bfloat16 hold scales as they are. uint8 stands for e8m0, powers of two by their biased
            exponent: the bytes of torch.float8_e8m0fnu, a dtype that compilers for CPUs do not take. int32 stands for
            scale words.
        block: Rows and columns that share a scale, where neither is the matrix's own.
        search: How scales are chosen by their error. None: by the formula above, and "plain". The stored form is the
            same.
        recipe: The arithmetic of another tool, in place of the formula above; again, of the same stored form.
    """

    name: str
    dtype: torch.dtype
    max: float
    granularity: Granularity
    block: tuple[int, int] = (1, 1)
    element: Element = "e4m3"
    scale_dtype: torch.dtype = torch.float32
    search: Search | None = None
    recipe: Recipe | None = None

    @property
    def plain(self) -> WeightFormat:
        """The same stored form, with scales by the formula alone: what tells whether bytes mean the same."""
        return self if self.search is None and self.recipe is None else replace(self, search=None, recipe=None)

    @property
    def lowest(self) -> float:
        """The smallest element that is stored."""
        signed = self.search is not None and min(self.search.candidates) < 0 and self.element == "int4"
        if self.has_zero_point or signed:
            return LOWEST
        return self.recipe.lowest or -self.max if self.recipe else -self.max

    @property
    def per_byte(self) -> int:
        """How many elements one item of `dtype` holds."""
        return 2 if self.element in ("e2m1", "int4") else 1

    @property
    def has_global_scale(self) -> bool:
        """Whether each matrix has a second scale, which multiplies the first."""
        return self.scale_dtype == torch.float8_e4m3fn

    @property
    def has_e8m0_scale(self) -> bool:
        """Whether scales are powers of two, stored as their biased exponents."""
        return self.scale_dtype == torch.uint8

    @property
    def has_float_scale(self) -> bool:
        """Whether scales are stored as they are, in fp32 or bfloat16."""
        return self.scale_dtype in (torch.float32, torch.bfloat16)

    @property
    def has_zero_point(self) -> bool:
        """Whether scales are words that hold a zero point, too."""
        return self.scale_dtype == torch.int32

    @property
    def needs_whole_matrix(self) -> bool:
        """Whether a scale depends on every element of the matrix."""
        return self.granularity == "tensor" or self.has_global_scale

    @property
    def divides(self) -> bool:
        """Whether x is divided by its scale; otherwise it is multiplied by the inverse."""
        return self.granularity in ("channel", "group") and not self.has_global_scale

    @property
    def keeps_nan(self) -> bool:
        """Whether an element can be NaN."""
        return self.element == "e4m3"

    def qdata_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored elements of a weight of `shape` `[..., N, K]`."""
        return (*shape[:-1], ceil_div(shape[-1], self.per_byte))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale that belongs to a weight of `shape` `[..., N, K]`."""
        *lead, rows, cols = shape
        if self.granularity == "tensor":
            return (*lead, 1)
        if self.granularity == "channel":
            return (*lead, rows, 1)
        return (*lead, ceil_div(rows, self.block[0]), ceil_div(cols, self.block[1]))

    def global_scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of the fp32 global scale; None for formats without."""
        return (*shape[:-2], 1) if self.has_global_scale else None

    def unit_rows(self, rows: int) -> int:
        """How many rows of an N-row matrix must be known before any of them can be quantized."""
        return max(rows, 1) if self.needs_whole_matrix else self.block[0]

    def scale_rows(self, start: int, stop: int) -> slice:
        """Which rows of a matrix's scale belong to its rows start to stop; `start` begins a block."""
        if self.granularity == "tensor":
            return slice(None)
        return slice(start // self.block[0], ceil_div(stop, self.block[0]))

    def step(self, scale: torch.Tensor) -> torch.Tensor:
        """Stored scales → fp32 values."""
        if self.has_zero_point:
            return (scale & ~ZERO_BITS).view(torch.float32)
        return e8m0_to_float(scale) if self.has_e8m0_scale else scale.to(torch.float32)

    def stored(self, step: torch.Tensor) -> torch.Tensor:
        """Scales in fp32, not negative → as they are stored, of formats that have them in fp32 or bfloat16."""
        if self.scale_dtype != torch.bfloat16:
            return step
        rounded = step.to(torch.bfloat16)
        return torch.where((step != 0.0) & (rounded == 0.0), SMALLEST_BF16, rounded)

    def zero(self, scale: torch.Tensor) -> torch.Tensor:
        """Stored scale words → zero points, int32."""
        return (scale << 28) >> 28

    def word(self, step: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """fp32 scales and zero points (any dtype) → scale words. Of a scale the upper 20 significant bits count."""
        return (step.view(torch.int32) & ~ZERO_BITS) | (zero.to(torch.int32) & ZERO_BITS)

    def words_from_range(self, lowest: torch.Tensor, largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Lowest and largest elements, of a weight of `dtype`, fp32 of any shape → scale words of the same shape."""
        lowest, largest = lowest.clamp_max(0.0), largest.clamp_min(0.0)
        # Of the halves, where the difference could be infinite.
        half = torch.where(torch.maximum(largest, -lowest) > 2.0**126, 0.5, 1.0)
        step = (largest * half - lowest * half) / (half * LEVELS)
        if dtype != torch.float32:
            step = step.to(dtype).to(torch.float32)
        step = ((step.view(torch.int32) + (ZERO_BITS + 1) // 2) & ~ZERO_BITS).view(torch.float32)
        zero = (LOWEST - lowest / step).round().clamp(LOWEST, self.max)
        return self.word(step, torch.where(step == 0.0, 0.0, zero))

    def gain_from_amax(self, amax: torch.Tensor) -> torch.Tensor:
        """fp32 amax of whole matrices, any shape → G of the same shape; the global scale is 1 / G."""
        # Rounded twice, because that is how torch divides a number by a tensor, and therefore vLLM.
        return amax.clamp_min(1e-8).reciprocal() * (self.max * E4M3_MAX)

    def scale_from_amax(self, amax: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 amax, any shape → scale of the same shape, in `scale_dtype`; `gain`: that of the matrix."""
        if gain is not None:
            return (gain * (amax * (1.0 / self.max))).clamp_max(E4M3_MAX).to(self.scale_dtype)
        # A 0-d tensor, because CUDA turns division by a Python scalar into multiplication by its reciprocal.
        limit = torch.full((), self.max, dtype=torch.float32, device=amax.device)
        if self.has_e8m0_scale:
            exponent = _exponent_nearest(amax) if self.element == "e2m1" else _exponent_at_least(amax / limit)
            return exponent.to(torch.uint8)
        if self.granularity == "block":
            return amax.clamp_min(BLOCK_FLOOR) / limit
        scale = amax / limit
        floored = self.granularity == "channel" and self.element == "e4m3"
        return scale.clamp_min(CHANNEL_FLOOR) if floored else self.stored(scale)


def e8m0_to_float(scale: torch.Tensor) -> torch.Tensor:
    """The powers of two that e8m0 codes (uint8) stand for, in fp32; 255 is NaN."""
    exponent = scale.to(torch.int32)
    bits = torch.where(exponent == 0, 0x400000, exponent << 23)
    return torch.where(exponent == 255, 0x7FC00000, bits).view(torch.float32)


def _exponent_at_least(x: torch.Tensor) -> torch.Tensor:
    """The biased exponent of the smallest power of two that is not below x (fp32, at least 0), exactly."""
    bits = x.view(torch.int32).clamp_max(0x7F800000)  # Infinity and NaN become the code of NaN.
    return torch.where(bits <= 0x400000, 0, (bits + 0x7FFFFF) >> 23)  # 0x400000 is 2^-127, the smallest there is.


def _exponent_nearest(amax: torch.Tensor) -> torch.Tensor:
    """The biased exponent of amax / 4 (fp32) rounded to a power of two, up from 1.75 times one."""
    return (((amax.view(torch.int32) + 0x200000) >> 23) - 2).clamp_min(0)


E4M3_MAX = 448.0
E2M1_MAX = 6.0
CHANNEL_FLOOR = 1.0 / (E4M3_MAX * 512.0)  # of scales of fp8_per_channel
BLOCK_FLOOR = 1e-4  # of the amax of a block of fp8_per_block
SMALLEST_BF16 = 2.0**-133
LOWEST = -8.0  # The smallest integer of four bits, which int4_asymmetric takes, and a search with negative factors.
LEVELS = 15.0  # of int4_asymmetric: steps from there to the largest
ZERO_BITS = 0xF  # of a scale word

FP8_PER_TENSOR = WeightFormat("fp8_per_tensor", torch.float8_e4m3fn, E4M3_MAX, "tensor")
FP8_PER_CHANNEL = WeightFormat("fp8_per_channel", torch.float8_e4m3fn, E4M3_MAX, "channel")
FP8_PER_BLOCK = WeightFormat("fp8_per_block", torch.float8_e4m3fn, E4M3_MAX, "block", (128, 128))
MXFP8 = WeightFormat("mxfp8", torch.float8_e4m3fn, E4M3_MAX, "group", (1, 32), scale_dtype=torch.uint8)
MXFP4 = WeightFormat("mxfp4", torch.uint8, E2M1_MAX, "group", (1, 32), "e2m1", torch.uint8)
NVFP4 = WeightFormat("nvfp4", torch.uint8, E2M1_MAX, "group", (1, 16), "e2m1", torch.float8_e4m3fn)
INT8_PER_CHANNEL = WeightFormat("int8_per_channel", torch.int8, 127.0, "channel", element="int8")
INT4_PER_GROUP = WeightFormat("int4_per_group", torch.uint8, 7.0, "group", (1, 128), "int4")
INT4_PER_GROUP_32 = WeightFormat("int4_per_group_32", torch.uint8, 7.0, "group", (1, 32), "int4", torch.bfloat16)
INT4_ASYMMETRIC = WeightFormat("int4_asymmetric", torch.uint8, 7.0, "group", (1, 128), "int4", torch.int32)

_ALL = (
    FP8_PER_TENSOR,
    FP8_PER_CHANNEL,
    FP8_PER_BLOCK,
    MXFP8,
    MXFP4,
    NVFP4,
    INT8_PER_CHANNEL,
    INT4_PER_GROUP,
    INT4_PER_GROUP_32,
    INT4_ASYMMETRIC,
)
FORMATS = {f.name: f for f in _ALL}
_POWERS, _OCTAVE = Search((0, -1), 1024.0, 12.0), Search((1.0, 1.25, 1.5, 1.75), 64.0, 480.0)
SEARCHES = {
    "fp8_per_channel": _OCTAVE,
    "fp8_per_block": _OCTAVE,
    "mxfp8": Search((0, -1), 64.0, 480.0),
    "mxfp4": _POWERS,
    "nvfp4": Search((0, -1, 1, 4, 5), 1024.0, 12.0),
    "int8_per_channel": Search((1.0, 127 / 128, 126 / 128), 256.0, 142.0),
    "int4_per_group": Search((1.0, -0.875, -0.84875), 512.0, 10.0),
    "int4_per_group_32": Search((1.0, -0.875, -0.84875, 0.95), 512.0, 10.0),
}
"""By the format's name; fp8_per_tensor has none, because its one scale gains next to nothing (docs/schemes.md), and
int4_asymmetric none yet."""
SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
