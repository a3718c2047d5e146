"""Test settings: a deterministic hypothesis profile; HYPOTHESIS_PROFILE=thorough searches longer, at random.
And what holds for every test: no session and no hook outlives it."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # Before PyTorch: two suites share the cores, and none spins.
# One of ours: a process that was killed leaves files behind that break the compiler of whoever comes next.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "inductor"))

from hypothesis import settings

from support.helpers import assert_no_hooks

settings.register_profile("default", max_examples=60, derandomize=True, deadline=None, print_blob=True)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# A shell starts what it runs in the background with Ctrl-C ignored; tests raise that signal.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What all test files import stays: the many collections of garbage need not walk it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    assert_no_hooks()
