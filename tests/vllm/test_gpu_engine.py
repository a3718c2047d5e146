"""A whole engine whose linear layers are those of a GPU: vLLM's own kernels for it, packed weights and all, with their
arithmetic in torch. The rest of the model is vLLM's on a CPU.

What is rehearsed is the life of a weight: build, load, publish, products, reload, a reload that fails, and what a
level-2 sleep leaves.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from qtensor.errors import IncompleteLoadError, QTensorError
from qtensor.integrations.vllm import checksums, linear
from qtensor.integrations.vllm.gpu import GpuLinear
from qtensor.kernels import FORMATS
from qtensor.lazy.lazy_tensor import LazyWeight
from qtensor.tensor.qtensor import QTensor
from support.vllm.checkpoints import checkpoint, tensors_of
from support.vllm.engines import Seen, engine, look
from support.vllm.fake_gpu import Chip, pretend
from support.vllm.reloads import LAYER, Q, addresses, other, reload, state

ROUNDED = {name: 0.06 if name.startswith("fp8") else 0.02 for name in FORMATS}
"""How far, in mean |Δ log p|, the same weights may be where products are rounded at other places, and Marlin rounds the
scales of fp8."""
SLOW = [
    pytest.param(chip, name, marks=pytest.mark.slow)
    for chip in (80, 90)
    for name in FORMATS
    if name not in ("nvfp4", "int4_asymmetric") and not (chip == 90 and name.startswith("fp8"))
]
"""CUTLASS takes fp8 row-major, as a CPU does."""


class OnChip:
    """A product of linear layers, each of whose methods runs where vLLM takes this machine for one with the chip."""

    def __init__(self, chip: Chip, compute: GpuLinear) -> None:
        self._chip, self._compute = chip, compute

    def __getattr__(self, name: str) -> Any:
        def run(*args: Any) -> Any:
            with pretend(self._chip, values=True):
                return getattr(self._compute, name)(*args)

        return run


@pytest.fixture
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Chip:
    inner, on = linear.linear_compute, request.param

    def choose(*args: Any, **kwargs: Any) -> OnChip:
        with pretend(on, values=True):
            compute = inner(*args, **kwargs)
        assert isinstance(compute, GpuLinear)
        return OnChip(on, compute)

    monkeypatch.setattr(linear, "linear_compute", choose)
    return on


_on_this_machine = linear.linear_compute


def on_a_cpu(folder: Path, name: str) -> tuple[Seen, dict[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "linear_compute", _on_this_machine)
        with engine(folder, f"qtensor_{name}") as llm:
            return look(llm), checksums(llm)[0]


def left_behind() -> int:
    """Weights that are being loaded, and quantized weights that are not in their layers' layout."""
    gc.collect()
    return sum(isinstance(thing, (LazyWeight, QTensor)) for thing in gc.get_objects())


@pytest.mark.parametrize(("chip", "name"), [(80, "nvfp4"), *SLOW], indirect=["chip"])
def test_a_weights_life(chip: Chip, name: str) -> None:
    a, b = checkpoint("llama"), other("llama")
    first, sums = on_a_cpu(a, name)
    second, sums_b = on_a_cpu(b, name)
    before = left_behind()
    with engine(a, f"qtensor_{name}") as llm:
        seen, places = look(llm), addresses(llm)
        assert seen.distance(first) < ROUNDED[name]
        exact = name not in ("int4_per_group", *(n for n in FORMATS if n.startswith("fp8")))
        assert not exact or checksums(llm)[0] == sums
        assert left_behind() == before

        reload(llm, b)
        changed = look(llm)
        assert changed.distance(second) < ROUNDED[name]
        assert not exact or checksums(llm)[0] == sums_b
        assert addresses(llm) == places
        assert left_behind() == before

        held = state(llm)
        source = tensors_of(a)
        for bad in ([(Q, source[Q])], [(Q, source[Q][:8])], [(LAYER + "mlp.down_proj.weight", source[Q] * torch.nan)]):
            with pytest.raises(QTensorError):
                reload(llm, bad)
            assert state(llm) == held
        with pytest.raises(IncompleteLoadError):
            reload(llm, [(Q, source[Q])])
        assert torch.equal(look(llm).logprobs, changed.logprobs)

        def sleep(model: torch.nn.Module) -> None:
            for param in model.parameters():
                param.data.view(torch.uint8).fill_(0x3B)

        llm.apply_model(sleep)
        reload(llm, a)
        again = look(llm)
        assert torch.equal(again.logprobs, seen.logprobs)
        assert again.weights == seen.weights
        assert addresses(llm) == places
        assert left_behind() == before
