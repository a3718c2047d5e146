"""Sharded weights: ranks that agree on scales hold, together, the bytes of the unsharded weight, and fail together."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qtensor import (
    IncompleteLoadError,
    NonFiniteWeightError,
    QTensorError,
    Sharding,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    online_quant,
    online_reload,
    quantize,
)
from qtensor.ranks import sharding, vote
from support.helpers import Experts, free_port, same_bytes
from support.programs import SCHEMES
from support.ranks import at_length, process_group, spawn, split, start

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no distributed package")
TIMEOUT = 20.0


def model_of(weights: dict[str, torch.Tensor]) -> nn.Module:
    model = nn.Module()
    for name, w in weights.items():
        rows, cols = w.shape[-2:]
        child = Experts(tuple(w.shape), w.dtype) if w.dim() == 3 else nn.Linear(cols, rows, bias=False, dtype=w.dtype)
        model.add_module(name, child)
    return model


def parameter(model: nn.Module, name: str) -> Any:
    return next(iter(getattr(model, name).parameters()))


def gathered(values: torch.Tensor, dim: int, world: int) -> torch.Tensor:
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, values.view(torch.uint8) if values.dtype.itemsize == 1 else values)
    return torch.cat(parts, dim)


@dataclass(frozen=True)
class Case:
    """Whole weights, and this rank's parts of them: dims says which dimension of each is split."""

    scheme: Any
    fulls: dict[str, torch.Tensor]
    dims: dict[str, int]
    spans: dict[str, tuple[int, int]]

    def part(self, name: str, full: torch.Tensor) -> torch.Tensor:
        start, stop = self.spans[name]
        return full.narrow(self.dims[name], start, stop - start)

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        return {name: self.part(name, full) for name, full in self.fulls.items()}


def random_case(scheme: Any, rank: int, world: int, rng: random.Random) -> Case:
    fulls, dims, spans = {}, {}, {}
    for i in range(5):
        shape = [rng.randint(world, 9) if rng.random() < 0.3 else 0, rng.randint(30, 700), rng.randint(30, 700)]
        shape = shape[1:] if not shape[0] else shape
        dim = rng.randrange(len(shape))
        if scheme.is_searched and scheme.format.granularity == "channel" and dim == len(shape) - 1:
            dim -= 1  # A row's scale is searched where the row is.
        step = scheme.format.block[dim - len(shape) + 2] if dim >= len(shape) - 2 else 1
        if step > 1:
            shape[dim] = rng.randint(step * world, 900)
        generator = torch.Generator().manual_seed(rng.randrange(2**20))
        fulls[f"w{i}"] = (torch.randn(shape, generator=generator) * rng.choice([1e-5, 1.0, 50.0])).bfloat16()
        dims[f"w{i}"], spans[f"w{i}"] = dim, split(shape[dim], world, step, rng)[rank]
    return Case(scheme, fulls, dims, spans)


def write_in_bands(model: nn.Module, parts: dict[str, torch.Tensor], rng: random.Random) -> None:
    for name in rng.sample(list(parts), len(parts)):
        target, at = parameter(model, name).data, 0
        for band in parts[name].split(rng.randint(20, 200), -2):
            target.narrow(-2, at, band.shape[-2]).copy_(band)
            at += band.shape[-2]


def assert_unsharded_bytes(model: nn.Module, case: Case, world: int) -> None:
    for name, full in case.fulls.items():
        dim, expected, param = case.dims[name], quantize(full, case.scheme), parameter(model, name)
        data = gathered(param.qdata, dim, world)
        assert same_bytes(data, expected.qdata.view(torch.uint8)), (name, case.scheme, dim, full.shape)
        split_scale = param.scale.shape != expected.scale.shape
        scale = gathered(param.scale, dim, world) if split_scale else param.scale
        assert same_bytes(scale, expected.scale), (name, case.scheme, dim, full.shape)


def bytes_equal_the_unsharded(rank: int, world: int) -> None:
    """Random models: every scheme × rows, columns, experts; uneven shards; another order of writes on every rank.
    Then reloaded with other values, likewise."""
    rng = random.Random(world)
    for round_, scheme in enumerate(SCHEMES):
        case = random_case(scheme, rank, world, rng)
        model = model_of(case.parts)
        group = Sharding(dims=case.dims, timeout=TIMEOUT)
        mine = random.Random(rank * 100 + round_)
        with online_quant(scheme, model, targets=["*"], process_group=group) as session:
            write_in_bands(model, case.parts, mine)
        assert session.report().missing == {}
        assert_unsharded_bytes(model, case, world)
        new = replace(case, fulls={name: full.flip(0, 1) * 3 for name, full in case.fulls.items()})
        how: Any = [{}, {"shadow": "host"}, {"atomic": False}][round_ % 3]
        with online_reload(model, process_group=group, assert_identity=True, **how):
            write_in_bands(model, new.parts, mine)
        assert_unsharded_bytes(model, new, world)


