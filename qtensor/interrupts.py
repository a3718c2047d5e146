"""What has to be done whole although an exception may come at any moment: Ctrl-C, a timer, a signal's handler."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import RLock
from typing import TypeVar

import torch

from .errors import QTensorError

MOST_TRIES = 100
_T = TypeVar("_T")

_python = ctypes.CDLL(None, handle=ctypes.pythonapi._handle)  # without the GIL, which `pythonapi` itself would hold
_allocate = ctypes.CFUNCTYPE(ctypes.c_void_p)(("PyThread_allocate_lock", _python))
_acquire = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)(("PyThread_acquire_lock", _python))
_release = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(("PyThread_release_lock", _python))
_free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(("PyThread_free_lock", _python))


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


class Doors:
    """One for each thread that may help with a call: closed, whatever interrupts the call, before that returns.

    A helper works between `enter` and `leave`. `close` waits for those inside and lets nobody in any more. It is one
    call of C, where Python does not look for signals, and the waits are those of locks that no signal ends: so as the
    first call of a `finally` block it is done, however many exceptions come. A loop in Python that waits, catches
    what interrupts it and waits again would be left by what comes between two of its turns.
    """

    close: Callable[[], bool]
    _locks: Sequence[int] = ()

    def __init__(self, count: int) -> None:
        self._locks = [_allocate() for _ in range(count)]
        self.close = functools.partial(all, map(_acquire, self._locks, itertools.repeat(1)))

    def enter(self, index: int) -> bool:
        """Whether the helper may work: it was not too late."""
        return bool(_acquire(self._locks[index], 0))

    def leave(self, index: int) -> None:
        """The helper has ended."""
        _release(self._locks[index])

    def __del__(self) -> None:
        for lock in self._locks:
            _free(lock)
