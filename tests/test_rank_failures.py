"""Ranks of which one fails, at any moment: all keep what they had, or all have the new values, and the next works."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qtensor import QTensorError, Sharding, fp8_per_channel, online_quant, online_reload, quantize, write_low_rank
from support.interrupts import STOPS
from support.ranks import spawn
from support.refits import by_offsets, packed

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no distributed package")
ENDURANCE = bool(os.environ.get("QTENSOR_ENDURANCE"))
ROWS, COLUMNS = 24, 48
DIMS = {"rows": 0, "columns": 1}  # the scales of `columns` span ranks
LONG, SHORT = 60.0, 1.0  # Seconds to wait for ranks that come, be the machine busy, and for one that does not.


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(ROWS, COLUMNS, generator=generator) for name in DIMS}


def part_of(name: str, whole: torch.Tensor) -> torch.Tensor:
    return whole.chunk(dist.get_world_size(), DIMS[name])[dist.get_rank()].contiguous()


class Sharded(nn.Module):
    """This rank's parts of two weights, loaded with values(0)."""

    def __init__(self) -> None:
        super().__init__()
        for name, whole in values(0).items():
            rows, columns = part_of(name, whole).shape
            self.add_module(name, nn.Linear(columns, rows, bias=False))
        with online_quant(fp8_per_channel, self, process_group=Sharding(dims=DIMS, timeout=LONG)):
            self.write(0)

    def write(self, seed: int) -> None:
        for name, whole in values(seed).items():
            self.get_submodule(name).weight.data.copy_(part_of(name, whole))  # type: ignore[operator]

    def reload(self, seed: int, fail: Callable[[str], None] = lambda where: None, timeout: float = LONG) -> None:
        """fail: is called at each step, and may raise."""
        fail("before it opens")
        with online_reload(self, process_group=Sharding(dims=DIMS, timeout=timeout)):
            fail("as it loads")
            self.write(seed)
            fail("at the end")

    def holds(self, seed: int | dict[str, int]) -> bool:
        """Are the bytes those of this rank's parts of the whole quantized weights? seed: of all, or of each."""
        for name in DIMS:
            whole = values(seed if isinstance(seed, int) else seed[name])[name]
            param: Any = self.get_submodule(name).weight
            expected = quantize(whole, fp8_per_channel)
            scale = expected.scale if DIMS[name] else part_of(name, expected.scale)
            data = part_of(name, expected.qdata.view(torch.uint8))
            if not torch.equal(param.scale, scale) or not torch.equal(param.qdata.view(torch.uint8), data):
                return False
        return True


def fails(step: str) -> Callable[[str], None]:
    def fail(where: str) -> None:
        if where == step:
            raise ZeroDivisionError(step)

    return fail


def a_rank_fails_before_it_opens_a_reload(rank: int, world: int) -> None:
    model = Sharded()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError if rank else QTensorError, match="" if rank else "rank 1 has not opened"):
            model.reload(1, fails("before it opens" if rank else ""), SHORT)
        assert model.holds(0)
    dist.barrier()
    for seed in (1, 2):
        model.reload(seed)
        assert model.holds(seed)


def a_rank_fails_in_the_midst_of_a_reload(rank: int, world: int) -> None:
    model = Sharded()
    started = time.monotonic()
    for step in ("as it loads", "at the end"):
        with pytest.raises(QTensorError if rank else ZeroDivisionError, match=f"rank 0 failed: {step}" if rank else ""):
            model.reload(1, fails("" if rank else step))
        assert model.holds(0)
    model.reload(1)
    assert model.holds(1)
    assert time.monotonic() - started < LONG


def ranks_fail_in_turn(rank: int, world: int) -> None:
    """Before it opens, as it loads, at its end: whoever fails, whenever, and whether or not the others do, too."""
    model, dice, here = Sharded(), random.Random(0), random.Random(rank)
    for round_ in range(10):
        step = dice.choice(["before it opens", "as it loads", "at the end"])
        time.sleep(here.uniform(0, 0.05))
        with pytest.raises((QTensorError, ZeroDivisionError)):
            model.reload(1, fails(step if round_ % world == rank else ""), SHORT)
        assert model.holds(0)
        dist.barrier()
    model.reload(1)
    assert model.holds(1)


