"""Pairs of source and scheme that are called lossless: the same numbers for every code, with every scale there is.

A number is a code times its scale, in fp64, where none of these products is rounded. Scales in 16 bits, e4m3 and powers
of two are all there, with integers in words every eighth; of fp32 every exponent, with the mantissas at its ends and
between. What may not be called so is refused for every value that makes it so. tests/test_sources_page.py holds the
pairs of docs/sources.md to `PROVED`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))  # The packing of integers into words is there.

from source_formats import words

from qtensor.kernels import FORMATS, MXFP4, Parts, WeightFormat
from qtensor.kernels.codes import decode
from qtensor.sources.scales import in_fp32
from support.sources import Tensors, source_of, specs_of

Numbers = torch.Tensor
EVERY_BYTE = torch.arange(256, dtype=torch.uint8)
EXPONENTS = EVERY_BYTE[:255]
E4M3 = EVERY_BYTE.view(torch.float8_e4m3fn)
E4M3 = E4M3[E4M3.float().isfinite()]
AT_ONCE = 4096
"""Rows of a matrix, so that its numbers in fp64 stay small."""


def _every(dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


def _fp32() -> torch.Tensor:
    bits = torch.arange(255).unsqueeze(1) << 23 | torch.tensor([0, 1, 0x2AAAAA, 0x555555, 0x7FFFFF])
    return bits.flatten().to(torch.int32).view(torch.float32)


FP32, FP16, BF16 = _fp32(), _every(torch.float16), _every(torch.bfloat16)
SOME = FP16[::8]
ANY_SCALES = (FP32, FP16, BF16)


def numbers(parts: Parts, fmt: WeightFormat) -> Numbers:
    """What a weight's elements are, in fp64: exactly."""
    values = decode(parts.qdata, fmt).double()
    scale = in_fp32(parts.scale).double() if fmt.has_e8m0_scale else fmt.step(parts.scale).double()
    scale = scale * parts.global_scale.double() if parts.global_scale is not None else scale
    if fmt.granularity in ("tensor", "channel"):
        return values * scale
    rows, cols = fmt.block
    wide = scale.repeat_interleave(rows, 0)[: values.shape[0]].repeat_interleave(cols, 1)[:, : values.shape[1]]
    if fmt.has_zero_point:
        values -= fmt.zero(parts.scale).repeat_interleave(cols, 1)[:, : values.shape[1]]
    return values * wide


def moved(parts: Tensors, scheme: str, shape: tuple[int, int], config: Mapping[str, Any] | None) -> Parts | None:
    source, fmt = source_of(parts, dict(config or {}), shape), FORMATS[scheme]
    held = source.parts(shape)
    assert all(held[name].fits(spec) for name, spec in specs_of(parts).items())
    needed = {name: tensor for name, tensor in parts.items() if held[name].needed}
    source.check(needed, shape)
    if source.moves(fmt) is None:
        return None
    made = source.move(needed, shape, fmt)
    assert made is None or source.exact(needed, fmt)
    return made


def assert_same_numbers(
    parts: Tensors, scheme: str, expected: Numbers, config: Mapping[str, Any] | None = None
) -> None:
    made = moved(parts, scheme, (expected.shape[0], expected.shape[1]), config)
    assert made is not None
    found = numbers(made, FORMATS[scheme])
    assert torch.equal(found, expected)
    if FORMATS[scheme].element in ("e4m3", "e2m1") and "int" not in str(source_of(parts)):
        assert torch.equal(found.signbit(), expected.signbit())


# Floats ---------------------------------------------------------------------------------------------------------------

Case = Callable[[], Iterator[tuple[Tensors, Numbers]]]
"""Matrices in a format, each with its numbers."""


def per_channel(values: str, scale: str) -> Case:
    def cases() -> Iterator[tuple[Tensors, Numbers]]:
        for scales in ANY_SCALES if values == "*" else (FP32,):
            for some in scales[scales >= 0].split(AT_ONCE):
                codes = E4M3.view(torch.uint8).repeat(len(some), 1).view(torch.float8_e4m3fn)
                yield {values: codes, scale: some.unsqueeze(1)}, codes.double() * some.double().unsqueeze(1)

    return cases


