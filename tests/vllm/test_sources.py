"""Checkpoints that are quantized already, requantized by the plugin: as an engine that loads their decoded values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qtensor import IncompleteLoadError, quantize
from qtensor.integrations.vllm.sources import decoded
from support.vllm.checkpoints import tensors_of, variant
from support.vllm.engines import engine, look
from support.vllm.reloads import reload

Tensors = dict[str, torch.Tensor]
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def _matrices(tensors: Tensors) -> list[str]:
    return [name for name in tensors if name.endswith("proj.weight")]


def _to_blocks(tensors: Tensors) -> None:
    """As DeepSeek and Qwen publish theirs."""
    for name in _matrices(tensors):
        made = quantize(tensors[name], "fp8_per_block")
        tensors[name], tensors[name + "_scale_inv"] = made.qdata, made.scale


def _to_their_values(tensors: Tensors) -> None:
    for name in _matrices(tensors):
        tensors[name] = quantize(tensors[name], "fp8_per_block").dequantize()


def blocks(architecture: str) -> Path:
    folder = variant(architecture, "fp8-blocks", _to_blocks)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    return folder


@pytest.fixture
def _requantize(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QTENSOR_VLLM_SOURCE", "requantize")
    return


@pytest.mark.usefixtures("_requantize")
@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe"])
def test_a_quantized_checkpoint_is_requantized(architecture: str) -> None:
    with engine(variant(architecture, "values", _to_their_values), "qtensor") as llm:
        expected = look(llm)
    with engine(blocks(architecture), "qtensor") as llm:
        seen = look(llm)
        assert seen.report is not None
        assert seen.weights == expected.weights
        assert torch.equal(seen.logprobs, expected.logprobs)
        # A trainer that sends fp8 blocks.
        reload(llm, iter(tensors_of(blocks(architecture)).items()))
        assert look(llm).weights == expected.weights


def test_a_user_may_say_so_in_the_place_of_the_checkpoints_configuration() -> None:
    options = {"quantization_config": {"quant_method": "qtensor", "source": "requantize"}}
    with engine(variant("llama", "values", _to_their_values), "qtensor") as llm:
        expected = look(llm)
    with engine(blocks("llama"), "qtensor", hf_overrides=options) as llm:
        assert look(llm).weights == expected.weights


def test_parts_of_nothing_pass_and_what_is_missing_is_named() -> None:
    tensors = tensors_of(blocks("llama"))
    plain = {"model.layers.0.self_attn.attn.k_scale": torch.ones(1), **tensors}
    found = dict(decoded(iter(plain.items()), FP8, torch.bfloat16))
    assert all(t.dtype.itemsize > 1 for t in found.values())
    assert "model.layers.0.self_attn.attn.k_scale" in found
    name = _matrices(tensors)[0]
    del tensors[name + "_scale_inv"]
    with pytest.raises(IncompleteLoadError, match=f"^{name}: of its parts only weight arrived"):
        list(decoded(iter(tensors.items()), FP8, torch.bfloat16))


def test_without_the_option_it_loads_by_its_own_method() -> None:
    from qtensor.integrations.vllm.config import QTensorConfig

    assert QTensorConfig.override_quantization_method(FP8, "qtensor") == "fp8"
