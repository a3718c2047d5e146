"""The upload ring on a device that watches the order of all accesses, and mutants of the ring, which it must catch."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qtensor import quantize
from qtensor.kernels import FORMATS, Audit, NonFinite, Parts, upload
from qtensor.kernels.reference import TORCH
from qtensor.kernels.upload import Consume, UploadRing, upload_rows
from qtensor.lazy import quant_store
from qtensor.lazy.quant_store import QuantStore
from qtensor.regions.coverage import Coverage
from qtensor.regions.views import View, whole
from qtensor.schemes.scheme import SCHEMES
from support.gpu.streams import WatchedDevice

PROGRAMS = 100


def problems(ring_class: type[UploadRing]) -> Iterator[str]:
    """What is wrong with a ring: races, wrong values, memory it keeps; that it lets two threads in, or overlaps
    nothing."""
    if two_threads_inside(ring_class):
        yield "two threads inside at once"
    device = WatchedDevice()
    ring_class(device, chunk_bytes=64, slots=2).upload_rows(torch.zeros(16, 4, dtype=torch.int16), lambda *_: None)
    if device.idle_waits:
        yield "the host waits although a slot is free"
    for seed in range(PROGRAMS):
        yield from program(ring_class, seed)


def program(ring_class: type[UploadRing], seed: int) -> Iterator[str]:
    """A few writes and what other code does between them, at random."""
    device = WatchedDevice(seed)
    chance, chunk = device.random, device.random.choice([16, 16, 64, 256])
    slots = chance.choice([1, 2, 3])
    ring = ring_class(device, chunk_bytes=chunk, slots=slots)
    for number in range(chance.randint(1, 6)):
        kind = chance.random()
        if kind < 0.3:
            foreign_kernel(device)
        elif kind > 0.85:
            ring.release()
            if any(device.held.values()):
                yield "release keeps memory"
            foreign_kernel(device)
            with device.on_host():
                device.pinned(256).copy_(torch.zeros(256, dtype=torch.uint8))
        if chance.random() < 0.5:
            device.switch_stream()
        rows, cols, unit = chance.randint(1, 12), chance.randint(1, 9), chance.choice([1, 2, 4])
        source = torch.arange(rows * cols, dtype=torch.int16).view(rows, cols) + 100 * number
        if chance.random() < 0.3:
            source = source.t().contiguous().t()
        expected, result = source.clone(), torch.full((rows, cols), -1, dtype=torch.int16)
        fails = chance.random() < 0.15

        def consume(part: torch.Tensor, first: int) -> None:
            assert first % unit == 0  # noqa: B023
            assert len(part) % unit == 0 or first + len(part) == rows  # noqa: B023
            assert part.nbytes <= max(chunk, unit * part.shape[1] * 2)  # noqa: B023
            into = result[first : first + len(part)]  # noqa: B023
            device.kernel(device.current, "quantize", lambda: into.copy_(part), reads=[part])
            if fails:  # noqa: B023
                raise KeyError

        try:
            with device.on_host():
                ring.upload_rows(source, consume, unit)
        except KeyError:
            continue
        source.fill_(-7)  # The loader may reuse its memory at once.
        if not torch.equal(result, expected):
            yield "wrong values"
        if chance.random() < 0.5:
            foreign_kernel(device)
        if device.held["pinned"] > slots * chunk:
            yield "more pinned memory than its slots"
    if chance.random() < 0.5:
        ring.release()
        foreign_kernel(device)
    yield from device.races


def foreign_kernel(device: WatchedDevice) -> None:
    """Of somebody else, on any stream, on memory that was free there."""
    mine = device.current
    device.current = device.random.choice(device.used)
    memory = device.on_device(device.random.choice([16, 64, 256]))
    device.kernel(device.current, "someone's kernel", writes=[memory])
    device.current = mine


def two_threads_inside(ring_class: type[UploadRing]) -> bool:
    ring = ring_class(WatchedDevice(), chunk_bytes=64)
    inside, together, other = [0], [False], threading.Event()

    def consume(part: torch.Tensor, first: int) -> None:
        inside[0] += 1
        if inside[0] > 1:
            together[0] = True
            other.set()
        other.wait(0.02)
        inside[0] -= 1

    def work() -> None:
        ring.upload_rows(torch.zeros(20, 4, dtype=torch.int16), consume)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return together[0]


def test_the_ring() -> None:
    assert list(problems(UploadRing)) == []


CONSUME, CONSUMED = "consume(on_device, first)", "slot.consumed = runtime.record(current)"
MUTANTS: dict[str, tuple[str, str]] = {
    "rule 1: no host wait before a pinned slot is refilled": (
        "if slot.copied is not None:\n            runtime.host_waits(slot.copied)\n        if slot.pinned",
        "if slot.pinned",
    ),
    "rule 2: the copy does not wait for the consumer": (
        "elif slot.consumed is not None:\n            runtime.stream_waits(copy_stream, slot.consumed)\n",
        "pass\n",
    ),
    "rule 3: the consumer does not wait for the copy": ("runtime.stream_waits(current, slot.copied)\n", "\n"),
    "new memory: the copy does not wait for the current stream": (
        "runtime.stream_waits(copy_stream, runtime.record(current))\n",
        "pass\n",
    ),
    "growing: the host does not wait for the consumer": (
        "if slot.consumed is not None:\n                runtime.host_waits(slot.consumed)\n",
        "pass\n",
    ),
    "consumed is recorded before": (
        f"try:\n            {CONSUME}\n        finally:\n            {CONSUMED}",
        f"{CONSUMED}\n        {CONSUME}",
    ),
    "copied is recorded on the current stream": (
        "slot.copied = runtime.record(self._copy_stream)",
        "slot.copied = runtime.record(runtime.current_stream())",
    ),
    "copied is recorded before": (
        "runtime.copy(on_device, pinned, self._copy_stream)\n        slot.copied = runtime.record(self._copy_stream)",
        "slot.copied = runtime.record(self._copy_stream)\n        runtime.copy(on_device, pinned, self._copy_stream)",
    ),
    "the copy is on the current stream": (
        "runtime.copy(on_device, pinned, self._copy_stream)",
        "runtime.copy(on_device, pinned, runtime.current_stream())",
    ),
    "the wrong stream waits for the consumer": (
        "runtime.stream_waits(copy_stream, slot.consumed)",
        "runtime.stream_waits(runtime.current_stream(), slot.consumed)",
    ),
    "release does not wait": (
        "if event is not None:\n                        self._runtime.host_waits(event)\n",
        "pass\n",
    ),
    "release waits for copies only": ("for event in (slot.copied, slot.consumed):", "for event in (slot.copied,):"),
    "consumed is not recorded after an error": (
        f"try:\n            {CONSUME}\n        finally:\n            {CONSUMED}",
        f"{CONSUME}\n        {CONSUMED}",
    ),
    "no lock": (
        "with self._lock:\n            for first in range(0, rows, step):",
        "if True:\n            for first in range(0, rows, step):",
    ),
    "always the same slot": ("self._next = (self._next + 1) % len(self._slots)", "pass"),
    "consumed is that of the first use": (
        "slot.consumed = runtime.record(current)",
        "slot.consumed = slot.consumed or runtime.record(current)",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str) -> None:
    rule, broken = MUTANTS[name]
    source = Path(upload.__file__).read_text()
    assert source.count(rule) == 1
    mutant: Any = ModuleType("mutant")
    mutant.__package__ = upload.__package__
    exec(source.replace(rule, broken), vars(mutant))
    assert next(problems(mutant.UploadRing), None)


def test_refuses_devices_it_is_not_for() -> None:
    with pytest.raises(ValueError, match="CPU memory to a GPU"):
        upload_rows(torch.zeros(2, 2), torch.device("cpu"), lambda part, first: None)


# What a store sends through the ring ---------------------------------------------------------------------------------


class Uploading:
    """A store on a CPU that takes itself for one on a GPU: large sources come through a ring of a watched device."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, shape: tuple[int, int], chunk: int) -> None:
        self.device = WatchedDevice()
        ring = UploadRing(self.device, chunk_bytes=chunk)

        def send(source: torch.Tensor, device: torch.device, consume: Consume, unit_rows: int = 1) -> None:
            ring.upload_rows(source, consume, unit_rows)

        patch.setenv("QTENSOR_KERNELS", "torch")  # numba would compile for seconds.
        patch.setattr(upload, "CHUNK_BYTES", chunk)
        patch.setattr(upload, "upload_rows", send)
        patch.setattr(quant_store, "_WORTH_A_RING", 1)
        patch.setattr(QuantStore, "_comes_by_ring", lambda store, source: True)
        self.audit, cpu = Audit(measure_sqnr=True), torch.device("cpu")
        self.coverage = Coverage(shape)
        self.store = QuantStore(SCHEMES[name], torch.bfloat16, cpu, self.coverage, self.audit, lambda change: None)
        self.store._on_cpu = False

    def assert_has(self, source: torch.Tensor, name: str) -> None:
        assert self.coverage.complete
        for ours, reference in zip(self.store.result.parts(), quantize(source, name).parts(), strict=True):
            assert torch.equal(ours.view(torch.uint8), reference.view(torch.uint8))
        assert self.device.races == []


