"""GgufCheckpoint: a `.gguf` file as the checkpoint that its model has in transformers, by the names that it has there.

Matrices stay as they lie in the file, blocks of bytes, and are decoded by whoever reads a quantized checkpoint. What
llama.cpp did to a model is undone: its names, the order of rows of q and k (whole rows, so that blocks stay whole),
and stacks of experts, whose matrices transformers has one by one on disk. config.json is made of the metadata. Only
architectures whose every tensor is a tensor of transformers, as it is, are read; others are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..kernels.formats import ceil_div
from .gguf_file import PLAIN, QUANTIZED, SUFFIX, Entry, GgufFile
from .reading import SINGLE, Checkpoint, Stored

GGUF = "gguf"
SHARD_BYTES = 4 << 30
"""Of the source, in each file that a conversion writes."""
_PIECE = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_NORMED = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_ROUTED = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_COMPUTED = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
"""What is no weight: transformers computes it from its configuration."""


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        model_type: What transformers calls it.
        model: Its class there.
        names: Of the modules of a layer, llama.cpp's to transformers'; "{}" is the number of an expert.
        turned: Whether the rows of q and k are in the order of llama.cpp's rotation, pairs side by side.
        config: What config.json says besides what the metadata do.
        experts: What config.json calls the number of experts.
    """

    model_type: str
    model: str
    names: Mapping[str, str]
    turned: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    experts: str = ""


_LLAMA = Architecture("llama", "LlamaForCausalLM", {**_ATTENTION, **_MLP}, turned=True)
ARCHITECTURES = {
    "llama": _LLAMA,
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", {**_ATTENTION, **_MLP}),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_ATTENTION, **_NORMED, **_MLP}),
    "qwen2moe": Architecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**_ATTENTION, **_ROUTED, **_SHARED},
        config={"norm_topk_prob": False},
        experts="num_experts",
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_ATTENTION, **_NORMED, **_ROUTED},
        config={"norm_topk_prob": True},
        experts="num_experts",
    ),
}
"""By "general.architecture". "llama" is Mistral's and, with experts, Mixtral's too."""
_MIXTRAL_OF_LLAMA = Architecture(
    "mixtral", "MixtralForCausalLM", {**_ATTENTION, **_MIXTRAL}, turned=True, experts="num_local_experts"
)
_CONFIG = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "expert_used_count": "num_experts_per_tok",
}
_NEEDED = ("block_count", "embedding_length", "attention.head_count")
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0


