"""The first use of numba in a process. This file imports nothing that uses it, nor does anything it imports."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qtensor import fp8_per_tensor, online_quant
from qtensor.kernels import FP8_PER_TENSOR, Parts, dequantize, quantize_into
from qtensor.report.progress import ProgressEvent

LOOPS = 1_000_000
"""Of what a timer interrupts: seconds. It may ring in what swallows it (a finalizer, which a collection runs)."""


@contextmanager
def timer(seconds: float, stop: type[BaseException], again: float = 0) -> Iterator[None]:
    """`stop` is raised from a signal handler after so much time, and every `again` seconds from then on (0: no more),
    until all is over."""

    def handler(*_: object) -> None:
        raise stop("from a timer")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6), again)
        yield
    finally:
        while True:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
                break
            except BaseException:  # the timer's own, at its last moment
                continue


def first_use(cache: str, stopped: bool, told: Any) -> None:
    """The first use of numba in a process: quantize, decode, each stopped until it is through, and a load."""
    assert "numba" not in sys.modules
    os.environ["NUMBA_CACHE_DIR"] = cache
    source = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = Parts.of((64, 96), FP8_PER_TENSOR)
    results: list[Any] = []
    events: list[ProgressEvent] = []
    operations = [
        lambda: quantize_into(source, *parts[:2], FP8_PER_TENSOR),
        lambda: results.append(dequantize(*parts[:2], FP8_PER_TENSOR, torch.bfloat16)),
    ]
    stops = 0
    for operation in operations:
        for i in itertools.count():
            try:
                with timer(2e-4 * (1 + i % 97) if stopped else 60, TimeoutError):
                    operation()
                break
            except TimeoutError:
                stops += 1
    layer = nn.Linear(96, 64, bias=False, dtype=torch.bfloat16)
    with online_quant(fp8_per_tensor, layer, progress=events.append):
        layer.weight.data.copy_(source)
    wanted, weight = Parts.of((64, 96), FP8_PER_TENSOR), layer.weight
    quantize_into(source, *wanted[:2], FP8_PER_TENSOR, backend="torch")
    for ours in (parts, weight.parts()):  # type: ignore[operator]
        assert torch.equal(ours[0].view(torch.uint8), wanted.qdata.view(torch.uint8))
        assert torch.equal(ours[1], wanted.scale)
    assert torch.equal(results[0], dequantize(*wanted[:2], FP8_PER_TENSOR, torch.bfloat16, backend="torch"))
    told.put((stops, [event.description for event in events]))
