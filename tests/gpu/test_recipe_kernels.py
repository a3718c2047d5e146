"""Recipes in the Triton kernels, byte for byte against the reference: as `test_kernels.py` does it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from test_kernels import CLASSES, ENDURANCE, SOME, assert_good_machine_code, at_length

from qtensor.kernels import RECIPES
from qtensor.kernels.recipes import OWN
from qtensor.kernels.triton import TRITON
from qtensor.schemes.scheme import as_scheme
from support.gpu.driver import Gpu, simulated_gpu
from support.kernel_cases import VALUES, check_nonfinite, check_quantize, lay_out, make_values

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    with simulated_gpu(request.node.callspec.params["arch"]) as simulated:
        yield simulated


USUALLY_BY_RECIPE = {
    ("int8_per_channel:compressed-tensors", "odd"),
    ("int4_asymmetric:compressed-tensors", "aligned"),
    ("mxfp4:compressed-tensors", "odd"),
    ("nvfp4:compressed-tensors", "aligned"),
    ("mxfp8:torchao", "stack"),
    ("int4_per_group_32:compressed-tensors", "stack"),
    ("fp8_per_block:compressed-tensors", "aligned"),
    ("fp8_per_tensor:compressed-tensors", "odd"),
    ("fp8_per_channel:quark", "K-1408"),
}


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "arch"),
    [
        pytest.param(name, kind, dtype, arch, id=f"{name}-{kind}-sm_{arch}", marks=() if usual else at_length)
        for tool, formats in RECIPES.items()
        for name in [f"{name}:{tool}" for name, own in formats.items() if own in OWN]
        for kind, dtype, arch in (
            ("aligned", torch.bfloat16, 90), ("odd", torch.float16, 80), ("K-1408", torch.float32, 89),
            ("stack", torch.bfloat16, 100),
        )
        for usual in [(name, kind) in USUALLY_BY_RECIPE]
    ],
)  # fmt: skip
def test_recipes_equal_the_reference(name: str, kind: str, dtype: torch.dtype, arch: int, gpu: Gpu) -> None:
    """Whether or not products and sums are fused. One column is of another size than the others, down to quotients that
    vanish in the weight's dtype."""
    fmt, (shape, layout) = as_scheme(name).format, CLASSES[kind]
    for gpu.contract, values in product((False, True), VALUES) if ENDURANCE else SOME:
        source = make_values(values, shape, dtype, seed=7)
        source[..., 2] = (source[..., 2].float() * 2.0**-60).to(dtype)
        gpu.launches.clear()
        check_quantize(TRITON, lay_out(source, layout), fmt)
        assert gpu.launches
    for poison in (math.nan, -math.inf):
        source[..., -1, -1] = poison
        source[..., 1, 3] = -poison
        check_nonfinite(TRITON, lay_out(source, layout), fmt)
    if kind == "aligned":
        for program in {program.text: program for program, _, _ in gpu.launches}.values():
            assert_good_machine_code(program, fmt)
        for program, _, executed in gpu.launches:
            assert executed["div"] < 0.5 * math.prod(shape), f"{program.name} divides element by element"
