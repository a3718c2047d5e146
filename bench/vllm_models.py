"""Random checkpoints for the benches of vLLM: a Llama and a Qwen3-MoE of about 1 GB in bf16, and three of the 48 layers
of Qwen3-30B-A3B, with a sixteenth of its vocabulary (4 GB).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def config_of(model: str) -> Any:
    import transformers

    common = {"vocab_size": 4096, "max_position_embeddings": 512, "torch_dtype": "bfloat16", "num_key_value_heads": 8}
    if model == "llama":
        return transformers.LlamaConfig(
            **common, hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=16
        )
    if model == "qwen3-30b-a3b":
        # The head's share of a step is the whole model's: three layers of 48, a sixteenth of 151,936 tokens.
        return transformers.Qwen3MoeConfig(
            **(common | {"vocab_size": 9496, "num_key_value_heads": 4}),
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            num_hidden_layers=3,
            num_attention_heads=32,
            head_dim=128,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        )
    return transformers.Qwen3MoeConfig(
        **common,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_experts=32,
        num_experts_per_tok=4,
        num_hidden_layers=10,
        num_attention_heads=16,
        head_dim=64,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def make_checkpoint(model: str, folder: Path) -> None:
    """One of `config_of`, bf16 in safetensors, N(0, 0.02)."""
    if (folder / "config.json").exists():
        return
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    made = transformers.AutoModelForCausalLM.from_config(config_of(model), dtype=torch.bfloat16)
    made.save_pretrained(folder)
