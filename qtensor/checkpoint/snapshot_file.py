"""One file of a snapshot: tensors at page borders, to be mapped, and a header that vouches for all of it.

It is a safetensors file that any reader of that format reads. Its header has, as metadata, what the snapshot is of and
the SHA-256 of every tensor, and begins with the SHA-256 of itself (computed with zeros in that place). The gaps that
alignment needs are tensors of bytes, because the format allows no others.

A file is mapped privately: what is read comes from the page cache, which processes share, and what a process writes
becomes a page of its own. So the mapped tensors may be written as any others are, and the file never changes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, SnapshotError
from .files import LIST_BYTES, open_file, parse_json, read_up_to
from .reading import DTYPE_NAMES, Stored, bytes_of, header_of

PAGE = 4096
_LINE = 64  # bytes: where a tensor of less than a page begins
_PADDING = "__padding__"
_ABOUT = "qtensor_snapshot"
_SEAL = b'{"__metadata__":{"header_sha256":"'
_DIGITS = 64
_PIECE = 16 << 20
_ANEW = "Load the model in the ordinary way, and save a new snapshot of it."


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors, and what they are, to a new file. about: JSON; it is read back by `MappedFile.about`."""
    if sys.byteorder != "little":
        raise SnapshotError(f"{path}: safetensors files are little-endian, and this machine is not")
    offsets, text = _header(tensors, about)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        base = file.tell()
        for name, tensor in tensors.items():
            file.seek(base + offsets[name])
            data = bytes_of(tensor.detach().cpu().contiguous())
            for start in range(0, len(data), _PIECE):
                file.write(data[start : start + _PIECE])
        file.truncate(base + max((offsets[n] + t.nbytes for n, t in tensors.items()), default=0))


def file_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """At most how many bytes the file will have, but for its header."""
    return sum(tensor.nbytes + PAGE for tensor in tensors.values())


def _header(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> tuple[dict[str, int], bytes]:
    """Where each tensor begins in the data, and the header, which ends at a page border. Small tensors come last."""
    offsets: dict[str, int] = {}
    entries: dict[str, Any] = {}
    end = gaps = 0
    for name in sorted(tensors, key=lambda name: tensors[name].nbytes < PAGE):
        tensor = tensors[name]
        begin = end + -end % (PAGE if tensor.nbytes >= PAGE else _LINE)
        if begin > end:
            entries[f"{_PADDING}.{gaps}"] = _entry(torch.uint8, [begin - end], end, begin)
            gaps += 1
        offsets[name], end = begin, begin + tensor.nbytes
        entries[name] = _entry(tensor.dtype, list(tensor.shape), begin, end)
    metadata = {"format": "pt", _ABOUT: _json(about)}
    body = '",' + _json(metadata)[1:] + "".join(f",{_json(name)}:{_json(e)}" for name, e in entries.items()) + "}"
    text = _SEAL + b"0" * _DIGITS + body.encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return offsets, _sealed(len(text).to_bytes(8, "little"), text)


def _entry(dtype: torch.dtype, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _sealed(length: bytes, text: bytes) -> bytes:
    """The header with the digest of itself in its place."""
    blank = _SEAL + b"0" * _DIGITS + text[len(_SEAL) + _DIGITS :]
    return _SEAL + hashlib.sha256(length + blank).hexdigest().encode() + blank[len(_SEAL) + _DIGITS :]


class MappedFile:
    """A file of a snapshot, opened and mapped.

    about: what `write_file` was told, as it was sealed. Raises SnapshotError for a file that is missing, cut short, or
    whose header is not the one that was written. The bytes of tensors are not looked at.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_file(path) as file:
                self._tensors: dict[str, Stored] = {stored.name: stored for stored in header_of(path, file)}
                file.seek(0)
                length = read_up_to(path, file, 8, 8)
                text = read_up_to(path, file, int.from_bytes(length, "little"), LIST_BYTES)
                if not text.startswith(_SEAL) or _sealed(length, text) != text:
                    raise SnapshotError(f"{path}: its header is not the one that was written. {_ANEW}")
                self.about: Any = parse_json(parse_json(text)["__metadata__"][_ABOUT].encode())
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except SnapshotError:
            raise
        except CheckpointError as error:
            raise SnapshotError(f"{error}. {_ANEW}") from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise SnapshotError(f"{path}: is no snapshot, or of another kind ({error!r:.200}). {_ANEW}") from None
        except OSError as error:
            raise SnapshotError(f"{path}: cannot be mapped: {error}") from None

    @property
    def nbytes(self) -> int:
        return len(self._map)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor whose memory is the mapped file; it keeps the mapping alive. Raises KeyError."""
        stored = self._tensors[name]
        if not stored.nbytes:
            return torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=stored.nbytes, offset=stored.offset)
        return raw.view(stored.dtype).view(stored.shape)
