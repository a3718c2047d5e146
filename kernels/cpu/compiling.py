"""Where loops are compiled, and modules imported late: in a thread that no signal reaches, once, for callers that wait.

An exception in the midst of numba's own set-up (its import, a compilation, a look into its cache) leaves numba broken
for the rest of the process, and Python raises what a signal's handler raises in the main thread. So whoever needs a
loop asks a thread for it and waits: an interrupt ends the wait alone, and the loop is there for whoever comes next. So
does whoever needs a module that `import qtensor` leaves out: an interrupt as Python imports can leave its import lock
held, and every other thread that imports waits for ever.

To ask is one step of a dictionary, one of a deque, and a new thread, which serves until nothing is asked for: an
interrupt finds nothing half done. Threads take turns. They are not those of `threading`, whose `start` waits for a lock
that an interrupt can leave held, and which Python joins at its end however much is asked for; a fork, and the end of
the process, wait for the one whose turn it is, so that no child begins in the midst of a compilation.
"""

from __future__ import annotations

import _thread
import atexit
import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from types import FunctionType
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

logger = logging.getLogger("qtensor")
T = TypeVar("T")


class Listener(Protocol):
    """Hears of it when a caller waits for something to be compiled, in that caller's thread."""

    def compiling(self, text: str) -> None: ...


listeners: WeakSet[Listener] = WeakSet()

not_kept: dict[str, str] = {}
"""Functions that are in no cache, and why: they compile in every process."""
_COMPILING = object()
_needed: deque[Task[Any]] = deque()
_waiting: dict[SimpleQueue[Any], tuple[Task[Any], int]] = {}  # and which thread waits
_turn = threading.RLock()  # The thread that builds has it; so do a fork and the end of the process.
_builder: int | None = None
_building: Task[Any] | None = None
_in_line: set[int] = set()  # threads that wait for their turn, and will look for what is needed then
_forking = _ending = _compiling = False
_said: set[str] = set()


class Task(Generic[T]):
    """Something to be built once. A build that fails is tried again when it is asked for again."""

    def __init__(self, build: Callable[[], T]) -> None:
        self._build = build
        self.done = False
        self._value: Any = None

    def result(self, purpose: str = "") -> T:
        """Wait for it. `purpose`, what it is for, is told to whoever listens if that takes a compilation."""
        if not self.done:
            self._wait(purpose)
        return self._value  # type: ignore[no-any-return]

    def begin(self) -> None:
        """Have it built meanwhile. What goes wrong is told to whoever asks for the result."""
        if not self.done and _building is not self:
            _needed.append(self)
            if not _in_line:
                _start()

    def build(self) -> None:
        """For the thread whose turn it is."""
        if not self.done:
            self._value = self._build()
            self.done = True

    def _wait(self, purpose: str) -> None:
        if _ending or threading.get_ident() == _builder:
            self.build()
            return
        mail: SimpleQueue[Any] = SimpleQueue()
        try:
            _waiting[mail] = self, threading.get_ident()
            # Who waits, is interrupted and asks again, for as long as a compilation takes, needs no thread each time.
            if _building is not self:
                _needed.append(self)
                if not _in_line:
                    _start()
            if _compiling:
                _tell(purpose)
            while not self.done:
                found = mail.get()
                if isinstance(found, BaseException):
                    raise found
                if found is _COMPILING:
                    _tell(purpose)
        finally:
            _waiting.pop(mail, None)


class Once(Generic[T]):
    """A function whose every result is built once, by a `Task`; from then on a call is a look into a dictionary."""

    def __init__(self, build: Callable[..., T]) -> None:
        self._build = build
        self._tasks: dict[tuple[Any, ...], Task[T]] = {}
        self._ready: dict[tuple[Any, ...], T] = {}

    def __call__(self, *key: Any, purpose: str = "") -> T:
        try:
            return self._ready[key]
        except KeyError:
            pass
        value = self._ready[key] = self._task(key).result(purpose)
        return value

    def begin(self, *key: Any) -> None:
        """See `Task.begin`."""
        self._task(key).begin()

    def if_ready(self, *key: Any) -> T | None:
        """What was built; None where it was not, and nobody waits."""
        task = self._task(key)
        return task._value if task.done else None

    def _task(self, key: tuple[Any, ...]) -> Task[T]:
        return self._tasks.setdefault(key, Task(partial(self._build, *key)))


