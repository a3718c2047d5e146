"""No interrupt leaves a lock held: how qtensor takes them, and that Python keeps what this relies on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from qtensor.interrupts import in_turn, unless_taken
from support.first_use import LOOPS, timer
from support.processes import ROOT


def left_held(run: Callable[[Any], object], tries: int) -> int:
    """How often a timer's exception left a lock held."""
    found = 0
    for i in range(tries):
        lock = threading.RLock()
        with suppress(KeyboardInterrupt), timer(2e-5 + 1e-7 * (i % 997), KeyboardInterrupt):
            for _ in range(LOOPS):
                run(lock)
        found += in_another_thread(lambda lock=lock: not lock.acquire(blocking=False))
    return found


def in_another_thread(question: Callable[[], bool]) -> bool:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(question).result()


def by_with(lock: Any) -> None:
    with lock:
        pass


def by_acquire(lock: Any) -> None:
    lock.acquire()
    try:
        pass
    finally:
        lock.release()


def test_no_interrupt_leaves_a_lock_held() -> None:
    """It can where `acquire` comes before a `try`, which shows that this test would notice. A `with` is safe on the
    Pythons that are supported today; if this fails on a later one, the locks of qtensor need another look."""
    assert left_held(by_with, 300) == 0
    assert left_held(lambda lock: in_turn(lock, int), 300) == 0
    assert left_held(lambda lock: unless_taken(lock, int), 300) == 0
    assert left_held(by_acquire, 300) > 0


def test_what_is_done_in_turn_lets_go_of_what_an_interrupt_left_held() -> None:
    lock = threading.RLock()
    lock.acquire()
    assert in_turn(lock, lambda: 7) == 7
    assert in_another_thread(lambda: lock.acquire(blocking=False))


def test_what_is_done_unless_taken() -> None:
    lock, done = threading.RLock(), []
    unless_taken(lock, lambda: done.append("free"))
    with lock:
        in_another_thread(lambda: unless_taken(lock, lambda: done.append("taken")) is None)
    assert done == ["free"]


def test_locks_are_taken_by_with() -> None:
    """See docs/design.md. What finds the lock of `prepared` taken goes another way, and waits for nobody."""
    own = {"interrupts.py", "compiling.py", "prepared.py"}
    files = [f for folder in ("qtensor", "kernels", "integrations") for f in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = [f for f in files if f.name not in own and ".acquire(" in f.read_text(encoding="utf-8")]
    assert found == []
