"""Refits of a large mixture of experts on one core: what a name costs over a plain copy, and what all of them take.

    python bench/refit.py [--layers 168] [--rounds 3] [--profile] [--docs]

The counts are those of a large model: 128 experts in each of 168 layers, so 64,512 names of experts (gate, up and down
of each), and ten more of each layer (q, k, v, o, the router, four norms, a bias). The shapes are those of
Qwen3-235B-A22B (hidden 4096, experts of 1536, 64 heads of queries and 4 of keys and values, of 128) with each dimension
divided by 32, so that it fits a small machine: the cost of a name is measured, not that of its bytes. The engine's
weights are fused as vLLM fuses them: w13 `[128, 2 I, H]`, w2 `[128, H, I]`, qkv.

"name by name" writes as vLLM's loaders do: `param.data[e].narrow(0, o, I).copy_(tensor)`. "by stacks" has one tensor
for all experts of a layer, as checkpoints of transformers have. "plain" writes to bf16 parameters, and quantizes
nothing. qtensor is `online_reload` around the same loader, fp8 per channel, from its first line to its last; "of it
kernel" is what the quantizing loops take by themselves. CPU time on one thread, best of the rounds, which take turns.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from torch import nn

from qtensor import fp8, online_quant, online_reload
from qtensor.kernels import FP8_PER_CHANNEL, quantize_into

EXPERTS, HIDDEN, INTER, HEAD = 128, 4096 // 32, 1536 // 32, 128 // 32
QUERIES, KEYS = 64 * HEAD, 4 * HEAD
NAMES_PER_LAYER = 3 * EXPERTS + 10
GOAL_US, GOAL_SECONDS = 25.0, 3.0
SHAPES = {
    "w13": (EXPERTS, 2 * INTER, HIDDEN),
    "w2": (EXPERTS, HIDDEN, INTER),
    "qkv": (QUERIES + 2 * KEYS, HIDDEN),
    "o": (HIDDEN, QUERIES),
    "router": (EXPERTS, HIDDEN),
    "norm1": (HIDDEN,),
    "norm2": (HIDDEN,),
    "q_norm": (HEAD,),
    "k_norm": (HEAD,),
    "bias": (EXPERTS,),
}
QUANTIZED = ("w13", "w2", "qkv", "o")
Loader = Callable[[nn.Module, dict[str, torch.Tensor]], None]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False))


def model_of(layers: int) -> nn.ModuleDict:
    return nn.ModuleDict({"layers": nn.ModuleList([Layer() for _ in range(layers)])})


def tensors() -> dict[str, torch.Tensor]:
    """One of each kind: all layers and experts are sent the same."""
    random = torch.Generator().manual_seed(0)
    shapes = SHAPES | {"gate": (INTER, HIDDEN), "up": (INTER, HIDDEN), "down": (HIDDEN, INTER), "q": (QUERIES, HIDDEN)}
    shapes |= {"k": (KEYS, HIDDEN), "v": (KEYS, HIDDEN)}
    return {name: torch.randn(shape, generator=random).bfloat16() for name, shape in shapes.items()}


def by_name(model: nn.Module, sent: dict[str, torch.Tensor]) -> None:
    for layer in model.layers:
        w13, w2 = layer.w13, layer.w2
        for e in range(EXPERTS):
            w13.data[e].narrow(0, 0, INTER).copy_(sent["gate"])
            w13.data[e].narrow(0, INTER, INTER).copy_(sent["up"])
            w2.data[e].copy_(sent["down"])
        the_rest(layer, sent)


def by_stack(model: nn.Module, sent: dict[str, torch.Tensor]) -> None:
    for layer in model.layers:
        layer.w13.data.copy_(sent["w13"])
        layer.w2.data.copy_(sent["w2"])
        the_rest(layer, sent)


def the_rest(layer: Any, sent: dict[str, torch.Tensor]) -> None:
    for name, first, rows in (("q", 0, QUERIES), ("k", QUERIES, KEYS), ("v", QUERIES + KEYS, KEYS)):
        layer.qkv.data.narrow(0, first, rows).copy_(sent[name])
    for name in ("o", "router", "norm1", "norm2", "q_norm", "k_norm", "bias"):
        getattr(layer, name).data.copy_(sent[name])


def plain(model: nn.Module, sent: dict[str, torch.Tensor], load: Loader) -> None:
    load(model, sent)


def refit(model: nn.Module, sent: dict[str, torch.Tensor], load: Loader) -> None:
    with online_reload(model, on_missing="error", progress=False):
        load(model, sent)


def kernel(layers: int, sent: dict[str, torch.Tensor]) -> float:
    """CPU seconds of the quantizing loops for the experts' names of so many layers."""
    names, times = ("gate", "up", "down"), 2000
    parts = {n: (torch.empty(sent[n].shape, dtype=torch.float8_e4m3fn), torch.empty(len(sent[n]), 1)) for n in names}
    start = time.process_time()
    for _ in range(times):
        for name in names:
            quantize_into(sent[name], *parts[name], FP8_PER_CHANNEL)
    return (time.process_time() - start) / times * EXPERTS * layers


def spent(work: Callable[..., None], *args: Any) -> float:
    start = time.process_time()
    work(*args)
    return time.process_time() - start


def measure(layers: int, rounds: int) -> dict[str, float]:
    sent = tensors()
    unquantized, ours = model_of(layers), model_of(layers)
    with online_quant(fp8, ours, targets=[f"*.{name}" for name in QUANTIZED], progress=False):
        by_stack(ours, sent)
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for way, load in (("name by name", by_name), ("by stacks", by_stack)):
            times.setdefault(f"plain, {way}", []).append(spent(plain, unquantized, sent, load))
            times.setdefault(f"qtensor, {way}", []).append(spent(refit, ours, sent, load))
        times.setdefault("kernel", []).append(kernel(layers, sent))
    return {name: min(found) for name, found in times.items()}


def table(seconds: dict[str, float], names: int) -> str:
    lines = [
        f"| {names:,} names, CPU seconds of one core | plain | qtensor | of it kernel | over plain, µs a name |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way in ("name by name", "by stacks"):
        copies, ours = seconds[f"plain, {way}"], seconds[f"qtensor, {way}"]
        over = (ours - copies) / names * 1e6
        loops = f"{seconds['kernel']:.2f}" if way == "name by name" else ""
        lines.append(f"| {way} | {copies:.2f} | {ours:.2f} | {loops} | {over:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=168)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="profile a refit name by name instead of timing")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/benchmarks.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.profile:
        ours, sent = model_of(args.layers), tensors()
        with online_quant(fp8, ours, targets=[f"*.{name}" for name in QUANTIZED], progress=False):
            by_stack(ours, sent)
        profiler = cProfile.Profile()
        profiler.runcall(refit, ours, sent, by_name)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
        return
    names, seconds = args.layers * NAMES_PER_LAYER, measure(args.layers, args.rounds)
    text = table(seconds, names)
    print(text)
    if args.docs:
        machine.into_page(Path(__file__).parent.parent / "docs" / "benchmarks.md", "refit", text)
    goals = {"us_a_name_over_plain": GOAL_US, "seconds": GOAL_SECONDS}
    results = {**machine.facts("torch", "numba"), "rounds": args.rounds, "names": names, "goals": goals, **seconds}
    print(f"\nwritten: {os.path.relpath(machine.save('refit', results))}")


if __name__ == "__main__":
    main()
