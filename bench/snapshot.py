"""A model of 1 GB in bf16, quantized: how long until it is ready, from a checkpoint and from a snapshot.

    python bench/snapshot.py [--gb 1] [--repeat 5]

Each row is a fresh process that has done the same once with a tiny model; the ways take turns, files are in the page
cache, medians. "read" is the time from then on until each page of the weights has been touched once, which is when
mapped files cost. Bytes of two processes: both hold the same model and have touched all of it; what the kernel counts
for both together (Pss), above what they held before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
from load_memory import checkpoint, config, held_bytes
from torch import nn

from qtensor import fp8, load_checkpoint, load_snapshot, online_quant, save_checkpoint, save_snapshot, weight_root
from qtensor.cli.demo import build, load_into, write_checkpoint
from qtensor.report.memory import Child, measure

OWN = "qtensor, load_state_dict of the bf16 files"
SNAPSHOT = "qtensor, load_snapshot"


def plain(model: nn.Module, source: Path, _: Path) -> nn.Module:
    model = model.to_empty(device="cpu")
    load_into(model, source)
    return model


def online(model: nn.Module, source: Path, _: Path) -> nn.Module:
    with online_quant(fp8, model, progress=False):
        load_into(model, source)
    return model


def quantized(model: nn.Module, _: Path, made: Path) -> nn.Module:
    load_checkpoint(model, made / "checkpoint", progress=False)
    return model


def by_torch(model: nn.Module, _: Path, made: Path) -> nn.Module:
    model.load_state_dict(torch.load(made / "state.pt", mmap=True, weights_only=True), assign=True)
    return model


def mapped(model: nn.Module, _: Path, made: Path, verify: Any = "sums") -> nn.Module:
    load_snapshot(model, made / "snapshot", verify=verify)
    return model


WAYS: dict[str, Callable[[nn.Module, Path, Path], nn.Module]] = {
    "bf16, load_state_dict": plain,
    OWN: online,
    "qtensor, load_checkpoint of the saved fp8 files": quantized,
    "torch.load(mmap=True), load_state_dict(assign=True)": by_torch,
    SNAPSHOT: mapped,
    f'{SNAPSHOT}, verify="sha256"': partial(mapped, verify="sha256"),
    f'{SNAPSHOT}, verify="header"': partial(mapped, verify="header"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="bytes of the bf16 checkpoint, 10^9 (default 1)")
    parser.add_argument("--repeat", type=int, default=5, help="processes per way (default 5)")
    parser.add_argument("--child", nargs=3, metavar=("WAY", "FOLDER", "MADE"), help=argparse.SUPPRESS)
    parser.add_argument("--stay", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        way, source, made = args.child
        run_child(way, Path(source), Path(made), args.stay)
        return
    source = checkpoint(args.gb)
    made = source.with_name(source.name + "-made")
    if not (made / "snapshot").exists():
        subprocess.run([sys.executable, __file__, "--child", "make", source, made], check=True)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(args.repeat):
        for way, found in runs.items():
            run = measure([sys.executable, __file__, "--child", way, str(source), str(made)])
            found.append({"seconds": run.seconds, "anonymous": run.final, **run.result})
    roots = {run["root"] for way, found in runs.items() if way != "bf16, load_state_dict" for run in found}
    assert len(roots) == 1, "the ways gave different weights"
    both = {way: two(way, source, made) for way in (OWN, SNAPSHOT)}
    rows = {way: {key: statistics.median(r[key] for r in found) for key in ("seconds", "read", "anonymous")}
            for way, found in runs.items()}  # fmt: skip
    print(table(rows, both, runs[OWN][0]["model"]))
    results = {**machine.facts("torch", "numba"), "repeat": args.repeat, "rows": rows, "two": both, "runs": runs}
    print(f"\nwritten: {os.path.relpath(machine.save('snapshot', results))}")


def run_child(way: str, source: Path, made: Path, stay: bool) -> None:
    if way == "make":
        make(source, made)
        return
    with tempfile.TemporaryDirectory() as tiny:
        write_checkpoint(Path(tiny) / "tiny", 1)
        make(Path(tiny) / "tiny", Path(tiny) / "made")
        WAYS[way](build(config(Path(tiny) / "tiny")), Path(tiny) / "tiny", Path(tiny) / "made")
    empty = build(config(source))
    child = Child()
    child.ready()
    model = WAYS[way](empty, source, made)
    child.done()
    start = time.perf_counter()
    touch(model)
    child.add(read=time.perf_counter() - start, root=weight_root(model), model=sum(map(held_bytes, model.parameters())))
    if stay:
        print("here", flush=True)
        sys.stdin.readline()


def make(source: Path, made: Path) -> None:
    model = online(build(config(source)), source, made)
    made.mkdir()
    save_checkpoint(model, made / "checkpoint")
    torch.save(model.state_dict(), made / "state.pt")
    save_snapshot(model, made / "snapshot")


def touch(model: nn.Module) -> None:
    for param in model.parameters():
        parts = param.parts() if hasattr(param, "parts") else (param.detach(),)
        for part in parts:
            part.contiguous().view(-1).view(torch.uint8)[::4096].sum()


def two(way: str, source: Path, made: Path) -> int:
    """What two processes with the model hold together, above what they held before it."""
    command = [sys.executable, __file__, "--child", way, str(source), str(made), "--stay"]
    pair = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(2)
    ]
    for child in pair:
        until(child, '"ready"')
    before = sum(pss(child.pid) for child in pair)
    for child in pair:
        child.stdin.write("\n\n")  # type: ignore[union-attr]
        child.stdin.flush()  # type: ignore[union-attr]
    for child in pair:
        until(child, "here")
    after = sum(pss(child.pid) for child in pair)
    for child in pair:
        child.communicate("\n")
    return after - before


def until(child: subprocess.Popen[str], word: str) -> None:
    for line in child.stdout:  # type: ignore[union-attr]
        if word in line:
            return
    raise RuntimeError(f"{child.args} ended")


def pss(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1]) * 1024


def table(rows: dict[str, dict[str, float]], both: dict[str, int], model: int) -> str:
    own = rows[OWN]["seconds"]
    lines = ["| | ready, s | of qtensor's load | read, s | ready and read | anonymous MB | two processes, MB |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for way, row in rows.items():
        seconds, read = row["seconds"], row["read"]
        pair = f"{both[way] / 1e6:.0f}" if way in both else ""
        lines.append(
            f"| {way} | {seconds:.3f} | {seconds / own:.2f} | {read:.3f} | "
            f"{(seconds + read) / (own + rows[OWN]['read']):.2f} | {row['anonymous'] / 1e6:.0f} | {pair} |"
        )
    return "\n".join([*lines, "", f"The model holds {model / 1e6:.0f} MB."])


if __name__ == "__main__":
    main()
