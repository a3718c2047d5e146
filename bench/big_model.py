"""A model whose bf16 weights exceed this machine: made shard by shard, quantized while it loads, asked for tokens.

    python bench/big_model.py [--gb 29.5] [--scheme fp8] [--tokens 8] [--folder bench/.data] [--keep] [--out FILE]

The checkpoint has the layers of a 14.8 B model (29.5 GB in bf16: 48 layers of 5120, Llama's), fewer of them for fewer
GB. The disk is checked first, and what was written is removed afterwards. A fresh process loads it with transformers
under the watch of this one, which samples its anonymous memory; then it generates tokens, one at a time, and the median
of their times stands beside the time that reading the weights takes: their bytes by the bandwidth at which torch reads
memory in that process (a sum over int64).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import psutil
import torch
from load_memory import from_pretrained, held_bytes
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtensor import online_quant
from qtensor.cli.demo import write_checkpoint
from qtensor.report.memory import Child, measure
from qtensor.schemes.scheme import SCHEMES

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 5120, 13824, 40, 8, 152064
SMALL, SMALL_VOCABULARY = 20, 32000  # GB below which layers count more than words
PROMPT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=29.5, help="bytes of the bf16 weights, 10^9")
    parser.add_argument("--scheme", choices=SCHEMES, default="fp8", metavar="SCHEME")
    parser.add_argument("--tokens", type=int, default=8, help="to generate, one at a time")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / ".data", help="where there is room")
    parser.add_argument("--keep", action="store_true", help="do not remove the checkpoint")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child, args.scheme, args.tokens)
        return
    folder = args.folder / f"big-{args.gb:g}gb"
    try:
        if not (folder / "config.json").exists():
            generate(folder, args.gb)
        command = [sys.executable, __file__, "--child", str(folder), "--scheme", args.scheme]
        run = measure([*command, "--tokens", str(args.tokens)])
        checkpoint = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    found = {
        **machine.facts("torch", "transformers", "safetensors", "numba"),
        "scheme": args.scheme,
        "memory_bytes": psutil.virtual_memory().total,
        "checkpoint_bytes": checkpoint,
        "load_seconds": run.seconds,
        "peak": run.peak,
        "stays": run.final,
        "peak_of_stays": run.peak / run.final,
        **run.result,
    }
    found["of_memory_limit"] = found["limit_seconds"] / found["seconds_per_token"]
    print(f"{checkpoint / 1e9:.1f} GB of bf16 on a machine with {found['memory_bytes'] / 1e9:.1f} GB, {args.scheme}")
    print(f"load: {run.seconds:.1f} s; peak {run.peak / 1e9:.2f} GB, stays {run.final / 1e9:.2f} GB", end=" ")
    print(f"(peak / stays {found['peak_of_stays']:.4f})")
    print(f"a token: {found['seconds_per_token']:.3f} s; reading {found['read_bytes'] / 1e9:.2f} GB", end=" ")
    print(f"takes {found['limit_seconds']:.3f} s ({found['of_memory_limit']:.0%} of the memory limit)")
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


def generate(folder: Path, gigabytes: float) -> None:
    """Random weights, one layer to a shard."""
    shape = config(gigabytes)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    needed = 2 * sum(size.numel() for size in shapes.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed + (2 << 30):
        raise SystemExit(
            f"{folder} has {free / 1e9:.1f} GB free; the checkpoint takes {needed / 1e9:.1f}, and 2 to spare"
        )
    print(f"generating {needed / 1e9:.1f} GB of random weights in {folder}", flush=True)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.split(".layers.")[-1].split(".")[0] if ".layers." in name else name, []).append(name)
    index = {}
    for number, names in enumerate(shards.values()):
        file = f"model-{number:05d}.safetensors"
        weights = {name: random_weight(shapes[name]) for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
    written = {"metadata": {"total_size": needed}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(written))
    (folder / "config.json").write_text(json.dumps(shape))


def random_weight(shape: torch.Size) -> torch.Tensor:
    """Norms are ones; the rest has a standard deviation of 0.02, like real weights."""
    weight = torch.empty(shape, dtype=torch.bfloat16)
    return weight.fill_(1) if weight.dim() == 1 else weight.normal_(0, 0.02)


def config(gigabytes: float) -> dict[str, Any]:
    """A Llama configuration whose bf16 weights take about so much."""
    words = VOCABULARY if gigabytes >= SMALL else SMALL_VOCABULARY
    head = HIDDEN // HEADS
    layer = 2 * HIDDEN * (2 * HIDDEN + 2 * KV_HEADS * head + 3 * INTERMEDIATE)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": words,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": max(1, round((gigabytes * 1e9 - 4 * words * HIDDEN) / layer)),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": head,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


def run_child(folder: Path, scheme: str, tokens: int) -> None:
    with tempfile.TemporaryDirectory() as tiny:  # compiles the loops, and imports what a load imports
        write_checkpoint(Path(tiny), 1)
        step_by_step(load(Path(tiny), scheme), 2)
    child = Child()
    child.ready()
    model = load(folder, scheme)
    child.done()
    read = sum(held_bytes(p) for name, p in model.named_parameters() if "embed_tokens" not in name)
    times = step_by_step(model, tokens)
    child.add(
        seconds_per_token=statistics.median(times),
        tokens=len(times),
        read_bytes=read,
        limit_seconds=read * seconds_per_byte(),
        threads=torch.get_num_threads(),
    )


def load(folder: Path, scheme: str) -> nn.Module:
    with online_quant(SCHEMES[scheme].weight_only(), progress=False):
        return from_pretrained(folder).eval()


def step_by_step(model: Any, tokens: int) -> list[float]:
    """Seconds of each token after a short prompt."""
    times = []
    with torch.inference_mode():
        found = model(torch.arange(PROMPT)[None], use_cache=True)
        for _ in range(tokens):
            start = time.perf_counter()
            word = found.logits[:, -1:].argmax(-1)
            found = model(word, past_key_values=found.past_key_values, use_cache=True)
            times.append(time.perf_counter() - start)
    return times


def seconds_per_byte() -> float:
    memory = torch.zeros(1 << 29, dtype=torch.uint8).view(torch.int64)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        memory.sum()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / memory.nbytes


if __name__ == "__main__":
    main()
