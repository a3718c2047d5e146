"""Processes of one gloo group, for tests of what several ranks do together."""

from __future__ import annotations

import contextlib
import os
import random
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.helpers import free_port
from support.processes import elsewhere

at_length = pytest.mark.skipif(not os.environ.get("QTENSOR_ENDURANCE"), reason="four ranks: make endurance")


@contextlib.contextmanager
def process_group(rank: int, world: int, port: int) -> Iterator[None]:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        yield
    except BaseException:
        traceback.print_exc()  # its peers see a lost connection, and one of them may be the one that is reported
        raise
    finally:
        dist.destroy_process_group()


def worker(rank: int, world: int, port: int, checks: tuple[Callable[[int, int], None], ...]) -> None:
    torch.set_num_threads(1)
    with process_group(rank, world, port):
        for check in checks:
            check(rank, world)
            dist.barrier()


def spawn(world: int, *checks: Callable[[int, int], None]) -> None:
    """Run checks(rank, world), one after the other, in as many processes; raise what the first of them raised."""
    start(worker, world, world, free_port(), checks)


def start(work: Callable[..., None], world: int, *args: Any) -> None:
    """Run work(rank, *args) in a process for each rank, forks that have their imports."""
    torch.multiprocessing.start_processes(work, args=args, nprocs=world, start_method=elsewhere.get_start_method())


def split(size: int, world: int, step: int, rng: random.Random) -> list[tuple[int, int]]:
    """Uneven pieces of range(size), one per rank, cut at multiples of `step`."""
    cuts = sorted(rng.sample(range(1, -(-size // step)), world - 1))
    borders = [0, *(c * step for c in cuts), size]
    return list(pairwise(borders))
