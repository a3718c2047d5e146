"""SHA-256 of sixteen runs of bytes at once, one in each lane of the vectors of AVX-512.

SHA-256 is a chain: each step waits for the one before it, and so one run of bytes leaves most of a core unused, with
the chip's own instructions for it as well. Sixteen side by side take as long as seven or eight of those in turn. (Two
runs by the chip's instructions, interleaved, were tried, too: 1.69 GB/s on a core that does 1.41 of one, and 2.7 to 3.0
of sixteen in vectors.)
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]

from .compiling import Once
from .instructions import I32, I64, Instructions, chip_features, chip_name, int64, intrinsic, splat, vector
from .laying import c_function

RUNS = 16
BLOCK = 64
_MOST = 1 << 14  # blocks of each run in one call: a few milliseconds, after which Python sees to its signals
_PRIMES = (
    2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109,
    113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179, 181, 191, 193, 197, 199, 211, 223, 227, 229, 233, 239,
    241, 251, 257, 263, 269, 271, 277, 281, 283, 293, 307, 311,
)  # fmt: skip
_HASH = np.dtype([(name, np.int64) for name in ("state", "sources", "blocks")])
"""Addresses of uint32 [8, 16] and of the runs' addresses, int64 [16]; how many blocks of each."""


def _root(value: int, power: int) -> int:
    """The first 32 bits of the fractional part of a square root (power 2) or a cube root (3)."""
    scaled, low, high = value << 32 * power, 0, value << 33
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**power <= scaled else (low, middle)
    return low & 0xFFFFFFFF


_FIRST = np.array([_root(prime, 2) for prime in _PRIMES[:8]], np.uint32)
_CONSTANTS = [_root(prime, 3) for prime in _PRIMES]


class _Block(Instructions):
    """Writes what takes one block of each run."""

    def take(self, state: Any, sources: Any, at: Any) -> None:
        b = self.b
        rows = []
        for run in range(RUNS):
            start = self.load(self.at(sources, int64(run), 8), I64, 8)
            rows.append(self.load(b.add(start, at), vector(I32)))
        words = [self.call("llvm.bswap.v16i32", row.type, row) for row in self.transposed(rows)]
        places = [self.at(state, int64(i), 4 * RUNS) for i in range(8)]
        old = [self.load(place, vector(I32), 4) for place in places]
        a, second, c, d, e, f, g, h = old
        for i, constant in enumerate(_CONSTANTS):
            word = words[i % 16]
            if i >= 16:
                before, after = words[(i + 1) % 16], words[(i + 14) % 16]
                small = self.all_of(self.turned(before, 7), self.turned(before, 18), b.lshr(before, splat(I32, 3)))
                large = self.all_of(self.turned(after, 17), self.turned(after, 19), b.lshr(after, splat(I32, 10)))
                word = words[i % 16] = b.add(b.add(word, small), b.add(words[(i + 9) % 16], large))
            chosen = b.xor(g, b.and_(e, b.xor(f, g)))
            mixed = self.all_of(*(self.turned(e, by) for by in (6, 11, 25)))
            first = b.add(b.add(b.add(h, word), splat(I32, constant)), b.add(mixed, chosen))
            most = b.or_(b.and_(a, second), b.and_(c, b.or_(a, second)))
            more = b.add(self.all_of(*(self.turned(a, by) for by in (2, 13, 22))), most)
            a, second, c, d, e, f, g, h = b.add(first, more), a, second, c, b.add(d, first), e, f, g
        for place, was, now in zip(places, old, (a, second, c, d, e, f, g, h), strict=True):
            self.store(b.add(was, now), place, 4)

    def turned(self, value: Any, by: int) -> Any:
        """Bits moved to the right, and around."""
        return self.call("llvm.fshr.v16i32", value.type, value, value, splat(I32, by))

    def all_of(self, x: Any, y: Any, z: Any) -> Any:
        return self.b.xor(self.b.xor(x, y), z)


@intrinsic()
def _take(typing_context, state, sources, at):
    """The block that begins `at` bytes into each run."""

    def emit(context, builder, signature, args):
        _Block(context, builder).take(*args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), emit


def is_fast() -> bool:
    """Whether sixteen runs at once are known to take less than one after the other. AMD's chips have not been
    measured: some do half a vector at a time, and their instructions for one run are faster."""
    return "+avx512bw" in chip_features() and not chip_name().startswith("znver")


@Once
def _loop() -> Any:
    def loop(pointer):
        p = carray(pointer, 1)[0]
        for at in range(0, p.blocks * BLOCK, BLOCK):
            _take(p.state, p.sources, at)

    return c_function(loop, _HASH)


def digests(runs: Sequence[Iterable[memoryview]]) -> list[bytes]:
    """The SHA-256 of up to 16 runs of bytes, each in pieces of any size; the next piece of one is asked for when the
    last is done with. The interpreter is free for other threads meanwhile."""
    loop = _loop(purpose="SHA-256")
    state = np.repeat(_FIRST[:, None], RUNS, 1)
    sources, places = np.zeros(RUNS, np.int64), np.zeros(1, _HASH)
    found = [b""] * len(runs)
    blocks = {run: _whole_blocks(pieces) for run, pieces in enumerate(runs)}
    held: dict[int, np.ndarray[Any, Any]] = {}
    left = dict.fromkeys(blocks, 0)
    while True:
        for run in [run for run in blocks if not left[run]]:
            piece = next(blocks[run], None)
            if piece is None:
                found[run] = state[:, run].astype(">u4").tobytes()
                del blocks[run], left[run]
            else:
                held[run] = np.frombuffer(piece, np.uint8)
                sources[run], left[run] = held[run].ctypes.data, len(piece) // BLOCK
        if not blocks:
            return found
        step = min(*left.values(), _MOST)
        for lane in range(RUNS):
            if lane not in blocks:  # What it makes of another's bytes is not looked at.
                sources[lane] = sources[next(iter(blocks))]
        places[0] = state.ctypes.data, sources.ctypes.data, step
        loop(places.ctypes.data)
        sources += step * BLOCK
        for run in left:
            left[run] -= step


def _whole_blocks(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """The same bytes in pieces of whole blocks, and the end that FIPS 180-4 adds."""
    total, rest = 0, b""
    for piece in pieces:
        total += len(piece)
        at = min(-len(rest) % BLOCK, len(piece))
        rest += piece[:at]
        if len(rest) == BLOCK:
            yield memoryview(rest)
            rest = b""
        whole = at + (len(piece) - at) // BLOCK * BLOCK if not rest else at
        if whole > at:
            yield piece[at:whole]
        rest += piece[whole:]
    rest += b"\x80"
    rest += bytes((56 - len(rest)) % BLOCK) + (8 * total).to_bytes(8, "big")
    yield memoryview(rest)