@dataclass(frozen=True)
class HeadRows(Stored):
    """Rows that are, within each of so many heads, in pairs: 0 and half, 1 and half + 1. They are read as transformers
    has them: first halves first."""

    heads: int = 1

    def read(self, first: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
        whole = self._memory() if out is None else out
        each, row = self.shape[0] // self.heads, prod(self.shape[1:])
        if not whole.numel():
            return whole
        low = first // (each * row) * each
        high = ceil_div(first + whole.numel(), each * row) * each
        held = super().read(low * row, torch.empty((high - low, row), dtype=self.dtype, device="cpu"))
        held = held.view(-1, each // 2, 2, row).transpose(1, 2).reshape(-1)
        whole.view(-1).copy_(held[first - low * row :][: whole.numel()])
        return whole


class GgufCheckpoint(Checkpoint):
    """One `.gguf` file, or all of those that a model was split into, if it is one of them that is given."""

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        self.files = list(_pieces(self.folder))
        self._headers = [GgufFile.open(file) for file in self.files]
        self._main = self._headers[0]
        name = self._main.fields.get("general.architecture")
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(f"{self.folder}: its architecture is {name!r:.60}; those that are read are {known}")
        self._prefix = f"{name}."
        mixture = name == "llama" and self._number("expert_count")
        self._architecture = _MIXTRAL_OF_LLAMA if mixture else ARCHITECTURES[name]
        self._entries = {entry.name: entry for header in self._headers for entry in header.entries}
        if len(self._entries) != sum(len(header.entries) for header in self._headers):
            raise CheckpointError(f"{self.folder}: its files have a tensor twice")
        self.tensors: dict[str, Stored] = {}
        for header in self._headers:
            for entry in header.entries:
                if entry.name not in _COMPUTED:
                    self.tensors |= {stored.name: stored for stored in self._stored(header.path, entry)}
        places = sorted({self._place(stored) for stored in self.tensors.values()})
        many = len(places)
        names = (f"model-{i + 1:05}-of-{many:05}.safetensors" for i in range(many)) if many > 1 else (SINGLE,)
        self._shards = dict(zip(places, names, strict=False))

    @cached_property
    def quantization(self) -> None:
        """The parts' names say it all."""
        return None

    @property
    def method(self) -> str:
        return GGUF

    @property
    def shards(self) -> list[str]:
        return list(self._shards.values()) or [SINGLE]

    def shard_of(self, stored: Any) -> str:
        return self._shards[self._place(stored)]

    def _place(self, stored: Any) -> tuple[str, int]:
        return stored.path.name, stored.offset // SHARD_BYTES

    def _number(self, key: str) -> Any:
        return self._main.number(self._prefix + key)

    def _count(self, key: str) -> int:
        found = self._number(key)
        if type(found) is not int or found < 1:
            raise CheckpointError(f"{self.folder}: its {self._prefix}{key} is {found!r}, and should be a number from 1")
        return found

    def _stored(self, path: Path, entry: Entry) -> Iterator[Stored]:
        """A tensor of the file as those of transformers."""
        outer, _, kind = entry.name.rpartition(".")
        layer = _LAYER.fullmatch(entry.name)
        if outer in _OUTER and kind == "weight":
            yield self._one(path, entry, f"{_OUTER[outer]}.{kind}", entry.shape)
            return
        module = self._architecture.names.get(layer[2]) if layer else None
        if layer is None or module is None:
            raise CheckpointError(
                f"{self.folder}: {entry.name} is no tensor that a {self._architecture.model} is known to have"
            )
        name, shape = f"model.layers.{int(layer[1])}.{module}.{layer[3]}", entry.shape
        if "{}" in module:
            experts, *each = shape
            for e in range(experts):
                offset = entry.offset + e * (entry.nbytes // experts)
                part = entry._replace(offset=offset, nbytes=entry.nbytes // experts)
                yield self._one(path, part, name.format(e), tuple(each))
            return
        if layer[2] == "ffn_gate_inp_shexp":  # A row of a matrix.
            shape = (1, *shape)[-2:]
        heads = 0
        if self._architecture.turned and layer[2] in ("attn_q", "attn_k"):
            heads = self._count("attention.head_count")
            if layer[2] == "attn_k" and self._number("attention.head_count_kv") is not None:
                heads = self._count("attention.head_count_kv")
            if shape[0] % (2 * heads):
                raise CheckpointError(f"{self.folder}: {entry.name} has {shape[0]} rows, which are no {heads} heads")
        yield self._one(path, entry, name, shape, heads)

    def _one(self, path: Path, entry: Entry, name: str, shape: tuple[int, ...], heads: int = 0) -> Stored:
        dtype = PLAIN.get(entry.type)
        if dtype is None:
            if len(shape) != 2:
                raise CheckpointError(f"{self.folder}: {entry.name} is quantized, and {list(shape)} is no matrix")
            kind, dtype = QUANTIZED[entry.type], torch.uint8
            name, shape = f"{name}.{kind}", (shape[0], entry.nbytes // max(shape[0], 1))
        make: Callable[..., Stored] = HeadRows if heads else Stored
        more = {"heads": heads} if heads else {}
        return make(name, path, dtype, shape, entry.offset, entry.nbytes, **more)

    @cached_property
    def config(self) -> dict[str, Any]:
        """As the model's config.json would be. Raises CheckpointError where the metadata do not tell it."""
        arch, found = self._architecture, {}
        for key, name in _CONFIG.items():
            value = self._number(key)
            if value is not None and math.isfinite(value):
                found[name] = value
            elif key in _NEEDED:
                raise CheckpointError(f"{self.folder}: has no {self._prefix}{key}, which config.json needs")
        size = self._number("attention.key_length") or self._number("rope.dimension_count")
        found["head_dim"] = size or found["hidden_size"] // max(found["num_attention_heads"], 1)
        if (embedded := self._entries.get("token_embd.weight")) is not None:
            found["vocab_size"] = embedded.shape[0]
        if arch.experts:
            found[arch.experts] = self._count("expert_count")
            found |= self._sizes_of_experts()
        if arch is _LLAMA:
            found["attention_bias"] = "blk.0.attn_q.bias" in self._entries
        for token, name in _TOKENS.items():
            if (value := self._main.number(f"tokenizer.ggml.{token}_token_id")) is not None:
                found[name] = value
        if (scaling := self._rope_scaling(found)) is not None:
            found["rope_scaling"] = scaling
        found["tie_word_embeddings"] = "output.weight" not in self._entries
        return {
            "architectures": [arch.model],
            "model_type": arch.model_type,
            "dtype": "bfloat16",
            **arch.config,
            **found,
        }

    def _sizes_of_experts(self) -> dict[str, int]:
        """By the tensors: not every file has them in its metadata."""
        if self._architecture is _MIXTRAL_OF_LLAMA:
            return {}
        called = {"ffn_down_exps": "moe_intermediate_size", "ffn_down_shexp": "shared_expert_intermediate_size"}
        found = {}
        for name, entry in self._entries.items():
            if (layer := _LAYER.fullmatch(name)) and layer[2] in called:
                found[called[layer[2]]] = entry.shape[-1]
        return found

    def _rope_scaling(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        kind = self._main.fields.get(f"{self._prefix}rope.scaling.type", "none")
        if "rope_freqs.weight" in self._entries:
            return self._llama3(config)
        if kind == "none":
            return None
        factor, before = (self._number(f"rope.scaling.{key}") for key in ("factor", "original_context_length"))
        if kind not in ("linear", "yarn") or not factor:
            raise CheckpointError(
                f"{self.folder}: its rotary embedding is scaled ({kind!r:.40}), which no config.json is made of here"
            )
        return {"rope_type": kind, "factor": factor} | (
            {"original_max_position_embeddings": before} if before is not None else {}
        )

    def _llama3(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Llama 3's scaling: its factors are in the file, and its parameters are those that give the factors."""
        entry = self._entries["rope_freqs.weight"]
        path = next(header.path for header in self._headers if entry in header.entries)
        told = Stored(entry.name, path, torch.float32, entry.shape, entry.offset, entry.nbytes).read()
        factor, theta, n = round(float(told.max()), 3), float(config.get("rope_theta", 10000.0)), told.numel()
        turns = theta ** -(torch.arange(n, dtype=torch.float64, device="cpu") / n) / (2 * math.pi)
        for context in (8192, 4096, 2048, 16384, 32768, 65536, 131072):
            smooth = ((context * turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)).clamp(0, 1)
            if torch.allclose(told.double(), 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": _LLAMA3_LOW,
                    "high_freq_factor": _LLAMA3_HIGH,
                    "original_max_position_embeddings": context,
                }
        raise CheckpointError(f"{self.folder}: its rope_freqs.weight are no factors that Llama 3's scaling gives")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A folder of safetensors files, or a `.gguf` file. Raises CheckpointError."""
    file = Path(path)
    return GgufCheckpoint(file) if file.suffix.lower() == SUFFIX and not file.is_dir() else Checkpoint(file)


def _pieces(path: Path) -> Iterator[Path]:
    """The files of a model that was split, the first of them, which has the metadata, first."""
    split = _PIECE.fullmatch(path.name)
    if split is None:
        yield path
        return
    for i in range(1, int(split[3]) + 1):
        piece = path.with_name(f"{split[1]}-{i:05}-of-{split[3]}.gguf")
        if not piece.is_file():
            raise CheckpointError(f"{path}: is one of {int(split[3])} files, and {piece.name} is missing")
        yield piece
