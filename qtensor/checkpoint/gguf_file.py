"""GgufFile: what the header of a `.gguf` file says, read without any other package, and checked before it is used.

A header is: magic, version, counts, the metadata (a key, a type, a value), and of each tensor its name, sizes, type and
place. Sizes are written with the columns first. The data begin after it, at a multiple of the alignment.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import CheckpointError
from ..sources.gguf import TYPES
from .files import LIST_BYTES, open_file
from .reading import NAME_LENGTH

MAGIC, VERSIONS, SUFFIX = b"GGUF", (2, 3), ".gguf"
PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
"""The types that are numbers of their own, by number in a file."""
QUANTIZED = {number: name for name, (number, _, _) in TYPES.items()}
_DIMENSIONS = 4
_LARGEST = 2**40
_KEPT = 1024
"""Elements of an array of metadata that is kept; the longer ones are a tokenizer's, and skipped."""
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Entry(NamedTuple):
    """One tensor: its type's number, its shape in numbers (rows first), and where in the file it is."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of one file. Raises CheckpointError that names the file, or the tensor, and what is wrong with it."""

    path: Path
    fields: Mapping[str, Any]
    entries: tuple[Entry, ...]

    @staticmethod
    def open(path: Path) -> GgufFile:
        with open_file(path) as raw, BufferedReader(raw, 1 << 20) as file:
            size = os.fstat(raw.fileno()).st_size
            try:
                return _parse(path, _Text(file, min(size, LIST_BYTES)), size)
            except ValueError as error:
                raise CheckpointError(f"{path}: is no whole GGUF file: {error}") from None

    def number(self, key: str) -> int | float | None:
        """A number of the metadata; None if there is none. Raises CheckpointError for anything else."""
        found = self.fields.get(key)
        if found is None:
            return None
        sound = isinstance(found, int | float) and not isinstance(found, bool) and abs(found) < _LARGEST
        if not sound:  # An array has a number for each layer, for which no transformers configuration here has a place.
            raise CheckpointError(f"{self.path}: its {key} is {found!r:.60}, and should be one number")
        return found  # type: ignore[no-any-return]


class _Text:
    """The header, from its first byte on. Raises ValueError where it ends, or is longer than a header is."""

    def __init__(self, file: BufferedIOBase, limit: int) -> None:
        self._file, self._left, self.at = file, limit, 0

    def take(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError(f"its header is cut short, or is longer than {LIST_BYTES:,} bytes")
        found = self._file.read(count)
        if len(found) != count:
            raise ValueError(f"it ends within its header ({self.at + len(found)} bytes)")
        self._left -= count
        self.at += count
        return found

    def scalar(self, kind: str) -> Any:
        found = struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]
        return float(str(np.float32(found))) if kind == "f" else found  # 1e-6, not 9.999999974752427e-07.

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self) -> Any:
        kind = self.scalar("I")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"its metadata have a value of type {kind}, which there is not")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind not in _SCALARS and kind != _STRING:
            raise ValueError(f"its metadata have an array of type {kind}, which cannot be read")
        if kind == _STRING:
            for _ in range(count):
                self.take(self.scalar("Q"))
            return None
        held = self.take(count * struct.calcsize("<" + _SCALARS[kind]))
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", held)) if count <= _KEPT else None


def _parse(path: Path, text: _Text, size: int) -> GgufFile:
    if (magic := text.take(4)) != MAGIC:
        raise ValueError(f"it begins with {magic!r}")
    version = text.scalar("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise ValueError("its numbers are big-endian" if swapped else f"it is of version {version}, not 2 or 3")
    tensors, fields = text.scalar("Q"), text.scalar("Q")
    values: dict[str, Any] = {}
    for _ in range(fields):
        key = text.string()
        if key in values:
            raise ValueError(f"its metadata have {key:.60} twice")
        values[key] = text.value()
    listed: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(tensors):
        name = text.string()
        if name in listed:
            raise ValueError(f"it has {name:.60} twice")
        listed[name] = _entry(name, text)
    every = values.get("general.alignment", 32)
    if type(every) is not int or not 1 <= every <= 1 << 20:
        raise ValueError(f"its alignment is {every!r:.60}")
    start = -(-text.at // every) * every
    return GgufFile(path, values, tuple(_placed(listed, start, size)))


def _entry(name: str, text: _Text) -> tuple[int, tuple[int, ...], int]:
    dims = text.scalar("I")
    if len(name) > NAME_LENGTH or not 1 <= dims <= _DIMENSIONS:
        raise ValueError(f"it has a tensor {name[:60]} of {dims} dimensions")
    shape = tuple(reversed([text.scalar("Q") for _ in range(dims)]))
    if prod(max(n, 1) for n in shape) > _LARGEST:
        raise ValueError(f"{name} has the sizes {list(shape)}")
    return text.scalar("I"), shape, text.scalar("Q")


def _placed(listed: Mapping[str, tuple[int, tuple[int, ...], int]], start: int, size: int) -> list[Entry]:
    found, end = [], 0
    for name, (kind, shape, offset) in sorted(listed.items(), key=lambda item: item[1][2]):
        nbytes = _nbytes(name, kind, shape)
        if offset < end:
            raise ValueError(f"{name} begins at byte {offset} of the data, within another tensor")
        end = offset + nbytes
        if start + end > size:
            raise ValueError(f"it has {size} of at least {start + end} bytes: {name} is cut off")
        found.append(Entry(name, kind, shape, start + offset, nbytes))
    return found


def _nbytes(name: str, kind: int, shape: tuple[int, ...]) -> int:
    if kind in PLAIN:
        return PLAIN[kind].itemsize * prod(shape)
    if kind not in QUANTIZED:
        raise ValueError(f"{name} has the type {kind}, which cannot be decoded (docs/sources.md has those that can)")
    _, values, size = TYPES[QUANTIZED[kind]]
    if shape[-1] % values:
        raise ValueError(f"{name} has {shape[-1]} columns, which are no blocks of {values} ({QUANTIZED[kind]})")
    return prod(shape) // values * size
