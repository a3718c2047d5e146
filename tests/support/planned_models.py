"""A small model with the layers that plans tell apart."""

from __future__ import annotations

import torch
from torch import nn

from qtensor import QTensor

SIZE = 128


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(SIZE, 2 * SIZE, bias=False, dtype=torch.bfloat16),
                "up_proj": nn.Linear(SIZE, 2 * SIZE, bias=False, dtype=torch.bfloat16),
                "down_proj": nn.Linear(2 * SIZE, SIZE, bias=False, dtype=torch.bfloat16),
            }
        )
        self.norm = nn.LayerNorm(SIZE, dtype=torch.bfloat16)


class Model(nn.Module):
    def __init__(self, layers: int = 8) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(3 * SIZE, SIZE, dtype=torch.bfloat16)
        self.layers = nn.ModuleList([Block() for _ in range(layers)])
        self.lm_head = nn.Linear(SIZE, 3 * SIZE, bias=False, dtype=torch.bfloat16)


def in_memory(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())


def same_bytes(a: QTensor, b: QTensor) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a.parts(), b.parts(), strict=True))
