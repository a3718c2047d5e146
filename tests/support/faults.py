"""Faults to inject: damaged files, errors in the middle of a write, memory that runs out. Used at every entry point.

Each takes the entry point (whose `folder` holds the checkpoint, and whose `victim` names one of its bf16 tensors) and a
patch.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from qtensor import kernels
from qtensor.lazy import quant_store, target
from qtensor.lazy.weight import ArmedWeight

FILE = "model.safetensors"
Patch = pytest.MonkeyPatch


class EntryPoint(Protocol):
    """folder: of the checkpoint. victim: one of its bf16 tensors."""

    folder: Path
    victim: str


Fault = Callable[[EntryPoint, Patch], None]


def cut(entry: EntryPoint, patch: Patch) -> None:
    for path in [*entry.folder.glob("*.safetensors"), *entry.folder.glob("*.distcp")]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_header(entry: EntryPoint, patch: Patch) -> None:
    _edit(entry.folder / FILE, 9, lambda b: b ^ 0xFF)


def flip_to_nan(entry: EntryPoint, patch: Patch) -> None:
    at = _tensor_at(entry.folder / FILE, entry.victim) + 2 * 777
    _edit(entry.folder / FILE, at, lambda b: b | 0x81)
    _edit(entry.folder / FILE, at + 1, lambda b: b | 0x7F)


def flip_lowest_bit(entry: EntryPoint, patch: Patch) -> None:
    _edit(entry.folder / FILE, _tensor_at(entry.folder / FILE, entry.victim) + 2 * 777, lambda b: b ^ 1)


def _tensor_at(path: Path, name: str) -> int:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return int(8 + size + json.loads(raw[8 : 8 + size])[name]["data_offsets"][0])


def _edit(path: Path, at: int, change: Callable[[int], int]) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] = change(raw[at])
    path.write_bytes(raw)


def at_write(number: int, act: Callable[[], Any]) -> Fault:
    """Act at the write of this number into an armed weight."""

    def arm(entry: EntryPoint, patch: Patch) -> None:
        real, seen = ArmedWeight.write, [0]

        def write(self: ArmedWeight, *args: Any) -> None:
            seen[0] += 1
            if seen[0] == number:
                act()
            real(self, *args)

        patch.setattr(ArmedWeight, "write", write)

    return arm


def eio_at(number: int) -> Fault:
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    return at_write(number, fail)


def interrupt_at(number: int) -> Fault:
    return at_write(number, lambda: signal.raise_signal(signal.SIGINT))


def no_memory_in_a_kernel(entry: EntryPoint, patch: Patch) -> None:
    real, calls = kernels.choose, [0]

    def called() -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise MemoryError

    class OutOfMemory(type(real(torch.device("cpu")))):  # type: ignore[misc]
        def quantize_into(self, *args: Any, **kwargs: Any) -> None:
            called()
            super().quantize_into(*args, **kwargs)

        def pieces(self, *args: Any) -> Any:
            made = super().pieces(*args)
            return None if made is None else PiecesOf(made)

    class PiecesOf:
        def __init__(self, made: Any) -> None:
            self._made = made

        def write(self, *args: Any) -> bool:
            called()
            return self._made.write(*args)  # type: ignore[no-any-return]

    patch.setattr(kernels, "choose", lambda *args, **kwargs: OutOfMemory())


def no_memory_for_the_result(entry: EntryPoint, patch: Patch) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("DefaultCPUAllocator: can't allocate memory")

    patch.setattr(quant_store, "empty", full)
    patch.setattr(target, "_room_for", full)


class Page:
    """A table in docs/reliability.md, behind a mark of its own. QTENSOR_WRITE_TABLE=1 writes it anew."""

    PATH = Path(__file__).parents[2] / "docs" / "reliability.md"

    def __init__(self, mark: str) -> None:
        self.begin, self.end = f"<!-- {mark} -->\n", "<!-- end -->\n"

    def check(self, rows: list[list[str]]) -> None:
        table = "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
        head, rest = self.PATH.read_text().split(self.begin)
        found, tail = rest.split(self.end, 1)
        if os.environ.get("QTENSOR_WRITE_TABLE"):
            self.PATH.write_text(head + self.begin + table + self.end + tail)
        else:
            assert found == table, f"{self.PATH.name} is out of date: run this file with QTENSOR_WRITE_TABLE=1"
