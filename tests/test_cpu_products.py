"""Products with quantized weights on a CPU, for every scheme and way: within a stated bound of the exact ones."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="the numba kernels need the optional extra 'cpu'")

from qtensor.kernels import FORMATS, Audit, Parts, WeightFormat
from qtensor.kernels.cpu import instructions, orders, products, rows, stripes, tiles, vectors
from qtensor.kernels.cpu.numba_backend import NUMBA
from qtensor.kernels.formats import SOURCE_DTYPES
from qtensor.kernels.reference import TORCH

formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
relaxed = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
AMX = pytest.mark.skipif(tiles.tile_unit() != tiles.AMX, reason="this chip has no tile unit for bfloat16 (AMX)")


def quantized(fmt: WeightFormat, shape: tuple[int, ...], seed: int, size: float = 0.05) -> Parts:
    source = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    parts = Parts.of(shape, fmt)
    TORCH.quantize_into(source, parts, fmt)
    return parts


def exact(parts: Parts, fmt: WeightFormat, cols: int) -> torch.Tensor:
    return TORCH.dequantize(parts, fmt, torch.float32)[..., :cols].double()


def assert_within(
    got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, fmt: WeightFormat
) -> None:
    """|error| ≤ (2^-20 + r) Σ|w·x| + s |product| + 2^-15 Σ|w|·X, with s the spacing of x's dtype at 1.

    2^-20 is for fp32 sums in another order, s the rounding of the result; r = s where weights are rounded to x's dtype
    first, for more than a few rows of x, unless they are multiplied as single floats. X is the largest |x| of eight
    columns where a few rows are multiplied as integers, else 0. Beside that, what is too small for x's dtype or for the
    tile unit (which takes denormals for zero) may be lost, of a weight and of the result; and what is too large for x's
    dtype may be infinite.
    """
    step = torch.finfo(x.dtype).eps
    want = x.double() @ weight.T
    terms = x.double().abs() @ weight.abs().T
    if bias is not None:
        want, terms = want + bias.double(), terms + bias.double().abs()
    single = x.dtype == torch.bfloat16 and vectors.has_tiles() and tiles.tile_unit() == tiles.BY_SINGLES
    few = x.shape[0] <= products.most_in_registers(x.dtype, fmt)
    rounded = 0.0 if single or few else step
    if few and stripes.way_of(fmt, x.dtype) == stripes.WORDS:
        terms = terms + 2.0**5 * (largest_of_eight(x, fmt).double() @ weight.abs().T)
    assert got.dtype == x.dtype
    assert got.shape == want.shape
    lost = max(torch.finfo(x.dtype).smallest_normal * step, 2.0**-126) * (1 + x.double().abs().sum(1, keepdim=True))
    near = (got.double() - want).abs() <= (2.0**-20 + rounded) * terms + step * want.abs() + lost
    assert (near | (want.abs() > (1 - step) * torch.finfo(x.dtype).max)).all()


def largest_of_eight(x: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """Of each column of x, the largest magnitude of those that have its scale as integers."""
    columns = torch.tensor(orders.ORDERS[orders.order_of(fmt, stripes.WORDS)].columns)
    places, width = columns.argsort(), len(columns)
    rows, cols = x.shape
    padded = torch.nn.functional.pad(x.abs(), (0, -cols % width))
    whole = padded.view(rows, padded.shape[1] // width, width)
    words = whole[:, :, columns].view(*whole.shape[:2], 4, 16, 2)
    most = words.amax((2, 4), keepdim=True).expand_as(words).reshape(whole.shape)
    return most[:, :, places].reshape(padded.shape)[:, :cols]


@st.composite
def activations(draw: st.DrawFn, count: int, cols: int) -> torch.Tensor:
    """x `[count, cols]` of any dtype, side by side, in a wider matrix, with other rows between, or transposed."""
    dtype = draw(st.sampled_from(SOURCE_DTYPES))
    size = draw(st.sampled_from([1.0, 1.0, 1e-3, 10.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(count, cols, generator=generator) * size
    if draw(st.booleans()):  # columns of very different sizes
        x *= 2.0 ** torch.randint(-24, 8, (cols,), generator=generator)
    x = x.to(dtype)
    layout = draw(st.sampled_from(["plain", "columns", "rows", "transposed"]))
    if layout == "columns":
        return torch.nn.functional.pad(x, (3, 2), value=float("nan"))[:, 3:-2]
    if layout == "rows":
        return torch.stack([x, torch.full_like(x, float("nan"))], 1)[:, 0]
    return x.t().contiguous().t() if layout == "transposed" else x


@formats
@relaxed
@given(data=st.data())
def test_a_product_is_within_its_bound(fmt: WeightFormat, data: st.DataObject) -> None:
    height = data.draw(st.sampled_from([1, 3, 4, 16, 31, 32, 33, 100, 128, 129, 300]))
    cols = data.draw(st.sampled_from([1, 2, 15, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 2050]))
    count = data.draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 70]))
    parts = quantized(fmt, (height, cols), height * cols, data.draw(st.sampled_from([0.05, 1e-6, 10.0])))
    x = data.draw(activations(count, cols))
    bias = data.draw(st.sampled_from([None, torch.linspace(-1, 1, height)]))
    bias = None if bias is None else bias.to(x.dtype)
    weight = exact(parts, fmt, cols)
    if data.draw(st.booleans()):  # a slice of columns of something wider, or scales that lie apart
        wide = torch.zeros(height, parts.qdata.shape[1] + 7, dtype=torch.uint8).view(fmt.dtype)
        wide[:, 5:-2].copy_(parts.qdata)
        parts = Parts(
            wide[:, 5:-2], parts.scale.t().contiguous().t() if parts.scale.dim() == 2 else parts.scale, *parts[2:]
        )
    assert_within(NUMBA.linear(x, parts, fmt, bias), x, weight, bias, fmt)


@formats
@relaxed
@given(data=st.data())
def test_experts_are_within_the_bound(fmt: WeightFormat, data: st.DataObject) -> None:
    experts, height, cols = 5, data.draw(st.sampled_from([8, 33])), data.draw(st.sampled_from([32, 65]))
    counts = data.draw(st.lists(st.sampled_from([0, 0, 1, 2, 4, 7, 20, 40]), min_size=experts, max_size=experts))
    parts = quantized(fmt, (experts, height, cols), sum(counts))
    x = data.draw(activations(sum(counts), cols))
    bias = data.draw(st.sampled_from([None, torch.linspace(-1, 1, experts * height).view(experts, height)]))
    bias = None if bias is None else bias.to(x.dtype)
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    got = NUMBA.experts(x, parts, fmt, offsets, bias)
    assert got.shape == (x.shape[0], height)
    for e, (start, stop) in enumerate(pairwise([0, *offsets.tolist()])):
        own = None if bias is None else bias[e]
        assert_within(got[start:stop], x[start:stop], exact(parts.matrix(e), fmt, cols), own, fmt)


@formats
@pytest.mark.parametrize("count", [2, 20])
def test_every_stored_scale_counts(fmt: WeightFormat, count: int) -> None:
    """Those that no quantizer makes, too: e8m0 up to 2^127 and NaN; e4m3 with NaN."""
    if fmt.scale_dtype.itemsize > 1:
        return
    cols = 256 * fmt.block[1]
    parts = quantized(fmt, (1, cols), 0)
    codes = torch.arange(256, dtype=torch.uint8)
    for nan in (False, True):
        finite = TORCH.dequantize(Parts(parts.qdata, codes.view(fmt.scale_dtype)[None], *parts[2:]), fmt, torch.float32)
        usable = finite.view(256, -1).isfinite().all(1) & (finite.view(256, -1).abs().amax(1) < 2.0**126)
        scale = torch.where(usable, codes, codes if nan else 100).view(fmt.scale_dtype)[None]
        x = torch.ones(count, cols, dtype=torch.bfloat16) * 2.0**-20
        these = Parts(parts.qdata, scale, *parts[2:])
        got = NUMBA.linear(x, these, fmt)
        if nan:
            assert got.isnan().all()
        else:
            assert_within(got, x, exact(these, fmt, cols), None, fmt)


@formats
@pytest.mark.parametrize("count", [1, 3, 9, 40])
def test_a_nan_in_the_weight_reaches_its_outputs(fmt: WeightFormat, count: int) -> None:
    if not fmt.keeps_nan:
        return
    source = torch.randn(129, 65)
    source[17, 3] = float("nan")
    parts = Parts.of((129, 65), fmt)
    NUMBA.quantize_into(source, parts, fmt, Audit(refuse_nonfinite=False))
    for dtype in (torch.bfloat16, torch.float32):
        out = NUMBA.linear(torch.randn(count, 65).to(dtype), parts, fmt)
        assert out[:, 17].isnan().all()
        assert out.isnan().sum() == count


@formats
@pytest.mark.parametrize("count", [3, 20])
def test_x_of_any_size(fmt: WeightFormat, count: int) -> None:
    """Infinity and NaN in one row of x stay in that row; sizes at both ends of fp32 change nothing."""
    parts = quantized(fmt, (40, 96), 1)
    weight = exact(parts, fmt, 96)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(count, 96).to(dtype)
        x[1, 5], x[2, 7] = float("inf"), float("nan")
        got = NUMBA.linear(x, parts, fmt)
        assert not got[1:3].isfinite().any()
        assert got[:1].isfinite().all()
        assert got[3:].isfinite().all()
        for size in (1e-25, 1e30):
            x = (torch.randn(count, 96) * size).to(dtype)
            assert_within(NUMBA.linear(x, parts, fmt), x, weight, None, fmt)


@formats
def test_gradients_of_x_and_bias(fmt: WeightFormat) -> None:
    parts = quantized(fmt, (40, 96), 1)
    weight = exact(parts, fmt, 96).float()
    for count in (2, 30):
        x, bias = torch.randn(count, 96, requires_grad=True), torch.zeros(40, requires_grad=True)
        NUMBA.linear(x, parts, fmt, bias).sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).expand(count, -1), rtol=1e-4, atol=1e-4)
        assert torch.equal(bias.grad, torch.full((40,), float(count)))
        bias.grad = None
        NUMBA.linear(x.detach(), parts, fmt, bias).sum().backward()
        assert torch.equal(bias.grad, torch.full((40,), float(count)))


@AMX
def test_torch_and_the_loops_take_turns_with_the_tile_unit() -> None:
    """Each sets it up for itself: what one leaves must not be what the other finds."""
    fmt = FORMATS["mxfp4"]
    parts = quantized(fmt, (256, 256), 2)
    x, dense = torch.randn(40, 256).bfloat16(), torch.randn(256, 256).bfloat16()
    ours, theirs = NUMBA.linear(x, parts, fmt), torch.nn.functional.linear(x, dense)
    for _ in range(20):
        assert torch.equal(NUMBA.linear(x, parts, fmt), ours)
        assert torch.equal(torch.nn.functional.linear(x, dense), theirs)


@formats
def test_without_tiles_and_without_openmp(fmt: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways that other chips and systems take."""
    monkeypatch.setattr(vectors, "has_tiles", lambda: False)
    monkeypatch.setattr(rows, "_openmp", lambda: None)
    parts = quantized(fmt, (700, 300), 3)
    weight = exact(parts, fmt, 300)
    for count in (1, 6, 30):
        x = torch.randn(count, 300).bfloat16()
        assert_within(NUMBA.linear(x, parts, fmt), x, weight, None, fmt)