def compiled(function: Callable[..., Any], key: tuple[Any, ...], attempt: Callable[[Callable[..., Any], bool], T]) -> T:
    """For builds of tasks: attempt(function, True), which compiles it or reads numba's cache; where that fails
    attempt(function, False), without the cache: it may have no folder, or the disk is full, or a file damaged.

    key: what it is compiled for, besides the chip and what its closure holds. numba keeps all that a function was
    compiled for in one numbered list of files, and of two processes that begin such a list at once one can find the
    other's code under its number. So here every file has a name of its own.
    """
    import numba
    from numba.core import registry

    machine = numba.__version__, *registry.cpu_target.target_context.codegen().magic_tuple()
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    digest = hashlib.sha256(repr((key, held, machine)).encode()).hexdigest()
    named = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    named.__module__, named.__doc__ = function.__module__, function.__doc__
    named.__qualname__ = f"{function.__qualname__}_{digest[:16]}"
    with _noticed():
        try:
            return attempt(named, True)
        except Exception as error:
            not_kept[named.__qualname__] = f"{type(error).__name__}: {error}"
            return attempt(named, False)


@contextmanager
def _noticed() -> Iterator[None]:
    """If numba begins to compile in this thread, whoever waits hears of it."""
    from numba.core import event

    thread = threading.get_ident()

    class Passes(event.Listener):  # type: ignore[misc]
        def on_start(self, event: Any) -> None:
            global _compiling
            if not _compiling and threading.get_ident() == thread:
                _compiling = True
                for mail in list(_waiting):
                    mail.put(_COMPILING)

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:run_pass", Passes()):
        yield


def _tell(purpose: str) -> None:
    if not purpose:
        return
    text = f"compiling CPU loops for {purpose} (once per machine)"
    if text not in _said:
        _said.add(text)
        logger.info(text)
    for listener in list(listeners):
        listener.compiling(text)


def _start() -> None:
    _thread.start_new_thread(_serve, ())


def _serve() -> None:
    """Build what is asked for, a task at a turn."""
    global _builder, _building, _compiling
    me = threading.get_ident()
    while _needed:
        _in_line.add(me)
        with _turn:
            _in_line.discard(me)
            if _forking or _ending:
                return
            try:
                task = _needed.popleft()
            except IndexError:  # Another thread of these was faster.
                return
            answer: BaseException | None = None
            _builder, _building = me, task
            try:
                task.build()
            except BaseException as error:
                answer = error
            finally:
                _builder, _building, _compiling = None, None, False
            # copy(): pairs are objects, whose making may collect garbage, and that let a caller in that changes it.
            for mail, (wanted, _) in _waiting.copy().items():
                if wanted is task:
                    mail.put(answer)


# Forks and the end of the process


def _before_fork() -> None:
    """What is raised here Python prints and forgets, and the fork goes on: so the wait has to, too."""
    global _forking
    if threading.get_ident() == _builder:
        return
    _forking = True
    while True:
        with suppress(BaseException):
            _turn.acquire()
            return


def _after_fork_in_parent() -> None:
    global _forking
    if not _forking:
        return
    _forking = False
    with suppress(RuntimeError):  # It is not held any more.
        while True:
            _turn.release()
    if _needed:
        _start()


def _after_fork_in_child() -> None:
    """The child has one thread, the one that forked. It waits for something if it forked in a signal's handler."""
    global _forking, _turn, _building
    _forking, _turn, _building = False, threading.RLock(), None
    _needed.clear()
    _in_line.clear()
    for mail, (task, thread) in _waiting.copy().items():
        if thread == threading.get_ident():
            _needed.append(task)
            _start()
        else:
            del _waiting[mail]


def _at_exit() -> None:
    """What compiles is finished, and lies in the cache next time; nothing new begins."""
    global _ending
    _ending = True
    _turn.acquire()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
