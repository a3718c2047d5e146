"""Every Triton kernel on every chip, byte for byte against the reference: the PTX that Triton compiles for it, executed
by support/gpu.

A cell is a format, a chip, a dtype and a class of shapes: what Triton specialises a kernel for. Compiling it is what
takes time, so a cell tries many values. Continuous integration has a spread of cells in which every format, chip, dtype
and class occurs; `make endurance` has them all.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.nvidia.compiler import get_ptxas

from qtensor.kernels import (
    FORMATS,
    FP8_PER_BLOCK,
    FP8_PER_CHANNEL,
    FP8_PER_TENSOR,
    SEARCHES,
    SOURCE_DTYPES,
    Audit,
    NonFinite,
    Parts,
    WeightFormat,
)
from qtensor.kernels.reference import TORCH
from qtensor.kernels.triton import TRITON, activation, launch, per_channel, per_group, per_tensor
from qtensor.schemes.scheme import SCHEMES
from support.gpu.driver import CHIPS, Gpu, simulated_gpu
from support.gpu.ptx import Program
from support.kernel_cases import (
    LAYOUTS,
    VALUES,
    assert_equal,
    assert_equal_parts,
    canonical,
    check_dequantize,
    check_nonfinite,
    check_quantize,
    destination,
    lay_out,
    make_values,
)
from support.kernel_contract import assert_gives_the_references_results

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
ENDURANCE = bool(os.environ.get("QTENSOR_ENDURANCE"))
at_length = pytest.mark.skipif(not ENDURANCE, reason="every format, chip, dtype and class of shapes: make endurance")
CLASSES: dict[str, tuple[tuple[int, ...], str]] = {
    "aligned": ((48, 256), "contiguous"),
    "odd": ((5, 257), "column slice"),
    "strided": ((33, 48), "transposed"),
    "K-1408": ((5, 1408), "contiguous"),
    "stack": ((2, 17, 144), "every other"),
}
SOME = [(False, "edges"), (True, "normal"), (False, "huge"), (True, "subnormal")]
"""Of the values, whether ptxas may fuse products and sums, in continuous integration."""
SPREAD = {
    "fp8_per_tensor": ("strided", torch.float16, 100),
    "fp8_per_channel": ("K-1408", torch.float32, 80),
    "int8_per_channel": ("odd", torch.float16, 89),
}
"""What continuous integration has besides every format aligned, in bf16, on sm_90."""


def cells() -> Iterator[object]:
    for name in FORMATS:
        for kind in CLASSES:
            for dtype in SOURCE_DTYPES:
                for arch in CHIPS:
                    usual = (kind, dtype, arch) in (("aligned", torch.bfloat16, 90), SPREAD.get(name))
                    label = f"{name}-{kind}-{str(dtype).removeprefix('torch.')}-sm_{arch}"
                    yield pytest.param(name, kind, dtype, arch, id=label, marks=() if usual else at_length)


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """sm_90, or the chip that a test asks for as `arch`."""
    called = getattr(request.node, "callspec", None)
    with simulated_gpu(called.params.get("arch", 90) if called else 90) as simulated:
        yield simulated


def some(names: list[str]) -> list[object]:
    """Every format; at length, all but these."""
    return [pytest.param(name, marks=() if name in names else at_length) for name in FORMATS]


@pytest.mark.parametrize(("name", "kind", "dtype", "arch"), list(cells()))
def test_equals_the_reference(name: str, kind: str, dtype: torch.dtype, arch: int, gpu: Gpu) -> None:
    fmt, (shape, layout) = FORMATS[name], CLASSES[kind]
    aligned = kind == "aligned"
    for gpu.contract, values in product((False, True), VALUES) if ENDURANCE else SOME if aligned else SOME[:2]:
        source = lay_out(make_values(values, shape, dtype, seed=7), layout)
        check_quantize(TRITON, source, fmt)
    for poison in (math.nan, math.inf, -math.inf) if ENDURANCE else (math.nan, -math.inf) if aligned else (math.inf,):
        source[..., -1, -1] = poison
        check_nonfinite(TRITON, source, fmt)
        source[..., 1, 3] = -poison
        check_nonfinite(TRITON, source, fmt)
        if ENDURANCE:
            check_quantize(TRITON, source, fmt, refuse=False)
    for seed in (1, 5) if ENDURANCE else (1,):
        check_dequantize(TRITON, shape, fmt, dtype, seed)
    if aligned and dtype == torch.bfloat16:
        for program in {program.text: program for program, _, _ in gpu.launches}.values():
            assert_good_machine_code(program, fmt)
        for program, _, executed in gpu.launches:
            assert executed["div"] < 0.5 * math.prod(shape), f"{program.name} divides element by element"
            assert not re.search(r"\b(div|rem)\.[su]64", program.text), f"{program.name} divides 64-bit integers"


USUALLY_SEARCHED = {
    ("nvfp4", "aligned"),
    ("int8_per_channel", "odd"),
    ("int4_per_group", "stack"),
    ("fp8_per_channel", "K-1408"),
    ("fp8_per_block", "aligned"),
}


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "arch"),
    [
        pytest.param(name, kind, dtype, arch, id=f"{name}-{kind}-sm_{arch}", marks=() if usual else at_length)
        for name in SEARCHES
        for kind, dtype, arch in (
            ("aligned", torch.bfloat16, 90), ("odd", torch.float16, 80), ("K-1408", torch.float32, 89),
            ("stack", torch.bfloat16, 100),
        )
        for usual in [(name, kind) in USUALLY_SEARCHED]
    ],
)  # fmt: skip
def test_searched_scales_equal_the_reference(name: str, kind: str, dtype: torch.dtype, arch: int, gpu: Gpu) -> None:
    """Whether or not products and sums are fused."""
    fmt, (shape, layout) = SCHEMES[name].searched().format, CLASSES[kind]
    for gpu.contract, values in product((False, True), VALUES) if ENDURANCE else SOME:
        source = lay_out(make_values(values, shape, dtype, seed=7), layout)
        gpu.launches.clear()
        check_quantize(TRITON, source, fmt)
        assert gpu.launches
    source[..., -1, -1] = math.nan
    check_nonfinite(TRITON, source, fmt)
    if (name, kind) in USUALLY_SEARCHED:  # Odd layouts take more registers than there are: docs/kernels.md.
        for program in {program.text: program for program, _, _ in gpu.launches}.values():
            assert spilled_bytes(program) == 0


@at_length
def test_searched_rows_too_long_for_one_pass(gpu: Gpu) -> None:
    for name, cols in product(("fp8_per_channel", "int8_per_channel"), (4097, 2 * 8192 + 5)):
        fmt = SCHEMES[name].searched().format
        source = make_values("normal", (3, cols), torch.bfloat16, 4000)
        source[1, cols - 1], source[2, 5] = math.inf, math.nan
        (expected, _), (actual, _) = (destination(source.shape, fmt) for _ in range(2))
        TORCH.quantize_into(source, expected, fmt, Audit(False))
        per_channel.quantize(source, actual, fmt, Audit(False), 0, one_pass_cols=4096)
        assert_equal_parts(actual, expected)


def assert_good_machine_code(program: Program, fmt: WeightFormat) -> None:
    """16 bytes at a time wherever the addresses allow it, and nothing spilled."""
    loads, stores = (re.search(rf"{access}\.global\S*\.v4\.b32", program.text) for access in ("ld", "st"))
    restores = "dequantize" in program.name or program.name == "per_row"
    narrow = fmt.name == "nvfp4"  # A group's codes are 8 bytes.
    assert loads or (restores and narrow), f"{program.name}: no 16-byte load"
    assert stores or "amax" in program.name or (not restores and narrow), f"{program.name}: no 16-byte store"
    assert spilled_bytes(program) == 0


def spilled_bytes(program: Program) -> int:
    """What did not fit in the registers of a thread, as the newest Triton compiles it: 3.7 and 3.8 spill up to 40 bytes
    in some kernels."""
    if triton.__version__ < "3.9":
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(program.text)
        arch = re.search(r"\.target (sm_\w+)", program.text)
        assert arch
        command = [
            get_ptxas(program.target).path,
            "-v",
            f"--gpu-name={arch.group(1)}",
            str(path),
            "-o",
            f"{path}.cubin",
        ]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert found, log
    return sum(map(int, found.groups()))


@pytest.mark.parametrize("name", some(["fp8_per_channel", "nvfp4"]))
def test_products_of_few_rows(name: str, gpu: Gpu) -> None:
    """x is used as it is, in one launch; more rows dequantize once."""
    fmt, shape = FORMATS[name], (3, 40, 208)
    stack, parts = make_values("normal", shape, torch.bfloat16, 7), Parts.of(shape, fmt)
    TORCH.quantize_into(stack, parts, fmt)
    x, bias = make_values("normal", (9, 208), torch.bfloat16, 8), make_values("normal", shape[:2], torch.bfloat16, 9)
    calls = [
        ("linear", (x[:5], parts.matrix(1), fmt, bias[1])),
        ("linear", (x[:5], parts.matrix(0), fmt)),
        ("experts", (x, parts, fmt, torch.tensor([4, 4, 9]), bias)),
    ]
    for operation, arguments in calls if ENDURANCE else calls[::2]:
        gpu.launches.clear()
        found = getattr(TRITON, operation)(*arguments)
        assert [program.name for program, _, _ in gpu.launches] == ["product_kernel"]
        torch.testing.assert_close(found, getattr(TORCH, operation)(*arguments), rtol=2e-2, atol=2e-2)
        assert spilled_bytes(gpu.launches[0][0]) == 0
    gpu.launches.clear()
    many = make_values("normal", (40, 208), torch.bfloat16, 8)
    assert torch.equal(TRITON.linear(many, parts.matrix(1), fmt), TORCH.linear(many, parts.matrix(1), fmt))
    assert len(gpu.launches) == 1
    x.requires_grad_()
    TRITON.linear(x, parts.matrix(1), fmt).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", FORMATS)
@at_length
def test_contract(name: str, gpu: Gpu) -> None:
    assert_gives_the_references_results(TRITON, FORMATS[name])


sizes = st.sampled_from([1, 2, 3, 16, 17, 127, 128, 129, 200])
sources = st.builds(
    lambda shape, kind, dtype, seed, layout: lay_out(make_values(kind, shape, dtype, seed), layout),
    st.one_of(st.tuples(sizes, sizes), st.tuples(st.integers(1, 3), st.integers(1, 130), st.sampled_from([1, 5, 130]))),
    st.sampled_from(VALUES),
    st.sampled_from(SOURCE_DTYPES),
    st.integers(0, 2**20),
    st.sampled_from(LAYOUTS),
)


@pytest.mark.parametrize("name", FORMATS)
@at_length
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(source=sources, arch=st.sampled_from(CHIPS), poison=st.lists(st.integers(0, 2**20), max_size=3))
def test_anything(name: str, source: torch.Tensor, arch: int, poison: list[int]) -> None:
    with simulated_gpu(arch):
        check_quantize(TRITON, source, FORMATS[name])
        for place in poison:
            index = np.unravel_index(place % source.numel(), source.shape)
            source[tuple(map(int, index))] = (math.nan, math.inf, -math.inf)[place % 3]
        if poison:
            check_nonfinite(TRITON, source, FORMATS[name])
        check_dequantize(TRITON, tuple(source.shape), FORMATS[name], source.dtype, source.shape[-1])


@pytest.mark.parametrize("name", some(["fp8_per_channel", "nvfp4"]))
def test_offsets_beyond_32_bits(name: str, gpu: Gpu) -> None:
    """Never touched but for two matrices, the memory costs address space alone."""
    fmt, far, shape = FORMATS[name], 2**31 + 64, (2, 3, 32)
    x = torch.empty(far + 1000, dtype=torch.bfloat16).as_strided(shape, (far, 32, 1))
    stored = fmt.qdata_shape(shape)
    q = torch.empty(far + 1000, dtype=torch.uint8).as_strided(stored, (far, 32, 1)).view(fmt.dtype)
    x.copy_(make_values("normal", shape, torch.bfloat16, 1))
    expected, _ = destination(shape, fmt)
    actual = Parts(q, *Parts.of(shape, fmt)[1:])
    TORCH.quantize_into(x, expected, fmt)
    TRITON.quantize_into(x, actual, fmt)
    assert_equal_parts(actual, expected)
    out = torch.empty(far + 1000, dtype=torch.bfloat16).as_strided(shape, (far, 32, 1))
    TRITON.dequantize(actual, fmt, torch.bfloat16, out)
    assert_equal(out, TORCH.dequantize(expected, fmt, torch.bfloat16, torch.empty(shape, dtype=torch.bfloat16)))


@pytest.mark.parametrize("name", some([]))
def test_an_origin_beyond_32_bits(name: str, gpu: Gpu) -> None:
    x = make_values("normal", (9, 48), torch.bfloat16)
    x[4, 7] = math.nan
    audit = Audit()
    TRITON.quantize_into(x, destination(x.shape, FORMATS[name])[0], FORMATS[name], audit, 2**40)
    with pytest.raises(NonFinite) as refused:
        audit.verify()
    assert refused.value.index == 2**40 + 4 * 48 + 7


def test_rows_too_long_for_one_pass(gpu: Gpu) -> None:
    for cols in (4097, 2 * 8192 + 5):
        source = make_values("one outlier", (3, cols), torch.bfloat16, 4000)
        source[1, cols - 1], source[2, 5] = math.inf, math.nan
        (expected, _), (actual, _) = (destination(source.shape, FP8_PER_CHANNEL) for _ in range(2))
        TORCH.quantize_into(source, expected, FP8_PER_CHANNEL, Audit(False))
        per_channel.quantize(source, actual, FP8_PER_CHANNEL, Audit(False), 0, one_pass_cols=4096)
        assert_equal_parts(actual, expected)
        check_activation(source, FP8_PER_CHANNEL, one_pass_cols=4096)


@pytest.mark.parametrize("name", some(["int4_per_group"]))
def test_more_groups_than_32_bits_count(name: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix that no machine here holds: its kernels, on one that fits."""
    fmt = FORMATS[name]
    if fmt.granularity != "group":
        return
    assert per_group._index(fmt, 1 << 24, fmt.block[1] * 128) == tl.int64
    assert per_group._index(fmt, 1 << 20, fmt.block[1] * 128) == tl.int32
    monkeypatch.setattr(per_group, "_index", lambda *_: tl.int64)
    check_quantize(TRITON, make_values("normal", (5, 257), torch.bfloat16), fmt)
    check_dequantize(TRITON, (5, 257), fmt, torch.bfloat16, 3)


