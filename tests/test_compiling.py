"""CPU loops compile once, out of the reach of signals, and say so: whatever interrupts whoever waits for them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from qtensor import fp8_per_tensor, quantize
from qtensor.cli import main
from qtensor.kernels.cpu import compiling
from qtensor.kernels.cpu.compiling import Once, Task
from qtensor.report.progress import Progress, ProgressEvent
from support.first_use import first_use, timer
from support.late_imports import PROGRAMS, late_imports
from support.processes import elsewhere, in_forks

pytest.importorskip("numba", reason="the numba kernels need the optional extra 'cpu'")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


class Slow:
    """A build that takes a while, and counts."""

    def __init__(self, seconds: float = 0.05, fails: int = 0) -> None:
        self.seconds, self.fails, self.begun = seconds, fails, 0

    def __call__(self) -> int:
        self.begun += 1
        time.sleep(self.seconds)
        if self.begun <= self.fails:
            raise ValueError(f"try {self.begun}")
        return self.begun


def give_up_waiting(task: Task[Any]) -> None:
    """Ask for something, and be interrupted: it is built all the same."""
    with suppress(TimeoutError), timer(0.002, TimeoutError):
        task.result()


def side_by_side(work: Callable[[], object], count: int = 8) -> list[object]:
    results: list[object] = []

    def collect() -> None:
        try:
            results.append(work())
        except ValueError as error:
            results.append(str(error))

    threads = [threading.Thread(target=collect) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return results


# Requests -------------------------------------------------------------------------------------------------------------


def test_what_is_begun_is_built_beside_and_what_goes_wrong_is_for_whoever_asks() -> None:
    build = Slow(0.1, fails=1)
    once = Once(build)
    start = time.perf_counter()
    once.begin()
    assert time.perf_counter() - start < 0.05
    while build.begun < 1 or compiling._building is not None:
        time.sleep(0.001)
    once.begin()
    assert once() == 2  # The second try, that is under way.
    once.begin()
    assert build.begun == 2


def test_a_wait_that_is_interrupted_leaves_a_build_for_whoever_comes_next() -> None:
    build = Slow(0.1)
    task = Task(build)
    with pytest.raises(TimeoutError), timer(0.02, TimeoutError):
        task.result()
    assert task.result() == 1
    assert build.begun == 1


def test_an_interrupt_at_any_moment_of_a_request() -> None:
    """Of the request, the wait, the answer: the next request is served, and nothing is built twice."""
    stopped = 0
    for i in range(600):
        build = Slow(0.0)
        task = Task(build)
        with suppress(KeyboardInterrupt), timer(1e-6 * (i % 250), KeyboardInterrupt):
            task.result()
            stopped -= 1
        stopped += 1
        assert Task(Slow(0.0)).result() == 1
        assert task.result() == 1
        assert build.begun == 1
    assert stopped > 60
    assert not compiling._waiting


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads that Python does not know are in /proc")
def test_who_asks_again_and_again_needs_no_thread_each_time() -> None:
    """Also for what comes after the build that takes so long."""
    enough = threading.Event()
    first, second = Task(lambda: enough.wait(60)), Task(Slow(0.0))
    before, most = len(os.listdir("/proc/self/task")), 0
    for _ in range(40):
        give_up_waiting(first)
        give_up_waiting(second)
        most = max(most, len(os.listdir("/proc/self/task")))
    assert not first.done
    enough.set()
    assert (first.result(), second.result()) == (True, 1)
    assert most <= before + 6


def test_many_threads_at_once_wait_for_one_build() -> None:
    build = Slow()
    assert side_by_side(Task(build).result) == [1] * 8
    made = Once(lambda a, b: (a, b))
    assert side_by_side(lambda: made(1, 2) is made(1, 2)) == [True] * 8


def test_a_build_that_fails_is_an_error_for_all_who_wait_and_is_tried_again() -> None:
    task = Task(Slow(fails=1))
    assert "try 1" in side_by_side(task.result)
    assert task.result() == 2


def test_what_is_asked_for_is_built_in_that_order() -> None:
    order: list[str] = []
    tasks = {name: Task(lambda name=name: order.append(name) or time.sleep(0.02)) for name in "abcd"}  # type: ignore[misc]
    for name in "abc":
        give_up_waiting(tasks[name])
    tasks["d"].result()
    assert order == list("abcd")


def test_a_build_may_need_another() -> None:
    inner = Once(lambda: 7)
    assert Task(lambda: inner() + 1).result() == 8


@needs_fork
@pytest.mark.parametrize("waits", [False, True])
def test_a_fork_in_the_midst_of_a_build(waits: bool) -> None:
    """The child has what was built, and builds what was not; also if a signal's handler forks as its thread waits."""
    first, second, later = Slow(0.2), Slow(0.05), Task(Slow(0.0))
    tasks = [Task(first), Task(second)]
    for task in tasks:
        give_up_waiting(task)
    while not first.begun:
        time.sleep(0.001)
    children: list[int] = []

    def fork() -> None:
        child = os.fork()
        if child:
            children.append(child)
            return
        here.append(os.getpid())

    here: list[int] = []
    parent = os.getpid()
    if waits:
        with calling_after(0.02, fork):
            tasks[1].result()
    else:
        fork()
    good = [task.result() for task in (*tasks, later)] == [1, 1, 1] and first.begun == 1
    if os.getpid() != parent:
        os._exit(0 if good else 1)
    assert good
    assert exit_code(children[0]) == 0


