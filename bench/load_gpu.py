"""Loading a mixture-of-experts checkpoint onto a GPU: peak memory over final memory, and time over a plain bf16 load.

    python bench/load_gpu.py [--scale 0.1] [--scheme fp8_per_channel] [--checkpoint DIR]

A random checkpoint with the tensor shapes of Qwen1.5-MoE-A2.7B (26.7 GiB in bf16; --scale keeps a share of its
layers) is loaded by one and the same safetensors loop, each way in a process of its own:

bf16                  into a plain model
qtensor               under online_quant
load-then-quantize    into a plain model whose weights are quantized afterwards

Goals: peak / final <= 1.01 for qtensor, and no slower than bf16. Needs a GPU, and disk and page cache for the
checkpoint, which is read once beforehand so that the disk's speed does not enter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from qtensor import fp8, fp8_per_block, fp8_per_channel, fp8_per_tensor, online_quant, quantize

SCHEMES = {
    "fp8": fp8,
    "fp8_per_tensor": fp8_per_tensor,
    "fp8_per_channel": fp8_per_channel,
    "fp8_per_block": fp8_per_block,
}
WAYS = ("bf16", "qtensor", "load-then-quantize")
HIDDEN, VOCAB, LAYERS, EXPERTS, EXPERT_SIZE, SHARED_SIZE = 2048, 151936, 24, 60, 1408, 5632
SHARD_BYTES = 4 << 30


def mlp(size: int) -> nn.Module:
    return nn.ModuleDict(
        {
            "gate_proj": nn.Linear(HIDDEN, size, bias=False),
            "up_proj": nn.Linear(HIDDEN, size, bias=False),
            "down_proj": nn.Linear(size, HIDDEN, bias=False),
        }
    )


def layer() -> nn.Module:
    attention = {name: nn.Linear(HIDDEN, HIDDEN, bias=True) for name in ("q_proj", "k_proj", "v_proj")}
    moe = {
        "gate": nn.Linear(HIDDEN, EXPERTS, bias=False),
        "experts": nn.ModuleList(mlp(EXPERT_SIZE) for _ in range(EXPERTS)),
        "shared_expert": mlp(SHARED_SIZE),
        "shared_expert_gate": nn.Linear(HIDDEN, 1, bias=False),
    }
    return nn.ModuleDict(
        {
            "self_attn": nn.ModuleDict({**attention, "o_proj": nn.Linear(HIDDEN, HIDDEN, bias=False)}),
            "mlp": nn.ModuleDict(moe),
            "input_layernorm": nn.RMSNorm(HIDDEN),
            "post_attention_layernorm": nn.RMSNorm(HIDDEN),
        }
    )


def build(layers: int) -> nn.Module:
    """The parameters of Qwen1.5-MoE-A2.7B, on the meta device, in bf16; it has no forward."""
    with torch.device("meta"):
        model = nn.ModuleDict({"embed_tokens": nn.Embedding(VOCAB, HIDDEN)})
        model["layers"] = nn.ModuleList(layer() for _ in range(layers))
        model["norm"] = nn.RMSNorm(HIDDEN)
        whole = nn.ModuleDict({"model": model, "lm_head": nn.Linear(HIDDEN, VOCAB, bias=False)})
    return whole.to(torch.bfloat16)


def make_checkpoint(folder: Path, layers: int, device: torch.device) -> None:
    """Random weights in shards of 4 GiB; does nothing if `folder` holds them already."""
    done = folder / f"complete-{layers}"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, torch.Tensor] = {}
    size = number = 0
    for name, weight in build(layers).state_dict().items():
        shard[name] = (torch.randn(weight.shape, device=device) * 0.02).to(torch.bfloat16).cpu()
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            save_file(shard, folder / f"model-{number:05}.safetensors")
            shard, size, number = {}, 0, number + 1
    save_file(shard, folder / f"model-{number:05}.safetensors")
    done.touch()


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, CPU tensor) of every tensor in the checkpoint, mapped from the files."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


def read_once(folder: Path) -> int:
    """Bring the checkpoint into the page cache; the bytes of its tensors."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(64 << 20):
                pass
    return sum(value.nbytes for _, value in tensors(folder))


