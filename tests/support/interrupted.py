"""Work that is killed at random moments: what the processes do, and who kills them.

They are forks (support/processes.py), so that a life takes tenths of a second; this file imports no more than those
have.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtensor import fp8, quantize, save_checkpoint, save_snapshot
from qtensor.checkpoint import ShardTask, convert_shard, quantize_checkpoint
from support.processes import elsewhere


def _quickly() -> None:
    """Most of a short life would go into loading compiled code."""
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)
        os.environ["QTENSOR_KERNELS"] = "torch"


def convert_alone(task: ShardTask) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return convert_shard(task, pool)


def quantize_folder(source: Path, target: Path) -> None:
    _quickly()
    quantize_checkpoint(source, target, fp8)


def save_model(seed: int, target: Path) -> None:
    _quickly()
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))
    for layer in model:
        layer.weight = nn.Parameter(quantize(torch.randn(64, 64), fp8), requires_grad=False)
    save_checkpoint(model, target, max_shard_size=40_000)


def snapshot_model(seed: int, target: Path) -> None:
    _quickly()
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    for layer in model:
        layer.weight = nn.Parameter(quantize(torch.randn(512, 512), fp8), requires_grad=False)
    save_snapshot(model, target)


def kill_at_random(
    work: Callable[..., None], *args: Any, before: Callable[[], None], times: int = 20
) -> Iterator[bool]:
    """Run `work` in a new process each time and kill it somewhere between its start and its usual end. Yields whether
    the kill came in time, until so many have. before: called before every run."""
    dice, usual, kills = random.Random(0), 0.0, 0
    for i in range(-2, 10 * times):
        if kills == times:
            return
        before()
        process = elsewhere.Process(target=work, args=args)
        process.start()
        started = time.perf_counter()
        process.join(None if i < 0 else dice.uniform(0, usual))
        usual = time.perf_counter() - started if i < 0 else usual  # The first run also starts the server.
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        if i >= 0:
            yield process.exitcode != 0
    raise AssertionError(f"only {kills} kills came in time")
