"""Tiny random checkpoints of the architectures under test, saved once per test run as transformers saves them."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

VOCAB = 512
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama() -> Any:
    return transformers.LlamaConfig(**_COMMON, intermediate_size=256)


def _qwen3() -> Any:
    return transformers.Qwen3Config(**_COMMON, intermediate_size=256, head_dim=32, tie_word_embeddings=True)


def _gemma() -> Any:
    return transformers.GemmaConfig(
        **_COMMON, intermediate_size=256, head_dim=32, hidden_activation="gelu_pytorch_tanh"
    )


def _opt() -> Any:
    return transformers.OPTConfig(
        **{k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads",)},
        ffn_dim=256,
        word_embed_proj_dim=128,
        do_layer_norm_before=True,
    )


def _mixtral() -> Any:
    return transformers.MixtralConfig(**_COMMON, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2)


def _qwen2_moe() -> Any:
    return transformers.Qwen2MoeConfig(
        **_COMMON,
        intermediate_size=256,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )


def _qwen3_moe() -> Any:
    return transformers.Qwen3MoeConfig(
        **_COMMON,
        head_dim=32,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
    )


def _deepseek_v3() -> Any:
    common = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}
    return transformers.DeepseekV3Config(
        **common,
        num_key_value_heads=4,
        intermediate_size=256,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=64,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_nextn_predict_layers=0,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
    )


def _gpt_oss() -> Any:
    return transformers.GptOssConfig(
        **_COMMON,
        head_dim=32,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    )


def _mamba2() -> Any:
    return transformers.Mamba2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=32,
        state_size=32,
        n_groups=1,
        expand=2,
        torch_dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "qwen3-tied": _qwen3,
    "gemma": _gemma,
    "opt": _opt,
    "mixtral": _mixtral,
    "qwen2-moe": _qwen2_moe,
    "qwen3-moe": _qwen3_moe,
    "deepseek-v3": _deepseek_v3,
    "gpt-oss": _gpt_oss,
    "mamba2": _mamba2,
}
# Not in the grid: for single questions.
OTHERS: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: transformers.Gemma2Config(**_COMMON, intermediate_size=256, head_dim=32),
}
MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v3", "gpt-oss")


@functools.cache
def root() -> Path:
    return Path(tempfile.mkdtemp(prefix="qtensor-vllm-"))


@functools.cache
def checkpoint(architecture: str) -> Path:
    """A folder with config.json and model.safetensors: bf16, weights drawn from N(0, 0.05)."""
    folder = root() / architecture
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        (ARCHITECTURES | OTHERS)[architecture](), dtype=torch.bfloat16
    )
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() > 1:
                param.normal_(0, 0.05)
            elif "bias" in name or "sinks" in name:
                param.normal_(0, 0.02)
    model.save_pretrained(folder, safe_serialization=True)
    _finish_config(folder)
    if architecture == "deepseek-v3":
        _restore_correction_bias(folder)
    return folder


def _finish_config(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config, indent=2))


def _restore_correction_bias(folder: Path) -> None:
    """DeepSeek's own checkpoints hold this router bias; it is a buffer in transformers."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in list(tensors):
        if name.endswith("mlp.gate.weight"):
            bias = name.removesuffix("weight") + "e_score_correction_bias"
            tensors.setdefault(bias, torch.zeros(tensors[name].shape[0], dtype=torch.float32))
    save_file(tensors, path, metadata={"format": "pt"})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def adapter(architecture: str, modules: tuple[str, ...], rank: int = 8) -> Path:
    """A random LoRA adapter, as peft saves it, for the linear layers whose names end in one of `modules`."""
    folder = root() / f"{architecture}-lora"
    folder.mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(7)
    tensors = {}
    for name, weight in tensors_of(checkpoint(architecture)).items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in modules:
            for part, shape in (("lora_A", (rank, weight.shape[1])), ("lora_B", (weight.shape[0], rank))):
                made = torch.randn(shape, generator=random) * 0.2
                tensors[f"base_model.model.{layer}.{part}.weight"] = made.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(modules)}))
    return folder


def quantized_checkpoint() -> Path:
    """A Llama that is fp8 in its file already, in the format of compressed-tensors, one scale per row."""
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": weights | {"strategy": "token", "dynamic": True},
    }

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            weight = tensors[name].float()
            scale = weight.abs().amax(1, keepdim=True) / 448
            tensors[name], tensors[f"{name}_scale"] = (weight / scale).to(torch.float8_e4m3fn), scale

    folder = variant("llama", "fp8", change)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def variant(architecture: str, label: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint whose tensors were changed in place by `change`."""
    source = checkpoint(architecture)
    folder = root() / f"{architecture}-{label}"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = tensors_of(source)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
