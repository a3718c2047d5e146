"""Checkpoint: a folder of safetensors files, checked before anything in it is used.

Opening reads the index and the headers, not the tensors. A header has to describe its file to the last byte, names in
the index may not leave the folder, and index and files have to agree tensor by tensor. Pickled checkpoints are
refused: reading one can run code. Tensors are read with plain reads into memory the caller may bound, not mapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import CheckpointError
from .files import CONFIG_BYTES, LIST_BYTES, open_file, parse_json, read_json, read_up_to

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
MANIFEST = "qtensor.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
NAME_LENGTH = 512  # Of a tensor, in characters.
_MOST_ELEMENTS = 2**48  # Also of a tensor of no elements, whose other sizes the file's size does not bound.
_MOST_DIMENSIONS = 64  # PyTorch's.
_SHOWN = 3

# The names safetensors gives dtypes, in the order in which it lays them out in a file.
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: where its bytes are."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    unit_rows = 1
    """Rows that are read together (see `convert.decoding.Decoded`)."""

    def read(self, first: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor; or, into `out` (contiguous, of the dtype), the elements from flat index `first` on."""
        whole = self._memory() if out is None else out
        target = bytes_of(whole)
        with open_file(self.path) as file:
            file.seek(self.offset + first * self.dtype.itemsize)
            done = 0
            while done < len(target):
                got = file.readinto(target[done:])
                if not got:
                    raise CheckpointError(f"{self.path} ends within {self.name}: the file was cut while it was read")
                done += got
        return whole

    def _memory(self) -> torch.Tensor:
        try:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        except (RuntimeError, MemoryError):
            raise CheckpointError(
                f"{self.path}: {self.name} takes {self.nbytes / 1e9:,.1f} GB, and there is no memory for them"
            ) from None


