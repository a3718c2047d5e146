"""What a layer publishes on a CPU, and what it computes with it: every scheme, against the weight in high precision."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from qtensor import quantize
from qtensor.integrations.vllm import compat
from qtensor.integrations.vllm.dispatch import linear_compute
from qtensor.integrations.vllm.head import QTensorEmbeddingMethod
from qtensor.integrations.vllm.layers import Published, Slot, part_names, process
from qtensor.integrations.vllm.options import Choice, parse
from qtensor.integrations.vllm.products import CpuLinear
from qtensor.kernels import FORMATS, upload
from qtensor.schemes.scheme import SCHEMES
from support.vllm.checkpoints import checkpoint
from support.vllm.engines import engine

N, K = 150, 205  # Odd, and no whole number of groups of 16, 32 or 128, nor of blocks.
every_scheme = pytest.mark.parametrize("name", FORMATS)


def _published(name: str) -> tuple[torch.nn.Module, CpuLinear]:
    layer, compute = torch.nn.Module(), CpuLinear(SCHEMES[name], round_activations=False)
    layer.orig_dtype, layer.input_size_per_partition = torch.bfloat16, K
    compute.publish(layer, _weight(name))
    return layer, compute


def _weight(name: str) -> torch.Tensor:
    return quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16(), name)


def test_names_are_vllms() -> None:
    found = {name: part_names(fmt) for name, fmt in FORMATS.items()}
    assert found.pop("fp8_per_block") == ("weight", "weight_scale_inv")
    assert found.pop("nvfp4") == ("weight", "weight_scale", "weight_global_scale")
    assert set(found.values()) == {("weight", "weight_scale")}
    assert part_names(FORMATS["nvfp4"], "w2_weight") == ("w2_weight", "w2_weight_scale", "w2_weight_global_scale")


@pytest.mark.parametrize("has_amx", [True, False])
def test_the_tile_registers_that_vllms_attention_uses_are_asked_for(
    has_amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(True))
    compat.permit_amx.cache_clear()
    for _ in range(2):
        linear_compute(SCHEMES["fp8_per_channel"], parse(SCHEMES["fp8_per_channel"], {}, {}), (N, K), torch.bfloat16)
    compat.permit_amx.cache_clear()
    assert asked == [True] * has_amx


@every_scheme
def test_products_and_dequantized_weights(name: str) -> None:
    layer, compute = _published(name)
    assert tuple(dict(layer.named_parameters())) == part_names(FORMATS[name])
    weight = _weight(name).dequantize()
    assert torch.equal(compute.dequantize(layer), weight)
    x, bias = torch.randn(2, 7, K).bfloat16(), torch.randn(N).bfloat16()
    expected = F.linear(x.float(), weight.float(), bias.float())
    torch.testing.assert_close(compute.apply(layer, x, bias).float(), expected, rtol=0.02, atol=0.1)


@every_scheme
@pytest.mark.parametrize("how", ["in place", "published", "as data", "as parameters"])
def test_what_a_layer_keeps_for_few_rows_is_of_its_weight(name: str, how: str) -> None:
    """Whichever way new values come, and nothing of the old ones is held."""
    layer, compute = _published(name)
    x = torch.randn(2, K).bfloat16()
    compute.apply(layer, x, None)
    new = quantize(torch.randn(N, K).bfloat16(), name)
    old = [weakref.ref(layer.get_parameter(part)) for part in part_names(FORMATS[name])]
    if how == "published":
        compute.publish(layer, new)
        assert not any(part() is not None for part in old)
    for part, value in zip(part_names(FORMATS[name]), new.parts(), strict=True):
        if how == "in place":
            layer.get_parameter(part).data.copy_(value)
        elif how == "as data":
            layer.get_parameter(part).data = value
        elif how == "as parameters":
            layer.register_parameter(part, torch.nn.Parameter(value, requires_grad=False))
    expected = F.linear(x.float(), new.dequantize().float())
    for _ in range(2):
        torch.testing.assert_close(compute.apply(layer, x, None).float(), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("name", ["fp8_per_channel", "mxfp8"])
def test_dynamic_activations_are_rounded(name: str) -> None:
    layer, plain = _published(name)
    x = torch.randn(7, K).bfloat16()
    rounded = CpuLinear(SCHEMES[name], round_activations=True).apply(layer, x, None)
    exact = plain.apply(layer, x, None)
    error = float((rounded - exact).float().norm() / exact.float().norm())
    assert 0.01 < error < 0.06  # e4m3 has four significant bits.


@every_scheme
def test_a_tied_embedding(name: str) -> None:
    layer, _ = _published(name)
    rows = torch.tensor([[3, 0], [149, 3]])
    method = QTensorEmbeddingMethod(Choice(parse(SCHEMES[name], {}, {})), "embed_tokens", SCHEMES[name])
    assert torch.equal(method.embedding(layer, rows), _weight(name).dequantize()[rows])


@every_scheme
def test_operators_have_the_shapes_that_compilers_are_told(name: str) -> None:
    """Of what is stored a shape shows K/2 where two elements share a byte."""
    layer, _ = _published(name)
    parts = [layer.get_parameter(part).data for part in part_names(FORMATS[name])]
    x, rows = torch.randn(7, K).bfloat16(), torch.tensor([3, 0])
    check = torch.library.opcheck
    only = ("test_faketensor",)  # Its other checks compute with fp8, which a CPU cannot.
    check(torch.ops.qtensor_vllm.linear.default, (x, parts, name, False, None), test_utils=only)
    check(torch.ops.qtensor_vllm.embedding.default, (rows, parts, name, torch.bfloat16, K), test_utils=only)


@every_scheme
def test_a_published_weight_is_found_where_it_lives(name: str) -> None:
    """A reload writes there. Without one of its parameters it counts as kept in another form."""
    layer, _ = _published(name)
    weight = _weight(name)
    for part, own in zip(weight.parts(), part_names(FORMATS[name]), strict=True):
        layer.register_parameter(own, torch.nn.Parameter(part, requires_grad=False))
    armed = SimpleNamespace(shape=(N, K), dtype=torch.bfloat16)
    published = Published.find(Slot("layer", layer, "weight", lambda _: None, {}), armed, weight)  # type: ignore[arg-type]
    live = published.live()
    assert live is not None
    assert live.shape == (N, K)
    assert [part.data_ptr() for part in live.parts()] == [part.data_ptr() for part in weight.parts()]
    del layer._parameters[part_names(FORMATS[name])[-1]]
    assert published.live() is None
    assert Published.find(published.slot, armed, weight).live() is None  # type: ignore[arg-type]


def test_a_method_keeps_what_serves_until_new_values_are_placed() -> None:
    """Fused experts keep their kernel, with the scales it reads, on the layer's method. A reload that is given up after
    its layers were processed leaves it as it was."""
    layer = torch.nn.Module()
    method = layer.quant_method = SimpleNamespace(moe_kernel="old")  # type: ignore[assignment]
    layer.register_parameter("weight", torch.nn.Parameter(torch.zeros(2), requires_grad=False))

    def publish(of: torch.nn.Module) -> None:
        method.moe_kernel, method.moe_quant_config = "new", of.weight

    new = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    processed = process(layer, {"weight": new}, publish)
    assert vars(method) == {"moe_kernel": "old"}
    processed.place()
    assert method.moe_kernel == "new"
    assert torch.equal(method.moe_quant_config, layer.weight)


def test_the_upload_ring_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server would hold its pinned and device memory for ever."""
    released: list[bool] = []
    monkeypatch.setattr(upload, "release", lambda: released.append(True))
    with engine(checkpoint("llama"), "qtensor") as llm:
        assert released == [True]
        llm.collective_rpc("reload_weights")
        assert released == [True, True]
