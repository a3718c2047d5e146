"""Checkpoints that other libraries wrote, with their own code: bitsandbytes and fine-grained fp8 (by transformers),
GPTQModel, AutoAWQ, ModelOpt and llm-compressor. What has to hold of them is in `support.peers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qtensor
import qtensor.convert
from support import peers
from support.helpers import assert_oracle, same_bytes
from support.peers import Made


def by_bitsandbytes(folder: Path, **settings: Any) -> Made:
    import bitsandbytes.functional as bnb

    config = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        peers.plain_folder(folder / "plain"), quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(folder / "made")

    def decode(module: Any) -> torch.Tensor:
        weight = module.weight
        if config.load_in_8bit:
            return bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
        return bnb.dequantize_4bit(weight.data, weight.quant_state)

    return Made(folder / "made", peers.linear_weights(model, decode), peers.logits(model))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4_bit(kind: str, nested: bool, tmp_path: Path) -> None:
    made = by_bitsandbytes(
        tmp_path, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    peers.assert_decoded_as_theirs(made)
    for scheme in ("fp8_per_channel", "int4_per_group"):
        assert peers.assert_becomes(made, scheme) == {"requantized"}


def test_bitsandbytes_int8(tmp_path: Path) -> None:
    made = by_bitsandbytes(tmp_path, load_in_8bit=True)
    peers.assert_decoded_as_theirs(made)
    assert peers.assert_becomes(made, "mxfp8") == {"requantized"}
    assert peers.assert_becomes(made, "int8_per_channel") == {"moved"}


def with_config(folder: Path, model: Any, state: dict[str, torch.Tensor], settings: dict[str, Any]) -> Path:
    """As `save_pretrained` would write it, where a library needs a GPU to."""
    model.config.save_pretrained(folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "quantization_config": settings}))
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_transformers_fine_grained_fp8(tmp_path: Path) -> None:
    """transformers quantizes with a GPU alone; the operation that it does it with runs anywhere."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    class Quantizer:
        quantization_config = transformers.FineGrainedFP8Config()

    model, state, weights = peers.plain_model(), {}, {}
    for name, tensor in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            state[name] = tensor
            continue
        made = Fp8Quantize(Quantizer()).convert({name: tensor})
        state |= made
        scale = next(t for n, t in made.items() if n.endswith("scale_inv"))
        weights[name] = Fp8Dequantize(Quantizer())._dequantize_one(made[name], scale, torch.bfloat16)
    folder = with_config(tmp_path / "made", model, state, transformers.FineGrainedFP8Config().to_dict())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    made = Made(folder, weights, peers.logits(theirs))
    peers.assert_decoded_as_theirs(made)
    assert peers.assert_becomes(made, "mxfp4") == {"requantized"}
    assert peers.assert_becomes(made, "fp8_per_block") == {"lossless"}


@pytest.mark.parametrize(("bits", "ordered"), [(3, False), (4, True)])
def test_gptqmodel(bits: int, ordered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # It writes its log there.
    monkeypatch.setattr("os.cpu_count", lambda: 8)  # With fewer its pool of threads is smaller than it asks for.
    gptq = pytest.importorskip("gptqmodel", reason="GPTQModel is installed by make test-libraries")
    model = gptq.GPTQModel.load(
        str(peers.plain_folder(tmp_path / "plain", tokens=True)),
        gptq.QuantizeConfig(bits=bits, group_size=128, desc_act=ordered, device="cpu"),
        dtype=torch.bfloat16,
    )
    tokens = [{"input_ids": torch.randint(0, 96, (1, 64)), "attention_mask": torch.ones(1, 64).long()}] * 8
    model.quantize(tokens, batch_size=1)
    model.save(str(tmp_path / "made"))
    # In fp16, as its scales are in the file: in bf16 it rounds them first.
    read = {"backend": gptq.BACKEND.TORCH, "device": "cpu", "dtype": torch.float16}
    theirs = gptq.GPTQModel.load(str(tmp_path / "made"), **read).model
    weights = peers.linear_weights(theirs, lambda module: module.dequantize_weight().t())
    made = Made(tmp_path / "made", weights)
    peers.assert_decoded_as_theirs(made)
    assert peers.assert_becomes(made, "fp8_per_channel") == {"requantized"}


def test_autoawq(tmp_path: Path) -> None:
    """Packed by its layer: the library's own loop needs a GPU."""
    gemm = pytest.importorskip("awq.modules.linear.gemm", reason="AutoAWQ is installed by make test-libraries")
    from awq.utils.packing_utils import dequantize_gemm

    model, state, weights = peers.plain_model(), {}, {}
    state = dict(model.state_dict())
    for name, module in list(model.named_modules()):
        if not name.endswith("_proj"):
            continue
        runs = module.weight.detach().float().unflatten(1, (-1, 128))
        low, high = runs.amin(-1).clamp(max=0), runs.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).half()
        zero = (-low / scale.float()).round().clamp(0, 15)
        codes = (runs / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)
        linear = torch.nn.Linear(module.in_features, module.out_features, bias=False, dtype=torch.float16)
        linear.weight.data = ((codes.clamp(0, 15) - zero.unsqueeze(-1)) * scale.float().unsqueeze(-1)).flatten(1).half()
        packed = gemm.WQLinear_GEMM.from_linear(linear, 4, 128, scales=scale.t(), zeros=zero.t())
        del state[f"{name}.weight"]
        state |= {f"{name}.{part}": tensor for part, tensor in packed.state_dict().items()}
        values = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, 128)
        weights[f"{name}.weight"] = values.t().to(torch.bfloat16)
    settings = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    made = Made(with_config(tmp_path / "made", model, state, settings), weights)
    peers.assert_decoded_as_theirs(made)
    assert peers.assert_becomes(made, "int8_per_channel") == {"requantized"}