@formats
@pytest.mark.parametrize("way", range(4), ids=["chunks", "singles", "pairs", "words"])
def test_every_way_to_multiply_a_few_rows(fmt: WeightFormat, way: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that this chip can take, also the ones that it does not choose: partial stripes, more scales than are
    made floats at once, rows that are no multiple of four."""
    if way == stripes.PAIRS and not stripes.has_pairs():
        pytest.skip("this chip does not multiply pairs of bfloat16 at full speed")
    if way == stripes.WORDS and (fmt.element == "e4m3" or not stripes.has_words()):
        pytest.skip("this chip does not multiply pairs of integers, or the format has none")
    if way == stripes.SINGLES and stripes.way_of(fmt, torch.float32) != way:
        pytest.skip("this chip has no table look-ups in registers, or the format none that pays")
    monkeypatch.setattr(stripes, "way_of", lambda fmt, dtype: way)
    monkeypatch.setattr(vectors, "has_tiles", lambda: False)
    for height, cols in ((7, 130), (33, 2050), (4, 4288)):
        parts = quantized(fmt, (height, cols), 4)
        weight = exact(parts, fmt, cols)
        for count in (1, 2, 6, 7):
            x = torch.randn(count, cols).bfloat16()
            assert_within(products.linear(x, parts, fmt, None), x, weight, None, fmt)


@pytest.mark.parametrize("unit", [tiles.BY_PAIRS, tiles.BY_SINGLES], ids=["pairs", "singles"])
def test_units_made_of_products(unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one that this chip does not choose: more columns than are decoded or multiplied at once, partial
    stripes, rows of the weight that are no multiple of 32, an odd and an even number of tiles."""
    if not {"+avx512bf16", "+avx512vbmi"} <= set(instructions.chip_features()):
        pytest.skip("this chip has no instructions for bfloat16, or no look-ups in registers")
    for module in (tiles, vectors, products):
        monkeypatch.setattr(module, "tile_unit", lambda: unit)
    for name in ("fp8_per_block", "nvfp4", "int8_per_channel"):
        fmt = FORMATS[name]
        for height, cols in ((37, 130), (33, 1298), (130, 4288)):
            parts = quantized(fmt, (height, cols), 6)
            weight = exact(parts, fmt, cols)
            for count in (17, 40):
                x = torch.randn(count, cols).bfloat16()
                assert_within(products.linear(x, parts, fmt, None), x, weight, None, fmt)


def test_every_code_in_stripes() -> None:
    """Also those that no quantizer makes: -128 of int8, -0 of e2m1 and e4m3; x says which column is which."""
    for fmt in FORMATS.values():
        cols = 512
        parts = quantized(fmt, (1, cols), 5)
        codes = torch.arange(cols // fmt.per_byte).to(torch.uint8)
        codes = torch.where(codes & 0x7F == 0x7F, 0, codes) if fmt.element == "e4m3" else codes
        parts = Parts(codes.view(fmt.dtype).view(1, -1), *parts[1:])
        x = torch.eye(cols)
        weight = exact(parts, fmt, cols)
        for dtype in (torch.bfloat16, torch.float32):
            for at in range(0, cols, 4):
                some = x[at : at + 4].to(dtype)
                assert_within(NUMBA.linear(some, parts, fmt), some, weight, None, fmt)


def test_an_older_chip(tmp_path: Path) -> None:
    """What numba makes for a chip without AVX-512 (and so without its table look-ups), in a process of its own."""
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this chip has no AVX2")
    names = list(FORMATS) if os.environ.get("QTENSOR_ENDURANCE") else ["mxfp4", "int4_per_group"]
    code = (
        "import torch, test_cpu_products as t\n"
        "assert not t.vectors.has_tiles()\n"
        f"for name in {names}:\n"
        "    fmt = t.FORMATS[name]\n"
        "    parts = t.quantized(fmt, (37, 130), 4)\n"
        "    for count in (1, 5):\n"
        "        x = torch.randn(count, 130).bfloat16()\n"
        "        t.assert_within(t.NUMBA.linear(x, parts, fmt), x, t.exact(parts, fmt, 130), None, fmt)\n"
    )
    chip = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c", "NUMBA_CACHE_DIR": str(tmp_path)}
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *sys.path])
    environment = os.environ | chip | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120, env=environment)
