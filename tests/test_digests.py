"""SHA-256 of many things at once: hashlib's digests, whatever the sizes, pieces, threads and errors."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtensor.tensor import digests
from qtensor.tensor.digests import Content, sha256_of

pytest.importorskip("numba")
SIZES = st.one_of(st.integers(0, 200), st.integers(0, 3000), st.sampled_from([55, 56, 63, 64, 65, 119, 120, 128]))


def cut(data: bytes, longest: int, seed: int) -> Iterator[memoryview]:
    """In pieces of any size, from a buffer that is used again, at any alignment."""
    dice, at = random.Random(seed), 0
    buffer = bytearray(longest + 64)
    while at < len(data):
        size, start = dice.randint(0, longest), dice.randrange(64)
        piece = data[at : at + size]
        buffer[start : start + len(piece)] = piece
        yield memoryview(buffer)[start : start + len(piece)]
        buffer[:] = bytes(len(buffer))
        at += size


@given(sizes=st.lists(SIZES, max_size=16), longest=st.integers(1, 700), seed=st.integers(0, 2**20))
@settings(deadline=None)
def test_sixteen_at_once_are_those_of_hashlib(sizes: list[int], longest: int, seed: int) -> None:
    from qtensor.kernels.cpu import hashing

    dice = random.Random(seed)
    runs = [dice.randbytes(size) for size in sizes]
    found = hashing.digests([cut(run, longest, seed + n) for n, run in enumerate(runs)])
    assert found == [hashlib.sha256(run).digest() for run in runs]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sixteen at once from the first byte on; how many were taken at once each time."""
    from qtensor.kernels.cpu import hashing

    counts: list[int] = []

    def counted(runs: list[Iterable[memoryview]]) -> list[bytes]:
        counts.append(len(runs))
        return hashing.digests(runs)

    class Ready:
        begin = staticmethod(lambda: None)
        if_ready = staticmethod(lambda: counted)

    monkeypatch.setattr(digests, "_sixteen", Ready)
    monkeypatch.setattr(digests, "_WORTH_A_LANE", 1)
    monkeypatch.setattr(digests, "_WORTH_ASKING", 1)
    return counts


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_of_many_each_has_its_own(workers: int, seed: int, together: list[int]) -> None:
    dice = random.Random(seed)
    sizes = [dice.choice([0, 1, 1000, 1000, 1000, dice.randint(0, 20_000), 300_000 * (seed % 2)]) for _ in range(150)]
    runs = [dice.randbytes(size) for size in sizes]
    contents = [Content(len(run), partial(whole_or_in_pieces, run)) for run in runs]
    assert sha256_of(contents, workers) == [hashlib.sha256(run).digest() for run in runs]
    assert together
    assert sum(together) < len(runs) or seed % 2 == 0


def whole_or_in_pieces(run: bytes, most: int) -> Iterator[memoryview]:
    for at in range(0, len(run), min(most, 4096)):
        yield memoryview(run)[at : at + min(most, 4096)]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_reading_raises_is_raised_and_the_rest_is_left(workers: int, error: Any, together: list[int]) -> None:
    begun: list[int] = []

    def pieces(n: int, most: int) -> Iterator[memoryview]:
        begun.append(n)
        yield memoryview(bytes(1000))
        if n == 20:
            raise error(str(n))

    with pytest.raises(error, match="20"):
        sha256_of([Content(2000 - n, partial(pieces, n)) for n in range(1000)], workers)
    assert len(begun) < 500


def test_what_is_not_ready_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class NotYet:
        begin = staticmethod(lambda: asked.append("begin"))
        if_ready = staticmethod(lambda: None)

    monkeypatch.setattr(digests, "_sixteen", NotYet)
    run = bytes(1 << 20)
    few = [Content(len(run), lambda most: [memoryview(run)])]
    assert sha256_of(few * 40, 2) == [hashlib.sha256(run).digest()] * 40
    assert asked == ["begin"]
    assert sha256_of(few * 10, 2) == [hashlib.sha256(run).digest()] * 10  # Too little for it to matter.
    assert asked == ["begin"]


def test_numba_is_not_imported_for_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "numba")
    monkeypatch.setattr(digests, "_sixteen", None)
    run = bytes(1 << 20)
    assert sha256_of([Content(len(run), lambda most: [memoryview(run)])] * 40, 2)


def test_the_chip_decides_and_so_does_whoever_wants_no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtensor.kernels.cpu import hashing

    assert digests._sixteen() is (hashing.digests if hashing.is_fast() else None)
    monkeypatch.setenv("QTENSOR_KERNELS", "torch")
    assert digests._sixteen._build() is None
