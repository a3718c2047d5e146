"""What the CPU kernels share: matrices as flat arrays of bits, and rows shared out among threads.

Threads: numba's own parallel loops are not used. Its default pool crashes when two Python threads enter it at once, and
its OpenMP pool kills a process that forks. The loops release the GIL instead, and a plain thread pool shares the rows
out, `torch.get_num_threads()` at a time, together with the calling thread. Any number of threads may call at once, and
a forked child starts its own pool.

Products come between operations of torch, whose OpenMP threads wait for the next one with a loop that keeps their core
busy: a pool beside them competes for it. So loops that are C functions run in that team (`run_loop`), by the
entry point that compilers use, `GOMP_parallel`; where there is none, and in a forked child, in the pool.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from ...interrupts import Doors
from ..formats import ceil_div

Array = np.ndarray[Any, Any]

PIECE = 1 << 18  # Elements below which handing work to another thread costs more than it saves.
_PIECES_PER_THREAD = 4  # So that a thread which lost its core for a while does not hold up the others.
_SLAB = 1 << 22  # Elements of a source copied at a time when its columns are not adjacent in memory.

# Element type → the integer type under which numba sees its bits (see `jit`).
_BITS = {
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.int8: torch.uint8,
}
ELEMENTS = {torch.bfloat16: np.dtype(np.uint16), torch.float16: np.dtype(np.int16), torch.float32: np.dtype(np.float32)}
"""Of a source, as numba sees them."""


def adjacent(matrix: torch.Tensor) -> bool:
    """Whether numba can read the matrix in place: columns next to each other, elements at aligned addresses."""
    return (matrix.stride(1) == 1 or matrix.shape[1] == 1) and matrix.data_ptr() % matrix.element_size() == 0


def flat_rows(matrix: torch.Tensor) -> tuple[Array, int]:
    """The memory of an `adjacent` matrix as one flat array of bits, and the distance between its rows."""
    rows, cols = matrix.shape
    stride = matrix.stride(0)
    flat = matrix.detach().as_strided((max(0, (rows - 1) * stride + cols),), (1,))
    return as_array(flat.view(_BITS.get(matrix.dtype, matrix.dtype))), stride


def as_array(tensor: torch.Tensor) -> Array:
    """The memory of a tensor. `numpy()` fixes the size of a storage for good, and FSDP frees gathered weights by
    resizing theirs: this array is of another storage, of the same memory."""
    array: Array = from_dlpack(to_dlpack(tensor)).numpy()
    return array


def slabs(source: torch.Tensor, unit: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of the source: all of it, or bounded copies of whole units when its columns lie apart."""
    rows, cols = source.shape
    if adjacent(source):
        yield 0, source
        return
    step = unit * max(1, _SLAB // (unit * cols))
    for first in range(0, rows, step):
        yield first, source[first : first + step].clone(memory_format=torch.contiguous_format)


_tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()  # for the threads of the pool
_threads = 0
_forked = False  # A child has none of the threads that OpenMP believes it has, and would wait for them forever.


def _ask_pool(task: Callable[[], None]) -> None:
    """Let a thread of the pool do it when one is idle. The task raises nothing.

    They are not threads of `threading` or of an executor: an interrupt in the midst of starting one of those leaves a
    thread that Python's end waits for and nobody tells.
    """
    global _threads
    _tasks.put(task)
    if _threads < (os.cpu_count() or 1):
        with contextlib.suppress(RuntimeError):  # This process may have no more threads.
            _thread.start_new_thread(_serve, (_tasks,))
            _threads += 1


def _serve(tasks: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        tasks.get()()


def _after_fork() -> None:
    """A child has none of its parent's threads, and perhaps a queue that one of them held."""
    global _tasks, _threads, _forked
    _tasks, _threads, _forked = SimpleQueue(), 0, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def share(count: int, elements: int, work: Callable[[int, int], None]) -> None:
    """Call work(start, stop) until the pieces cover range(count), on this thread and on idle ones of the pool.

    The calling thread takes pieces too and never waits for one that has not begun, so calls from many threads make
    progress however busy the pool is.
    """
    threads = torch.get_num_threads()
    pieces = max(1, min(count, elements // PIECE, threads * _PIECES_PER_THREAD if threads > 1 else 1))
    if pieces == 1:
        work(0, count)
        return
    step = ceil_div(count, pieces)
    starts = iter(range(0, count, step))
    lock = threading.Lock()
    over = False

    def drain() -> None:
        nonlocal over
        try:
            while not over:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                work(start, min(start + step, count))
        finally:
            over = True  # Nothing is left, or this thread was stopped, and the others need not go on.

    _together(drain, min(threads, pieces))


def team() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(function, argument, threads, flags) of torch's threads; None where there are none to enter."""
    return None if _forked else _openmp()


def with_places(loop: Any, kind: np.dtype[Any], *places: int) -> None:
    """Run one of the loops of `vectors` on this thread."""
    argument = np.array([places], kind)
    loop.ctypes(ctypes.cast(argument.ctypes.data, loop.ctypes.argtypes[0]))


def run_loop(loop: Any, places: Array, pieces: int, threads: int) -> None:
    """Run one of the loops of `vectors` on up to so many threads, of torch's if that can be."""
    threads = min(threads, pieces)
    address = places.ctypes.data
    parallel = team() if threads > 1 else None
    if parallel is not None:
        parallel(loop.address, address, threads, 0)
        return
    pointer = ctypes.cast(address, loop.ctypes.argtypes[0])
    if threads > 1:
        _together(functools.partial(loop.ctypes, pointer), threads)
    elif pieces:
        loop.ctypes(pointer)


@functools.cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(function, argument, threads, flags) of the library that torch's own loops run in."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    for library in (None, os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")):
        with contextlib.suppress(OSError, AttributeError, TypeError):
            parallel: Any = ctypes.CDLL(library).GOMP_parallel
            parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            parallel.restype = None
            return parallel  # type: ignore[no-any-return]
    return None


def _together(work: Callable[[], object], threads: int) -> None:
    """Call `work` on this thread and on idle ones of the pool; never wait for one that has not begun.

    However it ends, and whatever interrupts it, no thread works any more: they write to memory that the caller rolls
    back, or frees.
    """
    errors: list[BaseException] = []
    doors = Doors(threads - 1)

    def help_out(index: int) -> None:
        if doors.enter(index):
            try:
                work()
            except BaseException as error:
                errors.append(error)
            finally:
                doors.leave(index)

    try:
        for index in range(threads - 1):
            _ask_pool(functools.partial(help_out, index))
        work()
    finally:
        doors.close()  # the first call of the block: Python looks for signals after it, not before
    if errors:
        raise errors[0]
