"""Writing a checkpoint so that it is whole or not there.

Everything is written to a folder in `FOLDER.partial`, beside the folder it is for, read back and compared, and renamed
in one step. Whatever happens before that step, the folder is as it was. `qtensor.json`, in the finished folder, lists
each tensor with its dtype, shape and SHA-256, and every file that belongs to the checkpoint, which is also how a later
save knows what it may replace.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import CheckpointError
from ..text import printable
from .files import require_utf8_name
from .layouts import Spec
from .reading import CONFIG, DTYPE_NAMES, DTYPES, INDEX, MANIFEST, PICKLES, bytes_of, read_manifest

MARK = ".qtensor-partial"  # A folder beside what is being built: its lock, and notes for a resumed run.
LOCK, PLAN = "lock", "plan"
_WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
Records = dict[str, dict[str, Any]]
"""What was written, by tensor name: file, dtype, shape, sha256."""


class Names:
    """The names of the tensors to be written, and what each is made of: all are known before the first byte is."""

    def __init__(self) -> None:
        self._origins = {"__metadata__": "the metadata of each file"}

    def claim(self, name: str, origin: str) -> None:
        """Raises CheckpointError if another tensor has the name: one of the two would be lost."""
        if name in self._origins:
            raise CheckpointError(
                f"{self._origins[name]} and {origin} would both be called {name} in the files; rename one of them"
            )
        self._origins[name] = origin


class ShardWriter:
    """One safetensors file, written piece by piece: where each tensor lies is known before any of them is.

    The file is the one the safetensors library would write. `write` may be called from several threads, as long as
    each tensor's pieces come from one, in order.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec]) -> None:
        self.path, self._specs = path, dict(specs)
        rank = {dtype: i for i, dtype in enumerate(DTYPES.values())}
        order = sorted(specs, key=lambda name: (rank[specs[name][0]], name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets, end = {}, 0
        for name in order:
            dtype, shape = specs[name]
            begin, end = end, end + dtype.itemsize * int(torch.Size(shape).numel())
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            self._offsets[name] = (begin, end)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self._written = dict.fromkeys(specs, 0)
        self._hashes = {name: hashlib.sha256() for name in specs}
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(self._base + end)

    def open(self) -> IO[bytes]:
        """A handle for `write`; each thread has its own."""
        return self.path.open("r+b", buffering=0)

    def write(self, file: IO[bytes], name: str, piece: torch.Tensor) -> None:
        """The next piece of a tensor."""
        if not piece.numel():
            return
        data = bytes_of(piece.detach().cpu().contiguous())
        begin, end = self._offsets[name]
        at = self._written[name]
        assert begin + at + len(data) <= end, name
        file.seek(self._base + begin + at)
        done = 0
        while done < len(data):
            done += file.write(data[done:])
        self._hashes[name].update(data)
        self._written[name] = at + len(data)

    def finish(self) -> Records:
        """Records of all tensors; each has to have been written whole."""
        for name, (begin, end) in self._offsets.items():
            if self._written[name] != end - begin:
                raise CheckpointError(f"{self.path}: {name} was not written whole")
        return {
            name: {
                "file": self.path.name,
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "sha256": self._hashes[name].hexdigest(),
            }
            for name, (dtype, shape) in self._specs.items()
        }


class Staging:
    """The folder `TARGET.partial`, in which a checkpoint is built before it takes its place. Links are followed.

    Its mark says that this writer made it, and holds the lock and the notes; the checkpoint lies beside the mark, in a
    folder of its own. Nothing else that may be there is ever removed. Only one process at a time may build. What an
    interrupted one left is kept for `resume`, if it noted its plan, or removed.
    """

    def __init__(self, target: str | Path, resume: bool = False) -> None:
        self.target = _real(target)
        self.path = partial_folder(target)
        self.notes, self.files = self.path / MARK, build_folder(target)
        _require_replaceable(self.target)
        if self.path.is_symlink() or (self.path.exists() and not _made_here(self.path)):
            raise CheckpointError(f"{self.path} is in the way, and was not made by qtensor; move it elsewhere")
        self._lock = _lock(self.notes)
        if not (resume and (self.notes / PLAN).exists() and self.files.is_dir()):
            _remove(self.files)
            for path in self.notes.iterdir():
                if path.name != LOCK:
                    _remove(path)
        self.files.mkdir(exist_ok=True)

    def require_space(self, nbytes: int) -> None:
        free = shutil.disk_usage(self.path).free
        if free < nbytes:
            raise CheckpointError(
                f"{self.path}: {nbytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
                f"{self.target} is as it was"
            )

    @contextmanager
    def building(self, keep: bool = False) -> Iterator[Path]:
        """The folder to write into. When the block fails it is removed (kept, for a later `resume`, with `keep`), and
        a full disk says so."""
        try:
            yield self.files
        except BaseException as error:
            if keep:
                _unlock(self._lock)
            else:
                self._clear()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CheckpointError(
                    f"{self.path}: no space left on the disk; {self.target} is as it was. Free some, and run it again."
                ) from None
            raise

    def publish(self) -> None:
        """Take the place of the target, in one step. What replaces a checkpoint is on the disk first, so that a power
        cut leaves one of the two; what replaces nothing has its source to fall back on."""
        _require_replaceable(self.target)
        if self.target.exists() and any(self.target.iterdir()):
            for path in (*(p for p in self.files.iterdir() if p.is_file()), self.files):
                _sync(path)
            _exchange(self.files, self.target)
            _sync(self.target.parent)
        else:
            os.replace(self.files, self.target)
        self._clear()

    def _clear(self) -> None:
        """Remove the staging folder. It stays if someone put another file into it."""
        shutil.rmtree(self.files, ignore_errors=True)
        shutil.rmtree(self.notes, ignore_errors=True)
        with suppress(OSError):
            self.path.rmdir()
        _unlock(self._lock)


def partial_folder(target: str | Path) -> Path:
    """Beside the target: what is needed while it is built."""
    path = _real(target)
    return path.with_name(path.name + ".partial")


def build_folder(target: str | Path) -> Path:
    """Where the files of a checkpoint are written."""
    return partial_folder(target) / "files"


def _real(target: str | Path) -> Path:
    """The folder that a path leads to, links followed, whether it exists or not."""
    path = Path(os.path.realpath(target))
    if path.is_symlink():
        raise CheckpointError(f"{target} is a link that leads nowhere; give a folder")
    return path


def _made_here(folder: Path) -> bool:
    """Does a folder bear the mark of this writer, or nothing, as when the writer was killed before it made its mark?"""
    mark = folder / MARK
    if not folder.is_dir() or mark.is_symlink():
        return False
    return (mark / LOCK).is_file() or (set(folder.iterdir()) <= {mark} and not any(mark.glob("*")))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(folder: Path, format: str, records: Records) -> None:
    """The index, where there is more than one file, and `qtensor.json`: written last, once."""
    files = sorted({record["file"] for record in records.values()})
    if len(files) > 1:
        total = sum(_nbytes(record) for record in records.values())
        weight_map = {name: records[name]["file"] for name in sorted(records)}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    content = {
        "version": 1,
        "format": format,
        "files": sorted({p.name for p in folder.iterdir()} | {MANIFEST}),
        "tensors": {name: records[name] for name in sorted(records)},
    }
    write_json(folder / MANIFEST, content)


def side_files(source: Path) -> list[Path]:
    """What lies beside a checkpoint's weights: tokenizer, generation settings, model code, licence. Nothing, where the
    checkpoint is one file.

    Raises CheckpointError for a name that no list of files can hold.
    """
    found = []
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        weights = path.name.lower().endswith(_WEIGHTS) or path.name.endswith(".index.json")
        ours = path.name in (CONFIG, INDEX, MANIFEST)
        if path.is_file() and not path.name.startswith(".") and not weights and not ours:
            require_utf8_name(path)
            found.append(path)
    return found


def carry_over(source: Path, folder: Path) -> None:
    """Copy the side files. Links out of the source are left out, with a warning."""
    for path in side_files(source):
        if leads_out(path):
            message = f"{path} is a link out of its folder and is not carried over to the checkpoint"
            warnings.warn(printable(message), stacklevel=4)
        else:
            shutil.copyfile(path, folder / path.name)


def leads_out(path: Path) -> bool:
    """Is a file of a checkpoint a link to one that is not the checkpoint's? The Hub's cache keeps its files as
    models--NAME/blobs/HASH, to which models--NAME/snapshots/REVISION/FILE are links."""
    folder, real = path.parent.resolve(), path.resolve()
    repository = folder.parent.parent
    cached = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return not real.is_relative_to(folder) and not (cached and real.parent == repository / "blobs")


def _nbytes(record: Mapping[str, Any]) -> int:
    return DTYPES[record["dtype"]].itemsize * int(torch.Size(record["shape"]).numel())


def _require_replaceable(target: Path) -> None:
    """A folder may be replaced if this library wrote every file in it."""
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a folder")
    held = {p.name: p.is_file() and not p.is_symlink() for p in target.iterdir()}
    if not held:
        return
    try:
        known = set(read_manifest(target)["files"])
    except CheckpointError:
        known = set()
    if alien := sorted(name for name, plain in held.items() if not plain or name not in known):
        raise CheckpointError(
            f"{target} holds {alien[0]}, which was not written by a save to this folder; nothing is overwritten. "
            "Give a new folder, or remove this one."
        )


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders in one step where the system can (Linux), or else in two."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(-100, os.fsencode(a), -100, os.fsencode(b), _EXCHANGE) == 0:
            return
    except (AttributeError, OSError, TypeError):
        pass
    aside = b.with_name(b.name + ".previous")
    os.replace(b, aside)
    try:
        os.replace(a, b)
    except BaseException:
        os.replace(aside, b)
        raise
    os.replace(aside, a)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Windows cannot for a folder."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(mark: Path) -> IO[bytes] | None:
    """Make the mark, and hold it until `_unlock`, or the end of the process. None where files cannot be locked
    (Windows)."""
    while True:
        try:
            mark.mkdir(parents=True, exist_ok=True)
            file = (mark / LOCK).open("ab")
        except FileNotFoundError:
            continue  # Its last holder has just removed it.
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:
                return file
            file.close()
        except ImportError:
            file.close()
            return None
        except OSError:
            file.close()
            raise CheckpointError(f"{mark.parent} is being written by another process") from None


def _unlock(file: IO[bytes] | None) -> None:
    if file is not None:
        file.close()
