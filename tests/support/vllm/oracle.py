"""What vLLM's fused weights are made of, by name, and what `quantize` makes of them: the oracle of these tests."""

from __future__ import annotations

import re

import torch

from qtensor import quantize
from support.vllm.engines import is_quantized, is_scale

_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


_CUT_BY_COLUMN = ("o_proj", "down_proj")
# Integers of the size of an element: fp8 has few operations on a CPU.
_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def fused(tensors: dict[str, torch.Tensor], name: str, rank: int = 0, ranks: int = 1) -> torch.Tensor:
    """The high-precision values of the runtime weight `name`, from a Llama's or Qwen-MoE's checkpoint: those of one
    rank of several, if they share linear layers by tensor parallelism and own whole experts."""
    name = name.replace(".routed_experts", "")
    experts = re.match(r"(.*\.experts)\.(w13|w2)_weight$", name)
    if experts:
        prefix, stack = experts.groups()
        count = len({n for n in tensors if re.match(re.escape(prefix) + r"\.\d+\.down_proj", n)})
        parts = ("gate_proj", "up_proj") if stack == "w13" else ("down_proj",)
        stacked = [torch.cat([tensors[f"{prefix}.{e}.{p}.weight"] for p in parts]) for e in range(count)]
        return torch.stack(stacked).chunk(ranks)[rank]
    prefix, _, last = name.removesuffix(".weight").rpartition(".")
    dim = 1 if last in _CUT_BY_COLUMN else 0
    cuts = [tensors[f"{prefix}.{part}.weight"].chunk(ranks, dim)[rank] for part in _PARTS.get(last, (last,))]
    return torch.cat(cuts)


def runtime_state(tensors: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint in vLLM's own fused layout, as load_format="sharded_state" reads it: the state of a running model
    with every quantized weight in high precision again."""
    made: dict[str, torch.Tensor] = {}
    second_names: list[str] = []
    for name, value in state.items():
        if is_scale(name):
            continue
        if is_quantized(name, state):
            value = fused(tensors, name)
        # vLLM empties weights that it packed for the CPU; a router has two names, of which a state keeps the first.
        made[name] = tensors.get(name.replace(".experts.gate.", ".gate."), value).contiguous()
        if ".experts.gate." in name:
            second_names.append(name.replace(".experts.gate.", ".gate."))
    return {name: value for name, value in made.items() if name not in second_names}


def part_of_the_whole(
    tensors: dict[str, torch.Tensor], name: str, scheme: str, rank: int, ranks: int
) -> tuple[torch.Tensor, ...]:
    """The parts of a `QTensor` that a rank has of the runtime weight `name`: cut out of the quantized whole."""
    prefix, _, last = name.removesuffix(".weight").rpartition(".")
    if ranks == 1 or "experts" in name or "block" in scheme:
        return quantize(fused(tensors, name, rank, ranks), scheme).parts()
    whole = quantize(fused(tensors, name), scheme)
    rows = [len(tensors[f"{prefix}.{part}.weight"]) for part in _PARTS.get(last, (last,))]
    dim = 1 if last in _CUT_BY_COLUMN else 0

    def mine(part: torch.Tensor) -> torch.Tensor:
        if part.dim() < 2 or part.shape[dim] == 1:
            return part  # One scale for all of the rows, or all of the columns, that are split.
        cuts = [piece.chunk(ranks, dim)[rank] for piece in part.view(_BYTES[part.itemsize]).split(rows)]
        return torch.cat(cuts).view(part.dtype)

    return tuple(mine(part) for part in whole.parts())


def mistakes(
    tensors: dict[str, torch.Tensor], runtime: dict[str, torch.Tensor], scheme: str, rank: int = 0, ranks: int = 1
) -> list[str]:
    """Names of runtime weights and scales whose bytes are not the oracle's. An empty list is the aim."""
    wrong = []
    for name in runtime:
        if is_quantized(name, runtime):
            wrong += unequal(runtime, name, part_of_the_whole(tensors, name, scheme, rank, ranks))
    return wrong


def unequal(runtime: dict[str, torch.Tensor], name: str, parts: tuple[torch.Tensor, ...]) -> list[str]:
    """Names of the runtime weight's values and scales that are not these, byte for byte."""
    scale = f"{name}_scale_inv" if f"{name}_scale_inv" in runtime else f"{name}_scale"
    held = [*zip((name, scale, f"{name}_global_scale"), parts, strict=False)]
    return [own for own, part in held if own not in runtime or not _same(runtime[own], part)]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = _BYTES[b.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