def calling_after(seconds: float, action: Callable[[], None]) -> Any:
    """A signal's handler that does something and returns."""
    import signal
    from contextlib import contextmanager

    @contextmanager
    def within() -> Any:
        before = signal.signal(signal.SIGALRM, lambda *_: action())
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    return within()


def exit_code(child: int) -> int:
    for _ in range(1000):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    raise AssertionError("the child does not end")


def test_the_end_of_a_process_waits_for_what_compiles_and_begins_nothing() -> None:
    code = (
        "import sys, threading, time; sys.path.insert(0, sys.argv[1])\n"
        "import compiling\n"
        "def build(text):\n"
        "    print(text, 'begins', flush=True); time.sleep(0.2); print(text, 'ends', flush=True)\n"
        "for text in 'ab':\n"
        "    task = compiling.Task(lambda text=text: build(text))\n"
        "    threading.Thread(target=task.result, daemon=True).start()\n"
        "time.sleep(0.05)\n"
    )
    folder = str(Path(compiling.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr, done.stdout.split("\n")) == (0, "", ["a begins", "a ends", ""])


# Modules that are imported late ---------------------------------------------------------------------------------------


def test_no_load_imports_anything_where_an_interrupt_comes() -> None:
    """An interrupt as Python imports can leave its import lock held and modules half made: torch's own, too."""
    late = []
    for ours, others in in_forks(late_imports, PROGRAMS, ("torch", "numpy", "qtensor")):
        assert ours == []
        assert "qtensor.sources.fp8" in others  # It was late, and this test would notice.
        late.append("numba" in others)
    assert late.count(True) >= 3  # Bytes that are taken as they are need no kernel.


# numba ----------------------------------------------------------------------------------------------------------------


def in_a_new_process(cache: Path, stopped: bool) -> tuple[int, list[str]]:
    told = elsewhere.Queue()
    process = elsewhere.Process(target=first_use, args=(str(cache), stopped, told))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    found: tuple[int, list[str]] = told.get(timeout=10)
    return found


def test_interrupts_of_the_first_compilation_and_of_the_first_look_into_the_cache(tmp_path: Path) -> None:
    """numba does not survive one. Not cheap: two loops compile into an empty cache."""
    stops, _ = in_a_new_process(tmp_path, stopped=True)
    assert stops > 10
    files = sorted(path.name for path in tmp_path.rglob("*.nbc"))
    assert len({name.partition("-")[0] for name in files}) == len(files) == 2  # one function to a file: see `compiled`
    stops, said = in_a_new_process(tmp_path, stopped=True)
    assert stops > 2
    assert set(said) == {"quantizing"}
    assert sorted(path.name for path in tmp_path.rglob("*.nbc")) == files


# What is said ---------------------------------------------------------------------------------------------------------


def compile_something(purpose: str) -> None:
    """What numba compiles now, and in no cache."""

    def function(x: int) -> int:
        return x + len(purpose)

    def attempt(named: Callable[..., Any], cache: bool) -> Any:
        import numba

        time.sleep(0.02)
        return numba.njit(named).compile((numba.types.int64,))

    assert Task(lambda: compiling.compiled(function, (), attempt)).result(purpose)(1) == 1 + len(purpose)


def test_who_waits_for_a_compilation_is_told_once(capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    caplog.set_level("INFO", "qtensor")
    events: list[ProgressEvent] = []
    with Progress(events.append) as called, Progress(True), Progress(True, total=3), Progress(False):
        called.expect(3)
        for _ in range(2):
            compile_something("a scheme")
    compile_something("a scheme")
    text = "compiling CPU loops for a scheme (once per machine)"
    assert [e.description for e in events] == ["quantizing", text]
    assert (events[1].done, events[1].total) == (0, 3)
    assert capsys.readouterr().err.count(f"{text} …") == 2
    assert caplog.text.count(text) == 1


def test_what_lies_in_the_cache_is_not_told_of() -> None:
    events: list[ProgressEvent] = []
    quantize(torch.ones(4, 4), fp8_per_tensor)
    with Progress(events.append):
        quantize(torch.ones(4, 4), fp8_per_tensor)
    assert events == []


def test_doctor_compiles_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert main.main(["doctor", "--compile", "fp8_per_tensor"]) == 0
    assert "The CPU loops of fp8_per_tensor are compiled" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main.main(["doctor", "--compile", "fp7"])
    assert "fp7" in capsys.readouterr().err
    monkeypatch.setattr(compiling, "not_kept", {"loop": "OSError: full"})
    assert main.main(["doctor", "--compile", "fp8_per_tensor"]) == 1
    assert "could not be kept for other processes: OSError: full" in capsys.readouterr().out
    monkeypatch.setenv("QTENSOR_KERNELS", "torch")
    assert main.main(["doctor", "--compile"]) == 1
    assert "Nothing to compile" in capsys.readouterr().out


def test_a_damaged_cache_is_compiled_anew(tmp_path: Path, monkeypatch: Any) -> None:
    tried: list[bool] = []

    def attempt(named: Callable[..., Any], cache: bool) -> str:
        tried.append(cache)
        if cache:
            raise EOFError("Ran out of input")
        return "compiled"

    monkeypatch.setattr(compiling, "not_kept", {})
    assert compiling.compiled(lambda: None, (), attempt) == "compiled"
    assert tried == [True, False]
    assert [*compiling.not_kept.values()] == ["EOFError: Ran out of input"]
