"""A device whose streams and memory are watched: every access is stamped with a vector clock, and two that touch the
same bytes, at least one of them writing, are a race unless events order them.

Copies and kernels execute at once, so a program without races delivers what every schedule would. Memory that is freed
is handed out again at once, as caching allocators do: on the device to work on the stream it was allocated for.
"""

from __future__ import annotations

import random
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Clock = dict[str, int]
_BLOCK = 64  # bytes: what is allocated is a multiple of it


class Actor:
    """The host, or a stream. clock: how many steps of each actor have happened before its next one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {}

    def learn(self, other: Clock) -> None:
        for name, steps in other.items():
            self.clock[name] = max(self.clock.get(name, 0), steps)


class WatchedDevice:
    """A `kernels.upload.Runtime`.

    races: what was found. held, most: bytes of each kind that are allocated, and the most that were. used: the streams
    of programs, the ring's own left out. idle_waits: how often the host waited for the newest copy.
    """

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.arena = torch.zeros(1 << 20, dtype=torch.uint8)
        self.free: dict[str, list[tuple[int, int, Actor]]] = {"pinned": [], "device": []}
        self.held, self.most = {"pinned": 0, "device": 0}, {"pinned": 0, "device": 0}
        self.races: list[str] = []
        self.idle_waits = 0
        self.host, self.streams = Actor("host"), [Actor("stream 0")]
        self.current = self.streams[0]
        self.used = [self.current]
        self._top = self._copies = 0
        self._accesses: dict[int, list[tuple[int, int, bool, str, int, str]]] = defaultdict(list)
        self._on_device = False

    # kernels.upload.Runtime

    def pinned(self, nbytes: int) -> torch.Tensor:
        return self._allocate("pinned", nbytes)

    def on_device(self, nbytes: int) -> torch.Tensor:
        return self._allocate("device", nbytes)

    def new_stream(self) -> Actor:
        self.streams.append(Actor(f"stream {len(self.streams)}"))
        return self.streams[-1]

    def current_stream(self) -> Actor:
        return self.current

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Actor) -> None:
        self._copies += 1
        self.kernel(stream, "copy", lambda: destination.copy_(source), reads=[source], writes=[destination])

    def record(self, stream: Actor) -> tuple[Clock, int]:
        return dict(stream.clock), self._copies

    def stream_waits(self, stream: Actor, event: tuple[Clock, int]) -> None:
        stream.learn(event[0])

    def host_waits(self, event: tuple[Clock, int]) -> None:
        self.idle_waits += event[1] == self._copies
        self.host.learn(event[0])

    # What programs do besides

    def kernel(
        self,
        stream: Actor,
        label: str,
        work: Callable[[], Any] = lambda: None,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
    ) -> None:
        stream.learn(self.host.clock)  # It was launched now.
        self._access(stream, label, reads, writes)
        self._on_device = True
        try:
            work()
        finally:
            self._on_device = False

    def on_host(self) -> TorchDispatchMode:
        """Within it, what the host copies into the device's memory counts."""
        return _HostCopies(self)

    def switch_stream(self) -> None:
        """Go on with another stream of the program's, new or not, which waits for nothing: as another thread would."""
        self.current = self.random.choice([*self.used, self.new_stream()])
        if self.current not in self.used:
            self.used.append(self.current)

    def _access(self, actor: Actor, label: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        steps = actor.clock[actor.name] = actor.clock.get(actor.name, 0) + 1
        for tensor, writing in [*((t, False) for t in reads), *((t, True) for t in writes)]:
            low = tensor.data_ptr() - self.arena.data_ptr()
            high = low + tensor.numel() * tensor.element_size()
            if not 0 <= low < self.arena.numel():
                continue
            for block in range(low // _BLOCK, -(-high // _BLOCK)):
                for a, b, wrote, who, when, what in self._accesses[block]:
                    if (writing or wrote) and a < high and low < b and actor.clock.get(who, 0) < when:
                        self.races.append(f"{label} on {actor.name} races with {what} on {who}")
                self._accesses[block].append((low, high, writing, actor.name, steps, label))

    def _allocate(self, kind: str, nbytes: int) -> torch.Tensor:
        pool = self.free[kind]
        fits = [i for i, (_, n, s) in enumerate(pool) if n >= nbytes and (kind == "pinned" or s is self.current)]
        if fits:
            block = pool.pop(fits[0])
        else:
            block = (self._top, -(-nbytes // _BLOCK) * _BLOCK, self.current)
            self._top += block[1]
        tensor = self.arena[block[0] : block[0] + nbytes]
        self.held[kind] += nbytes
        self.most[kind] = max(self.most[kind], self.held[kind])
        weakref.finalize(tensor, self._freed, kind, nbytes, block)
        return tensor

    def _freed(self, kind: str, nbytes: int, block: tuple[int, int, Actor]) -> None:
        self.held[kind] -= nbytes
        self.free[kind].insert(0, block)


class _HostCopies(TorchDispatchMode):
    def __init__(self, device: WatchedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and not self._device._on_device:
            self._device._access(self._device.host, "host copy", (), args[:1])
        return out
