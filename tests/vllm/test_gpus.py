"""What the plugin does on each GPU: vLLM's own choice of kernel, or a refusal while the model is built. No GPU computes
here; see support/vllm/fake_gpu.py for what stands in. What the kernels are given is in test_gpu_values.py."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

from qtensor.errors import ConfigError
from qtensor.integrations.vllm.config import QTensorConfig
from qtensor.integrations.vllm.dispatch import linear_compute
from qtensor.integrations.vllm.gpu import GpuLinear
from qtensor.integrations.vllm.layers import process
from qtensor.integrations.vllm.moe import expert_method
from qtensor.integrations.vllm.options import Choice, parse
from qtensor.kernels import FORMATS
from qtensor.schemes.scheme import SCHEMES, fp8_per_block, fp8_per_channel, fp8_per_tensor
from qtensor.tensor.qtensor import empty
from support.processes import ROOT
from support.vllm.fake_gpu import CHIPS, Chip, pretend

PAGE = ROOT / "docs/vllm.md"
EXPERTS, HIDDEN, INNER = 8, 2048, 768


class Layer(nn.Module):
    """What vLLM's layer of experts tells its method."""

    local_num_experts = num_experts = EXPERTS
    hidden_size, intermediate_size_per_partition = HIDDEN, INNER
    expert_map = w13_input_scale = w2_input_scale = None
    activation = MoEActivation.SILU
    orig_dtype = torch.bfloat16

    def __init__(self, inner: int = INNER) -> None:
        super().__init__()
        parallel = FusedMoEParallelConfig(
            tp_size=1, pcp_size=1, dp_size=1, ep_size=1, tp_rank=0, pcp_rank=0, dp_rank=0, ep_rank=0, sp_size=1,
            use_ep=False, all2all_backend="allgather_reducescatter", enable_eplb=False,
        )  # fmt: skip
        self.moe_config = FusedMoEConfig(
            num_experts=EXPERTS, experts_per_token=2, hidden_dim=HIDDEN, intermediate_size=inner,
            num_local_experts=EXPERTS, num_logical_experts=EXPERTS, activation=MoEActivation.SILU, device="meta",
            routing_method=RoutingMethodType.Renormalize, moe_parallel_config=parallel, in_dtype=torch.bfloat16,
        )  # fmt: skip

    def _expert_routing_tables(self) -> None:
        return None


def linear(
    name: str, rows: int = 4096, cols: int = 4096, *, dtype: torch.dtype = torch.bfloat16, **given: Any
) -> tuple[GpuLinear, Any]:
    """The product of a layer, and the layer with its published weight: zeros, where tensors have values."""
    scheme, layer = SCHEMES[name], nn.Module()
    compute = linear_compute(scheme, parse(scheme, given, {}), (rows, cols), dtype, "model.layers.0.mlp.up_proj")
    assert isinstance(compute, GpuLinear)
    layer.logical_widths, layer.orig_dtype = [rows], dtype
    layer.input_size_per_partition, layer.output_size_per_partition = cols, rows
    layer.weight_block_size = [128, 128] if name == "fp8_per_block" else None
    weight = empty((rows, cols), scheme, dtype, torch.get_default_device())
    weight.parts().map(torch.Tensor.zero_)
    compute.publish(layer, weight)
    return compute, layer


def experts(name: str, *, by_default: bool = False, inner: int = INNER) -> tuple[Any, Layer]:
    """The method of a layer of experts, and the layer with its published weights."""
    scheme, layer = SCHEMES[name], Layer(inner)
    choice = Choice(parse(scheme, {}, {}), experts_by_default=by_default)
    method = expert_method(choice, "model.layers.0.mlp.experts", scheme, layer)
    layer.weight_block_size = [128, 128] if method.scheme is fp8_per_block else None
    method._publish(layer, *stacks(method.scheme, inner))
    layer.quant_method = method
    return method, layer


def stacks(scheme: Any, inner: int = INNER) -> list[Any]:
    shapes = (EXPERTS, 2 * inner, HIDDEN), (EXPERTS, HIDDEN, inner)
    return [empty(shape, scheme, torch.bfloat16, "meta") for shape in shapes]