@pytest.mark.parametrize(
    "cols", [1, 16, 144, 256, 257, 576, 768, 896, 1152, 1408, 2048, 2816, 5632, 8192, 11008, 14336]
)
def test_few_lanes_are_idle(cols: int) -> None:
    block, tail = launch.split(cols)
    assert block + tail >= cols
    assert all(n & (n - 1) == 0 for n in (block, tail))
    if cols >= 512:
        assert (block + tail) / cols < 1.15
    else:
        assert tail == 0


@pytest.mark.parametrize("schedule", [None, 1, *(pytest.param(n, marks=at_length) for n in range(2, 20))])
def test_programs_in_any_order(schedule: int | None, gpu: Gpu) -> None:
    """What programs share are a maximum, the first finding and the sums: the order of their accesses does not matter.
    The matrix is written in pieces, in any order and with overlaps."""
    gpu.schedule = schedule
    source = make_values("normal", (60, 40), torch.bfloat16, 5)
    amax = torch.zeros(1)
    for rows in (slice(40, 60), slice(0, 10), slice(5, 40), slice(0, 10)):
        per_tensor.accumulate_amax(source[rows], amax, Audit(), 0)
    assert amax.item() == source.abs().max().item()
    (expected, _), (actual, _) = (destination(source.shape, FP8_PER_TENSOR) for _ in range(2))
    TORCH.quantize_into(source, expected, FP8_PER_TENSOR)
    per_tensor.scale_and_cast(source, amax, actual, FP8_PER_TENSOR, Audit())
    assert_equal_parts(actual, expected)
    stack = make_values("one outlier", (2, 70, 40), torch.bfloat16, 17)
    check_quantize(TRITON, stack, FP8_PER_TENSOR)
    stack[1, 60, 3], stack[0, 7, 39], stack[1, 0, 0] = math.nan, -math.inf, math.inf
    check_nonfinite(TRITON, stack, FP8_PER_TENSOR)