def partial_reload(rank: int, world: int) -> None:
    """What no rank writes keeps its bytes; what one writes gets new scales on all, from new and old values."""
    full = {k: torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i, k in enumerate("abc")}
    dims = {"a": 1, "b": 1, "c": 1}
    part = {k: v.bfloat16().chunk(world, 1)[rank].contiguous() for k, v in full.items()}
    for scheme in (fp8_per_channel, fp8_per_tensor):
        model, group = model_of(part), Sharding(dims=dims, timeout=TIMEOUT)
        with online_quant(scheme, model, process_group=group):
            for name, values in part.items():
                parameter(model, name).data.copy_(values)
        before = {k: [p.clone() for p in parameter(model, k).parts()] for k in part}
        old_b = parameter(model, "b").dequantize()
        with pytest.warns(UserWarning, match=r"only a part of what shares") if rank else contextlib.nullcontext():  # noqa: SIM117
            with online_reload(model, process_group=group, assert_identity=True) as session:
                parameter(model, "a").data.copy_(part["a"] * 2)
                if rank == 0:
                    parameter(model, "b").data.copy_(part["b"] * 4)
        assert session.report().collectives == 1
        assert session.report().collective_bytes == 2 * 4 * (64 if scheme is fp8_per_channel else 1)
        assert all(map(same_bytes, before["c"], parameter(model, "c").parts()))
        whole: list[Any] = [None] * world
        dist.all_gather_object(whole, part["b"] * 4 if rank == 0 else old_b)
        for name, values in (("a", full["a"].bfloat16() * 2), ("b", torch.cat(whole, 1))):
            expected = quantize(values, scheme)
            assert same_bytes(parameter(model, name).scale, expected.scale), (name, scheme)
            data = gathered(parameter(model, name).qdata, 1, world)
            assert same_bytes(data, expected.qdata.view(torch.uint8)), (name, scheme)


def a_rank_that_fails_rolls_back_all(rank: int, world: int) -> None:
    """Whatever goes wrong, wherever: an exception, an interrupt, a NaN, an error in the last moment."""
    full = {"a": torch.randn(48, 64).bfloat16(), "b": torch.randn(32, 64).bfloat16()}
    model, group = model_of(full), Sharding(dims={"a": 1, "b": 0}, timeout=TIMEOUT)
    with online_quant(fp8_per_channel, model, process_group=group):
        for name, values in full.items():
            parameter(model, name).data.copy_(values)
    before = [part.clone() for p in model.parameters() for part in p.parts()]  # type: ignore[operator]

    def fail(how: str) -> None:
        if how == "exception":
            raise ValueError("no good")
        if how == "interrupt":
            raise KeyboardInterrupt
        parameter(model, "a").data[3].copy_(torch.full((64,), float("nan")))

    for bad in (0, world - 1):
        for how, said in {"exception": "no good", "interrupt": "KeyboardInterrupt", "nan": "a.weight: nan at"}.items():
            started = time.monotonic()
            match = f"rank {bad} failed: {said}" if rank != bad else "" if how == "interrupt" else said
            with pytest.raises(BaseException, match=match) as caught:  # noqa: SIM117
                with online_reload(model, process_group=group, shadow="host" if how == "nan" else "device"):
                    for name, values in full.items():
                        parameter(model, name).data.copy_(values * 3)
                    if rank == bad:
                        fail(how)
            assert isinstance(caught.value, QTensorError) or rank == bad
            assert time.monotonic() - started < TIMEOUT / 2
            now = [part for p in model.parameters() for part in p.parts()]  # type: ignore[operator]
            assert all(map(same_bytes, before, now)), how


