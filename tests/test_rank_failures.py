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
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qtensor import (
    QTensorError,
    Sharding,
    fp8_per_channel,
    online_quant,
    online_reload,
    quantize,
    weight_root,
    write_low_rank,
)
from support.growth import growth
from support.interrupts import STOPS, InOperation
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


class Refits:
    """Refits of one weight or both, as tensors, in a bucket or as low-rank updates, in an order of each rank's own, new
    values beside the old ones or in their place.

    On any rank an exception, a value that is not finite or an interrupt of any operation, at any weight: then no rank
    has anything new. What all hold has one root, which every rank knows.
    """

    def __init__(self, rank: int, world: int, seed: int) -> None:
        self.model, self.rank, self.world, self.count = Sharded(), rank, world, 0
        self.dice, self.here = random.Random(seed), random.Random(seed * world + rank)
        self.held = dict.fromkeys(DIMS, 0)

    def once(self, _: int = 0) -> None:
        self.count += 1
        dice, here = self.dice, self.here
        only, shadow = dice.choice([None, ["rows"], ["columns"]]), dice.choice(["device", "host"])
        chosen = list(only or DIMS)
        # Of each rank: nothing, or what befalls it at which of the weights (one more: at the end).
        faults = [dice.choice([None, None, None, None, "raises", "nan", "interrupt"]) for _ in range(self.world)]
        fault, where = faults[self.rank], here.randrange(len(chosen) + 1)
        if fault in ("nan", "interrupt"):
            where %= len(chosen)
        way = dice.choice([as_tensors, in_a_bucket, as_updates])
        sharing = Sharding(dims=DIMS, timeout=LONG)
        try:
            with online_reload(self.model, only=only, shadow=shadow, on_missing="error", process_group=sharing):
                parts = {name: part_of(name, values(self.count)[name]) for name in here.sample(chosen, len(chosen))}
                for at, name in enumerate(parts):
                    if fault == "nan" and at == where:
                        parts[name][here.randrange(len(parts[name])), -1] = float("nan")
                for at, (name, write) in enumerate(way(self.model, parts)):
                    if fault == "raises" and at == where:
                        raise ZeroDivisionError(name)
                    if fault == "interrupt" and at == where:
                        with InOperation(here.randint(1, 6), KeyboardInterrupt):
                            write()
                        raise KeyboardInterrupt  # It had fewer operations.
                    write()
                if fault == "raises":
                    raise ZeroDivisionError("at the end")
            assert not any(faults), (self.count, faults)
            self.held |= dict.fromkeys(chosen, self.count)
        except (QTensorError, ZeroDivisionError, KeyboardInterrupt) as error:
            # Another rank's fault may be heard of first.
            mine = {"raises": ZeroDivisionError, "interrupt": KeyboardInterrupt}.get(str(fault), QTensorError)
            if not any(faults) or not isinstance(error, (mine, QTensorError)):
                raise AssertionError(self.count, only, way.__name__, shadow, faults) from error
        assert self.model.holds(self.held), (self.count, only, faults)
        self.compare_roots()

    def compare_roots(self) -> None:
        """Of all ranks' parts together, and of what each rank believes that all of them hold."""
        whole = {name: quantize(values(i)[name], fp8_per_channel) for name, i in self.held.items()}
        believed = weight_root({name: w.qdata.view(torch.uint8) for name, w in whole.items()})
        mine = {name: self.model.get_submodule(name).weight.qdata.view(torch.uint8) for name in DIMS}  # type: ignore[union-attr, operator]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, (mine, believed))
        held = {name: torch.cat([parts[name] for parts, _ in found], DIMS[name]) for name in DIMS}
        assert {weight_root(held), *(root for _, root in found)} == {believed}, self.count


def refits_of_any_kind(rank: int, world: int, times: int, seed: int) -> None:
    refits = Refits(rank, world, seed)
    refits.once()
    files, threads, keys = opened()
    tensors, grown = growth(refits.once, times)
    assert refits.count == 1 + times + 20
    assert tensors <= 0, tensors
    assert grown < (256 << 10 if ENDURANCE else 4 << 20), grown
    # Connections of one that failed may wait for the next one to close them.
    now = opened()
    assert now[0] < files + 20, (files, now)
    assert now[1] < threads + 10, (threads, now)
    assert now[2] < keys + 20, (keys, now)


def opened() -> tuple[int, int, int]:
    """Files and connections of this process, its threads, those of gloo included, and keys of the ranks' store."""
    places = [Path("/proc/self") / name for name in ("fd", "task")]
    files, threads = (len(list(place.iterdir())) if place.exists() else 0 for place in places)
    return files, threads, dist.distributed_c10d._get_default_store().num_keys()


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


def test_refits_of_any_kind_with_a_fault_on_any_rank_leave_nothing_behind() -> None:
    """1,000 in `make endurance`: bytes and roots after each, and memory that does not grow."""
    spawn(2, partial(refits_of_any_kind, times=1000 if ENDURANCE else 40, seed=0))


@pytest.mark.parametrize("seed", range(5 if ENDURANCE else 1))
def test_an_exception_at_a_random_moment_of_any_rank(seed: int) -> None:
    """1,000 in `make endurance`, 200 from each seed."""
    spawn(2, partial(stop_at_random, times=200 if ENDURANCE else 20, seed=seed))
