"""Small `.gguf` files, written by the format's definition, without the package that owns it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qtensor.sources.gguf import TYPES
from support.sources import gguf_rows

Tensor = tuple[int, tuple[int, ...], bytes]
"""The number of its type, its shape in numbers, and its bytes."""
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}


def plain(tensor: torch.Tensor) -> Tensor:
    return _TYPES[tensor.dtype], tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def blocks(kind: str, rows: torch.Tensor) -> Tensor:
    """Rows of blocks `[..., bytes]`."""
    number, values, size = TYPES[kind]
    return number, (*rows.shape[:-1], rows.shape[-1] // size * values), rows.numpy().tobytes()


def write(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], version: int = 3) -> Path:
    head = bytearray(b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields)))
    for key, value in fields.items():
        head += _text(key) + _value(value)
    data = bytearray()
    for name, (kind, shape, held) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data))
        data += held
    head += b"\0" * (-len(head) % 32)
    path.write_bytes(head + data)
    return path


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, list):
        kind, each = (
            (8, [_text(v) for v in value]) if isinstance(value[0], str) else (4, [struct.pack("<I", v) for v in value])
        )
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(each)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def fields_of(arch: str, **more: Any) -> dict[str, Any]:
    """Of a model of two layers, with 4 heads of 64, of which 2 are of keys."""
    sizes = {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 256,
        "feed_forward_length": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        **more,
    }
    tokens = {"tokenizer.ggml.tokens": [f"<{i}>" for i in range(96)], "tokenizer.ggml.bos_token_id": 1}
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in sizes.items()}, **tokens}


def tensors_of(
    arch: str, kinds: tuple[str, ...] = ("Q4_K", "Q6_K"), experts: int = 0, head: bool = True
) -> dict[str, Tensor]:
    """Of the model of `fields_of`: matrices of random blocks of these types in turn, all else in fp32."""
    g = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}

    def add(name: str, rows: int, cols: int, *lead: int) -> None:
        kind = kinds[len(found) % len(kinds)]
        made = (
            torch.stack([gguf_rows(kind, rows, cols, g) for _ in range(lead[0])])
            if lead
            else gguf_rows(kind, rows, cols, g)
        )
        found[name] = blocks(kind, made)

    def add_plain(name: str, *shape: int) -> None:
        found[name] = plain(torch.randn(shape, generator=g) * 0.1)

    add("token_embd.weight", 96, 256)
    add_plain("output_norm.weight", 256)
    if head:
        add("output.weight", 96, 256)
    for i in range(2):
        at = f"blk.{i}."
        add_plain(at + "attn_norm.weight", 256)
        add_plain(at + "ffn_norm.weight", 256)
        for name, rows in (("attn_q", 256), ("attn_k", 128), ("attn_v", 128), ("attn_output", 256)):
            add(f"{at}{name}.weight", rows, 256)
            if arch in ("qwen2", "qwen2moe") and name != "attn_output":
                add_plain(f"{at}{name}.bias", rows)
        if arch.startswith("qwen3"):
            add_plain(at + "attn_q_norm.weight", 64)
            add_plain(at + "attn_k_norm.weight", 64)
        if experts:
            add_plain(at + "ffn_gate_inp.weight", experts, 256)
            for name, rows, cols in (("gate", 256, 256), ("up", 256, 256), ("down", 256, 256)):
                add(f"{at}ffn_{name}_exps.weight", rows, cols, experts)
        if arch == "qwen2moe":
            add_plain(at + "ffn_gate_inp_shexp.weight", 256)
            for name, rows, cols in (("gate", 512, 256), ("up", 512, 256), ("down", 256, 512)):
                add(f"{at}ffn_{name}_shexp.weight", rows, cols)
        if not experts:
            for name, rows, cols in (("gate", 512, 256), ("up", 512, 256), ("down", 256, 512)):
                add(f"{at}ffn_{name}.weight", rows, cols)
    return found
