"""What repeated work leaves behind in a process: tensors and memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise

import torch

from qtensor.report.memory import resident_bytes


def growth(cycle: Callable[[int], None], times: int, first: int = 20) -> tuple[int, int]:
    """Live tensors that `times` cycles leave behind, and anonymous bytes of a quarter of them, after some more.

    What a process holds besides may grow once, at any time, by megabytes; what cycles leave grows in every quarter. So
    the bytes are those of the quarter that left least.
    """
    for i in range(first):
        cycle(i)
    tensors, resident = _live_tensors(), [resident_bytes()[0]]
    for quarter in range(4):
        for i in range(quarter * times // 4, (quarter + 1) * times // 4):
            cycle(i)
        gc.collect()
        resident.append(resident_bytes()[0])
    return _live_tensors() - tensors, min(after - before for before, after in pairwise(resident))


def _live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
