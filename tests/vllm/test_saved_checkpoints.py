"""Checkpoints that qtensor writes, in vLLM as it comes: no plugin is asked for.

The oracle is vLLM's own online quantization of the bf16 source: the same runtime weights and scales, byte for byte, the
same logprobs and greedy tokens. A CPU has no operators for vLLM's per-tensor and per-block fp8; their files
are compared with vLLM's formulas, and their config.json with what vLLM makes of it. Of the other schemes a CPU serves
int4; for the rest, the class vLLM picks must have the parameters that are in the files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from vllm.model_executor import parameter
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.online.fp8 import _fp8_channel_scale, _fp8_quant_per_channel, _fp8_scale
from vllm.utils.deep_gemm import per_block_cast_to_fp8

from qtensor import fp8_per_channel, online_quant, quantize, save_checkpoint
from qtensor.checkpoint import quantize_checkpoint
from qtensor.checkpoint.fused import fused_group
from qtensor.kernels import SEARCHES
from support.vllm.checkpoints import checkpoint, tensors_of, variant
from support.vllm.engines import Seen, engine, look


def seen(folder: Path, quantization: str | None = None) -> Seen:
    with engine(folder, quantization) as llm:
        return look(llm)


@pytest.fixture(scope="module")
def online() -> Seen:
    return seen(checkpoint("llama"), "fp8_per_channel")


def _save(folder: Path) -> Path:
    with online_quant(fp8_per_channel):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    return save_checkpoint(model, folder)


def _convert(folder: Path) -> Path:
    quantize_checkpoint(checkpoint("llama"), folder, fp8_per_channel)
    return folder


@pytest.mark.parametrize("make", [_save, _convert])
def test_a_checkpoint_is_vllms_own_quantization(make, tmp_path, online):
    stock = seen(make(tmp_path / "made"))
    assert stock.report is None, "the plugin was not asked for"
    assert stock.weights == online.weights
    assert len(stock.weights) == 16
    assert torch.equal(stock.logprobs, online.logprobs)
    assert stock.tokens == online.tokens


def _per_channel(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _fp8_channel_scale(weight.abs().amax(-1, keepdim=True))
    return _fp8_quant_per_channel(weight, scale), scale


def _per_tensor(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's scale; its operator for the values multiplies by the reciprocal."""
    scale = _fp8_scale(weight.abs().amax()).view(1)
    return (weight.float() * (1.0 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn), scale


FORMULAS: dict[str, Any] = {
    "fp8_per_channel": _per_channel,
    "fp8_per_tensor": _per_tensor,
    "fp8_per_block": per_block_cast_to_fp8,
}


@pytest.mark.parametrize(
    ("scheme", "format"), [*((scheme, "compressed-tensors") for scheme in FORMULAS), ("fp8_per_block", "fp8")]
)
def test_files_follow_vllms_formulas(scheme, format, tmp_path):
    """vLLM quantizes fused matrices: their parts on disk have to be rows of those."""
    source, folder = tensors_of(checkpoint("llama")), tmp_path / "made"
    ignore = ["lm_head", "*embed_tokens", "*norm"]
    if scheme == "fp8_per_block":
        ignore.append("*.self_attn.?_proj")  # k and v have 64 rows here
    quantize_checkpoint(checkpoint("llama"), folder, scheme, ignore=ignore, format=format)
    made = tensors_of(folder)
    suffix = "weight_scale" if format == "compressed-tensors" else "weight_scale_inv"
    modules = [name.removesuffix(f".{suffix}") for name in made if name.endswith(suffix)]
    assert len(modules) == (6 if scheme == "fp8_per_block" else 14)
    for module in modules:
        group = fused_group(module) if scheme == "fp8_per_tensor" else (module,)
        with torch.compiler.set_stance("force_eager"):  # The formula, not what a compiler makes of it.
            qdata, scale = FORMULAS[scheme](torch.cat([source[f"{name}.weight"] for name in group]))
        start = sum(source[f"{name}.weight"].shape[0] for name in group[: group.index(module)])
        held = made[f"{module}.weight"]
        assert torch.equal(held.view(torch.uint8), qdata[start : start + held.shape[0]].view(torch.uint8)), module
        assert torch.equal(made[f"{module}.{suffix}"], scale), module
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    reader = CompressedTensorsConfig if format == "compressed-tensors" else Fp8Config
    understood = reader.from_config(config)
    if format == "fp8":
        assert understood.weight_block_size == [128, 128]
        assert "lm_head" in understood.ignored_layers
    else:
        weights = understood.target_scheme_map["Linear"]["weights"]
        assert f"fp8_per_{weights.strategy.value if hasattr(weights.strategy, 'value') else weights.strategy}" == scheme
        assert "lm_head" in understood.ignore


INT4 = (
    "int4_per_group",
    "int4_per_group:searched",
    "int4_per_group:compressed-tensors",
    "int4_per_group_32:searched",
    "int4_asymmetric",
)


@pytest.mark.parametrize("scheme", INT4)
def test_a_cpu_serves_int4(scheme, tmp_path):
    """As the bf16 model whose weights are what the codes and scales stand for."""

    def decode(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "_proj.weight" in n]:
            tensors[name] = quantize(tensors[name], scheme).dequantize()

    quantize_checkpoint(checkpoint("llama"), tmp_path / "made", scheme)
    bf16 = variant("llama", scheme.replace(":", "-"), decode)
    stock, expected, source = (seen(folder) for folder in (tmp_path / "made", bf16, checkpoint("llama")))
    assert stock.distance(expected) < source.distance(expected) / 4


CLASSES = {
    "mxfp8": "CompressedTensorsW8A8Mxfp8",
    "mxfp4": "CompressedTensorsW4A4Mxfp4",
    "nvfp4": "CompressedTensorsW4A4Fp4",
    "int8_per_channel": "CompressedTensorsWNA16",
    "int4_per_group": "CompressedTensorsWNA16",
    "int4_per_group_32": "CompressedTensorsWNA16",
    "int4_asymmetric": "CompressedTensorsWNA16",
}
_PACKAGE = "vllm.model_executor.layers.quantization.compressed_tensors.schemes"


RECIPES = ("nvfp4:compressed-tensors", "int8_per_channel:compressed-tensors", "mxfp4:torchao")


@pytest.mark.parametrize("scheme", [*CLASSES, *(f"{name}:searched" for name in CLASSES if name in SEARCHES), *RECIPES])
def test_vllms_parameters_are_the_tensors_in_the_files(scheme, tmp_path, monkeypatch):
    """Only what multiplies them is left out: it is chosen by the device, and a CPU has little."""
    quantize_checkpoint(checkpoint("llama"), tmp_path / "made", scheme)
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    understood = CompressedTensorsConfig.from_config(config)
    for module in [m for name, m in sys.modules.items() if name.startswith(_PACKAGE)]:
        for chooser in [n for n in vars(module) if n.startswith("init_") and n.endswith("_linear_kernel")]:
            monkeypatch.setattr(module, chooser, lambda *_, **__: None)
        for other, stand_in in {
            "choose_mp_linear_kernel": lambda config: lambda *_, **__: None,
            "expose_input_quant_key": lambda *_: None,
        }.items():
            if hasattr(module, other):
                monkeypatch.setattr(module, other, stand_in)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    parts: Any = understood.target_scheme_map["Linear"]
    found: Any = understood._get_scheme_from_parts(
        parts["weights"], parts["input_activations"], format=parts["format"], layer_name="down_proj"
    )
    assert type(found).__name__ == CLASSES[scheme.partition(":")[0]]
    layer, (rows, cols) = torch.nn.Module(), (128, 256)
    found.create_weights(
        layer=layer,
        output_size=rows,
        input_size=cols,
        output_partition_sizes=[rows],
        input_size_per_partition=cols,
        # vLLM keeps the scales of integers in the model's own dtype.
        params_dtype=torch.bfloat16 if scheme.startswith("int4_per_group_32") else torch.float32,
        weight_loader=SimpleNamespace(),
    )
    prefix = "model.layers.0.mlp.down_proj."
    made = {n.removeprefix(prefix): t for n, t in tensors_of(tmp_path / "made").items() if n.startswith(prefix)}
    wanted = {n: (p.dtype, tuple(p.shape)) for n, p in layer.named_parameters()}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in made.items()} == wanted
    if scheme.startswith("nvfp4"):
        source = tensors_of(checkpoint("llama"))[f"{prefix}weight"]
        # As vLLM inverts it after loading.
        assert torch.equal(1.0 / made["weight_global_scale"], quantize(source, scheme).parts()[2])
