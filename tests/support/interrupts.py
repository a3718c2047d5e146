"""Exceptions at any moment: from a timer's signal handler, at a given line of qtensor, or in a given torch operation.

A subject is a small model and something that is done to it. Afterwards the model must be all old or all new, compute,
and take the next load; and nothing may be left behind. Nothing here knows how qtensor does it. It is one file because
subjects, ways to interrupt them and the judgement afterwards are of no use without one another.
"""

from __future__ import annotations

import gc
import logging
import random
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qtensor import QTensor, fp8_per_block, fp8_per_channel, fp8_per_tensor, online_quant, online_reload, quantize
from support.at_lines import AtLine, ThenAtLine
from support.first_use import timer

STOPS: tuple[type[BaseException], ...] = (KeyboardInterrupt, TimeoutError, SystemExit, MemoryError)
SCHEMES = {"up.weight": fp8_per_channel, "down.weight": fp8_per_tensor, "wide.weight": fp8_per_block}
TARGETS = SCHEMES | {"head.weight": fp8_per_channel}
Weights = dict[str, torch.Tensor]


class Net(nn.Module):
    """A weight of each granularity, biases, a buffer, and a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.wide = nn.Linear(16, 32), nn.Linear(32, 16, bias=False), nn.Linear(16, 160)
        self.head = nn.Linear(16, 32)
        self.head.weight = self.up.weight
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x)) + self.wide(x)[:, :16]


def values(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        net = Net()
    return {
        name: torch.randn(t.shape, generator=generator) for name, t in net.state_dict().items() if name != "head.weight"
    }


def load(net: Net, weights: Weights) -> None:
    """As a loader does it: in pieces, columns too."""
    params: dict[str, Any] = dict(net.named_parameters()) | dict(net.named_buffers())
    for name, value in weights.items():
        if value.dim() == 2 and value.shape[0] == 160:
            params[name].data[:, 8:].copy_(value[:, 8:])
            params[name].data[:, :8].copy_(value[:, :8])
        elif value.dim() == 2:
            params[name].data[:8].copy_(value[:8])
            params[name].data[8:].copy_(value[8:])
        else:
            params[name].data.copy_(value)


def loaded(weights: Weights) -> Net:
    net = Net()
    with online_quant(TARGETS, net):
        load(net, weights)
    return net


def expected(weights: Weights) -> dict[str, bytes]:
    return {
        name: b"".join(_bytes(p) for p in (quantize(w, SCHEMES[name]).parts() if name in SCHEMES else (w,)))
        for name, w in weights.items()
    }


def held(net: Net) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, t in (*net.named_parameters(), *net.named_buffers()):
        if name in SCHEMES:
            assert type(t) is QTensor, f"{name} is a {type(t).__name__}"
        parts = t.parts() if isinstance(t, QTensor) else (t,)
        found[name] = b"".join(map(_bytes, parts))
    return found


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


OLD, NEW, NEXT = values(0), values(1), values(2)
STATES = {"old": expected(OLD), "new": expected(NEW), "next": expected(NEXT)}


class Subject:
    """What is interrupted: `run`. kind: "load", "abort of a load", or a mode of reload."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.net = Net() if "load" in kind.split() else loaded(OLD)
        self.objects = dict(self.net.named_parameters())
        self.gradients = True  # Are they on when it is over?

    def run(self) -> None:
        if "load" in self.kind.split():
            with online_quant(TARGETS, self.net):
                load(self.net, NEW)
                if "abort" in self.kind:
                    raise _Enough
            return
        shadow: Any = "host" if "host" in self.kind else "device"
        with online_reload(self.net, shadow=shadow, atomic="each" not in self.kind):
            load(self.net, NEW)
            if "abort" in self.kind:
                raise _Enough

    def problem(self) -> str | None:
        """What is wrong with the model or the process now; None if nothing is."""
        gc.collect()  # of what came since `gc.freeze`
        if not self.gradients:
            return "gradients are off for the whole process"
        try:
            if "load" in self.kind.split():
                if any(type(p) is not QTensor for n, p in self.net.named_parameters() if n in SCHEMES):
                    load_again = online_quant(TARGETS, self.net)
                    with load_again:
                        load(self.net, NEW)
                if held(self.net) != STATES["new"]:
                    return "it is not what was loaded"
            else:
                now = held(self.net)
                if "each" in self.kind:
                    wrong = [n for n in now if now[n] not in (STATES["old"][n], STATES["new"][n])]
                    if wrong:
                        return f"{wrong} are neither old nor new"
                elif now not in (STATES["old"], STATES["new"]):
                    return f"old: {[n for n in now if now[n] == STATES['old'][n]]}, new: " + str(
                        [n for n in now if now[n] == STATES["new"][n]]
                    )
                if {n: id(p) for n, p in self.net.named_parameters()} != {n: id(p) for n, p in self.objects.items()}:
                    return "a Parameter is another object"
            if not torch.isfinite(self.net(torch.ones(2, 16))).all():
                return "the forward pass gives no numbers"
            with online_reload(self.net):
                load(self.net, NEXT)
            if held(self.net) != STATES["next"]:
                return "the next reload did not load"
            if any("_armed" in p.__dict__ or "_view" in p.__dict__ for p in self.net.parameters()):
                return "a Parameter knows its session still"
            if left := hooks_left():
                return f"hooks are left: {left}"
            if not opens_in_another_thread():
                return "another thread waits for ever for its session to open"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None


