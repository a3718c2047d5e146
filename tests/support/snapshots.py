"""Models for tests of snapshots, and all that a snapshot has to keep of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qtensor import (
    quantize,
    weight_checksums,
)

FILE = "rank-0-of-1.safetensors"


class Stack(nn.Module):
    """Experts: quantized as a stack of matrices."""

    def __init__(self, count: int = 3, rows: int = 24, cols: int = 128) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(count, rows, cols))
        self.register_buffer("order", torch.arange(count).flip(0))
        self.register_buffer("hidden", torch.linspace(0, 1, count, dtype=torch.float16), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 128), nn.Linear(128, 40, bias=False)
        self.head.weight = self.embed.weight
        self.empty = nn.Parameter(torch.empty(0, 4))


KINDS: dict[str, Any] = {
    "linear": lambda: nn.Sequential(nn.Linear(128, 300), nn.LayerNorm(300), nn.Linear(300, 7)),
    "experts": Stack,
    "tied": Tied,
    "convolution": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last),
    "recurrent": lambda: nn.LSTM(16, 8, num_layers=2),
    "attention": lambda: nn.MultiheadAttention(64, 4),
    "of one number": lambda: nn.ParameterDict(
        {"gain": torch.tensor(2.5), "on": nn.Parameter(torch.tensor(True), requires_grad=False)}
    ),
    "nothing": nn.Identity,
}


def build(kind: str, scheme: str | None, dtype: torch.dtype, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = KINDS[kind]()
    for param in model.parameters():
        if param.is_floating_point() and param.numel() > 1:
            param.data.normal_()
    model = model.to(dtype)
    for module in list(model.modules()):
        for name, param in list(module._parameters.items()):
            if scheme is None or param is None or kind not in ("linear", "experts", "attention"):
                continue
            if param.dim() in (2, 3):
                module._parameters[name] = nn.Parameter(quantize(param.data, scheme), requires_grad=False)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """Bytes, dtypes, shapes, strides and ties of all parameters and buffers."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    ids = [id(t) for t in tensors.values()]
    sums = weight_checksums(tensors)
    return {
        name: (
            sums[name],
            t.dtype,
            t.shape,
            t.stride(),
            t.requires_grad,
            ids.index(id(t)),
            type(t),
            t.__dict__.get("scheme"),
        )
        for name, t in tensors.items()
    }


def linear(*schemes: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(128, 128, dtype=torch.bfloat16) for _ in schemes or ("fp8_per_channel",)))
    for layer, scheme in zip(model, schemes or ("fp8_per_channel",), strict=True):
        layer.weight = nn.Parameter(quantize(torch.randn(128, 128).bfloat16(), scheme), requires_grad=False)
    return model


def fresh(count: int = 1) -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(128, 128, dtype=torch.bfloat16) for _ in range(count)))