def once_all_have_agreed_an_interrupt_comes_too_late(rank: int, world: int) -> None:
    """Rank 0 is interrupted when the others may have seen that all succeeded: it commits with them, then raises."""
    full = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    model, group = model_of({"a": full}), Sharding(dims={"a": 1}, timeout=TIMEOUT)
    with online_quant(fp8_per_channel, model, process_group=group):
        parameter(model, "a").data.copy_(full)
    settle = vote.Vote.settle

    def interrupted(self: vote.Vote) -> None:
        settle(self)
        if rank == 0:
            raise KeyboardInterrupt

    vote.Vote.settle = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt) if rank == 0 else contextlib.nullcontext():  # noqa: SIM117
        with online_reload(model, process_group=group):
            parameter(model, "a").data.copy_(full * 2)
    vote.Vote.settle = settle  # type: ignore[method-assign]
    together = torch.cat([full * 2] * world, 1)
    assert same_bytes(parameter(model, "a").scale, quantize(together, fp8_per_channel).scale)


def the_store_does_not_fill_up(rank: int, world: int) -> None:
    """A trainer reloads thousands of times; a reload whose scales are not split leaves one key, the next takes it."""
    model, group = model_of({"a": torch.ones(8, 8).bfloat16()}), Sharding(dims={"a": 0}, timeout=TIMEOUT)
    with online_quant(fp8_per_channel, model, process_group=group):
        parameter(model, "a").data.copy_(torch.ones(8, 8))
    store, keys = dist.distributed_c10d._get_default_store(), []
    for _ in range(3):
        with online_reload(model, process_group=group):
            parameter(model, "a").data.copy_(torch.ones(8, 8))
        dist.barrier()
        keys.append(store.num_keys())
        dist.barrier()
    assert keys[1] == keys[2], keys


@contextlib.contextmanager
def buckets_of(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "BUCKET_BYTES", size)
        yield


@buckets_of(3 * 64 * 96 * 2)
def buckets_are_batched_and_stream(rank: int, world: int) -> None:
    """One collective per bucket; with small buckets, weights are quantized while others still load."""
    weights = {f"w{i}": torch.randn(64, 96).bfloat16() for i in range(30)}
    model = model_of(weights)
    with online_quant("fp8_per_tensor", model, process_group=Sharding(timeout=TIMEOUT)) as session:
        for name, w in weights.items():
            parameter(model, name).data.copy_(w)
            deadline = time.monotonic() + TIMEOUT
            while session._work._memory.staged > 2 * sharding.BUCKET_BYTES and time.monotonic() < deadline:
                session._work._agreements.advance()  # as every write does
                time.sleep(0.001)
    assert session.report().collectives == 10
    assert session.report().collective_bytes == 30 * 4
    assert session.report().peak_staged_bytes <= (2 * 3 + 1) * 64 * 96 * 2, "two buckets, and the weight after them"


def a_rank_that_lacks_rows_stops_all(rank: int, world: int) -> None:
    for bad in (0, 1):
        weights = {"a": torch.randn(40, 24).bfloat16(), "b": torch.randn(24, 40).bfloat16()}
        model, started = model_of(weights), time.monotonic()
        error = IncompleteLoadError if rank == bad else QTensorError
        match = r"b\.weight: 4 of 24 rows" if rank == bad else rf"rank {bad} failed: b\.weight: 4 of 24 rows"
        with pytest.raises(error, match=match):  # noqa: SIM117
            with online_quant("fp8_per_tensor", model, process_group=Sharding(timeout=TIMEOUT)):
                parameter(model, "a").data.copy_(weights["a"])
                parameter(model, "b").data[: 20 if rank == bad else 24].copy_(weights["b"][: 20 if rank == bad else 24])
        assert time.monotonic() - started < TIMEOUT / 2


def a_rank_that_raises_stops_all(rank: int, world: int) -> None:
    weights = {"a": torch.randn(40, 24).bfloat16()}
    model = model_of(weights)
    bad = weights["a"].clone()
    bad[3, 5] = float("nan")
    expected = NonFiniteWeightError if rank == 1 else QTensorError
    match = "index" if rank == 1 else r"rank 1 failed: a\.weight: nan at index \[3, 5\]"
    with (
        pytest.raises(expected, match=match),
        online_quant(fp8_per_tensor, model, process_group=Sharding(timeout=TIMEOUT)),
    ):
        parameter(model, "a").data.copy_(bad if rank == 1 else weights["a"])


