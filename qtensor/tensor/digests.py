"""SHA-256 of many things: by hashlib in a few threads, and sixteen at once where the chip has vectors for it.

hashlib's speed is that of a chain of instructions that wait for one another (1.4 GB/s on a core with SHA instructions).
The loop of `kernels.cpu.hashing` takes sixteen in the time of seven or eight. It takes numba, a fifth of a second to
import, and is compiled once per machine and then read. Nobody waits for that: it is asked for where numba is imported
already, or so much is to be hashed that the import pays, and used from when it is ready.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from .. import kernels
from ..kernels.cpu.compiling import Once

MOST_WORKERS = 8
_WORTH_A_THREAD = 1 << 20  # bytes
_RUNS = 16
_SLOWER = 8  # How many times as long a run takes that is one of sixteen. Measured by bench/hashing.py: 7.6.
_WORTH_A_LANE, _WORTH_ASKING = 64 << 10, 16 << 20  # bytes of the longest run, and of all
_WORTH_AN_IMPORT = 1 << 30  # bytes for each thread
_PIECE, _SMALL_PIECE = 16 << 20, 1 << 20

Digests = Callable[[Sequence[Iterable[memoryview]]], list[bytes]]


class Content(NamedTuple):
    """Bytes to be hashed. pieces(most): them in order, in pieces of at most that many bytes where they have to be read
    from somewhere; each may be overwritten when the next is asked for."""

    nbytes: int
    pieces: Callable[[int], Iterable[memoryview]]


def usual_workers(contents: Iterable[Content]) -> int:
    """As many threads as there are cores, eight at most, if there is enough for each."""
    large = sum(content.nbytes >= _WORTH_A_THREAD for content in contents)
    return max(min(large, os.cpu_count() or 1, MOST_WORKERS), 1)


def sha256_of(contents: Sequence[Content], workers: int) -> list[bytes]:
    """The SHA-256 of each, by so many threads. What `pieces` raises is raised."""
    queue = _Queue(contents, workers)
    if workers < 2:
        queue.work()
        return queue.found
    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in [pool.submit(queue.work) for _ in range(workers)]:
                future.result()
        finally:
            queue.stop()  # The pool's end waits for its threads.
    return queue.found


@Once
def _sixteen() -> Digests | None:
    """What hashes sixteen at once; None where nothing does it faster than hashlib."""
    if kernels.choose(torch.device("cpu")).name != "numba":
        return None
    from ..kernels.cpu import hashing

    if not hashing.is_fast():
        return None
    hashing.digests([[memoryview(b"")]])  # compiles
    return hashing.digests


class _Queue:
    """What threads take from: the largest first."""

    def __init__(self, contents: Sequence[Content], workers: int) -> None:
        self._contents, self._workers = contents, workers
        order = sorted(range(len(contents)), key=lambda i: -contents[i].nbytes)
        self._left, self._bytes = deque(order), sum(content.nbytes for content in contents)
        self._lock = threading.Lock()
        self.found = [b""] * len(contents)
        pays = "numba" in sys.modules or self._bytes >= workers * _WORTH_AN_IMPORT
        self._asks = pays and self._bytes >= _WORTH_ASKING and len(contents) > 1
        if self._asks:
            _sixteen.begin()

    def stop(self) -> None:
        """What nobody has begun is left."""
        with self._lock:
            self._left.clear()

    def work(self) -> None:
        """Hash until nothing is left, for a thread. What goes wrong in one is the end of all."""
        try:
            while taken := self._take():
                self._hash(taken)
        except BaseException:
            self.stop()
            raise

    def _hash(self, taken: list[int]) -> None:
        if len(taken) == 1:
            digest = hashlib.sha256()
            for piece in self._contents[taken[0]].pieces(_PIECE):
                digest.update(piece)
            self.found[taken[0]] = digest.digest()
            return
        together = _sixteen.if_ready()
        assert together is not None
        digests = together([self._contents[i].pieces(_SMALL_PIECE) for i in taken])
        for i, of_it in zip(taken, digests, strict=True):
            self.found[i] = of_it

    def _take(self) -> list[int]:
        with self._lock:
            count = self._together() or min(len(self._left), 1)
            taken = [self._left.popleft() for _ in range(count)]
            self._bytes -= sum(self._contents[i].nbytes for i in taken)
            return taken

    def _together(self) -> int:
        """How many of the next to take at once: 0 where they take less time one by one, or all that is left does in all
        threads."""
        if not self._asks or not self._left or _sixteen.if_ready() is None:
            return 0
        longest = self._contents[self._left[0]].nbytes
        if longest < _WORTH_A_LANE:
            return 0
        count = min(len(self._left), _RUNS)
        alone = sum(self._contents[self._left[i]].nbytes for i in range(count))
        return count if _SLOWER * longest < min(alone, self._bytes / self._workers) else 0