@pytest.mark.parametrize("name", ["fp8_per_tensor", "nvfp4"])
def test_a_matrix_with_one_scale_is_never_on_the_device_as_a_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.randn(100, 176, generator=torch.Generator().manual_seed(0)).bfloat16()  # 35 kB
    there = Uploading(monkeypatch, name, (100, 176), 4096)
    there.store.write(whole((100, 176)), source)
    there.assert_has(source, name)
    assert there.device.most["device"] == 2 * 4096
    assert there.device.idle_waits == 0
    by_itself = Audit(measure_sqnr=True)
    TORCH.quantize_into(source, Parts.of((100, 176), FORMATS[name]), FORMATS[name], by_itself)
    assert there.audit.noise == pytest.approx(by_itself.noise)


@pytest.mark.parametrize("name", ["fp8_per_tensor", "nvfp4"])
def test_a_matrix_in_chunks_names_what_it_refuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there, source = Uploading(monkeypatch, name, (100, 176), 4096), torch.zeros(100, 176)
    source[70, 3] = math.nan
    with pytest.raises(NonFinite) as refused:
        there.store.write(whole((100, 176)), source)
    assert refused.value.index == 70 * 176 + 3
    assert there.coverage.covered == 0


def test_staged_sources_take_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.randn(256, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
    there = Uploading(monkeypatch, "fp8_per_block", (256, 80), 4096)
    for start, stop in ((0, 64), (64, 200), (200, 256)):
        there.store.write(View((stop - start, 80), (80, 1), start * 80), source[start:stop])
    there.assert_has(source, "fp8_per_block")
    assert there.device.most["pinned"] == 2 * 4096
