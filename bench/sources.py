"""Quantized checkpoints into each scheme: how long, and how much memory.

    python bench/sources.py [--gb 1] [--threads 1] [--only fp8] [--ways ours bf16 ...]

A model of square linear layers is written as fp8 blocks (DeepSeek's) or as mxfp4 (compressed-tensors), of so many GB on
disk, and as the bf16 values of those. Each row is a process of its own:

- ours: `load_checkpoint(scheme=...)` of the quantized folder; bf16: of the bf16 folder, which is the speed that
  decoding is measured against
- in any order: the quantized tensors lie in one file in random order; a loader hands them over as they lie
- dequantized first: what users do without us, with transformers' own decoders: the whole model to bf16, then each
  weight in its place
- to files: `quantize_checkpoint`; llm-compressor: its `model_free_ptq`, with the decoder that it has for the source, in
  an environment that has both (`pip install llmcompressor`)

Time is from the first byte read to the model, or folder, in its final form, and the processors' time in that, which
other work on the machine hardly changes; best of --repeat. Peak is resident memory above what the process had before,
over the bytes of the finished weights; before, a model of one layer was loaded twice in the same way. What was held of
it, as the report says, are parts that waited for others. bench/source_pairs.py has what is lost.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from qtensor import load_checkpoint, online_quant, quantize
from qtensor.convert import quantize_checkpoint

SIDE = 4096
SOURCES = ("fp8", "mxfp4")
TARGETS = ("fp8_per_channel", "fp8_per_block", "mxfp8", "mxfp4", "nvfp4", "int8_per_channel", "int4_per_group")
BYTES = {"fp8": 1.0, "mxfp4": 0.53}
WAYS = ("ours", "bf16", "in any order", "dequantized first", "to files", "llm-compressor")
PRESETS = {
    "fp8_per_channel": "FP8_DYNAMIC",
    "fp8_per_block": "FP8_BLOCK",
    "mxfp8": "MXFP8A16",
    "mxfp4": "MXFP4A16",
    "nvfp4": "NVFP4A16",
    "int8_per_channel": "W8A16",
    "int4_per_group": "W4A16",
}
"""What llm-compressor calls the schemes."""
CONFIGS: dict[str, Any] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "mxfp4": {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "float",
                    "strategy": "group",
                    "group_size": 32,
                    "symmetric": True,
                    "scale_dtype": "torch.uint8",
                    "zp_dtype": "torch.uint8",
                },
            }
        },
        "ignore": [],
    },
}
"""config.json's "quantization_config"."""


def build(layers: int) -> nn.Module:
    with torch.device("meta"):
        model = nn.Module()
        model.layers = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16) for _ in range(layers))
        return model