def check_activation(x: torch.Tensor, fmt: WeightFormat, one_pass_cols: int = 16384) -> None:
    expected, expected_scale = TORCH.quantize_activation(x, fmt)
    group = fmt.block[1] if fmt.granularity == "block" else max(x.shape[1], 1)
    actual, scale = activation.quantize(x, group, one_pass_cols)
    assert_equal(canonical(actual), canonical(expected.contiguous()))
    assert_equal(scale, expected_scale)


@pytest.mark.parametrize("fmt", [FP8_PER_CHANNEL, FP8_PER_BLOCK], ids=["token", "group"])
@pytest.mark.parametrize(
    ("shape", "dtype", "arch"),
    [
        ((9, 1408), torch.bfloat16, 90),
        pytest.param((5, 257), torch.float16, 80, marks=at_length),
        pytest.param((33, 48), torch.float32, 100, marks=at_length),
    ],
)
def test_activation(fmt: WeightFormat, shape: tuple[int, ...], dtype: torch.dtype, arch: int, gpu: Gpu) -> None:
    for values in VALUES:
        x = make_values(values, shape, dtype)
        for poison in (0.0, math.nan, math.inf, -math.inf):
            x[3, 17] = poison
            check_activation(x, fmt)


def test_nothing_to_do(gpu: Gpu) -> None:
    for fmt in FORMATS.values():
        for shape in ((0, 4), (4, 0), (0, 3, 4), (2, 0, 4), (2, 3, 0)):
            check_quantize(TRITON, torch.zeros(shape), fmt)
            assert TRITON.dequantize(Parts.of(shape, fmt), fmt, torch.float32).numel() == 0
    assert gpu.launches == []


def test_refuses_what_it_cannot_do() -> None:
    parts = Parts.of((2, 2), FP8_PER_CHANNEL)
    with pytest.raises(TypeError, match="float64"):
        TRITON.quantize_into(torch.zeros(2, 2, dtype=torch.float64), parts, FP8_PER_CHANNEL)
    other = WeightFormat("fp8_e5m2", torch.float8_e5m2, 57344.0, "channel")
    with pytest.raises(TypeError, match="e5m2"):
        TRITON.quantize_into(torch.zeros(2, 2), parts, other)