def refits_of_any_kind(rank: int, world: int, times: int, seed: int) -> None:
    """Of one weight or both, as tensors, in a bucket or as low-rank updates, in an order of each rank's own. On any of
    them an exception, or a value that is not finite, at any weight: then no rank has anything new."""
    model, dice, here = Sharded(), random.Random(seed), random.Random(seed * world + rank)
    held = dict.fromkeys(DIMS, 0)
    for i in range(1, times + 1):
        only = dice.choice([None, ["rows"], ["columns"]])
        chosen = list(only or DIMS)
        # Of each rank: nothing, or what befalls it at which of the weights (one more: at the end).
        faults = [dice.choice([None, None, "raises", "nan"]) for _ in range(world)]
        fault, where = faults[rank], here.randrange(len(chosen) + 1)
        if fault == "nan":
            where %= len(chosen)
        way = dice.choice([as_tensors, in_a_bucket, as_updates])
        try:
            with online_reload(model, only=only, on_missing="error", process_group=Sharding(dims=DIMS, timeout=LONG)):
                parts = {name: part_of(name, values(i)[name]) for name in here.sample(chosen, len(chosen))}
                for at, name in enumerate(parts):
                    if fault == "nan" and at == where:
                        parts[name][here.randrange(len(parts[name])), -1] = float("nan")
                for at, (name, write) in enumerate(way(model, parts)):
                    if fault == "raises" and at == where:
                        raise ZeroDivisionError(name)
                    write()
                if fault == "raises":
                    raise ZeroDivisionError("at the end")
            assert not any(faults), (i, faults)
            held |= dict.fromkeys(chosen, i)
        except (QTensorError, ZeroDivisionError) as error:
            if not any(faults) or (fault == "raises") != isinstance(error, ZeroDivisionError):
                raise AssertionError(i, only, way.__name__, faults) from error
        assert model.holds(held), (i, only, faults)


Writes = Iterator[tuple[str, Callable[[], object]]]


def as_tensors(model: Sharded, parts: dict[str, torch.Tensor]) -> Writes:
    for name, part in parts.items():
        yield name, partial(model.get_submodule(name).weight.data.copy_, part)  # type: ignore[operator, union-attr]


def in_a_bucket(model: Sharded, parts: dict[str, torch.Tensor]) -> Writes:
    bucket = packed(parts)
    for name, part in by_offsets(bucket, parts):
        yield name, partial(model.get_submodule(name).weight.data.copy_, part)  # type: ignore[operator, union-attr]
    bucket.fill_(0xFF)


def as_updates(model: Sharded, parts: dict[str, torch.Tensor]) -> Writes:
    """Of which the product is zero: what the sums of single floats give is another test's question."""
    for name, part in parts.items():
        b, a = torch.zeros(len(part), 2), torch.ones(2, part.shape[1])
        yield name, partial(write_low_rank, model.get_submodule(name).weight, part, b, a)  # type: ignore[arg-type]


def stop_at_random(rank: int, world: int, times: int, seed: int) -> None:
    """Each rank by a timer of its own. That they differ in what they hold is found, and that a wait has no end."""
    model, dice, held, usual = Sharded(), random.Random(seed * world + rank), 0, 0.05
    for i in range(times):
        dist.barrier()
        started = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            stopped = reload_until(model, dice.uniform(0, 2 * usual), dice.choice(STOPS))
        assert time.monotonic() - started < 15, (i, stopped)
        assert model.holds(1) or model.holds(held), (i, stopped)
        found: list[Any] = [None] * world
        dist.all_gather_object(found, (model.holds(1), stopped))
        assert len({new for new, _ in found}) == 1, (i, found)
        assert all(torch.isfinite(layer(torch.ones(1, layer.in_features))).all() for layer in model.children())
        started, held = time.monotonic(), i % 2 * 2
        model.reload(held)
        usual = time.monotonic() - started
        assert model.holds(held), (i, stopped)


def reload_until(model: Sharded, seconds: float, kind: type[BaseException]) -> str:
    """Reload, unless it is stopped or another rank is. Says what came out."""
    try:
        with alarm_after(seconds, kind):
            model.reload(1, timeout=5.0)
    except (*STOPS, QTensorError) as error:
        return repr(error)
    return "nothing"


@contextmanager
def alarm_after(seconds: float, kind: type[BaseException]) -> Iterator[None]:
    """kind is raised from a signal's handler, unless the block has ended before."""

    def ring(*_: object) -> None:
        if armed:
            armed.clear()
            raise kind

    armed = [True]
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-4))
        yield
    finally:
        armed.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_after_a_rank_failed_the_next_reload_works_on_all() -> None:
    spawn(2, a_rank_fails_before_it_opens_a_reload, a_rank_fails_in_the_midst_of_a_reload)


def test_ranks_that_fail_in_turn_are_in_step_afterwards() -> None:
    spawn(2, ranks_fail_in_turn)


@pytest.mark.parametrize("seed", range(5 if ENDURANCE else 1))
def test_refits_of_any_kind_with_a_fault_on_any_rank(seed: int) -> None:
    """1,000 in `make endurance`, 200 from each seed."""
    spawn(2, partial(refits_of_any_kind, times=200 if ENDURANCE else 30, seed=seed))


@pytest.mark.parametrize("seed", range(5 if ENDURANCE else 1))
def test_an_exception_at_a_random_moment_of_any_rank(seed: int) -> None:
    """1,000 in `make endurance`, 200 from each seed."""
    spawn(2, partial(stop_at_random, times=200 if ENDURANCE else 20, seed=seed))
