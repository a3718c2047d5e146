"""Refits drawn at random on two ranks: every scheme and split, pieces, buckets, selections, `atomic=False`, faults."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch.distributed as dist

from support.rank_refits import random_refits
from support.ranks import at_length, spawn

ENDURANCE = bool(os.environ.get("QTENSOR_ENDURANCE"))
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no distributed package")


@pytest.mark.parametrize("seed", range(4 if ENDURANCE else 1))
def test_whatever_is_refitted_and_whatever_befalls_it_all_ranks_hold_what_one_would(seed: int) -> None:
    """2,000 refits of 200 models in `make endurance`, 500 from each seed."""
    spawn(2, partial(random_refits, models=50 if ENDURANCE else 8, each=10, seed=seed))


@at_length
def test_the_same_on_three_ranks() -> None:
    spawn(3, partial(random_refits, models=20, each=10, seed=9))
