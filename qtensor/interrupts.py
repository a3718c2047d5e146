"""What has to be done whole although an exception may come at any moment: Ctrl-C, a timer, a signal's handler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from .errors import QTensorError

MOST_TRIES = 100
_T = TypeVar("_T")


def in_spite_of_interrupts(action: Callable[[], object]) -> None:
    """Do what may be done again from the start, until it is through. An interrupt is raised then."""
    late: BaseException | None = None
    for _ in range(MOST_TRIES):
        try:
            action()
            break
        except BaseException as error:
            late = error
    else:
        raise QTensorError(
            f"{MOST_TRIES} tries failed, and the model is left between old and new: {late}. Load it anew."
        ) from late
    if late is not None:
        raise late


def without_grad(action: Callable[[], _T]) -> _T:
    """Do it with gradients off.

    `torch.no_grad` leaves them off for the whole process where an interrupt comes after its `__enter__` has switched
    them off, or before its `__exit__` has switched them on.
    """
    before = torch.is_grad_enabled()
    try:
        torch._C._set_grad_enabled(False)
        return action()
    finally:
        torch._C._set_grad_enabled(before)  # the first call of the block: Python looks for signals after it, not before