def groups_agree_for_themselves(rank: int, world: int) -> None:
    """Two groups of two: each has its own scales."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    full = torch.randn(32, 64).bfloat16() * 0 + rank + 1
    model = model_of({"a": full})
    group = groups[rank // 2]
    with online_quant(fp8_per_channel, model, process_group=Sharding(group, {"a": 1}, TIMEOUT)):
        parameter(model, "a").data.copy_(full)
    assert torch.equal(parameter(model, "a").scale, torch.full((32, 1), (rank // 2 * 2 + 2) / 448))


@buckets_of(1)
def late_writes_are_refused(rank: int, world: int) -> None:
    """Also where the loader swallows it: what it wrote is not there. Writes of nothing are none."""
    full = torch.randn(8, 8).bfloat16()
    model = model_of({"a": full, "b": full})
    for swallows in (contextlib.nullcontext(), contextlib.suppress(QTensorError)):
        with pytest.raises(QTensorError, match=r"written again after"):  # noqa: SIM117
            with online_quant(fp8_per_tensor, model, process_group=Sharding(timeout=TIMEOUT)):
                parameter(model, "a").data.copy_(full)
                parameter(model, "b").data.copy_(full)
                for _ in range(100):
                    parameter(model, "a").data[8:].copy_(full[8:])
                    parameter(model, "a").data[torch.zeros(8, 8, dtype=torch.bool)] = full[:0].flatten()
                    with swallows:
                        parameter(model, "b").data[:1].copy_(full[:1]) if rank else None
                    time.sleep(0.001)
                    with swallows:
                        parameter(model, "a").data.copy_(full)


def what_has_to_be_known_is_asked_for(rank: int, world: int) -> None:
    model = nn.Linear(24, 40, bias=False)
    with pytest.raises(QTensorError, match=r"not how this weight is split over it.*dims=\{\"weight\": 0\}"):
        online_quant(fp8_per_channel, model, process_group=dist.group.WORLD)
    dist.barrier()
    model = nn.Linear(24, 150, bias=False)
    message = "end inside a group of 128" if rank == 0 else "rank 0 failed: weight: this rank's 150"
    with pytest.raises(QTensorError, match=message):  # noqa: SIM117
        with online_quant(fp8_per_block, model, process_group=Sharding(dims={"weight": 0}, timeout=TIMEOUT)):
            model.weight.data.copy_(torch.randn(150, 24))
    with pytest.raises(ValueError, match="min_sqnr"):
        online_quant(fp8_per_tensor, model, process_group=dist.group.WORLD, min_sqnr=20.0)


def a_rank_that_does_not_come_is_not_waited_for(rank: int, world: int) -> None:
    if rank == 0:
        with pytest.raises(QTensorError, match="within 1 s: rank 1 has not opened this session"):
            online_quant(fp8_per_tensor, nn.Linear(24, 40), process_group=Sharding(timeout=1.0))
    dist.barrier()


def test_two_ranks() -> None:
    spawn(
        2,
        bytes_equal_the_unsharded,
        partial_reload,
        a_rank_that_fails_rolls_back_all,
        once_all_have_agreed_an_interrupt_comes_too_late,
        the_store_does_not_fill_up,
        buckets_are_batched_and_stream,
        a_rank_that_lacks_rows_stops_all,
        a_rank_that_raises_stops_all,
        late_writes_are_refused,
        what_has_to_be_known_is_asked_for,
        a_rank_that_does_not_come_is_not_waited_for,
    )


@at_length
def test_four_ranks() -> None:
    spawn(4, bytes_equal_the_unsharded, partial_reload, a_rank_that_lacks_rows_stops_all, groups_agree_for_themselves)


def killed(rank: int, world: int, port: int) -> None:
    weights = {"a": torch.randn(40, 24).bfloat16(), "b": torch.randn(24, 40).bfloat16()}
    with contextlib.suppress(Exception), process_group(rank, world, port):
        model, started = model_of(weights), time.monotonic()
        with pytest.raises(QTensorError, match=r"did not agree within|was lost while"):  # noqa: SIM117
            with online_quant(fp8_per_tensor, model, process_group=Sharding(timeout=3.0)):
                parameter(model, "a").data.copy_(weights["a"])
                if rank == world - 1:
                    os._exit(0)
                parameter(model, "b").data.copy_(weights["b"])
        assert time.monotonic() - started < 15
        os.environ["QTENSOR_TEST_SURVIVED"] = "1"
    os._exit(0 if rank == world - 1 or "QTENSOR_TEST_SURVIVED" in os.environ else 1)


def test_a_killed_rank_ends_the_others_with_an_error_in_time() -> None:
    start(killed, 3, 3, free_port())


def test_without_torch_distributed_process_group_says_what_to_call() -> None:
    with pytest.raises(QTensorError, match="init_process_group"):
        online_quant(fp8_per_tensor, nn.Linear(4, 4), process_group=Sharding())