def per_tensor() -> Iterator[tuple[Tensors, Numbers]]:
    codes = E4M3.view(torch.uint8).repeat(2, 1).view(torch.float8_e4m3fn)
    for scale in FP32:
        yield {"*": codes, "*_scale": scale}, codes.double() * scale.double()


def in_blocks(scales: torch.Tensor, name: str = "*_scale_inv") -> Case:
    """A block of 128 rows for each scale, twice side by side; all codes in it."""

    def cases() -> Iterator[tuple[Tensors, Numbers]]:
        for some in scales.split(64):
            codes = torch.cat([E4M3, E4M3[:2]]).view(torch.uint8).repeat(128 * len(some), 1).view(torch.float8_e4m3fn)
            wide = some if some.dtype.itemsize > 1 else in_fp32(some)
            expected = codes.double() * wide.double().repeat_interleave(128).unsqueeze(1)
            yield {"*": codes, name: some.unsqueeze(1).repeat(1, 2)}, expected

    return cases


def mxfp8() -> Iterator[tuple[Tensors, Numbers]]:
    codes = torch.cat([E4M3, E4M3[:2]]).view(torch.uint8).repeat(255, 1).view(torch.float8_e4m3fn)
    yield (
        {"*": codes, "*_scale": EXPONENTS.unsqueeze(1).repeat(1, 8)},
        codes.double() * in_fp32(EXPONENTS).double().unsqueeze(1),
    )


def mxfp4(blocks: bool) -> Case:
    def cases() -> Iterator[tuple[Tensors, Numbers]]:
        pairs, scales = EVERY_BYTE.repeat(255, 1), EXPONENTS.unsqueeze(1).repeat(1, 16)
        parts = {"*_packed": pairs, "*_scale": scales}
        if blocks:
            parts = {"*_blocks": pairs.unflatten(1, (-1, 16)), "*_scales": scales}
        yield parts, decode(pairs, MXFP4).double() * in_fp32(EXPONENTS).double().unsqueeze(1)

    return cases


def nvfp4() -> Iterator[tuple[Tensors, Numbers]]:
    scales = E4M3[E4M3.float() >= 0]
    scales = scales[~scales.float().signbit()]
    pairs = EVERY_BYTE.repeat(len(scales), 1)
    values = decode(pairs, MXFP4).double() * scales.double().unsqueeze(1)
    for whole in FP32:
        parts = {"*": pairs, "*_scale": scales.view(torch.uint8).unsqueeze(1).repeat(1, 32).view(scales.dtype)}
        yield {**parts, "*_scale_2": whole}, values * whole.double()


# Integers -------------------------------------------------------------------------------------------------------------


