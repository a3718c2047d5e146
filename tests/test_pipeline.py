"""The upload ring against a simulated device whose streams run as late, and as unfairly, as their events allow."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtensor.kernels.upload import UploadRing, upload_rows

GARBAGE = 0xAB


class Event:
    def __init__(self) -> None:
        self.done = False


class Stream:
    """Work in order; each item is a closure, or an event to wait for."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None] | Event] = []


class SimulatedDevice:
    """Copies and kernels happen only when the host waits for an event, or at random moments before that."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.current = self.new_stream()
        self.pinned_bytes = 0
        self.device_bytes = 0

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.pinned_bytes += nbytes
        return torch.full((nbytes,), GARBAGE, dtype=torch.uint8)

    def on_device(self, nbytes: int) -> torch.Tensor:
        self.device_bytes += nbytes
        return torch.full((nbytes,), GARBAGE, dtype=torch.uint8)

    def new_stream(self) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def current_stream(self) -> Stream:
        return self.current

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        self.launch(stream, lambda: destination.copy_(source))

    def launch(self, stream: Stream, work: Callable[[], Any]) -> None:
        stream.queue.append(work)
        for _ in range(self.random.choice([0, 0, 0, 1, 3])):
            self.step()

    def record(self, stream: Stream) -> Event:
        event = Event()
        stream.queue.append(lambda: setattr(event, "done", True))
        return event

    def stream_waits(self, stream: Stream, event: Event) -> None:
        stream.queue.append(event)

    def host_waits(self, event: Event) -> None:
        while not event.done:
            self.step()

    def step(self) -> bool:
        """Run one item of a random stream that can move; False when none can."""
        ready = [s for s in self.streams if s.queue and not (isinstance(s.queue[0], Event) and not s.queue[0].done)]
        if not ready:
            assert not any(s.queue for s in self.streams), "deadlock"
            return False
        item = self.random.choice(ready).queue.pop(0)
        if not isinstance(item, Event):
            item()
        return True

    def drain(self) -> None:
        while self.step():
            pass


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    chunk=st.sampled_from([2, 8, 16, 64, 1000]),
    slots=st.integers(1, 3),
    writes=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 9), st.sampled_from([1, 2, 4]), st.booleans()), max_size=5
    ),
)
def test_every_schedule_delivers_the_source(
    seed: int, chunk: int, slots: int, writes: list[tuple[int, int, int, bool]]
) -> None:
    device = SimulatedDevice(seed)
    ring = UploadRing(device, chunk_bytes=chunk, slots=slots)
    expected, delivered = [], []
    for number, (rows, cols, unit, strided) in enumerate(writes):
        source = torch.arange(rows * cols, dtype=torch.int16).view(rows, cols) + 100 * number
        if strided:
            source = source.t().contiguous().t()
        expected.append(source.clone())
        result = torch.full((rows, cols), -1, dtype=torch.int16)
        delivered.append(result)

        def consume(part: torch.Tensor, first: int, result: torch.Tensor = result, unit: int = unit) -> None:
            assert first % unit == 0
            assert len(part) % unit == 0 or first + len(part) == len(result)
            assert part.numel() * 2 <= max(chunk, unit * part.shape[1] * 2)
            device.launch(device.current, lambda: result[first : first + len(part)].copy_(part))

        ring.upload_rows(source, consume, unit)
        source.fill_(-7)  # The loader may reuse its memory at once.
        if seed % 3 == 0:
            device.current = device.new_stream()
            device.stream_waits(device.current, device.record(device.streams[0]))
    if seed % 2:
        ring.release()
    device.drain()
    for want, got in zip(expected, delivered, strict=True):
        assert torch.equal(want, got)
    assert device.pinned_bytes <= slots * chunk


def test_a_broken_rule_is_noticed() -> None:
    """The simulation is no proof unless it catches a ring that does not wait."""

    class Careless(SimulatedDevice):
        def host_waits(self, event: Event) -> None:
            pass

    def run(seed: int) -> bool:
        device = Careless(seed)
        ring = UploadRing(device, chunk_bytes=16, slots=1)
        source = torch.arange(64, dtype=torch.int16).view(16, 4)
        result = torch.zeros_like(source)
        ring.upload_rows(
            source,
            lambda part, first: device.launch(device.current, lambda: result[first : first + len(part)].copy_(part)),
        )
        device.drain()
        return torch.equal(result, source)

    assert not all(run(seed) for seed in range(20))


def test_a_failing_consumer_leaves_the_ring_usable() -> None:
    device = SimulatedDevice(1)
    ring = UploadRing(device, chunk_bytes=16)
    source = torch.arange(64, dtype=torch.int16).view(16, 4)

    def fail(part: torch.Tensor, first: int) -> None:
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        ring.upload_rows(source, fail)
    result = torch.zeros_like(source)
    ring.upload_rows(
        source, lambda part, first: device.launch(device.current, lambda: result[first : first + len(part)].copy_(part))
    )
    device.drain()
    assert torch.equal(result, source)


def test_threads_take_turns() -> None:
    device = SimulatedDevice(2)
    ring = UploadRing(device, chunk_bytes=16)
    results = [torch.zeros(20, 4, dtype=torch.int16) for _ in range(4)]

    def work(n: int) -> None:
        source = torch.full((20, 4), n + 1, dtype=torch.int16)
        target = results[n]
        ring.upload_rows(
            source,
            lambda part, first: device.launch(device.current, lambda: target[first : first + len(part)].copy_(part)),
        )

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    device.drain()
    assert all((results[n] == n + 1).all() for n in range(4))


def test_refuses_devices_it_is_not_for() -> None:
    with pytest.raises(ValueError, match="CPU memory to a GPU"):
        upload_rows(torch.zeros(2, 2), torch.device("cpu"), lambda part, first: None)
