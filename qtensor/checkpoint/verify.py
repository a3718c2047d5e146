"""What has to hold of a checkpoint before anyone trusts it. Writers check their own work; `qtensor verify` any."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import kernels
from ..errors import CheckpointError, ConfigError
from ..report.progress import Progress, ProgressLike, from_bytes
from ..tensor.digests import Content, sha256_of, usual_workers
from ..tensor.qtensor import QTensor
from .layouts import LAYOUTS, Layout, reader
from .reading import DTYPE_NAMES, MANIFEST, Checkpoint, Stored, bytes_of, read_manifest

_FEW_BYTES = 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Weight:
    """A quantized matrix of a checkpoint: its module, how it lies there, and its tensors by their last name."""

    module: str
    layout: Layout
    tensors: dict[str, Stored]

    def read(self, dtype: torch.dtype) -> QTensor:
        return self.layout.weight(self.module, {name: s.read() for name, s in self._items}, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix. Raises CheckpointError where its tensors do not belong together. Values and scales are not
        read."""
        parts = {name for name, entry in self.layout.entries.items() if entry.decode is not None}
        tensors = {name: _meta(s) if name in parts else self._small(s) for name, s in self._items}
        rows, cols = self.layout.weight(self.module, tensors, torch.bfloat16).shape
        return rows, cols

    def outline(self) -> QTensor:
        """The weight with its scales, and without its values, which are on the meta device."""
        data = self.layout.data
        tensors = {name: _meta(s) if name == data else s.read() for name, s in self._items}
        return self.layout.weight(self.module, tensors, torch.bfloat16)

    @staticmethod
    def _small(stored: Stored) -> torch.Tensor:
        return stored.read() if stored.nbytes <= _FEW_BYTES else _meta(stored)

    @property
    def _items(self) -> Iterable[tuple[str, Stored]]:
        return self.tensors.items()


def _meta(stored: Stored) -> torch.Tensor:
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def weights_of(checkpoint: Checkpoint) -> tuple[dict[str, Weight], dict[str, Stored]]:
    """The quantized weights by module, and all other tensors by name.

    Raises CheckpointError for a weight without its scale, or a scale without its weight.
    """
    plain = dict(checkpoint.tensors)
    config = checkpoint.quantization
    layouts = [layout for rows in LAYOUTS.values() for layout in rows.values()]
    scales = {layout.scale for layout in layouts}
    values = {layout.data for layout in layouts} - {"weight"}
    found: dict[str, Weight] = {}
    layout_for = reader(config) if config is not None else None
    for name in checkpoint.tensors:
        module, _, leaf = name.rpartition(".")
        if leaf not in scales:
            continue
        layout = layout_for(module) if layout_for is not None else None
        if layout is None:
            raise CheckpointError(f"{name}: config.json does not say how {module} is quantized")
        tensors = {}
        for suffix in layout.entries:
            part = plain.pop(f"{module}.{suffix}" if module else suffix, None)
            if part is None:
                raise CheckpointError(f"{module}: is quantized, and the checkpoint has no {module}.{suffix}")
            tensors[suffix] = part
        found[module] = Weight(module, layout, tensors)
    for name, stored in plain.items():
        if name.rpartition(".")[2] in values or (stored.dtype.is_floating_point and stored.dtype.itemsize == 1):
            raise CheckpointError(f"{name}: holds {stored.dtype} values, and the checkpoint has no scales for them")
    return found, plain


def verify_checkpoint(folder: str | Path, workers: int = 2, *, progress: ProgressLike = None) -> list[str]:
    """Everything that is wrong with a checkpoint, in words: names, dtypes, shapes, scales, checksums, missing files.

    Args:
        folder: Of the checkpoint.
        workers: Threads.
        progress: As `online_quant` takes it; events count the bytes whose checksums are compared.

    Returns:
        One sentence per problem; none if the checkpoint is whole.

    Raises:
        ConfigError: An argument is of the wrong kind.
    """
    require_workers(workers)
    try:
        checkpoint = Checkpoint(folder)
        weights, _ = weights_of(checkpoint)
        content = read_manifest(checkpoint.folder) if (checkpoint.folder / MANIFEST).exists() else None
    except CheckpointError as error:
        return [str(error)]
    found = list(_against_manifest(checkpoint, content)) if content is not None else []
    listed = content["tensors"] if content is not None else {}
    summed = {stored: listed[name].get("sha256") for name, stored in checkpoint.tensors.items() if name in listed}
    summed |= _named_by_the_hub(checkpoint.files)
    with Progress(progress, "verifying", sum(s.nbytes for s in summed), "byte") as shown:
        with ThreadPoolExecutor(workers) as pool:
            for result in pool.map(_scale_problems, weights.values()):
                found += result
        return found + _checksum_problems(summed, workers, shown.advance)


def problems(folder: str | Path, workers: int = 2, on_bytes: Callable[[int], None] | None = None) -> list[str]:
    """`verify_checkpoint` by its name in 0.1; it goes in 0.3.

    Args:
        folder: Of the checkpoint.
        workers: Threads.
        on_bytes: Called with the bytes of each piece that has been read.

    Returns:
        One sentence per problem; none if the checkpoint is whole.
    """
    heard = from_bytes(lambda fresh, _: on_bytes(fresh)) if on_bytes is not None else False
    return verify_checkpoint(folder, workers, progress=heard)


