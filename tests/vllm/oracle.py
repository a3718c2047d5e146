"""What vLLM's fused weights are made of, by name, and what `quantize` makes of them: the oracle of these tests."""

from __future__ import annotations

import re

import torch

from qtensor import quantize

_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


_CUT_BY_COLUMN = ("o_proj", "down_proj")


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
        if "weight_scale" in name:
            continue
        if value.dtype == torch.float8_e4m3fn:
            value = fused(tensors, name)
        # vLLM empties weights that it packed for the CPU; a router has two names, of which a state keeps the first.
        made[name] = tensors.get(name.replace(".experts.gate.", ".gate."), value).contiguous()
        if ".experts.gate." in name:
            second_names.append(name.replace(".experts.gate.", ".gate."))
    return {name: value for name, value in made.items() if name not in second_names}


def part_of_the_whole(
    tensors: dict[str, torch.Tensor], name: str, scheme: str, rank: int, ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantized values and scales that a rank has of the runtime weight `name`: cut out of the quantized whole."""
    prefix, _, last = name.removesuffix(".weight").rpartition(".")
    if ranks == 1 or "experts" in name or "block" in scheme:
        expected = quantize(fused(tensors, name, rank, ranks), scheme)
        return expected.qdata, expected.scale
    whole = quantize(fused(tensors, name), scheme)
    rows = [len(tensors[f"{prefix}.{part}.weight"]) for part in _PARTS.get(last, (last,))]

    def mine(values: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([part.chunk(ranks, dim)[rank] for part in values.split(rows)])

    dim = 1 if last in _CUT_BY_COLUMN else 0
    qdata = mine(whole.qdata.view(torch.uint8), dim).view(whole.qdata.dtype)
    return qdata, mine(whole.scale, 0) if dim == 0 and len(whole.scale) > 1 else whole.scale


def mistakes(
    tensors: dict[str, torch.Tensor], runtime: dict[str, torch.Tensor], scheme: str, rank: int = 0, ranks: int = 1
) -> list[str]:
    """Names of runtime weights whose bytes or scales are not the oracle's. An empty list is the aim."""
    wrong = []
    for name, data in runtime.items():
        if data.dtype != torch.float8_e4m3fn:
            continue
        qdata, expected_scale = part_of_the_whole(tensors, name, scheme, rank, ranks)
        scale = runtime.get(f"{name}_scale", runtime.get(f"{name}_scale_inv"))
        if not torch.equal(data.view(torch.uint8), qdata.view(torch.uint8)):
            wrong.append(name)
        elif scale is None or not torch.equal(scale, expected_scale):
            wrong.append(f"{name} (scale)")
    return wrong
