"""Quantized checkpoints into each scheme: how long, how much memory, and how much is lost a second time.

    python bench/sources.py [--gb 1] [--threads 1] [--only fp8] [--losses]

A model of square linear layers is written as fp8 blocks (DeepSeek's) or as mxfp4 (compressed-tensors), of so many GB on
disk, and as the bf16 values of those. Each row is a process of its own: `load_checkpoint(scheme=...)` of the quantized
folder; of the bf16 folder, which is the speed that decoding is measured against; and what users do without us, with
transformers' own decoders: dequantize the whole model to bf16, then quantize it weight by weight, in place. Time is
from the first byte read to the model in its final form, and the processors' time in that, which other work on the
machine hardly changes; best of --repeat. Peak is resident memory above what the process had before, over the bytes of
the finished weights; before, a model of one layer was loaded twice in the same way.

--losses: signal-to-quantization-noise ratio against the high-precision weights, of random normal ones, for each source
and scheme: quantized once, and quantized again from the source.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qtensor import load_checkpoint, online_quant, quantize
from qtensor.sources.families import recognise
from qtensor.sources.source import Spec

SIDE = 4096
SOURCES = ("fp8", "mxfp4")
TARGETS = ("fp8_per_channel", "fp8_per_block", "mxfp8", "mxfp4", "nvfp4", "int8_per_channel", "int4_per_group")
BYTES = {"fp8": 1.0, "mxfp4": 0.53}
WAYS = ("ours", "bf16", "dequantized first")


def build(layers: int) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16) for _ in range(layers)))


def write(folder: Path, source: str, layers: int) -> None:
    """The quantized folder, and one with its values in bf16, in files of a few layers."""
    for kind in (source, "bf16"):
        (folder / kind).mkdir(parents=True)
    index: dict[str, dict[str, str]] = {source: {}, "bf16": {}}
    for i in range(layers):
        weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(i)).mul_(0.02).bfloat16()
        made = quantize(weight, "fp8_per_block" if source == "fp8" else "mxfp4")
        names = ("weight", "weight_scale_inv") if source == "fp8" else ("weight_packed", "weight_scale")
        parts = {f"{i}.{name}": part for name, part in zip(names, made.parts(), strict=True)}
        for kind, tensors in ((source, parts), ("bf16", {f"{i}.weight": made.dequantize()})):
            save_file(tensors, folder / kind / f"model-{i:05}.safetensors")
            index[kind] |= dict.fromkeys(tensors, f"model-{i:05}.safetensors")
    for kind, files in index.items():
        (folder / kind / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def ours(folder: Path, layers: int, scheme: str) -> nn.Module:
    model = build(layers)
    load_checkpoint(model, folder, scheme=scheme, progress=False)
    return model


def dequantized_first(folder: Path, layers: int, scheme: str) -> nn.Module:
    """With transformers' decoders: all of it in bf16, then each weight in its place."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = build(layers)
    for i in range(layers):
        tensors = load_file(folder / f"model-{i:05}.safetensors")
        if f"{i}.weight_scale_inv" in tensors:
            values = Fp8Dequantize(None)._dequantize_one(
                tensors[f"{i}.weight"], tensors[f"{i}.weight_scale_inv"], torch.bfloat16
            )
        else:
            packed = tensors[f"{i}.weight_packed"].view(1, SIDE, SIDE // 32, 16)
            scales = tensors[f"{i}.weight_scale"].view(1, SIDE, SIDE // 32)
            values = convert_moe_packed_tensors(packed, scales)[0].T.contiguous()
        model[i].weight = nn.Parameter(values, requires_grad=False)
    for layer in model:
        layer.weight = nn.Parameter(quantize(layer.weight, scheme), requires_grad=False)
    return model


def high_water() -> int:
    """The most resident memory since it was set back, in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(folder: Path, way: str, source: str, scheme: str, layers: int, repeat: int) -> dict[str, Any]:
    """One row, in this process."""
    load = dequantized_first if way == "dequantized first" else ours
    kind = "bf16" if way == "bf16" else source
    where = folder / kind
    for _ in range(2):  # What is compiled, or loaded, at a first use is there before anything counts.
        load(folder / "warm" / kind, 1, scheme)
    ctypes.CDLL(None).malloc_trim(0)  # What is free goes back to the system, and counts when it is used again.
    Path("/proc/self/clear_refs").write_text("5")  # The high-water mark is where memory is now.
    before = high_water()
    seconds, cpu, peak, final = math.inf, math.inf, 0, 0
    for _ in range(repeat):
        started, worked = time.perf_counter(), time.process_time()
        model = load(where, layers, scheme)
        seconds = min(seconds, time.perf_counter() - started)
        cpu = min(cpu, time.process_time() - worked)
        final = sum(param.nbytes for param in model.parameters())
        peak = peak or high_water() - before
        del model
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "final": final, "ratio": peak / final}


def losses() -> dict[str, dict[str, float]]:
    """SQNR in dB of random normal weights: quantized once (source ""), and again from each source."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    signal = weight.float().square().sum()

    def sqnr(values: torch.Tensor) -> float:
        return float(10 * torch.log10(signal / (values.float() - weight.float()).square().sum()))

    found = {"": {scheme: sqnr(quantize(weight, scheme).dequantize()) for scheme in TARGETS}}
    for source in ("fp8_per_block", "fp8_per_channel", "mxfp8", "mxfp4", "nvfp4"):
        made = quantize(weight, source)
        found[source] = {"itself": sqnr(made.dequantize())}
        names = ("*_packed", "*_scale", "*_global_scale") if made.scheme.format.per_byte == 2 else ("*", "*_scale")
        parts = dict(zip(names, made.parts(), strict=False))
        if "*_global_scale" in parts:
            parts["*_global_scale"] = parts["*_global_scale"].reciprocal()
        for scheme in TARGETS:
            model = nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16, device="meta")
            with online_quant(scheme, model):
                model.load_state_dict({name.replace("*", "weight"): part for name, part in parts.items()})
            found[source][scheme] = sqnr(model.weight.dequantize())
        assert recognise({n: Spec(t.dtype, tuple(t.shape)) for n, t in parts.items()}, {}) is not None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--only", choices=SOURCES)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--losses", action="store_true")
    parser.add_argument("--row", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.row:
        folder, way, source, scheme, layers = args.row
        print(json.dumps(measure(Path(folder), way, source, scheme, int(layers), args.repeat)))
        return
    if args.losses:
        print(f"{'source':18}{'itself':>9}" + "".join(f"{t:>18}" for t in TARGETS))
        for source, row in losses().items():
            shown = [f"{row['itself']:.1f}" if "itself" in row else ""] + [f"{row[t]:.1f}" for t in TARGETS]
            print(f"{source or 'bf16':18}{shown[0]:>9}" + "".join(f"{s:>18}" for s in shown[1:]))
        return
    print(machine.facts("torch", "transformers", "safetensors"), f"threads: {args.threads}")
    print(f"{'source':8}{'target':20}{'way':20}{'seconds':>9}{'of CPU':>8}{'peak/final':>12}")
    for source in [args.only] if args.only else SOURCES:
        layers = max(1, round(args.gb * 1e9 / (BYTES[source] * SIDE * SIDE)))
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), source, layers)
            write(Path(folder, "warm"), source, 1)
            for scheme in args.targets:
                for way in args.ways:
                    command = [sys.executable, __file__, "--threads", str(args.threads), "--repeat", str(args.repeat)]
                    command += ["--row", folder, way, source, scheme, str(layers)]
                    row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                    times = f"{row['seconds']:9.2f}{row['cpu']:8.2f}"
                    print(f"{source:8}{scheme:20}{way:20}{times}{row['ratio']:12.2f}", flush=True)


if __name__ == "__main__":
    main()