class Checkpoint:
    """The tensors of a folder by name, and its config.json (empty if there is none).

    Raises CheckpointError that names the file, or the tensor, and what is wrong with it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder; give the folder that holds the checkpoint")
        self.files = [self.folder / name for name in self._file_names()]
        self.tensors: dict[str, Stored] = {}
        for path in self.files:
            for stored in _header(path):
                twin = self.tensors.setdefault(stored.name, stored)
                if twin is not stored:
                    raise CheckpointError(f"{stored.name} is in two files, {twin.path.name} and {path.name}")
        self._check_index()

    @cached_property
    def config(self) -> dict[str, Any]:
        path = self.folder / CONFIG
        return read_json(path, CONFIG_BYTES) if path.exists() else {}

    @cached_property
    def quantization(self) -> Mapping[str, Any] | None:
        """config.json's "quantization_config"; None if it has none."""
        found = self.config.get("quantization_config")
        if found is not None and not isinstance(found, Mapping):
            raise CheckpointError(f"{self.folder / CONFIG}: quantization_config is {found!r}, not an object")
        return found

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())

    @property
    def method(self) -> str | None:
        """What config.json calls the way in which it is quantized."""
        found = (self.quantization or {}).get("quant_method")
        return found if isinstance(found, str) else None

    @property
    def shards(self) -> list[str]:
        """The files that a conversion writes."""
        return [path.name for path in self.files]

    def shard_of(self, stored: Any) -> str:
        """The one of these that has what becomes of a tensor."""
        name: str = stored.path.name
        return name

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.exists():
            return {}
        found = read_json(path, LIST_BYTES).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
            raise CheckpointError(f'{path}: has no "weight_map" of names to files')
        for name, file in found.items():
            if not _is_name(file):
                raise CheckpointError(f"{path}: {name} is said to be in {file!r}, which is not a file of this folder")
        return found

    def _file_names(self) -> list[str]:
        names = sorted(set(self._weight_map.values()))
        if not names:
            found = sorted(p.name for p in self.folder.glob("*.safetensors"))
            names = [SINGLE] if SINGLE in found else found
        if not names:
            pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
            if pickles:
                raise CheckpointError(
                    f"{self.folder}: its weights are pickled ({pickles[0]}), and reading a pickle can run code. Load "
                    "it with torch.load(..., weights_only=True), and save it as safetensors first."
                )
            ggufs = sorted(p.name for p in self.folder.glob("*.gguf"))
            more = f". Give its file {ggufs[0]}, not the folder" if ggufs else ""
            raise CheckpointError(
                f"{self.folder}: is no checkpoint; it has neither {INDEX} nor a .safetensors file{more}"
            )
        missing = [name for name in names if self._weight_map and not (self.folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {', '.join(missing)} is missing or no ordinary file, and {INDEX} names it"
            )
        return names

    def _check_index(self) -> None:
        for name, file in self._weight_map.items():
            if name not in self.tensors or self.tensors[name].path.name != file:
                raise CheckpointError(f"{self.folder / INDEX}: says that {name} is in {file}, and it is not")
        extra = [name for name in self.tensors if self._weight_map and name not in self._weight_map]
        if extra:
            where = self.tensors[extra[0]].path.name
            raise CheckpointError(f"{self.folder / INDEX}: does not list {extra[0]}, which {where} holds")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(flat)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The list of contents that writers leave in a folder: "files" by name, and "tensors", by name, as objects.

    Raises CheckpointError if there is none, or it is no such list.
    """
    path = folder / MANIFEST
    content = read_json(path, LIST_BYTES)
    files, tensors = content.get("files"), content.get("tensors")
    sound = isinstance(files, list) and isinstance(tensors, dict) and all(isinstance(t, dict) for t in tensors.values())
    if not sound or not all(isinstance(file, str) and _is_name(file) for file in files or ()):
        raise CheckpointError(f"{path}: is not the list of contents that qtensor writes")
    return content


def _is_name(file: str) -> bool:
    """Of a file in the folder itself, on any system."""
    return Path(file).name == file and not set(file) & {"\\", "\0"} and file not in ("", ".", "..")


def _header(path: Path) -> Iterator[Stored]:
    """The tensors of one file, if its header is whole and describes all of the file. It is the rule of the safetensors
    library: the tensors' bytes lie one after the other, from the header to the file's end, and are as many as dtype and
    shape need."""
    with open_file(path) as file:
        yield from header_of(path, file)


def header_of(path: Path, file: FileIO) -> Iterator[Stored]:
    """The same of a file that is open, at its beginning. Raises CheckpointError."""
    try:
        size = os.fstat(file.fileno()).st_size
        start, entries = _entries(path, file, size)
        if lost := _lost(path, size, start, entries):
            raise CheckpointError(lost)
        end = 0
        if unknown := [(name, entry.dtype) for name, entry in entries.items() if entry.dtype not in DTYPES]:
            raise CheckpointError("{} has dtype {}, which cannot be read here".format(*unknown[0]))
        for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
            if entry.begin != end:
                raise CheckpointError(f"{name} begins at byte {entry.begin} of the data, and not at {end}")
            end += entry.nbytes
        if start + end != size:
            raise CheckpointError(f"{size - start - end} bytes at its end belong to no tensor")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: is not a whole safetensors file: {error}") from None
    for name, entry in entries.items():
        yield Stored(name, path, DTYPES[entry.dtype], entry.shape, start + entry.begin, entry.nbytes)


class _Entry(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def _entries(path: Path, file: FileIO, size: int) -> tuple[int, dict[str, _Entry]]:
    """Where a file's data begin, and what its header says of each tensor. Raises CheckpointError if it has no whole
    header; whether the data are whole is not looked at."""
    start = 8 + int.from_bytes(read_up_to(path, file, 8, 8), "little")
    if size < 8 or start > size:
        raise CheckpointError(f"{path.name} is cut short within its header ({size} bytes)")
    text = read_up_to(path, file, start - 8, LIST_BYTES)
    try:
        header = parse_json(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if not text.startswith(b"{") or not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its __metadata__ are not texts by name")
        return start, {name: _entry(name, entry) for name, entry in header.items()}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} has a damaged header: {error}") from None


def _entry(name: str, given: Any) -> _Entry:
    """Raises ValueError that names the tensor and the field."""
    if len(name) > NAME_LENGTH:
        raise ValueError(f"{name[:40]}... is a name of {len(name)} characters; at most {NAME_LENGTH} are read")
    if not isinstance(given, dict):
        raise ValueError(f"{name} is {given!r:.60}, not an object")
    if unknown := given.keys() ^ {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} lacks the field, or has one too many, {min(unknown):.60}")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError(f"{name} has dtype {dtype!r:.60}")
    if not _is_sizes(shape) or len(shape) > _MOST_DIMENSIONS or prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:
        raise ValueError(f"{name} has shape {shape!r:.60}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} has data_offsets {offsets!r:.60}")
    begin, end = offsets
    if dtype in DTYPES and end - begin != DTYPES[dtype].itemsize * prod(shape):
        raise ValueError(f"{name} is {dtype} {shape!r:.60}, and has bytes {begin} to {end}")
    return _Entry(dtype, tuple(shape), begin, end - begin)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it names {name:.60} twice")
        found[name] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _lost(path: Path, size: int, start: int, entries: Mapping[str, _Entry]) -> str:
    """What is wrong with a file that is shorter than its header promises, as a sentence; "" if it is not."""
    ends = {name: start + entry.begin + entry.nbytes for name, entry in entries.items()}
    lost = [name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > size]
    if not lost:
        return ""
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    names = ", ".join(f"'{name}'" for name in lost[:_SHOWN])
    return f"{path.name} has {size} of {max(ends.values())} bytes: {names}{more} are cut off"


def describe_truncated(folder: str | Path | None) -> str:
    """One sentence per safetensors file of a folder that is shorter than its header promises, naming the tensors that
    are lost; "" if there is none, or no such folder."""
    if folder is None or not Path(folder).is_dir():
        return ""
    return " ".join(filter(None, map(_truncated, sorted(Path(folder).glob("*.safetensors")))))


def _truncated(path: Path) -> str:
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            lost = _lost(path, size, *_entries(path, file, size))
    except CheckpointError as error:
        lost = str(error)
    return f"{lost}." if lost else ""
