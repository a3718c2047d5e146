"""Reloads of layers with a form of their own: shared scales, experts, packed, absorbed and repacked weights."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import LLM

from qtensor import (
    IncompleteLoadError,
    NonFiniteWeightError,
    QTensor,
    QTensorError,
    WeightShapeError,
    quantize,
    weight_checksums,
)
from qtensor.integrations.vllm import checksums, linear, processing
from qtensor.integrations.vllm.layers import Published, Slot, frozen, part_names
from qtensor.integrations.vllm.products import CpuLinear
from support.vllm.checkpoints import checkpoint, tensors_of, variant
from support.vllm.engines import engine, look
from support.vllm.oracle import fused, mistakes, unequal
from support.vllm.reloads import (
    LAYER,
    Q_ROWS,
    QKV,
    Q,
    addresses,
    fresh,
    lasting,
    options,
    other,
    reload,
    runtime,
    state,
)


def _reload_whole(llm: LLM, scheme: str, architecture: str = "llama") -> None:
    """To checkpoint B at once, back to A weight by weight: the oracle's bytes and checksums, the same addresses."""
    places = addresses(llm)
    for folder, mode in ((other(architecture), "atomic"), (checkpoint(architecture), "per_weight")):
        with options(llm, reload=mode):
            reload(llm, folder)
        given = tensors_of(folder)
        assert mistakes(given, runtime(llm), scheme) == []
        assert checksums(llm)[0][QKV] == weight_checksums({QKV: quantize(fused(given, QKV), scheme)})[QKV]
    assert addresses(llm) == places


@pytest.mark.parametrize("scheme", ["fp8_per_tensor", "nvfp4"])
def test_one_scale_takes_fused_weights_whole(scheme: str) -> None:
    a, b = tensors_of(checkpoint("llama")), tensors_of(other("llama"))
    with engine(checkpoint("llama"), f"qtensor_{scheme}") as llm:
        _reload_whole(llm, scheme)
        before = state(llm)
        with pytest.raises(IncompleteLoadError, match=re.escape(LAYER + "self_attn.k_proj.weight")):
            reload(llm, [(Q, b[Q])])
        assert state(llm) == before
        qkv = {LAYER + f"self_attn.{part}_proj.weight" for part in "qkv"}
        reload(llm, [(name, b[name]) for name in qkv])
        assert mistakes(a | {name: b[name] for name in qkv}, runtime(llm), scheme) == []
        with options(llm, reload_partial="keep"):
            old = quantize(fused(b, QKV), scheme).dequantize()
            reload(llm, [(Q, a[Q])])
        expected = quantize(torch.cat([a[Q], old[Q_ROWS:]]), scheme)
        assert unequal(runtime(llm), QKV, expected.parts()) == []
        assert QKV in llm.collective_rpc("qtensor_report")[0]["warnings"][0]


def test_groups_take_parts_of_fused_weights() -> None:
    """Two elements to a byte, and scales within a row: q_proj alone leaves k and v as they are."""
    a, b = tensors_of(checkpoint("llama")), tensors_of(other("llama"))
    with engine(checkpoint("llama"), "qtensor_int4_per_group") as llm:
        _reload_whole(llm, "int4_per_group")
        reload(llm, [(Q, b[Q])])
        assert mistakes(a | {Q: b[Q]}, runtime(llm), "int4_per_group") == []
        spoilt = b[Q].clone()
        spoilt[3, 5] = float("nan")
        before = state(llm)
        with pytest.raises(NonFiniteWeightError, match=re.escape(Q)):
            reload(llm, [(Q, spoilt)])
        assert state(llm) == before


@pytest.mark.parametrize("scheme", ["nvfp4:searched", pytest.param("fp8:searched", marks=pytest.mark.slow)])
def test_searched_scales_are_searched_again(scheme: str) -> None:
    settings = {"hf_overrides": {"quantization_config_dict_json": json.dumps({"linear": scheme})}}
    with engine(checkpoint("llama"), "qtensor", **settings) as llm:
        assert mistakes(tensors_of(checkpoint("llama")), runtime(llm), scheme) == []
        _reload_whole(llm, scheme)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nvfp4", "int4_per_group"])
