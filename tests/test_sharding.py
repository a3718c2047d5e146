"""Sharded weights: ranks that agree on scales hold, together, the bytes of the unsharded weight, and fail together."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import Experts, same_bytes
from programs import SCHEMES
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
    quantize,
    sharding,
)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no distributed package")
TIMEOUT = 20.0


@contextlib.contextmanager
def process_group(rank: int, world: int, port: int) -> Iterator[None]:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        yield
    finally:
        dist.destroy_process_group()


def worker(rank: int, world: int, port: int, checks: tuple[Callable[[int, int], None], ...]) -> None:
    with process_group(rank, world, port):
        for check in checks:
            check(rank, world)
            dist.barrier()


def spawn(world: int, *checks: Callable[[int, int], None]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(world, port, checks), nprocs=world)


def split(size: int, world: int, step: int, rng: random.Random) -> list[tuple[int, int]]:
    """Uneven pieces of range(size), one per rank, cut at multiples of `step`."""
    cuts = sorted(rng.sample(range(1, -(-size // step)), world - 1))
    borders = [0, *(c * step for c in cuts), size]
    return list(pairwise(borders))


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


def bytes_equal_the_unsharded(rank: int, world: int) -> None:
    """Random models: every scheme × rows, columns, experts; uneven shards; another order of writes on every rank."""
    rng = random.Random(world)
    for round_ in range(len(SCHEMES)):
        scheme = SCHEMES[round_ % len(SCHEMES)]
        fulls: dict[str, torch.Tensor] = {}
        where: dict[str, tuple[int, tuple[int, int]]] = {}
        for i in range(5):
            shape = [rng.randint(world, 9) if rng.random() < 0.3 else 0, rng.randint(30, 700), rng.randint(30, 700)]
            shape = shape[1:] if not shape[0] else shape
            dim = rng.randrange(len(shape))
            step = scheme.format.block[dim - len(shape) + 2] if dim >= len(shape) - 2 else 1
            if step > 1:
                shape[dim] = rng.randint(step * world, 900)
            generator = torch.Generator().manual_seed(rng.randrange(2**20))
            fulls[f"w{i}"] = (torch.randn(shape, generator=generator) * rng.choice([1e-5, 1.0, 50.0])).bfloat16()
            where[f"w{i}"] = dim, split(shape[dim], world, step, rng)[rank]
        local = {
            name: w.narrow(where[name][0], a := where[name][1][0], where[name][1][1] - a) for name, w in fulls.items()
        }
        model = model_of(local)
        dims = {name: dim for name, (dim, _) in where.items()}
        mine = random.Random(rank * 100 + round_)
        with online_quant(scheme, model, targets=["*"], process_group=Sharding(dims=dims, timeout=TIMEOUT)) as session:
            for name in mine.sample(list(local), len(local)):
                rows = list(local[name].split(mine.randint(20, 200), -2))
                target, at = parameter(model, name).data, 0
                for part in rows:
                    target.narrow(-2, at, part.shape[-2]).copy_(part)
                    at += part.shape[-2]
        assert session.report().missing == {}
        for name, full in fulls.items():
            dim, expected, param = where[name][0], quantize(full, scheme), parameter(model, name)
            data = gathered(param.qdata, dim, world)
            assert same_bytes(data, expected.qdata.view(torch.uint8)), (name, scheme, dim, full.shape)
            split_scale = param.scale.shape != expected.scale.shape
            scale = gathered(param.scale, dim, world) if split_scale else param.scale
            assert same_bytes(scale, expected.scale), (name, scheme, dim, full.shape)


def buckets_are_batched_and_stream(rank: int, world: int) -> None:
    """One collective per bucket; with small buckets, weights are quantized while others still load."""
    small = sharding.BUCKET_BYTES
    sharding.BUCKET_BYTES = 3 * 64 * 96 * 2
    weights = {f"w{i}": torch.randn(64, 96).bfloat16() for i in range(30)}
    model = model_of(weights)
    with online_quant("fp8_per_tensor", model, process_group=Sharding(timeout=TIMEOUT)) as session:
        for name, w in weights.items():
            parameter(model, name).data.copy_(w)
            time.sleep(0.01)
    sharding.BUCKET_BYTES = small
    assert session.report().collectives == 10
    assert session.report().collective_bytes == 30 * 4
    assert session.report().peak_staged_bytes < 30 * 64 * 96 * 2


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


def late_writes_are_refused(rank: int, world: int) -> None:
    full = torch.randn(8, 8).bfloat16()
    model = model_of({"a": full, "b": full})
    small, sharding.BUCKET_BYTES = sharding.BUCKET_BYTES, 1
    with pytest.raises(QTensorError, match=r"written again after"):  # noqa: SIM117
        with online_quant(fp8_per_tensor, model, process_group=Sharding(timeout=TIMEOUT)):
            parameter(model, "a").data.copy_(full)
            parameter(model, "b").data.copy_(full)
            for _ in range(200):
                parameter(model, "b").data[:1].copy_(full[:1]) if rank else None
                time.sleep(0.001)
                parameter(model, "a").data.copy_(full)
    sharding.BUCKET_BYTES = small


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
        with pytest.raises(QTensorError, match="not every rank of 0, 1 opened this session within 1 s"):
            online_quant(fp8_per_tensor, nn.Linear(24, 40), process_group=Sharding(timeout=1.0))
    dist.barrier()


def test_two_ranks() -> None:
    spawn(
        2,
        bytes_equal_the_unsharded,
        buckets_are_batched_and_stream,
        a_rank_that_lacks_rows_stops_all,
        a_rank_that_raises_stops_all,
        late_writes_are_refused,
        what_has_to_be_known_is_asked_for,
        a_rank_that_does_not_come_is_not_waited_for,
    )


def test_four_ranks() -> None:
    spawn(4, bytes_equal_the_unsharded, a_rank_that_lacks_rows_stops_all, groups_agree_for_themselves)


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(killed, args=(3, port), nprocs=3)


def test_without_torch_distributed_process_group_says_what_to_call() -> None:
    with pytest.raises(QTensorError, match="init_process_group"):
        online_quant(fp8_per_tensor, nn.Linear(4, 4), process_group=Sharding())