def write(folder: Path, source: str, layers: int, per_file: int) -> None:
    """The quantized folder, and one with its values in bf16, in files of so many layers."""
    index: dict[str, dict[str, str]] = {source: {}, "bf16": {}}
    for kind in index:
        (folder / kind).mkdir(parents=True)
        settings = {"quantization_config": CONFIGS[kind]} if kind in CONFIGS else {}
        (folder / kind / "config.json").write_text(json.dumps({"model_type": "bench", "dtype": "bfloat16", **settings}))
    for first in range(0, layers, per_file):
        held: dict[str, dict[str, torch.Tensor]] = {source: {}, "bf16": {}}
        for i in range(first, min(first + per_file, layers)):
            weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(i)).mul_(0.02).bfloat16()
            made = quantize(weight, "fp8_per_block" if source == "fp8" else "mxfp4")
            names = ("weight", "weight_scale_inv") if source == "fp8" else ("weight_packed", "weight_scale")
            held[source] |= {f"layers.{i}.{name}": part for name, part in zip(names, made.parts(), strict=True)}
            held["bf16"][f"layers.{i}.weight"] = made.dequantize()
        for kind, tensors in held.items():
            save_file(tensors, folder / kind / f"model-{first:05}.safetensors")
            index[kind] |= dict.fromkeys(tensors, f"model-{first:05}.safetensors")
    for kind, files in index.items():
        (folder / kind / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    _in_any_order(folder / source)


def _any_order(folder: Path) -> Path:
    return folder.with_name(f"{folder.name} in any order") / "model.safetensors"


def _in_any_order(folder: Path) -> None:
    """One file of the folder's tensors in random order. (The library sorts what it writes.)"""
    files = sorted(folder.glob("*.safetensors"))
    names = []
    for each in files:
        with safe_open(each, "pt") as held:
            names += [(each, name) for name in held.keys()]  # noqa: SIM118
    random.Random(0).shuffle(names)
    file, header, at = _any_order(folder), {}, 0
    file.parent.mkdir()
    data = file.with_name("data")
    with data.open("wb") as out:
        for each, name in names:
            with safe_open(each, "pt") as held:
                tensor = held.get_tensor(name)
            dtype = {torch.uint8: "U8", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}[tensor.dtype]
            offsets = [at, at + tensor.nbytes]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
            out.write(tensor.view(torch.uint8).numpy())
            at = offsets[1]
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        with data.open("rb") as held:
            shutil.copyfileobj(held, out, 1 << 22)
    data.unlink()


def ours(folder: Path, layers: int, scheme: str) -> nn.Module:
    model = build(layers)
    load_checkpoint(model, folder, scheme=scheme, progress=False)
    return model


def in_any_order(folder: Path, layers: int, scheme: str) -> nn.Module:
    """A loader that reads a file from its beginning to its end, into a buffer of its own."""
    model, file = build(layers), _any_order(folder)
    dtypes = {"U8": torch.uint8, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
    with online_quant(scheme, model, source={}) as session, file.open("rb") as held:
        header = json.loads(held.read(int.from_bytes(held.read(8), "little")))
        most = max(told["data_offsets"][1] - told["data_offsets"][0] for told in header.values())
        buffer = torch.empty(most, dtype=torch.uint8)
        for name, told in header.items():
            begin, end = told["data_offsets"]
            tensor = buffer[: end - begin]
            held.readinto(tensor.numpy())
            model.load_state_dict({name: tensor.view(dtypes[told["dtype"]]).view(told["shape"])}, strict=False)
    model.held = session.report().peak_staged_bytes
    return model


def to_files(folder: Path, layers: int, scheme: str) -> Path:
    shutil.rmtree(folder / "out", ignore_errors=True)
    quantize_checkpoint(folder, folder / "out", scheme, workers=1, progress=False)
    return folder / "out"


def by_llm_compressor(folder: Path, layers: int, scheme: str) -> Path:
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer, FP8BlockDequantizer
    from llmcompressor import model_free_ptq
    from loguru import logger

    logger.remove()
    fp8 = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    decoder = FP8BlockDequantizer.from_pretrained(folder) if fp8 else CompressedTensorsDequantizer(folder)
    shutil.rmtree(folder / "out", ignore_errors=True)
    model_free_ptq(folder, folder / "out", scheme=PRESETS[scheme], device="cpu", converter=decoder)
    return folder / "out"


def dequantized_first(folder: Path, layers: int, scheme: str) -> nn.Module:
    """With transformers' decoders: all of it in bf16, then each weight in its place."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = build(layers)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for i in sorted({int(name.split(".")[1]) for name in tensors}):
            held = {name.rpartition(".")[2]: tensors[name] for name in tensors if name.startswith(f"layers.{i}.")}
            if "weight_scale_inv" in held:
                values = Fp8Dequantize(None)._dequantize_one(held["weight"], held["weight_scale_inv"], torch.bfloat16)
            else:
                packed = held["weight_packed"].view(1, SIDE, SIDE // 32, 16)
                scales = held["weight_scale"].view(1, SIDE, SIDE // 32)
                values = convert_moe_packed_tensors(packed, scales)[0].T.contiguous()
            model.layers[i].weight = nn.Parameter(values, requires_grad=False)
    for layer in model.layers:
        layer.weight = nn.Parameter(quantize(layer.weight, scheme), requires_grad=False)
    return model


def high_water() -> int:
    """The most resident memory since it was set back, in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


LOADS = {
    "in any order": in_any_order,
    "dequantized first": dequantized_first,
    "to files": to_files,
    "llm-compressor": by_llm_compressor,
}


def measure(folder: Path, way: str, source: str, scheme: str, layers: int, repeat: int) -> dict[str, Any]:
    """One row, in this process."""
    load: Any = LOADS.get(way, ours)
    kind = "bf16" if way == "bf16" else source
    where = folder / kind
    for _ in range(2):  # What is compiled, or loaded, at a first use is there before anything counts.
        load(folder / "warm" / kind, 1, scheme)
    ctypes.CDLL(None).malloc_trim(0)  # What is free goes back to the system, and counts when it is used again.
    Path("/proc/self/clear_refs").write_text("5")  # The high-water mark is where memory is now.
    before = high_water()
    seconds, cpu, peak, final, held = math.inf, math.inf, 0, 0, 0
    for _ in range(repeat):
        started, worked = time.perf_counter(), time.process_time()
        made = load(where, layers, scheme)
        seconds = min(seconds, time.perf_counter() - started)
        cpu = min(cpu, time.process_time() - worked)
        if isinstance(made, Path):
            final = sum(file.stat().st_size for file in made.glob("*.safetensors"))
        else:
            final, held = sum(param.nbytes for param in made.parameters()), getattr(made, "held", 0)
        peak = peak or high_water() - before
        del made
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "final": final, "ratio": peak / final, "held": held / final}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--only", choices=SOURCES)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers-per-file", type=int, default=1)
    parser.add_argument("--row", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.row:
        folder, way, source, scheme, layers = args.row
        print(json.dumps(measure(Path(folder), way, source, scheme, int(layers), args.repeat)))
        return
    print(machine.facts("torch", "transformers", "safetensors"), f"threads: {args.threads}")
    print(f"{'source':8}{'target':20}{'way':20}{'seconds':>9}{'of CPU':>8}{'peak/final':>12}{'held/final':>12}")
    for source in [args.only] if args.only else SOURCES:
        layers = max(1, round(args.gb * 1e9 / (BYTES[source] * SIDE * SIDE)))
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), source, layers, args.layers_per_file)
            write(Path(folder, "warm"), source, 1, 1)
            for scheme in args.targets:
                for way in args.ways:
                    command = [sys.executable, __file__, "--threads", str(args.threads), "--repeat", str(args.repeat)]
                    command += ["--row", folder, way, source, scheme, str(layers)]
                    row = json.loads(
                        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
                    )
                    times = f"{row['seconds']:9.2f}{row['cpu']:8.2f}"
                    print(f"{source:8}{scheme:20}{way:20}{times}{row['ratio']:12.2f}{row['held']:12.2f}", flush=True)


if __name__ == "__main__":
    main()
