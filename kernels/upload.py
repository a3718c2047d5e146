"""From CPU memory to a GPU, overlapped: while one chunk is quantized on the device, the next is on its way.

A write from CPU memory is cut into chunks of whole units, about 32 MiB each. A chunk is copied into a slot of a small
ring of pinned memory (once that returns, the source is no longer needed), from there to the slot's device buffer on a
copy stream, and consumed, which means quantized, on the caller's current stream. Four rules keep that correct without
ever waiting for the whole device:

1. a pinned slot is refilled only after the host has waited for the last copy out of it;
2. a device buffer is overwritten only after the copy stream has waited for the last consumer of it;
3. a consumer runs only after the caller's stream has waited for the copy into its buffer;
4. therefore whatever the caller's stream does next comes after all of it.

Both kinds of memory belong to the ring: SLOTS chunks pinned and SLOTS chunks on the device, held until `release`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from qtensor.errors import ConfigError

CHUNK_BYTES = 32 << 20
SLOTS = 2

Consume = Callable[[torch.Tensor, int], None]


class Runtime(Protocol):
    """The parts of a device's runtime that the ring uses. Streams and events are opaque."""

    def pinned(self, nbytes: int) -> torch.Tensor: ...
    def on_device(self, nbytes: int) -> torch.Tensor: ...
    def new_stream(self) -> Any: ...
    def current_stream(self) -> Any: ...
    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Any) -> None: ...
    def record(self, stream: Any) -> Any: ...
    def stream_waits(self, stream: Any, event: Any) -> None: ...
    def host_waits(self, event: Any) -> None: ...


