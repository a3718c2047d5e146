"""Engines for the tests: real vLLM in this process, one after another, small and without a tokenizer."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # Others use these cores, too.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry
from vllm.platforms.cpu import CpuPlatform

from qtensor.integrations.vllm.compat import shield_llvmlite
from qtensor.kernels import FORMATS
from support.vllm.checkpoints import VOCAB

_PROMPTS = [torch.randint(3, VOCAB, (12,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]
_TOKENS = 4
_SMALL = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "bfloat16",
    "max_model_len": 128,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 32 << 20,
}

# What makes a start of an engine take seconds, if there were others in the process, is done over all that was ever
# imported: up to nine garbage collections, before which vLLM thaws what was frozen, and a search for kernels to
# replace, of which the first one finds all. `engine` freezes what is older than it. And to look at a model's class,
# vLLM starts a process that imports vLLM.
_freeze = gc.freeze
gc.freeze = gc.unfreeze = lambda: None
if hasattr(CpuPlatform, "register_triton_kernel_overrides"):
    _register = CpuPlatform.register_triton_kernel_overrides.__func__
    CpuPlatform.register_triton_kernel_overrides = classmethod(functools.cache(_register))
registry._run_in_subprocess = lambda look_at_class: look_at_class()

DISTANCE = {name: 0.25 if fmt.per_byte == 2 else 0.12 for name, fmt in FORMATS.items()}
"""How far, in mean |Δ log p|, a scheme may be from unquantized vLLM on these tests' random weights."""


@dataclass
class Seen:
    """What a test compares. tokens: greedy continuations of eight prompts. logprobs `[8, VOCAB]`: of the first new
    token. weights: name → (shape, sha256) of every quantized weight and its scales. report: qtensor's, if any."""

    tokens: list[list[int]]
    logprobs: torch.Tensor
    weights: dict[str, tuple[tuple[int, ...], str]]
    report: dict[str, Any] | None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def distance(self, other: Seen) -> float:
        """Mean |Δ log p| over prompts and vocabulary."""
        return float((self.logprobs - other.logprobs).abs().mean())

    def agreement(self, other: Seen) -> float:
        """Share of prompts whose most likely next token is the same."""
        return float((self.logprobs.argmax(-1) == other.logprobs.argmax(-1)).float().mean())


@contextlib.contextmanager
def engine(folder: Path, quantization: str | None, **options: Any) -> Iterator[LLM]:
    llm = None
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # In GiB, and the examples set it.
    shield_llvmlite()  # Unquantized engines need it too, once a test has used numba.
    gc.collect()
    _freeze()
    try:
        llm = LLM(str(folder), quantization=quantization, **(_SMALL | options))
        yield llm
    finally:
        if llm is not None:
            # What someone still refers to would shut down when it dies, and take the next engine's groups with it.
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def load_error(folder: Path, quantization: str | None = "qtensor", **options: Any) -> Exception:
    """The error that loading ends with. Fails if it loads."""
    try:
        with engine(folder, quantization, **options):
            pass
    except Exception as error:
        error.__traceback__ = None
        return error
    raise AssertionError("it loaded")


def look(llm: LLM, *, keep_tensors: bool = False, lora: Any = None) -> Seen:
    logits: list[torch.Tensor] = []
    handles: list[Any] = []

    def watch(model: torch.nn.Module) -> None:
        handles.append(
            model.logits_processor.register_forward_hook(lambda _m, _i, out: logits.append(out.float().clone()))
        )

    llm.apply_model(watch)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in _PROMPTS],
        SamplingParams(max_tokens=_TOKENS, temperature=0, detokenize=False, ignore_eos=True),
        use_tqdm=False,
        lora_request=lora,
    )
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    first = logits[0][:, :VOCAB]
    assert len(first) == len(_PROMPTS), "the prompts did not run in one batch"
    handles[0].remove()
    reports = None
    if hasattr(llm.llm_engine.vllm_config.quant_config, "choice"):
        reports = llm.collective_rpc("qtensor_report")[0]
    tensors = llm.apply_model(runtime_tensors)[0]
    seen = Seen(tokens, first.log_softmax(-1), _digests(tensors), reports)
    if keep_tensors:
        seen.tensors = tensors
        seen.state = llm.apply_model(lambda model: {n: t.detach().clone() for n, t in model.state_dict().items()})[0]
    return seen


def weights_of(llm: LLM) -> dict[str, tuple[tuple[int, ...], str]]:
    """What `look` calls weights, of an engine that need not be able to generate."""
    return _digests(llm.apply_model(runtime_tensors)[0])


def _digests(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(t.shape), digest(t)) for name, t in tensors.items()}


def runtime_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every quantized weight as [..., N, K] (K/2 where two elements share a byte), whatever the kernel's layout, and
    every scale."""
    found = {}
    params = dict(model.named_parameters())
    for name, param in params.items():
        if is_quantized(name, params):
            found[name] = (param if param.is_contiguous() else param.mT).detach()
        elif is_scale(name):
            found[name] = param.detach()
    return found


def is_scale(name: str) -> bool:
    return "weight_scale" in name or "weight_global_scale" in name


def is_quantized(name: str, params: Collection[str]) -> bool:
    """Whether this one of a model's parameters has scales."""
    return f"{name}_scale" in params or f"{name}_scale_inv" in params


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
