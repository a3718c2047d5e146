"""What vLLM's GPU kernels are given, and what they make of it: packed weights, products and reloads, with the kernels'
arithmetic in torch (support/vllm/reference_kernels.py), on chips that this machine takes itself for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4, marlin_utils_fp8, marlin_utils_test
from vllm.scalar_type import scalar_types

from qtensor import quantize
from qtensor.integrations.vllm.dispatch import linear_compute
from qtensor.integrations.vllm.gpu import GpuLinear
from qtensor.integrations.vllm.layers import process
from qtensor.integrations.vllm.options import parse
from qtensor.kernels import FORMATS
from qtensor.schemes.scheme import SCHEMES
from qtensor.tensor.qtensor import QTensor
from support.vllm.fake_gpu import Chip, pretend
from support.vllm.reference_kernels import marlin_dequantize

SEED = torch.Generator().manual_seed(11)
SERVED = [name for name in FORMATS if name != "int4_asymmetric"]
GRID: list[tuple[Chip, str]] = [
    (75, "mxfp8"), (75, "nvfp4"), (75, "int4_per_group"),
    *((80, name) for name in SERVED),
    *((90, name) for name in SERVED),
    (100, "nvfp4"), (120, "mxfp4"), ("gfx90a", "int4_per_group"), ("gfx942", "int4_per_group"), ("gfx950", "mxfp8"),
]  # fmt: skip


def weight_of(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """With rows, and a row of zeros, of very different size."""
    size = torch.randn(rows, 1, generator=SEED).mul(2).exp()
    size[rows // 2] = 0.0
    return (torch.randn(rows, cols, generator=SEED) * size).to(dtype)


def layer_of(name: str, rows: int, cols: int, dtype: torch.dtype, **options: Any) -> tuple[GpuLinear, nn.Module]:
    """The product of a layer, and the layer without its weight."""
    scheme, layer = SCHEMES[name], nn.Module()
    compute = linear_compute(scheme, parse(scheme, options, {}), (rows, cols), dtype, "up_proj")
    assert isinstance(compute, GpuLinear)
    layer.logical_widths, layer.orig_dtype = [rows], dtype  # type: ignore[assignment]
    layer.input_size_per_partition, layer.output_size_per_partition = cols, rows  # type: ignore[assignment]
    layer.weight_block_size = [128, 128] if name == "fp8_per_block" else None  # type: ignore[assignment]
    return compute, layer


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def served(weight: QTensor, compute: GpuLinear, dtype: torch.dtype) -> QTensor:
    """The weight as its kernel keeps it: some have scales of 16 bits."""
    kernel, fmt = type(compute.kernel).__name__, weight.scheme.format
    rounds = fmt.name == "int4_per_group" or kernel == "MarlinFP8ScaledMMLinearKernel"
    qdata, scale, *rest = weight.parts()
    if rounds:
        scale = scale.to(dtype).float()
    if kernel == "MarlinNvFp4LinearKernel":  # Its scales have no values below 2^-6.
        scale = torch.where(scale.float() < 2.0**-6, 0.0, scale.float()).to(scale.dtype)
    return QTensor(qdata, scale, weight.scheme, dtype, global_scale=rest[0] if rest else None, cols=weight.cols)


@pytest.mark.parametrize(("chip", "name"), GRID, ids=lambda part: str(part))
def test_products_and_the_weight_read_back(chip: Chip, name: str) -> None:
    """Bytes are those of `quantize`, from the packed layout. A product with activations as they are is that with the
    dequantized weight, rounded, and rounded again with a bias."""
    dtype = torch.float16 if chip == 75 else torch.bfloat16
    for rows, cols in ((256, 128), (192, 256)):
        with pretend(chip, values=True):
            compute, layer = layer_of(name, rows, cols, dtype)
            layer.register_parameter("bias", nn.Parameter(torch.randn(rows, generator=SEED).to(dtype)))
            bias = layer.bias.detach().clone()
            quantized = quantize(weight_of(rows, cols, dtype), name)
            expected = served(QTensor.with_parts(quantized, *quantized.parts().map(torch.clone)), compute, dtype)
            compute.publish(layer, quantized)
            assert torch.equal(layer.bias, bias)
            found = compute.read(layer)
            assert found is not None
            assert all(map(same_bytes, found.parts(), expected.parts()))
            assert torch.equal(compute.dequantize(layer), expected.dequantize())
            if chip == "gfx950" or "Cutlass" in type(compute.kernel).__name__:
                continue  # Their products round activations to fp8 themselves.
            x = torch.randn(3, cols, generator=SEED).to(dtype)
            out = compute.apply(layer, x, layer.bias).double()
            weight = expected.dequantize(torch.float32).double()
            exact = x.double() @ weight.t() + bias.double()
            step = torch.finfo(dtype).eps
            summed = 2.0**-20 * (x.double().abs() @ weight.abs().t())
            assert bool(((out - exact).abs() <= step * (exact.abs() + bias.double().abs()) + summed).all())


def test_int8_activations_by_int8_weights() -> None:
    """Each row of x is off by at most half a step of its largest element."""
    with pretend(80, values=True):
        compute, layer = layer_of("int8_per_channel", 256, 128, torch.bfloat16, activation="int8")
        quantized = quantize(weight_of(256, 128), "int8_per_channel")
        weight, x = quantized.dequantize(torch.float32).double(), torch.randn(3, 128, generator=SEED).bfloat16()
        compute.publish(layer, quantized)
        assert same_bytes(layer.weight.t(), quantized.qdata)
        found, exact = compute.apply(layer, x, None).double(), x.double() @ weight.t()
        half = x.double().abs().amax(1, keepdim=True) / 254
        assert bool(((found - exact).abs() <= half * weight.abs().sum(1) + exact.abs() * 2.0**-7).all())


@given(
    chip=st.sampled_from([80, 90]),
    name=st.sampled_from(["mxfp8", "mxfp4", "nvfp4", "int8_per_channel", "int4_per_group", "int4_per_group_32"]),
    rows=st.integers(1, 200),
    groups=st.integers(1, 3),
)
def test_any_shape_is_read_back(chip: Chip, name: str, rows: int, groups: int) -> None:
    """Kernels pad what is no multiple of their tiles."""
    across = {"int8_per_channel": 36}.get(name) or FORMATS[name].block[1]
    with pretend(chip, values=True):
        compute, layer = layer_of(name, rows, groups * across, torch.bfloat16)
        quantized = quantize(weight_of(rows, groups * across), name)
        expected = served(QTensor.with_parts(quantized, *quantized.parts().map(torch.clone)), compute, torch.bfloat16)
        compute.publish(layer, quantized)
        found = compute.read(layer)
        assert found is not None
        assert all(map(same_bytes, found.parts(), expected.parts()))


def test_a_layout_that_is_no_order_of_the_bytes_is_not_read() -> None:
    """A kernel that computes with the codes: there is no answer, rather than a wrong one."""
    with pretend(80, values=True):
        compute, layer = layer_of("mxfp8", 128, 128, torch.bfloat16)
        inner = compute.kernel.process_weights_after_loading

        def adds(layer: Any) -> None:
            inner(layer)
            layer.weight.data += layer.weight.data.flip(0)

        compute.kernel.process_weights_after_loading = adds
        compute.publish(layer, quantize(weight_of(128, 128), "mxfp8"))
        assert compute.read(layer) is None


@pytest.mark.parametrize(("chip", "name"), [(80, "nvfp4"), (80, "fp8_per_channel"), (90, "int4_per_group")])
def test_new_values_go_where_the_old_ones_are(chip: Chip, name: str) -> None:
    """Made aside while the old ones serve, then copied into the same memory; a bias is not reordered twice."""
    with pretend(chip, values=True):
        compute, layer = layer_of(name, 256, 256, torch.bfloat16)
        layer.register_parameter("bias", nn.Parameter(torch.randn(256), requires_grad=False))
        old, new = (quantize(weight_of(256, 256), name) for _ in range(2))
        expected = served(QTensor.with_parts(new, *new.parts().map(torch.clone)), compute, torch.bfloat16)
        compute.publish(layer, old)
        before = {k: (id(p), p.data_ptr(), p.clone()) for k, p in layer._parameters.items() if p.numel()}

        def publish(layer: Any) -> None:
            weight = layer._parameters.pop("weight")
            compute.publish(layer, weight)

        values = {"weight": nn.Parameter(new, requires_grad=False), "bias": layer.bias}
        made = process(layer, values, publish)
        assert all(torch.equal(layer._parameters[k], saved) for k, (_, _, saved) in before.items())
        made.place()
        assert {k: (id(p), p.data_ptr()) for k, p in layer._parameters.items() if p.numel()} == {
            k: entry[:2] for k, entry in before.items()
        }
        found = compute.read(layer)
        assert found is not None
        assert all(map(same_bytes, found.parts(), expected.parts()))
        assert torch.equal(layer.bias, before["bias"][2])


def test_memory_that_was_packed_is_given_back() -> None:
    """A load holds its results to the end: they would stand beside the packed weights of all layers."""
    with pretend(80, values=True):
        for name in SERVED:
            compute, layer = layer_of(name, 256, 256, torch.bfloat16)
            weight = quantize(weight_of(256, 256), name)
            compute.publish(layer, weight)
            assert weight.qdata.untyped_storage().nbytes() == 0, name


# The stand-ins, held to vLLM's own ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "fp8", "uint4b8", "uint8b128"])
def test_the_stand_in_for_marlin_reads_what_vllm_packs(kind: str) -> None:
    """vLLM's test utilities make a packed weight and the weight it stands for."""
    rows, cols = 128, 256
    weight = (torch.randn(rows, cols, generator=SEED) / 8).bfloat16()
    with pretend(80, values=True):
        gain = None
        if kind == "nvfp4":
            exact, packed, scales, gain = marlin_utils_fp4.rand_marlin_weight_nvfp4_like(weight, 16)
            type_ = scalar_types.float4_e2m1f
        elif kind == "mxfp4":
            exact, packed, scales = marlin_utils_fp4.rand_marlin_weight_mxfp4_like(weight, 32)
            type_ = scalar_types.float4_e2m1f
        elif kind == "fp8":
            exact, packed, scales = marlin_utils_fp8.marlin_quant_fp8_torch(weight, 128)
            type_ = scalar_types.float8_e4m3fn
        else:
            type_ = getattr(scalar_types, kind)
            exact, packed, scales, *_ = marlin_utils_test.marlin_quantize(weight.t().contiguous(), type_, 128)
        found = marlin_dequantize(packed, scales, gain, type_, cols, rows, torch.bfloat16)
    assert torch.allclose(found, exact.float(), rtol=2**-6, atol=0)