class _Enough(Exception):
    """What a loader fails with."""


def hooks_left() -> list[str]:
    """Functions of qtensor among PyTorch's process-wide hooks."""
    from torch.nn.modules import module

    tables = [v for k, v in vars(module).items() if k.startswith("_global_") and k.endswith("hooks")]
    return [repr(h) for table in tables for h in table.values() if h.__module__.startswith("qtensor")]


def opens_in_another_thread() -> bool:
    def use() -> None:
        session = online_quant(fp8_per_channel)
        session.__enter__()
        session.abort()

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()


KINDS = [
    "load",
    "abort of a load",
    "reload",
    "reload in place, host",
    "reload of each",
    "abort of a reload",
    "abort of a reload in place, host",
    "abort of a reload of each",
]


def attempt(subject: Subject, around: Callable[[], Any]) -> BaseException | None:
    """Run the subject within `around()`; what came out. Without logging, whose handlers keep their lock for ever when
    an exception comes between Python's `acquire` and its `try`."""
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with around():
                subject.run()
        except BaseException as error:
            error.__traceback__ = None
            error.__context__ = error.__cause__ = None
            return None if isinstance(error, _Enough) else error
        finally:
            logging.disable(logging.NOTSET)
            subject.gradients = torch.is_grad_enabled()
            torch.set_grad_enabled(True)
    return None


def duration(kind: str) -> float:
    times = []
    for _ in range(5):
        subject = Subject(kind)
        start = time.perf_counter()
        with suppress(_Enough):
            subject.run()
        times.append(time.perf_counter() - start)
    return sorted(times)[2]


def random_moments(runs: int, seed: int) -> list[str]:
    """Every kind, stopped at random moments. What went wrong, one line each."""
    chance, wrong = random.Random(seed), []
    gc.freeze()
    longest = {kind: duration(kind) for kind in KINDS}
    for i in range(runs):
        kind, stop = KINDS[i % len(KINDS)], chance.choice(STOPS)
        subject, moment = Subject(kind), chance.random() * longest[kind] * 1.2
        attempt(subject, lambda moment=moment, stop=stop: timer(moment, stop))  # type: ignore[misc]
        problem = subject.problem()
        if problem is not None:
            wrong.append(f"{kind}, {stop.__name__} after {moment * 1e3:.3f} ms: {problem}")
    return wrong


def lines_of(kind: str) -> Counter[str]:
    """The lines of qtensor that a kind of subject runs, and how often."""
    with AtLine("", -1, KeyboardInterrupt) as tracer, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(_Enough):
            Subject(kind).run()
    return tracer.seen


def at_every_line(kind: str, stop: type[BaseException], where: Callable[[str], bool] = bool) -> list[str]:
    """The subject stopped at each line, when it is run first and last. What went wrong, one line each."""
    wrong = []
    gc.freeze()
    for line, times in lines_of(kind).items():
        for n in {1, times} if where(line) else ():
            subject = Subject(kind)
            attempt(subject, lambda line=line, n=n: AtLine(line, n, stop))  # type: ignore[misc]
            problem = subject.problem()
            if problem is not None:
                wrong.append(f"{kind}, {stop.__name__} at {line} ({n}): {problem}")
    return wrong


def twice(kind: str, stop: type[BaseException], step: int, later: int) -> list[str]:
    """The subject stopped at one in `step` of its lines, and once more at one in `later` of those that are run because
    of that. What went wrong, one line each."""
    wrong, runs = [], 0
    gc.freeze()
    with AtLine("", -1, stop) as lines, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = Subject(kind)
        before = set(lines.seen)
        with suppress(_Enough):
            subject.run()
    for first in [line for line in lines.seen if line not in before][step // 2 :: step]:
        tracer = ThenAtLine(first, 1, stop, "")
        attempt(Subject(kind), lambda tracer=tracer: tracer)  # type: ignore[misc]
        runs += len(tracer.after)
        for second in list(tracer.after)[::later]:
            subject, tracer = Subject(kind), ThenAtLine(first, 1, stop, second)
            attempt(subject, lambda tracer=tracer: tracer)  # type: ignore[misc]
            problem = subject.problem()
            if problem is not None:
                wrong.append(f"{kind}, {stop.__name__} at {first} and at {second}: {problem}")
    assert runs
    return wrong


def in_every_operation(kind: str, stop: type[BaseException]) -> list[str]:
    """The subject stopped in each torch operation it runs. What went wrong, one line each."""
    wrong, n = [], 0
    gc.freeze()
    while True:
        n += 1
        subject, mode = Subject(kind), InOperation(n, stop)
        attempt(subject, lambda mode=mode: mode)  # type: ignore[misc]
        if mode.seen < n:
            return wrong
        problem = subject.problem()
        if problem is not None:
            wrong.append(f"{kind}, {stop.__name__} in operation {n}: {problem}")


class InOperation(TorchDispatchMode):
    """Raises in the n-th torch operation that is run (of those at which `when()` is true)."""

    def __init__(self, n: int, stop: type[BaseException], when: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self._n, self._stop, self._when, self.seen = n, stop, when, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._when():
            self.seen += 1
            if self.seen == self._n:
                raise self._stop(f"in {func}")
        return func(*args, **(kwargs or {}))
