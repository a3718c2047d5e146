"""The element and scale formats, exhaustively, and the formulas of the schemes, spelled out apart from the kernels."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtensor import (
    QTensor,
    QTensorError,
    int4_asymmetric,
    int4_per_group,
    int4_per_group_32,
    int8_per_channel,
    mxfp4,
    mxfp8,
    nvfp4,
    quantize,
)
from qtensor.kernels import FORMATS, INT4_ASYMMETRIC, INT4_PER_GROUP, MXFP4, MXFP8, SOURCE_DTYPES
from qtensor.kernels.codes import decode, encode, traceable_decode
from support.helpers import same_bytes

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
ALL_BYTES = torch.arange(256, dtype=torch.int16).to(torch.uint8)
dtypes = pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed % 16, packed // 16), -1).flatten(-2)


def nearest_even(x: float, values: list[float]) -> int:
    """The index of the value nearest to x >= 0, the even index of two that are equally near."""
    above = min(bisect_left(values, x), len(values) - 1)
    below = max(above - 1, 0)
    if x - values[below] == values[above] - x:
        return above if above % 2 == 0 else below
    return below if x - values[below] < values[above] - x else above


def every_bf16() -> torch.Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def neighbours(points: list[float]) -> torch.Tensor:
    """fp32 numbers at and next to the points, and their negatives."""
    bits = torch.tensor(points).view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)
    near = bits.clamp_min(0).flatten().view(torch.float32)
    return torch.cat([near, -near])


def test_e2m1_encodes_every_bf16_and_every_midpoint() -> None:
    midpoints = [(a + b) / 2 for a, b in pairwise(E2M1)]
    x = torch.cat([every_bf16(), neighbours(E2M1 + midpoints), torch.tensor([7.0, 1e30, -1e30])])
    codes = nibbles(encode(x.clone(), MXFP4))[: len(x)]
    for value, code in zip(x.tolist(), codes.tolist(), strict=True):
        if value != value:
            assert code == 0
            continue
        assert code % 8 == nearest_even(abs(value), E2M1), value
    signs = x.signbit() & ~x.isnan()
    assert torch.equal(codes >= 8, signs)


def test_int4_encodes_every_bf16() -> None:
    x = torch.cat([every_bf16(), neighbours([i / 2 for i in range(17)])])
    codes = nibbles(encode(x.clone(), INT4_PER_GROUP))[: len(x)].to(torch.int16)
    signed = torch.where(codes > 7, codes - 16, codes)
    assert torch.equal(signed, x.nan_to_num(0.0).clamp(-7, 7).round().to(torch.int16))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_every_code_decodes_exactly(fmt) -> None:
    codes = ALL_BYTES.view(fmt.dtype)
    tables = {"e2m1": [*E2M1, *(-v for v in E2M1)], "int4": [*range(8), *range(-8, 0)]}
    if fmt.element in tables:
        want = torch.tensor(tables[fmt.element], dtype=torch.float32)[nibbles(ALL_BYTES).long()]
    else:
        want = codes.float()
    for dtype in SOURCE_DTYPES:
        torch.testing.assert_close(decode(codes, fmt, dtype).float(), want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(traceable_decode(codes, fmt), want, rtol=0, atol=0, equal_nan=True)


def exponents_and_neighbours() -> torch.Tensor:
    """fp32 numbers of every exponent, subnormals included: powers of two, 1.75 times them, and their neighbours."""
    exponent = torch.arange(255, dtype=torch.int32)[:, None, None] << 23
    mantissa = torch.tensor([0, 0x400000, 0x600000, 0x7FFFFF], dtype=torch.int32)[:, None]
    bits = exponent + mantissa + torch.arange(-2, 3, dtype=torch.int32)
    return bits.clamp(0, 0x7F7FFFFF).flatten().view(torch.float32)


def test_every_exponent_of_mxfp8_is_the_smallest_that_holds_amax() -> None:
    amax = exponents_and_neighbours()
    scale = MXFP8.step(MXFP8.scale_from_amax(amax)).double()
    share = (amax / 448.0).double()  # rounded to fp32, as vLLM's is
    assert (scale >= share).all()
    assert ((scale / 2 < share) | (scale == 2.0**-127)).all()


def test_every_exponent_of_mxfp4_is_the_rounded_one_of_amax() -> None:
    amax = exponents_and_neighbours()
    scale = MXFP4.step(MXFP4.scale_from_amax(amax)).double()
    assert ((amax / scale < 7.0) & ((amax / scale >= 3.5) | (scale == 2.0**-127))).all()


def test_every_e8m0_code_is_its_power_of_two() -> None:
    assert torch.equal(MXFP8.step(ALL_BYTES[:255]), ALL_BYTES.view(torch.float8_e8m0fnu).float()[:255])
    assert MXFP8.step(ALL_BYTES[255:]).isnan().all()


# The schemes ----------------------------------------------------------------------------------------------------------


def groups(w: torch.Tensor, size: int) -> torch.Tensor:
    x = w.float()
    return torch.nn.functional.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))


def e2m1_values(x: torch.Tensor) -> torch.Tensor:
    grid = torch.tensor(E2M1)
    index = torch.tensor([nearest_even(v, E2M1) for v in x.abs().flatten().tolist()])
    return grid[index].view(x.shape) * torch.where(x < 0, -1.0, 1.0)


def values_and_scale(w: torch.Tensor, scheme: object) -> tuple[torch.Tensor, torch.Tensor]:
    """What the elements stand for in units of their scale, and the fp32 value of the scale."""
    if scheme is int8_per_channel:
        scale = (w.abs().amax(1, keepdim=True) / 127).to(w.dtype)
        return (w / scale).float().round().clamp(-127, 127), scale.float()
    x = groups(w, scheme.format.block[1])
    amax = x.abs().amax(-1)
    if scheme in (int4_per_group, int4_per_group_32):
        scale = amax / torch.tensor(7.0)
        if scheme is int4_per_group_32:
            scale = scale.bfloat16().float()
        return (x / scale[..., None]).round().clamp(-7, 7), scale
    if scheme is mxfp8:
        scale = torch.exp2(torch.ceil(torch.log2(amax.double() / 448)).clamp(-127)).float()
        return (x / scale[..., None]).to(torch.float8_e4m3fn).float(), scale
    if scheme is mxfp4:
        fraction, exponent = torch.frexp(amax)
        scale = torch.exp2((exponent - 1 + (fraction >= 0.875) - 2).double()).float()
        return e2m1_values(x / scale[..., None]), scale
    assert scheme is nvfp4
    gain = (1 / x.abs().max()) * 2688
    block = (gain * (amax * (1 / 6))).clamp_max(448).to(torch.float8_e4m3fn).float()
    return e2m1_values(x * (1 / (block * (1 / gain)))[..., None]), block


@dtypes
@pytest.mark.parametrize("scheme", [mxfp8, mxfp4, nvfp4, int8_per_channel, int4_per_group, int4_per_group_32], ids=str)
@pytest.mark.parametrize("cols", [129, 256])
def test_bytes_follow_the_formulas(scheme, dtype: torch.dtype, cols: int) -> None:
    w = (torch.randn(70, cols, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)
    q = quantize(w, scheme)
    values, scale = values_and_scale(w, scheme)
    assert torch.equal(q.scheme.format.step(q.scale), scale)
    got = decode(q.qdata, scheme.format)
    want = values.flatten(1)[:, : got.shape[1]] if values.dim() == 3 else values
    assert torch.equal(got, want)
    step = scale if q.global_scale is None else scale * q.global_scale
    if values.dim() == 3:
        values, step = values, step[..., None]
    restored = (values * step).flatten(1)[:, :cols].to(dtype)
    assert torch.equal(q.dequantize(), restored)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(SOURCE_DTYPES),
    seed=st.integers(0, 2**20),
    shift=st.sampled_from([0.0, 0.5, 3.0, -3.0, 100.0]),
    size=st.sampled_from([1e-3, 1.0, 300.0]),
    cols=st.sampled_from([1, 5, 128, 131, 300]),
)
def test_zero_points(dtype: torch.dtype, seed: int, shift: float, size: float, cols: int) -> None:
    """The formula, in fp64 where it is not rounded to fp32. A zero stays one, and no element is further off than half
    a step; at the ends, by as much as the rounded scale falls short."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(7, cols, generator=generator) + shift * torch.randn(7, 1, generator=generator)
    w = (w * size).masked_fill_(torch.rand(7, cols, generator=generator) < 0.1, 0.0).to(dtype)
    w[2] = 0.0
    q, fmt = quantize(w, int4_asymmetric), INT4_ASYMMETRIC
    x = groups(w, 128)
    lowest, largest = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    scale = ((largest - lowest) / torch.tensor(15.0)).to(dtype).double()
    fraction, exponent = torch.frexp(scale)
    scale = torch.ldexp((fraction * 2**20 + 0.5).floor() / 2**20, exponent).float()  # Up from the middle.
    zero = torch.where(scale > 0, (-8 - lowest / scale).round().clamp(-8, 7), 0.0)
    assert torch.equal(fmt.step(q.scale), scale)
    assert torch.equal(fmt.zero(q.scale).float(), zero)
    units = torch.where(scale[..., None] > 0, x / scale[..., None], 0.0)
    codes = (units.round() + zero[..., None]).clamp(-8, 7)
    assert torch.equal(decode(q.qdata, fmt)[:, :cols], codes.flatten(1)[:, :cols])
    if cols % 2:  # Beside the last element is a zero: its code is the zero point.
        assert torch.equal(q.qdata[:, -1] >> 4, (zero[:, -1].int() & 0xF).to(torch.uint8))
    found = q.dequantize(torch.float32)
    assert (found[w == 0] == 0).all()
    off = (found.double() - w.double()).abs()
    allowed = scale.double().repeat_interleave(128, 1)[:, :cols] * (0.5 + 15 * torch.finfo(dtype).eps + 1e-5)
    assert (off <= allowed).all()


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
def test_a_scale_in_bfloat16_is_never_rounded_to_zero_or_infinity(dtype: torch.dtype, searched: bool) -> None:
    """Of groups of every size there is: the nearest one in fp64's arithmetic, 2^-133 at least; 0 for zeros."""
    top = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps]).double()
    sizes = torch.exp2(torch.arange(-149, 128).double()) * torch.tensor([[1.0], [1.49], [1.9999]]).double()
    sizes = torch.cat([top, sizes.flatten(), torch.zeros(1).double()]).clamp(max=float(top[0])).to(dtype)
    w = torch.zeros(len(sizes), 32, dtype=dtype)
    w[:, 5], w[:, 9] = sizes, -sizes
    q = quantize(w, int4_per_group_32.searched() if searched else int4_per_group_32)
    quotient = (sizes.float() / 7.0).double()
    unit = torch.exp2(torch.frexp(quotient)[1] - 8).clamp_min(2.0**-133)
    wanted = torch.where(quotient == 0, 0.0, ((quotient / unit).round() * unit).clamp_min(2.0**-133))
    got = q.scale[:, 0].double()
    if not searched:
        assert torch.equal(got, wanted)
    assert got.isfinite().all()
    assert torch.equal(got == 0, quotient == 0)
    assert (q.dequantize(torch.float32)[quotient == 0] == 0).all()


