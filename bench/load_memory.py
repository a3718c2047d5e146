"""Memory and time of loading a bf16 checkpoint in six ways, each in fresh processes, side by side.

    python bench/load_memory.py [--gb 1] [--repeat 5]

Peak and final are anonymous memory above what the warm process held before the load; each process has done the same
load once with a tiny model. transformers maps bf16 weights from the file instead of reading them, on a CPU: such pages
are not anonymous, so "mapped" shows the most that was resident of them. Medians over the repetitions; the ways take
turns. The checkpoint is generated once and kept in bench/.data.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import torch
from torch import nn

from qtensor import fp8, online_quant
from qtensor.cli.demo import build, load_into, write_checkpoint
from qtensor.report.memory import Child, Measurement, measure

WAYS = {
    "plain": "bf16, load_state_dict",
    "plain-hf": "bf16, from_pretrained",
    "torchao": "bf16, load_state_dict, then torchao quantize_",
    "torchao-hf": "bf16, from_pretrained, then torchao quantize_",
    "qtensor": "qtensor, load_state_dict",
    "qtensor-hf": "qtensor, from_pretrained",
}
DATA = Path(__file__).parent / ".data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="bytes of the checkpoint, 10^9 (default 1)")
    parser.add_argument("--repeat", type=int, default=5, help="processes per way (default 5)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child[0], Path(args.child[1]))
        return
    folder = checkpoint(args.gb)
    runs: dict[str, list[Measurement]] = {way: [] for way in args.ways}
    for _ in range(args.repeat):
        for way, found in runs.items():
            found.append(measure([sys.executable, __file__, "--child", way, str(folder)]))
    rows = {way: summarize(found) for way, found in runs.items()}
    print(table(rows))
    results = {
        **machine.facts("torch", "transformers", "torchao", "safetensors", "numba"),
        "checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "repeat": args.repeat,
        "rows": rows,
        "runs": {way: [vars(run) for run in found] for way, found in runs.items()},
    }
    print(f"\nwritten: {os.path.relpath(machine.save('load_memory', results))}")


def checkpoint(gigabytes: float, seed: int = 0) -> Path:
    folder = DATA / (f"llama-{gigabytes:g}gb" + (f"-seed{seed}" if seed else ""))
    if not (folder / "config.json").exists():
        print(f"generating {gigabytes:g} GB of random weights in {os.path.relpath(folder)}")
        write_checkpoint(folder, gigabytes * 1000, shard_bytes=256 << 20, seed=seed)
    return folder


def run_child(way: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as tiny:
        write_checkpoint(Path(tiny), 1)
        load(way, Path(tiny))
    child = Child()
    child.ready()
    model = load(way, folder)
    child.done(model_bytes=sum(held_bytes(p) for p in model.parameters()))


def load(way: str, folder: Path) -> nn.Module:
    if way == "qtensor":
        model: nn.Module = build(config(folder))
        with online_quant(fp8, model, progress=False):
            load_into(model, folder)
    elif way == "qtensor-hf":
        with online_quant(fp8, progress=False):
            model = from_pretrained(folder)
    elif way.endswith("-hf"):
        model = from_pretrained(folder)
    else:
        model = build(config(folder)).to_empty(device="cpu")
        load_into(model, folder)
    if way.startswith("torchao"):
        torchao_quantize(model)
    return model


def config(folder: Path) -> dict[str, Any]:
    import json

    return json.loads((folder / "config.json").read_text())


def from_pretrained(folder: Path, **options: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.bfloat16} | options))


def torchao_quantize(model: nn.Module) -> None:
    """fp8 weights, one scale per row, in the same layers that qtensor picks."""
    from torchao.quantization import Float8WeightOnlyConfig, PerRow, quantize_

    quantize_(
        model,
        Float8WeightOnlyConfig(granularity=PerRow()),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
    )


def held_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, for a subclass those of its parts."""
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return tensor.nbytes
    parts, _ = tensor.__tensor_flatten__()
    return sum(held_bytes(getattr(tensor, part)) for part in parts)


def summarize(runs: list[Measurement]) -> dict[str, Any]:
    """Medians, with the lowest and highest peak and time."""
    peaks, seconds = sorted(run.peak for run in runs), sorted(run.seconds for run in runs)
    model = runs[0].result["model_bytes"]
    return {
        "peak_bytes": statistics.median(peaks),
        "peak_range": [peaks[0], peaks[-1]],
        "final_bytes": statistics.median(run.final for run in runs),
        "mapped_bytes": statistics.median(run.peak_file for run in runs),
        "model_bytes": model,
        "peak_over_model": statistics.median(peaks) / model,
        "seconds": statistics.median(seconds),
        "seconds_range": [seconds[0], seconds[-1]],
        "baseline_bytes": statistics.median(run.baseline for run in runs),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| way of loading | model MB | peak MB | peak / model | final MB | mapped MB | seconds (lowest–highest) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, row in rows.items():
        model, peak, final, mapped = (
            row[k] / 1e6 for k in ("model_bytes", "peak_bytes", "final_bytes", "mapped_bytes")
        )
        fastest, slowest = row["seconds_range"]
        lines.append(
            f"| {WAYS[way]} | {model:.0f} | {peak:.0f} | {row['peak_over_model']:.3f} | {final:.0f} | {mapped:.0f} "
            f"| {row['seconds']:.2f} ({fastest:.2f}–{slowest:.2f}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
