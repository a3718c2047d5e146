"""Random checkpoints for the benches of vLLM, in bf16: a Llama and a Qwen3-MoE of about 1 GB, and two parts of
Qwen3-30B-A3B, in its shapes, of 4 GB: three of its 48 layers with all experts, and, as what is read for one token tells
more the more layers there are, twelve with 32 of the 128 experts. Their vocabularies are the same share of its own as
their layers, so that the head weighs what it does in the whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_QWEN3_30B_A3B = {"qwen3-30b-a3b": (3, 128), "qwen3-30b-a3b-deep": (12, 32)}
"""Name → layers and experts."""


def config_of(model: str) -> Any:
    import transformers

    common = {"max_position_embeddings": 512, "torch_dtype": "bfloat16"}
    if model == "llama":
        return transformers.LlamaConfig(
            **common,
            vocab_size=4096,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=8,
            num_attention_heads=16,
            num_key_value_heads=8,
        )
    mixture = common | {"decoder_sparse_step": 1, "mlp_only_layers": []}
    if model == "qwen3-moe":
        return transformers.Qwen3MoeConfig(
            **mixture,
            vocab_size=4096,
            hidden_size=1024,
            intermediate_size=2048,
            moe_intermediate_size=512,
            num_experts=32,
            num_experts_per_tok=4,
            num_hidden_layers=10,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=64,
        )
    layers, experts = _QWEN3_30B_A3B[model]
    return transformers.Qwen3MoeConfig(
        **mixture,
        vocab_size=151936 * layers // 48,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=experts,
        num_experts_per_tok=8,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        norm_topk_prob=True,
    )


def make_checkpoint(model: str, folder: Path, seed: int = 0) -> None:
    """One of `config_of`, N(0, 0.02), if it is not there."""
    if (folder / "config.json").exists():
        return
    import torch
    import transformers

    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    made = transformers.AutoModelForCausalLM.from_config(config_of(model), dtype=torch.bfloat16)
    made.save_pretrained(folder)
