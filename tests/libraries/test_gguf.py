"""`.gguf` files written by the gguf package, of models that transformers made: what transformers reads of them, and
what is read here. Names are those of the package's own table, and rows those that llama.cpp's converter writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from qtensor import QTensor, load_checkpoint, quantize
from qtensor.checkpoint.gguf import GgufCheckpoint

SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
MODELS = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "qwen2moe": (transformers.Qwen2MoeConfig, {**MOE, "shared_expert_intermediate_size": 512}),
    "qwen3moe": (transformers.Qwen3MoeConfig, {**MOE, "norm_topk_prob": True}),
}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter orders the rows of q and k."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write(path: Path, arch: str, kind: str) -> Any:
    """A random model in that type where its tensors are matrices, and in fp32 where they are not."""
    torch.manual_seed(0)
    made, more = MODELS[arch]
    config = made(**SIZES, **more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if "moe" in arch:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    table = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), 2)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            values = permuted(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        base, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            called = table.get_name(f"{base}.down_proj").replace("down", "{}")
            half = values.shape[1] // 2
            pairs = {called.format("gate"): values[:, :half], called.format("up"): values[:, half:]}
        elif last == "down_proj":
            pairs = {table.get_name(name): values}
        else:
            pairs = {table.get_name(base): values[0] if values.shape[:1] == (1,) else values}
        for mapped, held in pairs.items():
            suffix = last if last in ("weight", "bias") else "weight"
            wide = held.ndim < 2 or "ffn_gate_inp" in mapped or kind == "F32"
            how = gguf.GGMLQuantizationType["F32" if wide else kind]
            writer.add_tensor(
                f"{mapped}.{suffix}", gguf.quants.quantize(np.ascontiguousarray(held), how), raw_dtype=how
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def theirs(path: Path, config: Any) -> Any:
    """As transformers reads it. (Of the metadata it does not take the sizes of Qwen3's heads and of experts.)"""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(path.parent, gguf_file=path.name, dtype=torch.bfloat16, config=config)


def ours(path: Path, scheme: str, config: Any, **options: Any) -> Any:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    load_checkpoint(model, path, scheme=scheme, **options)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_a_file_is_what_transformers_reads(arch: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    expected = theirs(path, write(path, arch, kind).config)
    plain = ours(path, "fp8", expected.config, ignore=["*"])
    for name, param in expected.named_parameters():
        assert torch.equal(plain.get_parameter(name), param), name
    assert torch.equal(logits(plain), logits(expected))
    model = ours(path, "fp8_per_channel", expected.config)
    quantized = 0
    for name, param in expected.named_parameters():
        found = model.get_parameter(name)
        if isinstance(found, QTensor):
            wanted = quantize(param, "fp8_per_channel")
            assert torch.equal(found.qdata.view(torch.uint8), wanted.qdata.view(torch.uint8)), name
            assert torch.equal(found.scale, wanted.scale), name
            quantized += 1
    assert quantized >= 8


@pytest.mark.parametrize("arch", MODELS)
def test_the_configuration_is_that_of_transformers(arch: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = write(path, arch, "Q8_0")
    mine = transformers.AutoConfig.for_model(**GgufCheckpoint(path).config)
    for key in (*SIZES, "rms_norm_eps", "rope_parameters", "tie_word_embeddings", *MODELS[arch][1]):
        assert getattr(mine, key, None) == getattr(model.config, key, None), key
    read = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    for key in (*SIZES, "rope_parameters", "tie_word_embeddings"):
        if key != "head_dim" or arch == "llama":
            assert getattr(mine, key, None) == getattr(read, key, None), key
