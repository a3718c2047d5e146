"""Speed and memory of quantizing a checkpoint file to file: `qtensor quantize` beside llm-compressor.

    python bench/convert.py [--gb 1] [--repeat 3] [--workers 2] [--peer PYTHON]

Both write fp8 with one scale per row, with as many workers, from the same bf16 files to the same disk, each time in a
fresh process that has converted a tiny checkpoint once; they take turns. GB/s is of source bytes. Peak is memory above
what the warm process held before: anonymous, and (mapped) of mapped files, which the kernel may drop. qtensor's time
includes checksums and reading everything back; neither waits for the disk.

llm-compressor pins its own transformers and compressed-tensors, so it runs in an environment of its own, which has
qtensor too (`pip install llmcompressor .`): --peer is the Python of that. Without it only qtensor is measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from load_memory import DATA, checkpoint

from qtensor.cli.demo import write_checkpoint
from qtensor.report.memory import Child, Measurement, measure

WAYS = {
    "qtensor": "qtensor quantize",
    "peer": "llm-compressor model_free_ptq, FP8_DYNAMIC",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="bytes of the checkpoint, 10^9 (default 1)")
    parser.add_argument("--repeat", type=int, default=3, help="processes per way (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="of each (default 2)")
    parser.add_argument("--peer", metavar="PYTHON", help="Python of an environment with llmcompressor and qtensor")
    parser.add_argument("--child", nargs=3, metavar=("WAY", "FOLDER", "WORKERS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child[0], Path(args.child[1]), int(args.child[2]))
        return
    folder = checkpoint(args.gb)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    runs: dict[str, list[Measurement]] = {way: [] for way in WAYS if way != "peer" or args.peer}
    load = os.getloadavg()
    for _ in range(args.repeat):
        for way, found in runs.items():
            python = args.peer if way == "peer" else sys.executable
            found.append(measure([python, __file__, "--child", way, str(folder), str(args.workers)]))
    rows = {way: summarize(found, size) for way, found in runs.items()}
    print(table(rows))
    results: dict[str, Any] = {
        **machine.facts("torch", "safetensors", "numba"),
        "load_average": {"before": load, "after": os.getloadavg()},
        "checkpoint_bytes": size,
        "workers": args.workers,
        "rows": rows,
        "runs": {way: [vars(run) for run in found] for way, found in runs.items()},
    }
    if args.peer:
        results["peer"] = machine.versions(args.peer, "llmcompressor", "compressed-tensors", "transformers", "torch")
        share = rows["qtensor"]["peak_share"]
        ratio = rows["qtensor"]["gb_per_s"] / rows["peer"]["gb_per_s"]
        print(f"\nqtensor is {ratio:.1f} times as fast (goal 3), at a peak of {share:.1%} (goal 10 %)")
    print(f"\nwritten: {os.path.relpath(machine.save('convert', results))}")


def run_child(way: str, folder: Path, workers: int) -> None:
    with tempfile.TemporaryDirectory(dir=DATA) as scratch:
        tiny = Path(scratch) / "tiny"
        write_checkpoint(tiny, 1)
        convert(way, tiny, Path(scratch) / "tiny-out", workers)
        child = Child()
        child.ready()
        convert(way, folder, Path(scratch) / "out", workers)
        child.done()
        shutil.rmtree(Path(scratch) / "out")


def convert(way: str, source: Path, target: Path, workers: int) -> None:
    if way == "peer":
        from llmcompressor.entrypoints.model_free import model_free_ptq

        ignore = ["lm_head", "re:.*embed_tokens$", "re:.*norm$"]
        model_free_ptq(str(source), str(target), scheme="FP8_DYNAMIC", ignore=ignore, max_workers=workers, device="cpu")
        return
    from qtensor.checkpoint import quantize_checkpoint

    quantize_checkpoint(source, target, "fp8_per_channel", workers=workers)


def summarize(runs: list[Measurement], size: int) -> dict[str, Any]:
    seconds = sorted(run.seconds for run in runs)
    peak = statistics.median(run.peak for run in runs)
    return {
        "seconds": statistics.median(seconds),
        "seconds_range": [seconds[0], seconds[-1]],
        "gb_per_s": size / 1e9 / statistics.median(seconds),
        "peak_bytes": peak,
        "peak_share": peak / size,
        "mapped_bytes": statistics.median(run.peak_file for run in runs),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| way of converting | GB/s | seconds (lowest–highest) | peak MB | of the checkpoint | mapped MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, row in rows.items():
        fastest, slowest = row["seconds_range"]
        lines.append(
            f"| {WAYS[way]} | {row['gb_per_s']:.2f} | {row['seconds']:.2f} ({fastest:.2f}–{slowest:.2f}) "
            f"| {row['peak_bytes'] / 1e6:.0f} | {row['peak_share']:.1%} | {row['mapped_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
