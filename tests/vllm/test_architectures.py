"""Scheme × architecture: loads, generates, and stays as close to unquantized vLLM as its bits allow.

The core grid always runs: every architecture with fp8_per_channel, every scheme with Llama, and with Qwen3-MoE one of
each way to store a weight. The rest is marked slow. Random weights make flat distributions, so closeness is judged by
log probabilities. A table of the mean distance and of how often the most likely token agrees is printed at the end,
vLLM's own fp8 in its first column.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from qtensor.kernels import FORMATS
from support.vllm.checkpoints import ARCHITECTURES, MIXTURES, checkpoint, tensors_of
from support.vllm.engines import DISTANCE, Seen, engine, is_quantized, load_error, look
from support.vllm.oracle import mistakes

_CORE = {"llama": FORMATS, "qwen3-moe": ("fp8_per_channel", "fp8_per_block", "nvfp4", "int4_per_group")}
_ORACLE_KNOWS = ("llama", "qwen3-tied", "gemma", "qwen3-moe")
_TABLE = "mean |Δ log p| to unquantized vLLM, and share of prompts with the same most likely token"
_NATIVE = "vLLM's fp8_per_channel"


@functools.cache
def unquantized(architecture: str) -> Seen:
    with engine(checkpoint(architecture), None) as llm:
        return look(llm)


def _closeness(seen: Seen, plain: Seen) -> str:
    return f"{seen.distance(plain):.3f}, {seen.agreement(plain):.2f}"


def _grid() -> list:
    return [
        pytest.param(a, s, marks=[] if s in _CORE.get(a, ("fp8_per_channel",)) else [pytest.mark.slow])
        for a in ARCHITECTURES
        for s in FORMATS
    ]


@pytest.mark.parametrize(("architecture", "scheme"), _grid())
def test_grid(architecture: str, scheme: str, record: Callable[..., None]) -> None:
    plain = unquantized(architecture)
    with engine(checkpoint(architecture), f"qtensor_{scheme}") as llm:
        seen = look(llm, keep_tensors=architecture in _ORACLE_KNOWS)
    record(_TABLE, architecture, f"qtensor, {scheme}", _closeness(seen, plain))
    assert torch.isfinite(seen.logprobs).all()
    assert seen.distance(plain) < DISTANCE[scheme]
    assert seen.report is not None
    assert len(seen.report["layers"]) == sum(is_quantized(name, seen.weights) for name in seen.weights) > 0
    if architecture in _ORACLE_KNOWS:
        assert mistakes(tensors_of(checkpoint(architecture)), seen.tensors, scheme) == []


@pytest.mark.slow
def test_mla_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    with engine(checkpoint("deepseek-v3"), None) as llm:
        plain = look(llm)
    with engine(checkpoint("deepseek-v3"), "qtensor") as llm:
        seen = look(llm)
    assert seen.distance(plain) < DISTANCE["fp8_per_channel"]


@pytest.mark.parametrize(
    "architecture",
    [a if a == "llama" else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES if a not in MIXTURES],
)
def test_same_bytes_as_native(architecture: str, record: Callable[..., None]) -> None:
    """vLLM's own fp8_per_channel keeps weights transposed; apart from that the bytes and scales are the same."""
    with engine(checkpoint(architecture), "fp8_per_channel") as llm:
        native = look(llm)
    record(_TABLE, architecture, _NATIVE, _closeness(native, unquantized(architecture)))
    with engine(checkpoint(architecture), "qtensor_fp8_per_channel") as llm:
        assert look(llm).weights == native.weights


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MIXTURES)
def test_native_has_no_experts_on_a_cpu(architecture: str, record: Callable[..., None]) -> None:
    """Should this fail, vLLM has learned it: compare bytes as for dense models, and tell docs/vllm.md."""
    assert "scaled_fp8_quant" in str(load_error(checkpoint(architecture), "fp8_per_channel"))
    record(_TABLE, architecture, _NATIVE, "missing operator")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["qtensor", "qtensor_nvfp4"])
def test_compiled(quantization: str) -> None:
    """Without enforce_eager the model is compiled; the products are custom operators there. Same tokens."""
    with engine(checkpoint("qwen3-moe"), quantization) as llm:
        eager = look(llm)
    with engine(checkpoint("qwen3-moe"), quantization, enforce_eager=False) as llm:
        assert look(llm).distance(eager) < 0.02
