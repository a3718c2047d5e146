"""What has to be done whole although an exception may come at any moment: Ctrl-C, a timer, a signal's handler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import RLock
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


def in_turn(lock: RLock, action: Callable[[], _T]) -> _T:
    """Do what is repeated until it is through, in one thread at a time. The lock is for this alone, and not nested.

    Python looks for signals, and a tracer comes, where a lock may just have been taken and its `with` block not begun:
    that leaves it held, by a thread that does not know. So this lets go of it however often this thread has it.
    """
    try:
        with lock:
            return action()
    finally:
        _let_go(lock)


def _let_go(lock: RLock) -> None:
    with suppress(RuntimeError):
        while True:
            lock.release()


def unless_taken(lock: RLock, action: Callable[[], object]) -> None:
    """Do it in this thread's turn, if it is nobody else's.

    `if lock.acquire(blocking=False)` before a `try` leaves it held where an interrupt comes in between.
    """
    taken = True
    try:
        taken = lock.acquire(blocking=False)
        if taken:
            action()
    finally:
        if taken:  # or perhaps not: an interrupt came before the answer
            try:  # noqa: SIM105 (the first call of the block: Python looks for signals after it, not before)
                lock.release()
            except RuntimeError:
                pass


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
