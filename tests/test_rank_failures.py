"""Ranks of which one fails, at any moment: all keep what they had, or all have the new values, and the next works."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from qtensor import QTensorError, Sharding, fp8_per_channel, online_quant, online_reload, quantize
from support.ranks import spawn

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no distributed package")
ENDURANCE = bool(os.environ.get("QTENSOR_ENDURANCE"))
ROWS, COLUMNS = 24, 48
DIMS = {"rows": 0, "columns": 1}  # the scales of `columns` span ranks


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(ROWS, COLUMNS, generator=generator) for name in DIMS}


def part_of(name: str, whole: torch.Tensor) -> torch.Tensor:
    return whole.chunk(dist.get_world_size(), DIMS[name])[dist.get_rank()].contiguous()


class Sharded(nn.Module):
    """This rank's parts of two weights, loaded with values(0)."""

    def __init__(self, timeout: float) -> None:
        super().__init__()
        for name, whole in values(0).items():
            rows, columns = part_of(name, whole).shape
            self.add_module(name, nn.Linear(columns, rows, bias=False))
        self.group = Sharding(dims=DIMS, timeout=timeout)
        with online_quant(fp8_per_channel, self, process_group=self.group):
            self.write(0)

    def write(self, seed: int) -> None:
        for name, whole in values(seed).items():
            self.get_submodule(name).weight.data.copy_(part_of(name, whole))  # type: ignore[operator]

    def reload(self, seed: int, fail: Callable[[str], None] = lambda where: None) -> None:
        """fail: is called at each step, and may raise."""
        fail("before it opens")
        with online_reload(self, process_group=self.group):
            fail("as it loads")
            self.write(seed)
            fail("at the end")

    def holds(self, seed: int) -> bool:
        """Are the bytes those of this rank's parts of the whole quantized weights?"""
        for name, whole in values(seed).items():
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
    model = Sharded(timeout=1.0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError if rank else QTensorError, match="" if rank else "rank 1 has not opened"):
            model.reload(1, fails("before it opens" if rank else ""))
        assert model.holds(0)
    dist.barrier()
    for seed in (1, 2):
        model.reload(seed)
        assert model.holds(seed)


def a_rank_fails_in_the_midst_of_a_reload(rank: int, world: int) -> None:
    model = Sharded(timeout=20.0)
    started = time.monotonic()
    for step in ("as it loads", "at the end"):
        with pytest.raises(QTensorError if rank else ZeroDivisionError, match=f"rank 0 failed: {step}" if rank else ""):
            model.reload(1, fails("" if rank else step))
        assert model.holds(0)
    model.reload(1)
    assert model.holds(1)
    assert time.monotonic() - started < 10


def test_after_a_rank_failed_the_next_reload_works_on_all() -> None:
    spawn(2, a_rank_fails_before_it_opens_a_reload, a_rank_fails_in_the_midst_of_a_reload)