MODELOPT = {"NVFP4": "nvfp4", "FP8": "fp8_per_channel", "MXFP4": "mxfp8"}


@pytest.mark.parametrize("kind", MODELOPT)
def test_modelopt(kind: str, tmp_path: Path) -> None:
    mtq = pytest.importorskip("modelopt.torch.quantization", reason="ModelOpt is installed by make test-libraries")
    from modelopt.torch import quantization
    from modelopt.torch.export import export_hf_checkpoint

    def quantized() -> Any:
        model = peers.plain_model()
        model.config.architectures = ["LlamaForCausalLM"]
        mtq.quantize(model, getattr(mtq, f"{kind}_DEFAULT_CFG"), lambda model: model(peers.IDS))
        return model

    export_hf_checkpoint(quantized(), export_dir=tmp_path / "made")
    state, weights, theirs = load_file(tmp_path / "made" / "model.safetensors"), {}, None
    decoder = getattr(quantization.qtensor, f"{kind}QTensor")
    for name in [n for n in state if n.endswith("_proj.weight")]:
        held = decoder(peers.plain_model().get_parameter(name).shape, torch.bfloat16, state[name])
        scales = {"scale": state[f"{name}_scale"]}
        if kind != "FP8":
            scales["block_sizes"] = {-1: 16 if kind == "NVFP4" else 32}
        if kind == "NVFP4":
            scales["double_scale"] = state[f"{name}_scale_2"]
        weights[name] = held.dequantize(torch.bfloat16, **scales)
        if kind == "NVFP4":  # Its table has 0 where the format has -0.
            codes = torch.stack((state[name] & 0xF, state[name] >> 4), -1).flatten(1)
            weights[name][codes == 8] = -0.0
    if kind == "FP8":  # The others' layers need a GPU.
        model = quantized()
        mtq.disable_quantizer(model, "*input_quantizer")
        theirs = peers.logits(model)
        for name, theirs_rounded in weights.items():  # It rounds the scale to bf16 first, as others do not.
            weights[name] = (state[name].float() * state[f"{name}_scale"]).bfloat16()
            torch.testing.assert_close(weights[name], theirs_rounded, rtol=2**-6, atol=0)
    made = Made(tmp_path / "made", weights, theirs)
    peers.assert_decoded_as_theirs(made)
    told = {"quant_method": "modelopt"}  # transformers does not know this method, and passes nothing of it on.
    assert peers.assert_becomes(made, "int8_per_channel", source=told) == {"requantized"}
    assert peers.assert_becomes(made, MODELOPT[kind], shared=kind == "NVFP4", source=told) == {"lossless"}