def test_packed_experts(scheme: str) -> None:
    a, b = tensors_of(checkpoint("qwen3-moe")), tensors_of(other("qwen3-moe"))
    with engine(checkpoint("qwen3-moe"), f"qtensor_{scheme}") as llm:
        _reload_whole(llm, scheme, "qwen3-moe")
        expert = {name for name in a if name.startswith("model.layers.0.mlp.experts.2.")}
        reload(llm, [(name, b[name]) for name in expert])
        assert mistakes(a | {name: b[name] for name in expert}, runtime(llm), scheme) == []


def test_one_expert_and_layers_that_vllm_packs() -> None:
    """Layer 0 is quantized. Layer 1 is not: on a CPU vLLM packs its attention and its experts, and drops the rest."""
    choice = json.dumps({"ignore": ["re:model[.]layers[.]1[.].*"]})
    settings = {"hf_overrides": {"quantization_config_dict_json": choice}}
    a, b = tensors_of(checkpoint("qwen3-moe")), tensors_of(other("qwen3-moe"))
    expected = fresh("qwen3-moe", choice)
    with engine(checkpoint("qwen3-moe"), "qtensor", enable_prefix_caching=False, **settings) as llm:
        before, first = state(llm), look(llm)
        expert = {name for name in a if name.startswith("model.layers.0.mlp.experts.2.")}
        reload(llm, [(name, b[name]) for name in expert])
        assert mistakes(a | {name: b[name] for name in expert}, runtime(llm), "fp8_per_channel") == []
        reload(llm)
        now = state(llm)
        assert lasting(now) == lasting(before)

        one_of_packed = "model.layers.1.mlp.experts.0.down_proj.weight"
        with pytest.raises(IncompleteLoadError, match="only be replaced as a whole"):
            reload(llm, [(one_of_packed, b[one_of_packed])])
        assert state(llm) == now
        # k and v of the packed projection are read back from it.
        reload(llm, [(Q, b[Q])])
        assert not torch.equal(look(llm).logprobs, first.logprobs)
        reload(llm, [(Q, a[Q])])
        assert torch.equal(look(llm).logprobs, first.logprobs)

        reload(llm, other("qwen3-moe"))
        seen = look(llm)
        assert (seen.weights, seen.tokens) == (expected.weights, expected.tokens)
        assert torch.equal(seen.logprobs, expected.logprobs)
        reload(llm, checkpoint("qwen3-moe"))
        assert torch.equal(look(llm).logprobs, first.logprobs)


def test_absorbed_weights_of_latent_attention_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fresh("deepseek-v3")
    with engine(checkpoint("deepseek-v3"), "qtensor", enable_prefix_caching=False) as llm:
        before, first = state(llm), look(llm)
        if torch.cpu._is_amx_tile_supported():
            with pytest.raises(QTensorError, match="latent attention has packed this weight for itself"):
                reload(llm, other("deepseek-v3"))
            assert state(llm) == before
            assert torch.equal(look(llm).logprobs, first.logprobs)
            return
        assert any("W_UV" in name or "W_UK" in name for name in before)
        reload(llm, other("deepseek-v3"))
        assert addresses(llm) == {name: entry[:2] for name, entry in lasting(before).items()}
        seen = look(llm)
        assert (seen.weights, seen.tokens) == (expected.weights, expected.tokens)
        assert torch.equal(seen.logprobs, expected.logprobs)
        reload(llm, checkpoint("deepseek-v3"))
        assert torch.equal(look(llm).logprobs, first.logprobs)

        serving = state(llm)
        inner = processing.absorb_again
        calls = []

        def fail_late(attention: Any, dtype: torch.dtype) -> None:
            calls.append(attention)
            if len(calls) == 2:
                raise MemoryError("no room to absorb")
            inner(attention, dtype)

        with monkeypatch.context() as patch:
            patch.setattr(processing, "absorb_again", fail_late)
            with pytest.raises(MemoryError):
                reload(llm, other("deepseek-v3"))
        assert state(llm) == serving