def signed(bits: int, width: int) -> torch.Tensor:
    """Every integer of so many bits, again and again, `[width]`."""
    return torch.arange(-(1 << bits - 1), 1 << bits - 1).repeat(-(-width // (1 << bits)))[:width]


def integers(make: Callable[[torch.Tensor, torch.Tensor], Tensors], bits: int, groups: int, *scales: Any) -> Case:
    """make: the parts of integers `[N, K]` around zero, and their scales `[N, groups]`."""

    def cases() -> Iterator[tuple[Tensors, Numbers]]:
        for dtype in scales:
            for some in dtype[: len(dtype) // 32 * 32].split(AT_ONCE):  # Whole words of rows.
                codes = signed(bits, 256).repeat(len(some), 1)
                each = torch.stack([some.roll(i) for i in range(groups)], 1)
                expected = codes.double() * each.double().repeat_interleave(256 // groups, 1)
                yield make(codes, each), expected

    return cases


def words_of(bits: int) -> Callable[[torch.Tensor, torch.Tensor], Tensors]:
    return lambda codes, scale: {
        "*_packed": words(codes + (1 << bits - 1), bits),
        "*_scale": scale,
        "*_shape": torch.tensor(codes.shape),
    }


def gptq(bits: int, first: bool = True, zero: int | None = None) -> Callable[[torch.Tensor, torch.Tensor], Tensors]:
    half = 1 << bits - 1

    def make(codes: torch.Tensor, scale: torch.Tensor) -> Tensors:
        zeros = torch.full(scale.t().shape, half if zero is None else zero) - int(first)
        return {
            "qweight": words(codes + half, bits).t().contiguous(),
            "qzeros": words(zeros % (1 << bits), bits),
            "scales": scale.t().contiguous(),
            "g_idx": (torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1])).int(),
        }

    return make


def bytes_each(codes: torch.Tensor, scale: torch.Tensor) -> Tensors:
    return {"*": codes.to(torch.int8), "*_scale": scale}


def torchao(codes: torch.Tensor, scale: torch.Tensor) -> Tensors:
    return {
        "_*_qdata": codes.to(torch.int8),
        "_*_scale": scale,
        "_*_zero_point": torch.zeros(scale.shape, dtype=torch.int8),
    }


def paired_rows(codes: torch.Tensor, scale: torch.Tensor) -> Tensors:
    pairs = (codes & 0xF).unflatten(0, (-1, 2))
    return {"*": (pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8), "*_scale": scale}


def with_zero_points(tool: str) -> Case:
    """Every code of four bits with every zero point, and every scale of fp16 (of bf16, in words) with one."""

    def cases() -> Iterator[tuple[Tensors, Numbers]]:
        for some in (BF16 if tool == "words" else FP16).split(AT_ONCE):
            some = some[: len(some) // 32 * 32]
            codes = torch.arange(16).repeat(8).repeat(len(some), 1)
            zeros = (torch.arange(len(some)) % 16).unsqueeze(1)
            expected = (codes - zeros).double() * some.double().unsqueeze(1)
            if tool == "awq":
                where = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]) * 4
                turned = [(t.t().unflatten(1, (-1, 8)) << where).sum(-1).to(torch.int32) for t in (codes, zeros)]
                yield {"qweight": turned[0], "qzeros": turned[1], "scales": some.unsqueeze(0)}, expected
            elif tool == "gptq":
                # The first version cannot say 0 but as the largest number, whose carry is the next one's.
                stored = words((zeros.t() - 1) % 16, 4)
                read = unpacked(stored + 0x11111111, len(some))
                expected = (codes - read.t()).double() * some.double().unsqueeze(1)
                yield (
                    {
                        "qweight": words(codes, 4).t().contiguous(),
                        "qzeros": stored,
                        "scales": some.unsqueeze(0),
                        "g_idx": torch.zeros(codes.shape[1], dtype=torch.int32),
                    },
                    expected,
                )
            else:
                packed_zeros = words(zeros.t(), 4).t().contiguous()
                packed = {"*_packed": words(codes, 4), "*_scale": some.unsqueeze(1), "*_zero_point": packed_zeros}
                yield {**packed, "*_shape": torch.tensor(codes.shape)}, expected

    return cases


def unpacked(held: torch.Tensor, count: int) -> torch.Tensor:
    """The integers of four bits in words `[rows, words]`."""
    return (held.unsqueeze(-1) >> torch.arange(0, 32, 4) & 0xF).flatten(1)[:, :count]


PROVED: dict[tuple[str, str], Case] = {
    **{("fp8 per tensor", scheme): per_tensor for scheme in ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block")},
    ("fp8 per channel", "fp8_per_channel"): per_channel("*", "*_scale"),
    ("torchao fp8", "fp8_per_channel"): per_channel("_*_qdata", "_*_scale"),
    ("fp8 blocks of 128 × 128", "fp8_per_block"): in_blocks(FP32),
    ("fp8 blocks, powers of two", "fp8_per_block"): in_blocks(EXPONENTS.view(torch.float8_e8m0fnu)),
    ("fp8 blocks, powers of two", "mxfp8"): in_blocks(EXPONENTS.view(torch.float8_e8m0fnu)),
    ("fp8 blocks whose scales are powers of two in fp32", "mxfp8"): in_blocks(in_fp32(EXPONENTS)),
    ("mxfp8", "mxfp8"): mxfp8,
    **{
        (name, scheme): mxfp4(blocks)
        for (name, blocks), scheme in product([("mxfp4", False), ("mxfp4 of gpt-oss", True)], ["mxfp4", "mxfp8"])
    },
    ("nvfp4 of ModelOpt", "nvfp4"): nvfp4,
    ("int8 per channel", "int8_per_channel"): integers(bytes_each, 8, 1, *ANY_SCALES),
    ("int8 in words, per channel", "int8_per_channel"): integers(words_of(8), 8, 1, SOME),
    ("torchao int8", "int8_per_channel"): integers(torchao, 8, 1, BF16),
    ("GPTQ int8 per channel", "int8_per_channel"): integers(gptq(8), 8, 1, SOME),
    ("GPTQ int8 per channel, v2", "int8_per_channel"): integers(gptq(8, False), 8, 1, SOME),
    ("ModelOpt int4, groups of 128", "int4_per_group"): integers(paired_rows, 4, 2, FP32, BF16),
    **{(f"int{b}, groups of 128", "int4_per_group"): integers(words_of(b), b, 2, SOME) for b in (1, 2, 3, 4)},
    **{(f"GPTQ int{b}, groups of 128", "int4_per_group"): integers(gptq(b), b, 2, SOME) for b in (2, 3, 4)},
    **{(f"GPTQ int{b}, groups of 128", "int4_asymmetric"): integers(gptq(b), b, 2, SOME) for b in (2, 3, 4)},
    ("int4, groups of 32, scales in bf16", "int4_per_group_32"): integers(words_of(4), 4, 8, BF16),
    ("GPTQ int4, groups of 128, zero points", "int4_asymmetric"): with_zero_points("gptq"),
    ("AWQ int4, groups of 128", "int4_asymmetric"): with_zero_points("awq"),
}
"""Pairs and the matrices that show it. mxfp4 in nvfp4, and integers with zero points, are below."""


@pytest.mark.parametrize(("source", "scheme"), PROVED, ids=str)
def test_every_code_with_every_scale_is_the_same_number(source: str, scheme: str) -> None:
    count = 0
    config = {"checkpoint_format": "gptq_v2"} if source.endswith("v2") else {}
    for parts, expected in PROVED[source, scheme]():
        assert_same_numbers(parts, scheme, expected, config)
        count += expected.numel()
    assert count >= 127 * 255


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("scheme", ["int8_per_channel", "fp8_per_channel", "int4_per_group"])
def test_few_bits_per_channel_are_the_same_with_every_zero_point(scheme: str, bits: int) -> None:
    """Each scale with one of the zero points; int4_per_group has those in the middle alone."""
    top, half = 1 << bits, 1 << bits - 1
    zeros = torch.tensor([half]) if scheme == "int4_per_group" else torch.arange(top)
    for at, zero in enumerate(zeros):
        some = FP16[at :: len(zeros)] if len(zeros) > 1 else SOME
        some = some[: len(some) // 32 * 32]
        codes = torch.arange(top).repeat(32 // top).repeat(len(some), 1)
        parts = {"*_packed": words(codes, bits), "*_scale": some.unsqueeze(1), "*_shape": torch.tensor(codes.shape)}
        if scheme != "int4_per_group":
            parts["*_zero_point"] = words(torch.full((1, len(some)), int(zero)), bits).t().contiguous()
        expected = (codes - zero).double() * some.double().unsqueeze(1)
        assert_same_numbers(parts, scheme, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_point_that_is_not_in_the_middle_is_not_called_lossless(bits: int) -> None:
    """Where a format's integers have no room for what it makes of the codes; all of them are in the matrix."""
    codes, scale = signed(bits, 256).repeat(32, 1), torch.ones(32, 1, dtype=torch.float16)
    scheme = "int8_per_channel" if bits == 8 else "int4_per_group"
    largest = {"int8_per_channel": 128, "int4_per_group": 8}[scheme]
    groups = 1 if bits == 8 else 2
    for zero in range(1 << bits):
        parts = gptq(bits, False, zero)(codes, scale.repeat(1, groups))
        made = moved(parts, scheme, (32, 256), {"checkpoint_format": "gptq_v2"})
        low, high = -zero, (1 << bits) - 1 - zero
        assert (made is not None) == (-largest <= low and high < largest)
        if made is not None:
            assert torch.equal(numbers(made, FORMATS[scheme]), (codes + (1 << bits - 1) - zero).double())


def test_zero_points_are_the_same_with_every_scale_of_16_bits() -> None:
    """compressed-tensors' files have scales in the model's dtype; of others, those of 20 significant bits are moved."""
    for parts, expected in with_zero_points("words")():
        assert_same_numbers(parts, "int4_asymmetric", expected)
    for bits, fits in ((19, True), (20, False)):
        scale = torch.full((32, 1), 1.0 + 2.0**-bits)
        parts = {**parts, "*_packed": parts["*_packed"][:32], "*_zero_point": parts["*_zero_point"][:4]}
        parts |= {"*_scale": scale, "*_shape": torch.tensor((32, 128))}
        source = source_of(parts)
        made = moved(parts, "int4_asymmetric", (32, 128), None)
        assert (made is not None) == fits
        assert source.never_moves(parts, FORMATS["int4_asymmetric"]) == (not fits)


def test_scales_that_bfloat16_does_not_hold_are_not_moved() -> None:
    """All files with groups of 32 say the same but for the dtype of their scales."""
    for bits, fits in ((7, True), (8, False)):
        parts = words_of(4)(signed(4, 256).repeat(32, 1), torch.full((32, 8), 1.0 + 2.0**-bits))
        assert (moved(parts, "int4_per_group_32", (32, 256), None) is not None) == fits
        assert source_of(parts).never_moves(parts, FORMATS["int4_per_group_32"]) == (not fits)


def test_a_divisor_is_exact_where_its_inverse_is() -> None:
    """nvfp4 of compressed-tensors: a power of two is inverted without rounding, and nothing else is called lossless."""
    codes, scales = EVERY_BYTE.repeat(2, 1), torch.full((2, 32), 1.5).to(torch.float8_e4m3fn)
    values = decode(codes, MXFP4).double() * 1.5
    for whole in FP32[FP32 > 0]:
        inverse = whole.reciprocal()
        if not inverse.isfinite():
            continue
        parts = {"*_packed": codes, "*_scale": scales, "*_global_scale": whole.reshape(1)}
        source = source_of(parts)
        exact = source.exact(parts, FORMATS["nvfp4"])
        assert exact == (float(inverse) * float(whole) == 1.0 and float(torch.frexp(whole)[0]) == 0.5)
        if exact:
            made = source.move(parts, (2, 512), FORMATS["nvfp4"])
            assert made is not None
            assert torch.equal(numbers(made, FORMATS["nvfp4"]), values / whole.double())


# Two scales for one ---------------------------------------------------------------------------------------------------


def test_every_pair_of_powers_of_two_is_the_same_in_nvfp4_or_is_not_called_so() -> None:
    """All pairs of scales that a matrix may have, each with all codes: the same numbers, or no form at all."""
    pairs, known = (torch.arange(16, dtype=torch.uint8) * 0x11).repeat(2, 1), 0  # A group that has every code, twice.
    codes_of = decode(pairs, MXFP4).double()
    source = source_of({"*_packed": pairs, "*_scale": torch.zeros(2, 1, dtype=torch.uint8)})
    for high in range(255):
        for low in range(high + 1):
            scale = EXPONENTS[[high, low]]
            made = source.move({"*_packed": pairs, "*_scale": scale[:, None]}, (2, 32), FORMATS["nvfp4"])
            assert (made is not None) == (low >= 1 and high - low <= 17 and low >= max(high - 8, 1) - 9)
            if made is not None:
                known += 1
                assert torch.equal(numbers(made, FORMATS["nvfp4"]), codes_of * in_fp32(scale).double()[:, None])
    assert known > 4000


def test_a_group_of_zeros_has_any_scale() -> None:
    pairs = torch.zeros(2, 16, dtype=torch.uint8)
    pairs[0] = 0x80  # -0.0 and 0.0
    pairs[1, 0] = 0x31
    parts = {"*_packed": pairs, "*_scale": torch.tensor([[0], [127]], dtype=torch.uint8)}
    assert_same_numbers(parts, "nvfp4", decode(pairs, MXFP4).double())
