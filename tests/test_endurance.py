"""Sixteen threads that are switched at every chance, and loads and reloads over and over without growth.

`make endurance` (QTENSOR_ENDURANCE=1) runs the full counts; otherwise a tenth or less of them.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from test_reload import assert_reloaded, quantized
from torch import nn

from qtensor import Scheme, fp8_per_block, fp8_per_channel, fp8_per_tensor, online_quant, online_reload
from support.growth import growth
from support.helpers import assert_oracle
from support.loading import TinyNet, assert_equals_oracle, weights_of

FULL = bool(os.environ.get("QTENSOR_ENDURANCE"))
LOADS, RELOADS, ROUNDS = (1000, 500, 20) if FULL else (100, 50, 2)
THREADS = 16
SCHEMES = [fp8_per_channel, fp8_per_block, fp8_per_tensor]


@pytest.fixture
def _restless() -> Iterator[None]:
    """Threads change places every microsecond, or as often as the interpreter lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def together(jobs: list[Callable[[], None]]) -> None:
    """Run jobs in a thread each, starting at once; raise what the first of them raised."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], None]) -> None:
        try:
            start.wait()
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def stack(matrices: int, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(24, 150, bias=False, dtype=dtype) for _ in range(matrices)))


@pytest.mark.usefixtures("_restless")
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("matrices", [1, 3, THREADS], ids=["one weight", "shared", "disjoint"])
def test_sixteen_threads_load_and_reload_exactly(matrices: int, scheme: Scheme) -> None:
    """Law 8. Of a load every piece is written by two threads, of a reload by one, in an order of their own."""
    for seed in range(ROUNDS):
        generator = torch.Generator().manual_seed(seed)
        model = stack(matrices)

        def load(model: nn.Sequential, values: list[torch.Tensor], dice: random.Random, *, twice: bool) -> None:
            pieces = [(i, r, c) for i in range(matrices) for r in range(0, 150, 10) for c in (0, 12)]
            dice.shuffle(pieces)
            shares = [pieces[k::THREADS] + (pieces[k + 1 :: THREADS] if twice else []) for k in range(THREADS)]

            def job(share: list[tuple[int, int, int]]) -> None:
                for i, r, c in dice.sample(share, len(share)):
                    source = values[i][r : r + 10, c : c + 12].clone()
                    model[i].weight.data[r : r + 10, c : c + 12].copy_(source)
                    source.fill_(float("nan"))

            together([lambda share=share: job(share) for share in shares])

        values = [torch.randn(150, 24, generator=generator).bfloat16() for _ in range(matrices)]
        with online_quant(scheme, model) as session:
            load(model, values, random.Random(seed), twice=True)
            for name, boxes in session.report().missing.items():  # units that a repeated piece had re-opened
                i = int(name.split(".")[0])
                for (a, b), (c, d) in boxes:
                    model[i].weight.data[a:b, c:d].copy_(values[i][a:b, c:d])
        for layer, full in zip(model, values, strict=True):
            assert_oracle(layer.weight, full, scheme)

        new = [torch.randn(150, 24, generator=generator).bfloat16() for _ in range(matrices)]
        reload = online_reload(model)
        load(model, new, random.Random(seed), twice=False)
        assert reload.finish().missing == {}
        for layer, full in zip(model, new, strict=True):
            assert_oracle(layer.weight, full, scheme)


@pytest.mark.parametrize("fails", [False, True], ids=["finished", "aborted"])
def test_loading_and_freeing_models_does_not_grow(fails: bool) -> None:
    state = weights_of(TinyNet)

    def cycle(i: int) -> None:
        try:
            with online_quant(SCHEMES[i % 3]):
                model = TinyNet().bfloat16()
                model.load_state_dict(state)
                if fails:
                    raise InterruptedError
        except InterruptedError:
            return
        if i == 0:
            assert_equals_oracle(model, state, TinyNet.QUANTIZED, SCHEMES[0])

    tensors, resident = growth(cycle, LOADS)
    assert tensors <= 0
    assert resident < 256 << 10


def test_failed_and_finished_reloads_do_not_grow() -> None:
    """Finished ones alone: `test_reload`. Here every other reload breaks off half-way."""
    model, versions = quantized(), [weights_of(TinyNet, seed=s) for s in range(3)]

    def cycle(i: int) -> None:
        try:
            with online_reload(model):
                model.load_state_dict(versions[i % 3])
                if i % 2:
                    raise InterruptedError
        except InterruptedError:
            assert_reloaded(model, versions[(i - 1) % 3], fp8_per_channel)

    tensors, resident = growth(cycle, RELOADS)
    assert tensors <= 0
    assert resident < 256 << 10
