"""from_pretrained of quantized repositories into another scheme, against transformers' own dequantization."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qtensor
from qtensor import (
    LossySourceError,
    QTensor,
    fp8_per_block,
    load_checkpoint,
    online_quant,
    quantize,
    save_checkpoint,
    verify_checkpoint,
)
from qtensor.checkpoint.transformers import transformers_asks
from qtensor.convert import quantize_checkpoint
from qtensor.schemes.scheme import SCHEMES
from qtensor.sources.families import recognise
from qtensor.sources.source import Spec
from support.helpers import assert_oracle, same_bytes
from support.sources import FORMS, whole

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not transformers_asks(), reason="needs transformers 5.21 or newer")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 64,
}


@pytest.fixture
def config() -> Iterator[Any]:
    yield qtensor.QTensorConfig
    from qtensor.checkpoint import quantizer

    quantizer.unregister()


def save(folder: Path, model: Any, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    model.config.save_pretrained(folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "quantization_config": settings}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory: Any) -> Path:
    """As DeepSeek and Qwen publish theirs."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).bfloat16()
    folder = tmp_path_factory.mktemp("fp8")
    with online_quant(fp8_per_block, model) as session:
        state = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).bfloat16().state_dict()
        model.load_state_dict(state)
    del session
    save_checkpoint(model, folder / "ours", format="fp8")
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return save(folder, model, settings, load_file(folder / "ours" / "model.safetensors"))


@pytest.fixture(scope="module")
def mixtral_folder(tmp_path_factory: Any) -> Path:
    """Single experts on disk, each in blocks, that transformers merges into stacks."""
    torch.manual_seed(0)
    settings = transformers.MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.MixtralForCausalLM(settings).bfloat16()
    folder = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(folder / "plain")
    tensors = load_file(folder / "plain" / "model.safetensors")
    for name in [n for n in tensors if re.search(r"_proj\.weight$|\.w[123]\.weight$", n)]:
        made = quantize(tensors[name], fp8_per_block)
        tensors[name], tensors[name + "_scale_inv"] = made.qdata, made.scale
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return save(folder, model, settings, tensors)