@pytest.mark.parametrize("scheme", [mxfp4, nvfp4, int4_per_group, int4_per_group_32], ids=str)
@pytest.mark.parametrize("cols", [1, 5, 33])
def test_odd_columns_share_their_last_byte_with_zero(scheme, cols: int) -> None:
    """A weight need not be a multiple of the group, nor even: what is beyond its columns is zero in no scale."""
    w = torch.randn(2, 6, cols).bfloat16()
    q = quantize(w, scheme)
    assert q.shape == w.shape
    assert q.qdata.shape == (2, 6, (cols + 1) // 2)
    assert not (q.qdata[..., -1] >> 4).any()
    padded = torch.nn.functional.pad(w, (0, 1))
    assert all(map(same_bytes, q.parts(), quantize(padded, scheme).parts()))
    x = torch.randn(3, cols).bfloat16()
    dense = torch.nn.functional.linear(x, q[1].dequantize())
    assert (torch.nn.functional.linear(x, q[1]) - dense).abs().max() <= 0.01 * dense.abs().max()
    assert torch.equal(q[:, 2:4].dequantize(), q.dequantize()[:, 2:4])


def test_columns_are_sliced_by_groups() -> None:
    q = quantize(torch.randn(8, 100).bfloat16(), mxfp4)
    part = q[:, 32:64]
    assert type(part) is QTensor
    assert part.qdata.data_ptr() == q.qdata.data_ptr() + 16
    new = torch.randn(8, 32).bfloat16()
    part.copy_(new)
    assert torch.equal(q.dequantize()[:, 32:64], quantize(new, mxfp4).dequantize())
    assert not isinstance(q[:, 30:64], QTensor)
    assert torch.equal(q[:, 30:64], q.dequantize()[:, 30:64])
    assert type(q[:, 96:]) is QTensor


def test_new_rows_of_nvfp4_change_the_global_scale_of_all() -> None:
    q = quantize(torch.randn(8, 32).bfloat16(), nvfp4)
    expected = q.dequantize()
    expected[2:4] = 0
    q[2:4].copy_(torch.zeros(2, 32))
    assert torch.equal(q.dequantize(), quantize(expected, nvfp4).dequantize())
    with pytest.raises(QTensorError, match="nvfp4 needs global_scale"):
        QTensor(q.qdata, q.scale, nvfp4)


def test_only_fp8_weights_have_dynamic_activations() -> None:
    from qtensor import Scheme

    with pytest.raises(ValueError, match="int4_per_group is weight-only"):
        Scheme(INT4_PER_GROUP)
    assert mxfp8.weight_only().activation == "none"
