"""Files that a stranger may have written: opened only if they are ordinary ones, read only so far, and JSON or refused.

What is wrong is a CheckpointError that names the file. A FIFO would wait for ever, a device may do anything, and a
sparse file claims any size, so all are told by the handle that is read from, not by a look at the name before.
"""

from __future__ import annotations

import json
import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

CONFIG_BYTES = 16 << 20
"""Of a config.json. The largest have a list of some ten thousand modules: a few MB."""
LIST_BYTES = 100_000_000
"""Of a list of tensors (an index, qtensor.json, the header of a safetensors file): the limit that the safetensors
library has for headers. A list of a million tensors still fits."""
_WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


def open_file(path: Path) -> FileIO:
    """A handle without a buffer to read an ordinary file, or a link to one, from.

    Raises CheckpointError for anything else, without waiting for it, and for what cannot be opened.
    """
    try:
        handle = os.open(path, os.O_RDONLY | _WITHOUT_WAITING)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CheckpointError(f"{path}: is no ordinary file, and is not read")
    return FileIO(handle, "rb")


def read_up_to(path: Path, file: FileIO, count: int, limit: int) -> bytes:
    """The next `count` bytes, or those up to the file's end. Raises CheckpointError for more than `limit`."""
    if count > limit:
        raise CheckpointError(f"{path}: {count:,} bytes of it are text, and at most {limit:,} are read")
    pieces = bytearray()
    while len(pieces) < count and (piece := file.read(count - len(pieces))):
        pieces += piece
    return bytes(pieces)


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object of text that can be written again. Raises CheckpointError naming the file."""
    with open_file(path) as file:
        data = read_up_to(path, file, os.fstat(file.fileno()).st_size, limit)
    try:
        found = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds {type(found).__name__}, not a JSON object")
    return found


def parse_json(data: bytes, **options: Any) -> Any:
    """UTF-8 JSON as `json.loads` with `options` reads it. Raises ValueError, also for halves of surrogate pairs, which
    JSON can write and UTF-8 cannot, and RecursionError for what is nested too deeply."""
    found = json.loads(data.decode("utf-8"), **options)
    if b"\\u" in data:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def require_utf8_name(path: Path) -> None:
    """Lists of files are UTF-8. Raises CheckpointError for a file whose name cannot be written there."""
    try:
        path.name.encode("utf-8")
    except UnicodeEncodeError:
        name = os.fsencode(path.name)
        raise CheckpointError(f"{path.parent}: the name {name!r} is not UTF-8; rename the file") from None
