"""Checkpoints that are quantized already, requantized by the plugin: as an engine that loads their decoded values."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtensor import IncompleteLoadError, LossySourceError, quantize
from qtensor.integrations.vllm import reports
from qtensor.integrations.vllm.sources import decoded
from qtensor.kernels import FORMATS
from qtensor.kernels.codes import decode
from support.helpers import same_bytes
from support.sources import FORMS, source_of, whole
from support.vllm.checkpoints import tensors_of, variant
from support.vllm.engines import engine, load_error, look, runtime_tensors
from support.vllm.oracle import fused, mistakes
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


# The same numbers -----------------------------------------------------------------------------------------------------

MXFP4 = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": {}}


def _to_mxfp4(tensors: Tensors) -> None:
    """As compressed-tensors packs it; GPT-OSS's experts as it publishes them."""
    for name in _matrices(tensors):
        made = quantize(tensors.pop(name), "mxfp4")
        tensors[name + "_packed"], tensors[name + "_scale"] = made.qdata, made.scale
    for name in [n for n in tensors if n.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        made = quantize(tensors.pop(name).mT.contiguous(), "mxfp4")
        tensors[name + "_blocks"] = made.qdata.unflatten(-1, (-1, 16))
        tensors[name + "_scales"] = made.scale


def in_mxfp4(architecture: str) -> Path:
    folder = variant(architecture, "mxfp4", _to_mxfp4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": MXFP4}))
    return folder


def part_of(tensors: Tensors, part: str, name: str, rank: int = 0, ranks: int = 1, whole_experts: bool = True) -> Any:
    """The bytes of a part ("packed", "scale") of a checkpoint's matrices that a rank has of a runtime weight."""
    held = {n.removesuffix(f"_{part}"): t for n, t in tensors.items() if n.endswith(f"weight_{part}")}
    if whole_experts or "experts" not in name:
        return fused(held, name, rank, ranks)
    each = fused(held, name)
    if name.endswith("w2_weight"):
        return each.chunk(ranks, 2)[rank]
    return torch.cat([half.chunk(ranks, 1)[rank] for half in each.chunk(2, 1)], 1)


def assert_moved(tensors: Tensors, runtime: Tensors, scheme: str, *where: Any) -> None:
    """Of mxfp4: scales are the file's, byte for byte, and so are codes, or their values in e4m3."""
    weights = [name for name in runtime if f"{name}_scale" in runtime]
    assert len(weights) > 4
    for name in weights:
        codes = part_of(tensors, "packed", name, *where)
        values = codes if scheme == "mxfp4" else decode(codes, FORMATS["mxfp4"]).to(torch.float8_e4m3fn)
        assert torch.equal(runtime[name].view(torch.uint8), values.view(torch.uint8)), name
        assert torch.equal(runtime[f"{name}_scale"], part_of(tensors, "scale", name, *where)), name


@pytest.mark.usefixtures("_requantize")
@pytest.mark.parametrize(("architecture", "scheme"), [("llama", "mxfp8"), ("qwen3-moe", "mxfp4")])
def test_what_is_the_same_numbers_is_moved(architecture: str, scheme: str) -> None:
    """Fused layers and experts, also in a reload."""
    folder = in_mxfp4(architecture)
    with engine(folder, f"qtensor_{scheme}") as llm:
        seen = look(llm, keep_tensors=True)
        assert seen.report is not None
        assert {layer["source"] for layer in seen.report["layers"]} == {"mxfp4: lossless"}
        assert seen.report["peak_staged_bytes"] == 0
        assert_moved(tensors_of(folder), seen.tensors, scheme)
        reload(llm, iter(tensors_of(folder).items()))
        assert look(llm).weights == seen.weights


@pytest.mark.usefixtures("_requantize")
def test_gpt_oss_is_moved_out_of_its_blocks() -> None:
    folder = variant("gpt-oss", "mxfp4-blocks", _to_mxfp4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with engine(folder, "qtensor_mxfp4") as llm:
        seen = look(llm, keep_tensors=True)
    assert seen.report is not None
    assert {layer["source"].rpartition(": ")[2] for layer in seen.report["layers"]} == {"lossless"}
    tensors = tensors_of(folder)
    for name in [n for n in seen.tensors if n.endswith(("w13_weight", "w2_weight"))]:
        theirs = "gate_up_proj" if "w13" in name else "down_proj"
        prefix = name.replace(".routed_experts", "").rpartition(".")[0]
        assert torch.equal(seen.tensors[name], tensors[f"{prefix}.{theirs}_blocks"].flatten(2))
        assert torch.equal(seen.tensors[f"{name}_scale"], tensors[f"{prefix}.{theirs}_scales"])


def test_loss_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTENSOR_VLLM_SOURCE", "lossless")
    error = load_error(blocks("llama"), "qtensor_mxfp4")
    assert isinstance(error, LossySourceError)
    assert "_proj.weight'): fp8 (blocks of 128 × 128) cannot be moved as it is" in str(error)
    with engine(in_mxfp4("llama"), "qtensor_mxfp8") as llm:
        assert {layer["source"] for layer in reports(llm)[0]["layers"]} == {"mxfp4: lossless"}


# Several ranks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of their own; they are sent the functions of these tests."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")


@pytest.mark.usefixtures("_requantize", "_ranks")
@pytest.mark.parametrize("whole_experts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_take_their_parts_of_values_and_scales(whole_experts: bool) -> None:
    """Attention by rows and by columns; experts, too, or whole ones."""
    folder = in_mxfp4("qwen3-moe")
    with engine(folder, "qtensor_mxfp8", tensor_parallel_size=2, enable_expert_parallel=whole_experts) as llm:
        found, told = llm.apply_model(runtime_tensors), reports(llm)
    for rank, tensors in enumerate(found):
        assert_moved(tensors_of(folder), tensors, "mxfp8", rank, 2, whole_experts)
        assert {layer["source"] for layer in told[rank]["layers"]} == {"mxfp4: lossless"}


@pytest.mark.usefixtures("_requantize", "_ranks")
@pytest.mark.slow
def test_two_ranks_agree_on_the_scales_of_what_they_decode() -> None:
    """Rows whose columns are on both ranks have one scale: of the decoded whole."""
    with engine(blocks("llama"), "qtensor", tensor_parallel_size=2) as llm:
        found = llm.apply_model(runtime_tensors)
    values = tensors_of(variant("llama", "values", _to_their_values))
    assert [mistakes(values, tensors, "fp8_per_channel", rank, 2) for rank, tensors in enumerate(found)] == [[], []]


# Options and errors ---------------------------------------------------------------------------------------------------


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


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(sorted(FORMS)), st.booleans())
def test_parts_of_any_format_stream_by_in_any_order(data: st.DataObject, form: str, stacked: bool) -> None:
    """And what the format does not need, of several weights, beside tensors that are no parts. Zero points and orders
    that the configuration does not tell of and that come last are an error, not other weights."""
    made = FORMS[form]
    shape, config = (made.rows * 32 // made.rows, made.multiple * 128 // made.multiple), dict(made.config or {})
    count = 2 if stacked and "bitsandbytes" not in form else 1
    sent, values = {"model.norm.weight": torch.ones(4)}, {}
    for i in range(2):
        each = [made.parts(*shape, 2 * i + e) for e in range(count)]
        name = f"model.layers.{i}.mlp.up_proj"
        for part in each[0]:
            own = torch.stack([parts[part] for parts in each]) if count > 1 else each[0][part]
            sent[f"{name}.{part.replace('*', 'weight')}"] = own
        found = [whole(parts, torch.bfloat16, shape) for parts in each]
        turned = count > 1 and source_of(each[0]).transposed  # GPT-OSS's, in its models.
        values[f"{name}.weight"] = torch.stack(found) if count > 1 else found[0]
        if turned:
            values[f"{name}.weight"] = values[f"{name}.weight"].mT
    told = data.draw(st.booleans()) or not config
    order = data.draw(st.permutations(sorted(sent)))
    given_on: Tensors = {}
    maybe = contextlib.nullcontext() if told else contextlib.suppress(IncompleteLoadError)
    with maybe:
        given_on = dict(decoded(((name, sent[name]) for name in order), config if told else {}, torch.bfloat16))
    if not told and not given_on:
        return
    assert given_on.keys() == {"model.norm.weight", *values}
    for name, expected in values.items():
        assert same_bytes(given_on[name].clone().contiguous(), expected.contiguous()), name


def test_a_part_that_the_format_does_not_need_may_come_last() -> None:
    parts = FORMS["nvfp4 of ModelOpt"].parts(32, 128)
    sent = {f"a.{part.replace('*', 'weight')}": tensor for part, tensor in parts.items()} | {
        "a.input_scale": torch.ones(1)
    }
    assert list(dict(decoded(iter(sent.items()), {}, torch.bfloat16))) == ["a.weight"]


def test_without_the_option_it_loads_by_its_own_method() -> None:
    from qtensor.integrations.vllm.config import QTensorConfig

    assert QTensorConfig.override_quantization_method(FP8, "qtensor") == "fp8"