class _Reversed(CpuLinear):
    """A kernel with a weight layout of its own, as GPU kernels have: rows in reverse, in memory of its own."""

    def publish(self, layer: Any, weight: QTensor) -> None:
        layer.register_parameter("weight", frozen(weight.qdata.view(torch.uint8).flip(0).view(weight.qdata.dtype)))
        layer.register_parameter(part_names(self.fmt)[1], frozen(weight.scale.flip(0)))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert bias is None
        return super().apply(layer, x, None).flip(-1)


def test_a_kernels_own_layout_and_reads_of_a_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba's loader writes A_log, then replaces it by a function of what it reads back."""
    monkeypatch.setattr(linear, "linear_compute", lambda scheme, *_, **__: _Reversed(scheme, False))
    mixer = "backbone.layers.1.mixer."
    b = tensors_of(other("mamba2"))
    with engine(checkpoint("mamba2"), "qtensor", enable_prefix_caching=False) as llm:
        places = addresses(llm)
        reload(llm, other("mamba2"))
        assert addresses(llm) == places
        expected = quantize(b[mixer + "in_proj.weight"], "fp8_per_channel").qdata.view(torch.uint8).flip(0)
        assert torch.equal(runtime(llm)[mixer + "in_proj.weight"].view(torch.uint8), expected)
        decay = llm.apply_model(lambda model: model.get_parameter(mixer + "A").detach().clone())[0]
        assert torch.equal(decay, -b[mixer + "A_log"].float().exp())
        # The convolution multiplies with a packed copy or with this view of what was loaded.
        taps = llm.apply_model(lambda model: model.get_submodule(mixer[:-1]).conv_weights.clone())[0]
        assert torch.equal(taps, b[mixer + "conv1d.weight"].squeeze(1))
        before = state(llm)
        with pytest.raises(WeightShapeError, match=mixer + "in_proj"):
            reload(llm, [(mixer + "in_proj.weight", b[mixer + "in_proj.weight"][:-8])])
        assert state(llm) == before


def test_a_transposed_weight_is_reloaded_where_it_is() -> None:
    """GPU kernels read [K, N] views of [N, K] memory."""
    layer = torch.nn.Module()
    weight = quantize(torch.randn(6, 4, dtype=torch.bfloat16), "fp8_per_channel")
    layer.register_parameter("weight", frozen(weight.qdata.t()))
    layer.register_parameter("weight_scale", frozen(weight.scale))
    armed = SimpleNamespace(shape=(6, 4), dtype=torch.bfloat16)
    slot = Slot("layer", layer, "weight", lambda _: None, {})
    live = Published.find(slot, armed, weight).live()  # type: ignore[arg-type]
    assert live is not None
    assert live.shape == (6, 4)
    live.qdata.view(torch.uint8).zero_()
    assert layer.weight.view(torch.uint8).count_nonzero() == 0


@pytest.mark.slow
def test_ranks_agree() -> None:
    """A value that only one of two ranks sees is not finite: neither takes the new weights."""
    b = tensors_of(other("llama"))
    with engine(checkpoint("llama"), "qtensor", tensor_parallel_size=2, enable_prefix_caching=False) as llm:
        before = llm.collective_rpc("qtensor_checksums")
        spoilt = b[LAYER + "mlp.down_proj.weight"].clone()
        spoilt[3, 5] = float("nan")  # The first rank's columns.
        folder = variant("llama", "spoilt", lambda t: t.update(b | {LAYER + "mlp.down_proj.weight": spoilt}))
        with pytest.raises(RuntimeError, match=r"rank 0( failed)?: .*nan at index"):
            reload(llm, folder)
        assert llm.collective_rpc("qtensor_checksums") == before
        reload(llm, other("llama"))
        after = llm.collective_rpc("qtensor_checksums")
        assert all(old[QKV] != new[QKV] for old, new in zip(before, after, strict=True))