@pytest.fixture(scope="module")
def gpt_oss_folder(tmp_path_factory: Any) -> Path:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1, "hidden_size": 64, "intermediate_size": 64}
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**sizes, layer_types=["full_attention"])
    ).bfloat16()
    tensors = dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith("_proj") and ".experts." in n]:
        experts, cols, rows = tensors.pop(name).shape
        shape = (experts, rows, cols // 32, 16)
        tensors[name + "_blocks"] = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        tensors[name + "_scales"] = torch.randint(115, 122, shape[:-1], generator=generator).to(torch.uint8)
    return save(tmp_path_factory.mktemp("gpt-oss"), model, {"quant_method": "mxfp4"}, tensors)


def test_what_transformers_saves_of_mxfp4_is_what_it_loaded(gpt_oss_folder: Path) -> None:
    """Its own operation turns the layout of kernels back into parts, by names and shapes that are a source here. The
    kernels that lay them out have to be downloaded; on a CPU their layout is the plain one, turned."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="this transformers saves no mxfp4")
    if not hasattr(mxfp4, "Mxfp4ReverseDeserialize"):
        pytest.skip("this transformers saves no mxfp4")
    stored = load_file(gpt_oss_folder / "model.safetensors")

    def in_kernels(tensor: torch.Tensor) -> Any:
        layout = SimpleNamespace(unswizzle_data=lambda data: data)
        return SimpleNamespace(storage=SimpleNamespace(layout=layout, data=tensor.transpose(-1, -2)))

    for name in [n for n in stored if n.endswith("_blocks")]:
        owner, _, proj = name.removesuffix("_blocks").rpartition(".")
        blocks, scales = stored[name], stored[name.removesuffix("_blocks") + "_scales"]
        experts = torch.nn.Module()
        setattr(experts, proj, in_kernels(blocks.flatten(-2)))
        setattr(experts, f"{proj}_precision_config", SimpleNamespace(weight_scale=in_kernels(scales)))
        model = torch.nn.Module()
        model.add_module("experts", experts)
        saved = mxfp4.Mxfp4ReverseDeserialize(None).convert({}, model=model, full_layer_name=f"experts.{proj}_blocks")
        assert saved.keys() == {f"experts.{proj}_blocks", f"experts.{proj}_scales"}
        parts = {n.replace(f"experts.{proj}", "*"): t[0] for n, t in saved.items()}
        source = recognise({n: Spec(t.dtype, tuple(t.shape)) for n, t in parts.items()}, {"quant_method": "mxfp4"})
        assert str(source) == "mxfp4 (blocks)"
        assert torch.equal(saved[f"experts.{proj}_blocks"], blocks)
        assert torch.equal(saved[f"experts.{proj}_scales"], scales)
        assert owner.endswith("experts")


def dequantized(folder: Path) -> Any:
    """As transformers reads it."""
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    kind = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}[told["quant_method"]]
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=getattr(transformers, kind)(dequantize=True), dtype=torch.bfloat16
    )


def load(folder: Path, scheme: str, way: str, config: Any, **options: Any) -> Any:
    if way == "configuration":
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config(scheme, **options), dtype=torch.bfloat16
        )
    if way == "folder":
        settings = transformers.AutoConfig.from_pretrained(folder)
        del settings.quantization_config
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
        load_checkpoint(model, folder, scheme=scheme, **options)
        return model
    with online_quant(scheme, source={}, **options):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def assert_became(model: Any, expected: Any, scheme: str) -> None:
    for name, param in expected.named_parameters():
        found = model.get_parameter(name)
        if isinstance(found, QTensor):
            assert_oracle(found, param, SCHEMES[scheme])
        else:
            assert same_bytes(found, param)


ways = pytest.mark.parametrize("way", ["block", "configuration", "folder"])


@ways
@pytest.mark.parametrize("scheme", ["fp8_per_channel", "mxfp4"])
def test_fp8_blocks_become_any_scheme(fp8_folder: Path, way: str, scheme: str, config: Any) -> None:
    model, expected = load(fp8_folder, scheme, way, config), dequantized(fp8_folder)
    assert_became(model, expected, scheme)
    assert sum(isinstance(p, QTensor) for p in model.parameters()) == 7
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


@ways
def test_blocks_are_moved_into_blocks(fp8_folder: Path, way: str, config: Any) -> None:
    model = load(fp8_folder, "fp8_per_block", way, config, strict_source="lossless")
    tensors = load_file(fp8_folder / "model.safetensors")
    for name, param in model.named_parameters():
        if isinstance(param, QTensor):
            assert same_bytes(param.qdata, tensors[name])
            assert same_bytes(param.scale, tensors[name + "_scale_inv"])


@ways
def test_a_lossy_scheme_is_refused_by_name(fp8_folder: Path, way: str, config: Any) -> None:
    with pytest.raises(LossySourceError, match=r"^model\.layers\.0\..*_proj\.weight: "):
        load(fp8_folder, "mxfp4", way, config, strict_source="lossless")


@ways
def test_gpt_oss_becomes_another_scheme(gpt_oss_folder: Path, way: str, config: Any) -> None:
    model, expected = load(gpt_oss_folder, "fp8_per_channel", way, config), dequantized(gpt_oss_folder)
    assert_became(model, expected, "fp8_per_channel")
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, QTensor)


@pytest.mark.parametrize("way", ["configuration", "folder"])  # In a block transformers asks for bitsandbytes itself.
def test_parts_with_dots_in_their_names_are_parts(way: str, config: Any, tmp_path: Path) -> None:
    """bitsandbytes' "weight.absmax"."""
    model, tensors, wanted = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).bfloat16(), {}, {}
    for name, tensor in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        parts = FORMS["bitsandbytes nf4"].parts(*tensor.shape)
        wanted[name] = whole(parts, torch.bfloat16, tuple(tensor.shape))
        tensors |= {name.removesuffix("weight") + part.replace("*", "weight"): t for part, t in parts.items()}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    loaded = load(save(tmp_path / "nf4", model, settings, tensors), "fp8_per_channel", way, config)
    for name, values in wanted.items():
        assert_oracle(loaded.get_parameter(name), values, SCHEMES["fp8_per_channel"])


def test_gpt_oss_becomes_files(gpt_oss_folder: Path, tmp_path: Path) -> None:
    """Stacks of experts have no quantized form in files: they are written in high precision, and said to be left."""
    report = quantize_checkpoint(gpt_oss_folder, tmp_path / "out", "fp8_per_channel")
    assert report.sources == {"mxfp4 (blocks)": 2}
    assert set(report.left.values()) >= {"a stack of matrices in one tensor"}
    assert verify_checkpoint(tmp_path / "out") == []
    expected, found = dequantized(gpt_oss_folder).state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    experts = "model.layers.0.mlp.experts."
    for name in (f"{experts}gate_up_proj", f"{experts}down_proj", f"{experts}gate_up_proj_bias"):
        assert same_bytes(found[name], expected[name])
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert same_bytes(found[weight], quantize(expected[weight], "fp8_per_channel").qdata)


@ways
def test_experts_that_are_merged_become_another_scheme(mixtral_folder: Path, way: str, config: Any) -> None:
    model, expected = load(mixtral_folder, "fp8_per_channel", way, config), dequantized(mixtral_folder)
    assert_became(model, expected, "fp8_per_channel")
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, QTensor)


def test_without_a_word_the_files_bytes_win_as_before(fp8_folder: Path) -> None:
    with online_quant("mxfp4"):
        model = transformers.AutoModelForCausalLM.from_pretrained(fp8_folder, dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.scheme == fp8_per_block