def test_modelopt_awq(tmp_path: Path) -> None:
    """Weights whose factors it folded into the layer before are decoded; what multiplies activations is refused."""
    mtq = pytest.importorskip("modelopt.torch.quantization", reason="ModelOpt is installed by make test-libraries")
    from modelopt.torch.export import export_hf_checkpoint, quant_utils

    model, kept = peers.plain_model(), {}
    model.config.architectures = ["LlamaForCausalLM"]
    mtq.quantize(model, mtq.INT4_AWQ_CFG, lambda model: model(peers.IDS))
    pack = quant_utils.pack_int4_in_uint8

    def packed(weight: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
        found = pack(weight, scales, block)
        wide = scales.repeat_interleave(block, -1)
        kept[found.data_ptr()] = (found, ((weight / wide).round().clamp(-8, 7) * wide).to(torch.bfloat16))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant_utils, "pack_int4_in_uint8", packed)
        export_hf_checkpoint(model, export_dir=tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    with pytest.raises(qtensor.CheckpointError, match=r"layers\.0\..*_proj\.weight: has pre_quant_scale"):
        peers.load(tmp_path, "mxfp8")
    asked = {name.removesuffix("pre_quant_scale") for name in state if name.endswith(".pre_quant_scale")}
    assert asked
    folded = [n for n in state if n.endswith("_proj.weight") and n.removesuffix("weight") not in asked]
    assert folded
    for name in folded:
        theirs = next(values for codes, values in kept.values() if torch.equal(codes, state[name]))
        linear = torch.nn.Linear(theirs.shape[1], theirs.shape[0], bias=False, dtype=torch.bfloat16)
        with qtensor.online_quant("int8_per_channel", linear, ignore=["*"]):
            linear.load_state_dict({"weight": state[name], "weight_scale": state[f"{name}_scale"]})
        assert torch.equal(linear.weight, theirs)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_diffusers_component_by_torchao(kind: str, tmp_path: Path) -> None:
    """A quantized transformer of a pipeline, saved by diffusers; it quantizes with bitsandbytes on a GPU alone."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is installed by make test-libraries")
    import torchao.quantization

    def empty() -> Any:
        torch.manual_seed(0)
        sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64, "sample_size": 4}
        return diffusers.DiTTransformer2DModel(**sizes, num_embeds_ada_norm=4).to(torch.bfloat16)

    empty().save_pretrained(tmp_path / "plain")
    config = diffusers.TorchAoConfig(getattr(torchao.quantization, kind)())
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "plain", quantization_config=config, torch_dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "transformer")
    weights = {n: p.dequantize() for n, p in theirs.named_parameters() if hasattr(p, "qdata")}
    assert len(weights) >= 8
    model = empty()
    report = qtensor.load_checkpoint(model, tmp_path / "transformer", scheme="mxfp8")
    assert {layer.source.rpartition(": ")[2] for layer in report.layers} == {"requantized"}
    for name, values in weights.items():
        assert_oracle(model.get_parameter(name), values, model.get_parameter(name).scheme)
    qtensor.convert.quantize_checkpoint(tmp_path / "transformer", tmp_path / "out", "mxfp8")
    again = empty()
    qtensor.load_checkpoint(again, tmp_path / "out")
    for name in weights:
        parts = zip(again.get_parameter(name).parts(), model.get_parameter(name).parts(), strict=True)
        assert all(same_bytes(a, b) for a, b in parts)


@pytest.mark.parametrize("how", ["W4A16", "FP8_DYNAMIC", "NVFP4A16", "GPTQ with an order"])
def test_llm_compressor(how: str, tmp_path: Path) -> None:
    llm = pytest.importorskip("llmcompressor", reason="llm-compressor is installed by make test-libraries")
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    plain, more = peers.plain_folder(tmp_path / "plain", tokens=True), {}
    if how.startswith("GPTQ"):
        recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"], actorder="static")
        rows = [{"input_ids": torch.randint(0, 96, (64,)), "attention_mask": torch.ones(64).long()} for _ in range(8)]
        more = {"dataset": torch.utils.data.DataLoader(rows), "num_calibration_samples": 8, "max_seq_length": 64}
    else:
        recipe = QuantizationModifier(targets="Linear", scheme=how, ignore=["lm_head"])
    model = llm.oneshot(model=str(plain), recipe=recipe, **more)
    model.save_pretrained(tmp_path / "made", save_compressed=True)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    theirs = peers.logits(read)
    made = Made(tmp_path / "made", peers.linear_weights(read, lambda module: module.weight), theirs)
    assert any("scale" in name for name in load_file(tmp_path / "made" / "model.safetensors"))
    peers.assert_decoded_as_theirs(made)
    assert peers.assert_becomes(made, "int8_per_channel") == {"requantized"}
