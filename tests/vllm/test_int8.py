"""Int8 activations with int8 weights: the packed bytes, the product's bound, vLLM's own W8A8, reloads and reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm import _custom_ops as ops
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Int8
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

from qtensor import int8_per_channel, quantize, weight_checksums
from qtensor.errors import ConfigError
from qtensor.integrations.vllm import compat
from qtensor.integrations.vllm.int8 import Int8Linear, round_rows
from qtensor.integrations.vllm.options import parse
from qtensor.tensor.qtensor import QTensor
from support.vllm.checkpoints import checkpoint, tensors_of
from support.vllm.engines import engine, load_error, look
from support.vllm.oracle import fused
from support.vllm.reloads import QKV, addresses, other, reload

NAME = "qtensor_int8_per_channel"
INT8 = {"hf_overrides": {"quantization_config_dict_json": json.dumps({"activation": "int8"})}}
needs_operator = pytest.mark.skipif(not compat.has_int8_product(), reason="oneDNN's sums are exact on chips with VNNI")


def _weight(rows: int, cols: int, seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(rows, cols, generator=generator).mul(0.05).bfloat16(), "int8_per_channel")


def _published(weight: QTensor, packed: bool) -> tuple[torch.nn.Module, Int8Linear]:
    layer, compute = torch.nn.Module(), Int8Linear(packed)
    layer.orig_dtype, layer.input_size_per_partition = weight.dtype, weight.shape[1]
    compute.publish(layer, weight)
    return layer, compute


@needs_operator
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (48, 37), (96, 160), (130, 600)])
def test_a_packed_weight_is_the_only_one_and_can_be_read(rows: int, cols: int) -> None:
    """Memory that a load still holds is given back. Rows of zeros, and with codes of -127 and 127, included."""
    source = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).bfloat16()
    source[rows // 2] = 0
    weight, same = quantize(source, "int8_per_channel"), quantize(source, "int8_per_channel")
    layer, compute = _published(weight, packed=True)
    assert weight.qdata.untyped_storage().nbytes() == 0
    assert sum(p.nbytes for p in layer.parameters()) == same.scale.nbytes
    assert [torch.equal(a, b) for a, b in zip(compute.read(layer).parts(), same.parts(), strict=True)] == [True, True]
    assert torch.equal(compute.dequantize(layer), same.dequantize())
    assert torch.equal(layer.state_dict()["weight"], same.qdata)
    assert layer.weight.numel() == 0


@pytest.mark.parametrize("packed", [pytest.param(True, marks=needs_operator), False])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 70, 300])
def test_product_is_within_its_bound(rows: int, packed: bool) -> None:
    """Exact sums of integers, then one rounding to x's dtype, or two; x itself is off by half a step at most."""
    weight = _weight(96, 192)
    values = weight.dequantize(torch.float32).double()
    layer, compute = _published(weight, packed)
    x, bias = torch.randn(rows, 192).bfloat16(), torch.randn(96).bfloat16()
    x[0, 5] = 9.0  # An outlier, which sets its row's step.
    whole, step = round_rows(x)
    for b in (None, bias):
        out = compute.apply(layer, x, b).double()
        exact = (whole.double() * step.double()) @ values.T + (0 if b is None else b.double())
        product = (whole.double() * step.double()).abs() @ values.abs().T
        assert bool(
            ((out - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-8 * (product if not packed else 0) + 1e-6).all()
        )
        plain = x.double() @ values.T + (0 if b is None else b.double())
        allowed = step.double() / 2 * values.abs().sum(1)
        assert bool(((exact - plain).abs() <= allowed * 1.001 + 1e-9).all())


@needs_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_both_ways_multiply_the_same_integers(dtype: torch.dtype) -> None:
    """Seen through a weight of 127s on its diagonal; rows of zeros and of tiny numbers included."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(40, 64) * 3, torch.zeros(1, 64), torch.full((1, 64), 1e-5), torch.randn(2, 64) * 1e3])
    x = x.to(dtype)
    eye = QTensor((torch.eye(64) * 127).to(torch.int8), torch.full((64, 1), 1 / 127), int8_per_channel, dtype)
    layer, compute = _published(eye, packed=True)
    seen = compute.apply(layer, x, None)
    whole, step = round_rows(x)
    torch.testing.assert_close(seen, (whole.float() * step).to(dtype), rtol=2**-7, atol=0)
    assert seen[40].count_nonzero() == 0
    assert compute.apply(layer, x[:0], None).shape == (0, 64)


def test_only_int8_weights_have_it() -> None:
    assert parse(int8_per_channel, {"activation": "int8"}, {}).activation == "int8"
    assert parse(int8_per_channel, {"activation": "int8", "moe": "none"}, {}).linear is int8_per_channel
    for given in ({"linear": "nvfp4"}, {"moe": "fp8"}):
        with pytest.raises(ConfigError, match="multiplies int8 activations with int8 weights"):
            parse(int8_per_channel, given | {"activation": "int8"}, {})
    error = load_error(checkpoint("llama"), "qtensor", **INT8)
    assert "fp8_per_channel has others; choose int8_per_channel" in str(error)


@needs_operator
@pytest.mark.parametrize("rows", [1, 16, 70])
def test_a_product_is_vllms_own(rows: int) -> None:
    """What its W8A8 layers compute, by either of its operators, but for the order of factors in fp32."""
    weight = _weight(96, 192)
    x = (torch.randint(-15, 16, (rows, 192)) + torch.randint(-2, 3, (rows, 192)) / 8).bfloat16()
    x[:, 0] = 127  # The step is 1, and no value lies half way between two steps, where the operators differ.
    handler = ops.create_onednn_scaled_mm(weight.qdata.clone().t(), weight.scale, x.dtype, True, False)
    whole, step, _ = ops.onednn_scaled_int8_quant(x)
    native = [ops.onednn_scaled_mm(handler, whole, torch.empty(rows, 96, dtype=x.dtype), step, None, None, None)]
    if torch.cpu._is_amx_tile_supported():
        packed, scale = torch.ops._C.convert_weight_packed(weight.qdata), weight.scale.flatten()
        native.append(torch.ops._C.int8_scaled_mm_with_quant(x, packed, scale, None, x.dtype, True))
    layer, compute = _published(weight, packed=True)
    found = compute.apply(layer, x, None)
    for own in native:
        torch.testing.assert_close(found, own, rtol=2**-7, atol=0.01)
        assert float((found == own).float().mean()) > 0.9


# In an engine -------------------------------------------------------------------------------------------------------


def _oracle(folder: Path, name: str) -> str:
    return weight_checksums({name: quantize(fused(tensors_of(folder), name), "int8_per_channel")})[name]


def _vllms_own(folder: Path) -> Path:
    """The same bytes as a checkpoint that vLLM serves by itself with int8 activations."""
    tensors = {}
    for name, tensor in tensors_of(checkpoint("llama")).items():
        if "_proj.weight" in name:
            weight = quantize(tensor, "int8_per_channel")
            tensors[name], tensors[f"{name}_scale"] = weight.qdata.contiguous(), weight.scale.contiguous()
        else:
            tensors[name] = tensor
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint("llama") / "config.json").read_text())
    shared = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": shared | {"strategy": "channel", "dynamic": False},
                "input_activations": shared | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@needs_operator
def test_it_computes_what_vllms_own_int8_does(tmp_path: Path) -> None:
    """The same codes and scales; vLLM may take another operator. And near unquantized ones."""
    with engine(_vllms_own(tmp_path / "own"), None) as llm:
        methods = llm.apply_model(lambda model: [type(getattr(m, "scheme", None)) for m in model.modules()])[0]
        assert methods.count(CompressedTensorsW8A8Int8) == 8
        native = look(llm)
    with engine(checkpoint("llama"), NAME, **INT8) as llm:
        seen = look(llm)
    with engine(checkpoint("llama"), None) as llm:
        plain = look(llm)
    assert seen.distance(native) < 0.012  # A sum that is rounded the other way may be another int8 one layer on.
    assert 0 < seen.distance(plain) < 0.05


def test_loads_and_reloads_are_the_oracles_bytes_at_the_same_addresses() -> None:
    a, b = checkpoint("llama"), other("llama")
    with engine(a, NAME, enable_prefix_caching=False, **INT8) as llm:
        places, first = addresses(llm), look(llm)
        sums = llm.collective_rpc("qtensor_checksums")[0]
        names = [layer["name"] for layer in first.report["layers"]]
        assert {name: sums[name] for name in names} == {name: _oracle(a, name) for name in names}
        assert not any("weight_scale" in name for name in sums)

        reload(llm, b)
        sums = llm.collective_rpc("qtensor_checksums")[0]
        assert {name: sums[name] for name in names} == {name: _oracle(b, name) for name in names}
        assert addresses(llm) == places
        assert not torch.equal(look(llm).logprobs, first.logprobs)

        changed = tensors_of(a)[QKV.replace("qkv_proj", "q_proj")]
        if compat.has_int8_product():
            with pytest.raises(Exception, match=r"k_proj.weight(.|\n)*has to be sent together"):
                reload(llm, [(QKV.replace("qkv_proj", "q_proj"), changed)])
            assert llm.collective_rpc("qtensor_checksums")[0] == sums
        reload(llm, a)
        assert torch.equal(look(llm).logprobs, first.logprobs)
        assert addresses(llm) == places


def test_what_is_saved_has_the_weights(tmp_path: Path) -> None:
    """By vLLM's own saver of sharded states, before and after a reload: as of layers whose weights are in order."""
    folder, saved = checkpoint("llama"), {}
    for activation in ("int8", "none"):
        settings = {"hf_overrides": {"quantization_config_dict_json": json.dumps({"activation": activation})}}
        with engine(folder, NAME, enable_prefix_caching=False, **settings) as llm:
            for turn in range(2):
                target = tmp_path / f"{activation}-{turn}"
                target.mkdir()
                llm.apply_model(lambda model, to=str(target): ShardedStateLoader.save_model(model, to))
                saved[activation, turn] = load_file(next(target.glob("*.safetensors")))
                reload(llm, folder)
    names = [name for name in saved["none", 0] if name.endswith("_proj.weight")]
    assert len(names) == 8
    for found in saved.values():
        assert found.keys() == saved["none", 0].keys()
        assert all(torch.equal(found[name], saved["none", 0][name]) for name in names)


@pytest.mark.parametrize("architecture", ["qwen3-tied", "qwen3-moe"])
def test_tied_heads_and_experts(architecture: str) -> None:
    """An embedding is looked up by row, so its weight stays in order; experts are weight-only."""
    options = {"activation": "int8"} | ({"lm_head": True} if architecture == "qwen3-tied" else {})
    settings = {"hf_overrides": {"quantization_config_dict_json": json.dumps(options)}}
    with engine(checkpoint(architecture), NAME, **settings) as llm:
        seen, sums = look(llm), llm.collective_rpc("qtensor_checksums")[0]
    with engine(checkpoint(architecture), None) as llm:
        plain = look(llm)
    assert 0 < seen.distance(plain) < 0.12
    dense = [layer["name"] for layer in seen.report["layers"] if ".experts." not in layer["name"]]
    assert {name: sums[name] for name in dense} == {name: _oracle(checkpoint(architecture), name) for name in dense}


@pytest.mark.slow
@needs_operator
def test_compiled_and_reloaded() -> None:
    """A compiled model finds the weight that oneDNN keeps at each call: the new one, after a reload."""
    with engine(other("llama"), NAME, **INT8) as llm:
        expected = look(llm)
    with engine(checkpoint("llama"), NAME, enforce_eager=False, enable_prefix_caching=False, **INT8) as llm:
        first = look(llm)
        reload(llm, other("llama"))
        now = look(llm)
        assert now.distance(expected) < min(0.05, now.distance(first) / 4)  # Compilers round elsewhere.
        reload(llm, checkpoint("llama"))
        assert look(llm).distance(first) < 0.001


@pytest.mark.slow
@needs_operator
def test_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank rounds the columns of x that it has; its bytes are those of its part, before and after a reload."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    with engine(checkpoint("llama"), NAME, tensor_parallel_size=2, enable_prefix_caching=False, **INT8) as llm:
        for folder in (checkpoint("llama"), other("llama")):
            if folder != checkpoint("llama"):
                reload(llm, folder)
            sums = llm.collective_rpc("qtensor_checksums")
            for rank, found in enumerate(sums):
                whole = quantize(fused(tensors_of(folder), QKV, rank, 2), "int8_per_channel")
                assert found[QKV] == weight_checksums({QKV: whole})[QKV]
        prompt = {"prompt_token_ids": [3, 4, 5, 6]}
        settings = SamplingParams(max_tokens=4, min_tokens=4, temperature=0, detokenize=False, ignore_eos=True)
        assert len(llm.generate([prompt], settings, use_tqdm=False)[0].outputs[0].token_ids) == 4
