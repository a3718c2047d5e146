"""What repeated work leaves behind in a process: tensors and memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from statistics import median_low

import torch

from qtensor.report.memory import resident_bytes


def growth(cycle: Callable[[int], None], times: int, first: int = 20) -> tuple[int, int]:
    """Live tensors and anonymous bytes that a quarter of `times` cycles leaves behind, after some more.

    What a process holds besides may grow once, at any time, by megabytes, and others' tensors may go; what cycles leave
    grows in every quarter. So the bytes are those of the quarter that left least, and the tensors a usual quarter's.
    """
    for i in range(first):
        cycle(i)
    tensors, resident = [_live_tensors()], [resident_bytes()[0]]
    for quarter in range(4):
        for i in range(quarter * times // 4, (quarter + 1) * times // 4):
            cycle(i)
        tensors.append(_live_tensors())
        resident.append(resident_bytes()[0])
    return median_low(_steps(tensors)), min(_steps(resident))


def _steps(counts: list[int]) -> list[int]:
    return [after - before for before, after in pairwise(counts)]


def _live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