def outcome(build: Callable[[], type], layer: str) -> str:
    """The kernel that vLLM chose, or "refused"."""
    try:
        name = build().__name__
    except ConfigError as error:
        message = str(error)
    else:
        return re.sub(r"(FP8|Fp8|MxFp4|Mxfp8|NvFp4)?(Block)?(ScaledMM)?(Linear)?Kernel$", "", name)
    assert message.startswith(f"qtensor: model.layers.0.mlp.{layer}: ")
    assert any(way_out in message for way_out in ("`ignore`", "or use", "Use vLLM's own", "Serve the model"))
    return "refused"


def chip_name(chip: Chip) -> str:
    return f"sm_{chip}" if isinstance(chip, int) else chip


def table() -> str:
    lines = [f"| linear layers | {' | '.join(f'`{name}`' for name in FORMATS)} |", "| --- " * (1 + len(FORMATS)) + "|"]
    for chip in CHIPS:
        dtype = torch.float16 if chip == 75 else torch.bfloat16  # vLLM refuses bfloat16 there.
        with pretend(chip, values=True):
            cells = [
                outcome(lambda name=name, dtype=dtype: type(linear(name, 256, 256, dtype=dtype)[0].kernel), "up_proj")
                for name in FORMATS
            ]
        lines.append(f"| {chip_name(chip)} | {' | '.join(cells)} |")
    served = ("fp8_per_channel", "fp8_per_block", "fp8_per_tensor")
    lines += ["", f"| experts | {' | '.join(f'`{name}`' for name in served)} |", "| --- " * 4 + "|"]
    for chip in CHIPS:
        with pretend(chip):
            cells = [outcome(lambda name=name: experts(name)[0].experts_cls, "experts") for name in served]
            for name in FORMATS.keys() - served:
                with pytest.raises(ConfigError):
                    experts(name)
        lines.append(f"| {chip_name(chip)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_page_says_what_every_gpu_gets() -> None:
    """QTENSOR_WRITE_PAGES=1 writes it."""
    before, rest = PAGE.read_text().split("<!-- gpus: tests/vllm/test_gpus.py -->\n\n")
    _, _, after = rest.partition("\n\n<!-- end -->")
    page = f"{before}<!-- gpus: tests/vllm/test_gpus.py -->\n\n{table()}\n\n<!-- end -->{after}"
    if os.environ.get("QTENSOR_WRITE_PAGES"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page


@pytest.mark.parametrize(
    ("chip", "name", "problem"),
    [
        ("gfx942", "fp8_per_tensor", r"e4m3fnuz, in which .* other numbers. Use vLLM's own"),
        ("gfx90a", "fp8_per_channel", "no fp8 units.*int4_per_group"),
        ("gfx942", "mxfp8", r"decode the weight to 16 bits .* Try another scheme \(int4_per_group\)"),
        ("gfx950", "nvfp4", "vLLM has no kernel for nvfp4 here.*fp8_per_channel"),
        ("gfx950", "int8_per_channel", 'or this one with the option activation="int8"'),
    ],
)
def test_a_refusal_says_why_and_what_instead(chip: Chip, name: str, problem: str) -> None:
    with pretend(chip), pytest.raises(ConfigError, match=problem):
        linear(name)


@pytest.mark.parametrize(
    ("chip", "name", "problem"),
    [
        ("gfx942", "fp8_per_tensor", r"e4m3fnuz, in which .* other numbers. Use vLLM's own"),
        ("gfx90a", "fp8_per_channel", "no fp8 units"),
        (90, "mxfp4", "serves experts in fp8_per_tensor, .* Give experts one of these by the option `moe`"),
    ],
)
def test_a_refusal_of_experts(chip: Chip, name: str, problem: str) -> None:
    with pretend(chip), pytest.raises(ConfigError, match=problem):
        experts(name)


@pytest.mark.parametrize(
    ("name", "cols", "dtype", "problem"),
    [
        ("fp8_per_block", 200, torch.bfloat16, "its 200 input columns are no multiple of 128"),
        ("mxfp8", 80, torch.bfloat16, "no multiple of 32"),
        ("mxfp4", 80, torch.bfloat16, "no multiple of 32"),
        ("nvfp4", 40, torch.bfloat16, "no multiple of 16"),
        ("int8_per_channel", 42, torch.bfloat16, "no multiple of 4"),
        ("int4_per_group", 192, torch.bfloat16, "no multiple of 128"),
        ("int4_per_group_32", 48, torch.bfloat16, "no multiple of 32"),
        ("mxfp4", 64, torch.float32, "dtype='bfloat16'"),
    ],
)
def test_shapes_that_no_kernel_takes(name: str, cols: int, dtype: torch.dtype, problem: str) -> None:
    """vLLM's kernels assert at the first product."""
    with pretend(90), pytest.raises(ConfigError, match=f"up_proj: .*{problem}"):
        linear(name, 256, cols, dtype=dtype)


def test_columns_of_gfx950s_kernel() -> None:
    """For others it would keep the weight in 16 bits."""
    with pretend("gfx950"), pytest.raises(ConfigError, match="160 input columns are no multiple of 128"):
        linear("mxfp8", 256, 160)


@pytest.mark.parametrize(("chip", "kernel"), [(80, "Cutlass"), (90, "Cutlass"), ("gfx942", "Triton"), (100, None)])
def test_int8_activations(chip: Chip, kernel: str | None) -> None:
    with pretend(chip):
        if kernel is None:
            with pytest.raises(ConfigError, match="sm_75 to sm_90"):
                linear("int8_per_channel", activation="int8")
            return
        compute, layer = linear("int8_per_channel", activation="int8")
        assert type(compute.kernel).__name__ == f"{kernel}Int8ScaledMMLinearKernel"
        assert layer.weight.shape == (4096, 4096)


@pytest.mark.parametrize("chip", [90, 100])
def test_rows_that_are_no_multiple_of_sixteen(chip: Chip) -> None:
    """vLLM 0.32's CUTLASS kernel raises when it pads a weight with scales by row. Here the weight is padded before."""
    with pretend(chip):
        compute, layer = linear("fp8_per_channel", 1000, 1024)
        assert layer.weight.shape == (1024, 1008)
        assert layer.weight_scale.shape == (1008, 1)
        compute.kernel = SimpleNamespace(apply_weights=lambda layer, x, bias: x.new_empty(3, 1008) + bias)
        assert compute.apply(layer, torch.empty(3, 1024), torch.empty(1000)).shape == (3, 1000)
        assert linear("fp8_per_channel", 1008, 1024)[0].padding == 0


def test_what_experts_get_by_default_where_scales_by_row_have_no_kernel() -> None:
    """Marlin has none for experts. Whoever asks for the scheme by name is told."""
    with pretend(80):
        with pytest.raises(ConfigError, match="for experts: fp8_per_tensor, fp8_per_block"):
            experts("fp8_per_channel")
        assert experts("fp8_per_channel", by_default=True)[0].scheme is fp8_per_block
        assert experts("fp8_per_channel", by_default=True, inner=832)[0].scheme is fp8_per_tensor
    with pretend(90):
        assert experts("fp8_per_channel", by_default=True)[0].scheme is fp8_per_channel


def test_who_has_asked_for_a_scheme_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert QTensorConfig().choice.experts_by_default
    assert QTensorConfig().__getstate__()["choice"].experts_by_default
    assert QTensorConfig({"linear": "fp8_per_block"}).choice.experts_by_default
    assert not QTensorConfig({"moe": "fp8_per_channel"}).choice.experts_by_default
    monkeypatch.setenv("QTENSOR_VLLM_MOE", "fp8_per_channel")
    assert not QTensorConfig().choice.experts_by_default


@pytest.mark.parametrize(("chip", "name"), [(80, "fp8_per_tensor"), (90, "fp8_per_channel")])
def test_a_reload_that_is_given_up_leaves_the_kernel_of_experts(chip: Chip, name: str) -> None:
    """The kernel reads scales that its configuration holds: old weights with new ones of them would be wrong."""
    with pretend(chip):
        method, layer = experts(name)
        kernel, scale = method.moe_kernel, layer.w13_weight_scale
        assert method.moe_quant_config.w1_scale is scale
        values = [nn.Parameter(w, requires_grad=False) for w in stacks(SCHEMES[name])]
        made = process(layer, dict(zip(("w13_weight", "w2_weight"), values, strict=True)), method.publish)
        assert method.moe_kernel is kernel
        assert method.moe_quant_config.w1_scale is layer.w13_weight_scale is scale
        assert made.method["moe_kernel"] is not kernel