def require_workers(workers: int) -> None:
    """Raises ConfigError for a number of threads that is none."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"workers is a number of threads, at least 1, not {workers!r}")


def require_sound(folder: Path, workers: int = 2) -> None:
    """Raises CheckpointError if what was just written does not read back as it was meant."""
    found = verify_checkpoint(folder, workers, progress=False)
    if found:
        raise CheckpointError(f"{folder}: what was written does not read back: {found[0]} ({len(found)} problems)")


def require_written(folder: Path, tensors: Iterable[Stored]) -> None:
    """Raises CheckpointError naming a tensor, or a file, whose bytes are not those that were written, as the folder's
    list of contents has their SHA-256, or the Hub's cache the files'. They are read in as many threads as there are
    cores, eight at most."""
    expected: dict[Stored, str | None] = {}
    if (folder / MANIFEST).exists():
        listed = read_manifest(folder)["tensors"]
        expected = {stored: listed.get(stored.name, {}).get("sha256") for stored in tensors}
    else:
        paths = sorted({stored.path for stored in tensors})
        expected = _named_by_the_hub(paths)
        if unknown := [path for path in paths if path not in {stored.path for stored in expected}]:
            raise CheckpointError(
                f"{unknown[0]}: there is no checksum to verify it by: no {MANIFEST}, as `save_checkpoint` and `qtensor "
                "quantize` leave, and it is not in the Hub's cache. Load it without verify"
            )
    if found := _checksum_problems(expected, None, _nobody):
        raise CheckpointError(f"{folder}: {found[0]}")


def _named_by_the_hub(paths: Iterable[Path]) -> dict[Stored, str | None]:
    """Whole files, and their SHA-256: the Hub's cache keeps a large file as models--NAME/blobs/SHA256, to which the
    folder's is a link."""
    found: dict[Stored, str | None] = {}
    for path in paths:
        real = path.resolve()
        if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
            size = real.stat().st_size
            found[Stored(path.name, path, torch.uint8, (size,), 0, size)] = real.name
    return found


def _nobody(nbytes: int) -> None:
    """Nobody hears of progress."""


def _read(stored: Stored, most: int) -> Iterator[memoryview]:
    """A tensor's bytes."""
    raw = Stored(stored.name, stored.path, torch.uint8, (stored.nbytes,), stored.offset, stored.nbytes)
    buffer = torch.empty(min(most, stored.nbytes), dtype=torch.uint8, device="cpu")
    for start in range(0, stored.nbytes, most):
        yield bytes_of(raw.read(start, buffer[: min(most, stored.nbytes - start)]))


def _against_manifest(checkpoint: Checkpoint, content: dict[str, Any]) -> Iterator[str]:
    """Names, dtypes, shapes and files, compared with qtensor.json."""
    for file in content["files"]:
        if not (checkpoint.folder / file).exists():
            yield f"{file}: is missing"
    expected = content["tensors"]
    for name in sorted(expected.keys() - checkpoint.tensors.keys()):
        yield f"{name}: is missing"
    for name in sorted(checkpoint.tensors.keys() - expected.keys()):
        yield f"{name}: is in the files and not in {MANIFEST}"
    for name, record in expected.items():
        stored = checkpoint.tensors.get(name)
        if stored is None:
            continue
        held = {"file": stored.path.name, "dtype": DTYPE_NAMES[stored.dtype], "shape": list(stored.shape)}
        for key, value in held.items():
            if record.get(key) != value:
                yield f"{name}: its {key} is {value}, and {MANIFEST} says {record.get(key)}"


def _scale_problems(weight: Weight) -> list[str]:
    """Scales are finite, and 0 only where all values are. Those of integers may be negative, as some tools choose them
    to have one more integer on the side of the largest value."""
    try:
        outline = weight.outline()
    except CheckpointError as error:
        return [str(error)]
    fmt = outline.scheme.format
    steps = [fmt.step(outline.scale), *outline.parts()[2:]]
    if fmt.element in ("int8", "int4"):
        steps = [step.abs() for step in steps]
    if all(bool((step > 0).all() and step.isfinite().all()) for step in steps):
        return []
    if all(bool((step >= 0).all() and step.isfinite().all()) for step in steps) and not _any_value_at_zero(weight):
        return []
    name = weight.tensors[weight.layout.scale].name
    return [f"{name}: holds scales that are not finite and positive ({list(outline.shape)} weight)"]


def _any_value_at_zero(weight: Weight) -> bool:
    """Is there a value that is not 0 under a scale, or global scale, that is?"""
    held = weight.read(torch.float32)
    fmt = held.scheme.format
    zero = fmt.step(held.scale) == 0 if fmt.has_zero_point else held.scale.float() == 0
    if held.global_scale is not None:
        zero |= held.global_scale == 0
    marks = torch.where(zero, 1.0, 0.0)
    marks = fmt.word(marks, fmt.zero(held.scale)) if fmt.has_zero_point else marks.to(fmt.scale_dtype)
    ones = None if held.global_scale is None else torch.ones_like(held.global_scale)
    parts = kernels.Parts(held.qdata, marks, ones)
    return bool(kernels.serving(*parts).dequantize(parts, fmt, torch.float32).any())


def _checksum_problems(
    expected: Mapping[Stored, str | None], workers: int | None, on_bytes: Callable[[int], None]
) -> list[str]:
    """Of tensors and the SHA-256 that they should have. workers: threads; None for the usual number."""
    unreadable: dict[Stored, str] = {}

    def pieces(stored: Stored, most: int) -> Iterator[memoryview]:
        try:
            for piece in _read(stored, most):
                yield piece
                on_bytes(len(piece))
        except CheckpointError as error:
            unreadable[stored] = str(error)

    contents = [Content(stored.nbytes, partial(pieces, stored)) for stored in expected]
    digests = sha256_of(contents, workers or usual_workers(contents))
    found = []
    for (stored, sum_), digest in zip(expected.items(), digests, strict=True):
        if stored in unreadable:
            found.append(unreadable[stored])
        elif digest.hex() != sum_:
            found.append(f"{stored.name}: its bytes in {stored.path.name} are not those that were written")
    return found