class CudaRuntime:
    """`Runtime` for an NVIDIA or AMD GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def on_device(self, nbytes: int) -> torch.Tensor:
        """From the common pool: a load under vLLM's sleep mode allocates from another one, which is for weights, and
        which pool it is belongs to the thread."""
        stream = self.current_stream()

        def allocate() -> torch.Tensor:
            with torch.cuda.stream(stream):
                return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

        with ThreadPoolExecutor(1) as other:
            return other.submit(allocate).result()

    def new_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def stream_waits(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def host_waits(self, event: torch.cuda.Event) -> None:
        event.synchronize()


class _Slot:
    """One pinned buffer, one device buffer, and the events after which each may be overwritten."""

    def __init__(self) -> None:
        self.pinned: torch.Tensor | None = None
        self.device: torch.Tensor | None = None
        self.copied: Any = None
        self.consumed: Any = None


class UploadRing:
    """The ring of one device. Calls from several threads take turns; each write's consumers run in order.

    A chunk given to `consume` is valid until `consume` returns, for work it put on the current stream; `consume` must
    neither keep the chunk nor upload anything itself.
    """

    def __init__(self, runtime: Runtime, chunk_bytes: int = CHUNK_BYTES, slots: int = SLOTS) -> None:
        self._runtime = runtime
        self._chunk_bytes = chunk_bytes
        self._slots = [_Slot() for _ in range(slots)]
        self._next = 0
        self._copy_stream = runtime.new_stream()
        self._lock = threading.Lock()

    def upload_rows(self, source: torch.Tensor, consume: Consume, unit_rows: int = 1) -> None:
        """Call `consume(chunk, first_row)` for consecutive chunks of `source` `[N, K]` (CPU, any strides).

        Every chunk starts on a multiple of `unit_rows` and holds whole units, but for the last rows of the source. A
        unit larger than the chunk size makes a chunk, and a device buffer, of its own size.
        """
        rows, cols = source.shape
        if source.numel() == 0:
            return
        row_bytes = cols * source.element_size()
        step = unit_rows * max(1, self._chunk_bytes // (row_bytes * unit_rows))
        with self._lock:
            for first in range(0, rows, step):
                self._upload(source[first : first + step], first, consume)

    def release(self) -> None:
        """Give the ring's memory back, once the device is done with it. The next upload takes it again."""
        with self._lock:
            for slot in self._slots:
                for event in (slot.copied, slot.consumed):
                    if event is not None:
                        self._runtime.host_waits(event)
                slot.pinned = slot.device = slot.copied = slot.consumed = None

    def _upload(self, part: torch.Tensor, first: int, consume: Consume) -> None:
        runtime, copy_stream = self._runtime, self._copy_stream
        nbytes = part.numel() * part.element_size()
        slot = self._take()
        current = runtime.current_stream()
        if slot.device is None or slot.device.numel() < nbytes:
            if slot.consumed is not None:
                runtime.host_waits(slot.consumed)
            slot.device = None
            slot.device = runtime.on_device(max(nbytes, self._chunk_bytes))
            # The allocator may hand out memory that work already on the current stream still uses.
            runtime.stream_waits(copy_stream, runtime.record(current))
        elif slot.consumed is not None:
            runtime.stream_waits(copy_stream, slot.consumed)
        on_device = slot.device[:nbytes].view(part.dtype).view(part.shape)
        self._copy_pieces(part, on_device, slot)
        runtime.stream_waits(current, slot.copied)
        try:
            consume(on_device, first)
        finally:
            slot.consumed = runtime.record(current)

    def _copy_pieces(self, part: torch.Tensor, on_device: torch.Tensor, slot: _Slot) -> None:
        """Through pinned memory in pieces that fit a slot: one piece, unless a single unit exceeds the chunk size."""
        flat = on_device.view(-1)
        per_piece = max(1, self._chunk_bytes // part.element_size())
        cols = part.shape[1]
        if part.numel() <= per_piece:
            self._through_pinned(part, on_device, slot)
            return
        rows_per_piece = per_piece // cols
        for row in range(0, part.shape[0], max(1, rows_per_piece)):
            if rows_per_piece:
                piece = part[row : row + rows_per_piece]
                self._through_pinned(piece, on_device[row : row + rows_per_piece], slot)
                continue
            for col in range(0, cols, per_piece):
                piece = part[row, col : col + per_piece]
                self._through_pinned(piece, flat[row * cols + col :][: piece.numel()], slot)

    def _through_pinned(self, piece: torch.Tensor, on_device: torch.Tensor, slot: _Slot) -> None:
        runtime = self._runtime
        if slot.copied is not None:
            runtime.host_waits(slot.copied)
        if slot.pinned is None:
            slot.pinned = runtime.pinned(self._chunk_bytes)
        pinned = slot.pinned[: piece.numel() * piece.element_size()].view(piece.dtype).view(piece.shape)
        pinned.copy_(piece)
        runtime.copy(on_device, pinned, self._copy_stream)
        slot.copied = runtime.record(self._copy_stream)

    def _take(self) -> _Slot:
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        return slot


_rings: dict[torch.device, UploadRing] = {}
_rings_lock = threading.Lock()


def upload_rows(source: torch.Tensor, device: torch.device, consume: Consume, unit_rows: int = 1) -> None:
    """Move `source` `[N, K]` from CPU memory to a GPU chunk by chunk, calling `consume(chunk, first_row)` for each.

    When this returns, `source` may be overwritten, and everything put on `device`'s current stream from now on comes
    after all that the consumers did. See `UploadRing` for what `consume` may do.
    """
    if source.device.type != "cpu" or device.type != "cuda":
        raise ConfigError(f"upload_rows moves CPU memory to a GPU, not {source.device} to {device}")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    with _rings_lock:
        ring = _rings.get(device)
        if ring is None:
            ring = _rings[device] = UploadRing(CudaRuntime(device))
    ring.upload_rows(source, consume, unit_rows)


def release(device: torch.device | None = None) -> None:
    """Give back the pinned and device memory of `device`'s ring (of all rings by default); for the end of a load."""
    with _rings_lock:
        rings = [ring for key, ring in _rings.items() if device is None or key == device]
    for ring in rings:
        ring.release()