def fill(model: nn.Module, folder: Path) -> None:
    """The loader, the same for every way of loading."""
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors(folder):
            params[name].copy_(value)


def quantize_afterwards(model: nn.Module, scheme: Any) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(("lm_head", ".gate", "shared_expert_gate")):
            module.weight = nn.Parameter(quantize(module.weight.detach(), scheme), requires_grad=False)


def load(way: str, folder: Path, layers: int, scheme: Any, device: torch.device) -> nn.Module:
    model = build(layers)
    if way == "qtensor":
        with online_quant(scheme, model, device=device):
            fill(model, folder)
        return model
    model = model.to_empty(device=device)
    fill(model, folder)
    if way == "load-then-quantize":
        quantize_afterwards(model, scheme)
    return model


def measure(way: str, folder: Path, layers: int, scheme: Any) -> dict[str, Any]:
    """One load in this process: seconds, and bytes the torch allocator gave out at most and at the end."""
    device = gpu.require_gpu()
    torch.ones(1, device=device)  # The context's own start is not part of a load.
    if way != "bf16":
        quantize(torch.ones(256, 256, dtype=torch.bfloat16, device=device), scheme)  # Nor is compiling the kernels.
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = load(way, folder, layers, scheme, device)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak, final = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    assert not any(p.is_meta for p in model.parameters())
    return {"way": way, "seconds": seconds, "peak_bytes": peak, "final_bytes": final}


def in_own_process(way: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", way, "--checkpoint", str(folder)]
    command += ["--scale", str(options.scale), "--scheme", options.scheme]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per way: the median time, and memory, over its runs."""
    rows = []
    plain = statistics.median(r["seconds"] for r in runs if r["way"] == "bf16")
    for way in WAYS:
        mine = [r for r in runs if r["way"] == way]
        seconds = statistics.median(r["seconds"] for r in mine)
        peak, final = max(r["peak_bytes"] for r in mine), mine[0]["final_bytes"]
        rows.append(
            {
                "way": way,
                "seconds": seconds,
                "of bf16": seconds / plain,
                "peak GiB": peak / 2**30,
                "final GiB": final / 2**30,
                "peak / final": peak / final,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the 24 layers (default 1.0: 26.7 GiB)")
    parser.add_argument("--scheme", choices=sorted(SCHEMES), default="fp8")
    parser.add_argument("--checkpoint", type=Path, help="folder to make the checkpoint in, kept (default: temporary)")
    parser.add_argument("--repeat", type=int, default=3, help="loads per way; the median time counts")
    parser.add_argument("--no-save", action="store_true", help="write no file under bench/results/")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    layers = max(1, round(LAYERS * options.scale))
    if options.one:
        print(json.dumps(measure(options.one, options.checkpoint, layers, SCHEMES[options.scheme])))
        return 0
    device = gpu.require_gpu()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.checkpoint or Path(temporary)) / f"layers-{layers}"
        make_checkpoint(folder, layers, device)
        torch.cuda.empty_cache()
        size = read_once(folder)
        print(f"{gpu.machine()['chip']}: {layers} layers, {size / 2**30:.1f} GiB in bf16, {options.scheme}\n")
        runs = [in_own_process(way, options, folder) for _ in range(options.repeat) for way in WAYS]
    rows = summarize(runs)
    ours = rows[WAYS.index("qtensor")]
    goals = [f"peak / final {ours['peak / final']:.4f} (goal 1.01)", f"time of bf16 {ours['of bf16']:.2f} (goal 1.00)"]
    print(gpu.table(rows), *goals, sep="\n")
    if not options.no_save:
        record = {"machine": gpu.machine(), "scheme": options.scheme, "layers": layers, "bf16_bytes": size}
        print("written to", gpu.save("load_gpu", {**record, "rows": rows, "runs": runs}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
