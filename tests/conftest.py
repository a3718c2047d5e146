"""What holds for every test: no session and no hook outlives it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from loading import assert_nothing_armed


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    swap = torch.__future__.get_swap_module_params_on_conversion()
    yield
    torch.__future__.set_swap_module_params_on_conversion(swap)
    assert_nothing_armed()
