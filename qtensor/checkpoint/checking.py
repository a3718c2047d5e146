"""What has to hold of a checkpoint before anyone trusts it. Writers check their own work; `qtensor verify` any."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .layouts import LAYOUTS, Layout, reader
from .reading import DTYPE_NAMES, Checkpoint, Stored, bytes_of, read_json
from .writing import MANIFEST

_PIECE = 16 << 20


@dataclass(frozen=True)
class Weight:
    """A quantized matrix of a checkpoint: its module, how it lies there, and its tensors by their last name."""

    module: str
    layout: Layout
    tensors: dict[str, Stored]

    def read(self, dtype: torch.dtype) -> Any:
        return self.layout.weight(self.module, {suffix: s.read() for suffix, s in self.tensors.items()}, dtype)


def weights_of(checkpoint: Checkpoint) -> tuple[dict[str, Weight], dict[str, Stored]]:
    """The quantized weights by module, and all other tensors by name.

    Raises CheckpointError for a weight without its scale, or a scale without its weight.
    """
    plain = dict(checkpoint.tensors)
    config = checkpoint.config.get("quantization_config")
    scales = {layout.scale for rows in LAYOUTS.values() for layout in rows.values()}
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
        for suffix in layout.specs((1, 1)):
            part = plain.pop(f"{module}.{suffix}" if module else suffix, None)
            if part is None:
                raise CheckpointError(f"{module}: is quantized, and the checkpoint has no {module}.{suffix}")
            tensors[suffix] = part
        found[module] = Weight(module, layout, tensors)
    for name, stored in plain.items():
        if stored.dtype.is_floating_point and stored.dtype.itemsize == 1:
            raise CheckpointError(f"{name}: holds {stored.dtype} values, and the checkpoint has no scales for them")
    return found, plain


def problems(folder: str | Path, workers: int = 2, on_bytes: Callable[[int], None] = lambda n: None) -> list[str]:
    """Everything that is wrong with a checkpoint, in words: names, dtypes, shapes, scales, checksums, missing files."""
    try:
        checkpoint = Checkpoint(folder)
        weights, _ = weights_of(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    found = list(_against_manifest(checkpoint))
    jobs: list[Callable[[], list[str]]] = [lambda w=w: _scale_problems(w) for w in weights.values()]  # type: ignore[misc]
    if (checkpoint.folder / MANIFEST).exists():
        expected = _manifest(checkpoint)["tensors"]
        for name, stored in checkpoint.tensors.items():
            if name in expected:
                sha = expected[name].get("sha256")
                jobs.append(lambda s=stored, sha=sha: _checksum_problems(s, sha, on_bytes))  # type: ignore[misc]
    with ThreadPoolExecutor(workers) as pool:
        for result in pool.map(lambda job: job(), jobs):
            found += result
    return found


def require_sound(folder: Path, workers: int = 2) -> None:
    """Raises CheckpointError if what was just written does not read back as it was meant."""
    found = problems(folder, workers)
    if found:
        raise CheckpointError(f"{folder}: what was written does not read back: {found[0]} ({len(found)} problems)")


def sha256(stored: Stored, on_bytes: Callable[[int], None] = lambda n: None) -> str:
    """Of a tensor's bytes, read in bounded pieces."""
    digest = hashlib.sha256()
    raw = Stored(stored.name, stored.path, torch.uint8, (stored.nbytes,), stored.offset, stored.nbytes)
    buffer = torch.empty(min(_PIECE, stored.nbytes), dtype=torch.uint8)
    for start in range(0, stored.nbytes, _PIECE):
        piece = buffer[: min(_PIECE, stored.nbytes - start)]
        digest.update(bytes_of(raw.read(start, piece)))
        on_bytes(piece.numel())
    return digest.hexdigest()


def _manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.folder / MANIFEST
    content = read_json(path)
    if not isinstance(content.get("tensors"), dict) or not isinstance(content.get("files"), list):
        raise CheckpointError(f"{path}: is not the list of contents that qtensor writes")
    return content


def _against_manifest(checkpoint: Checkpoint) -> Iterator[str]:
    """Names, dtypes, shapes and files, compared with qtensor.json, if the folder has one."""
    if not (checkpoint.folder / MANIFEST).exists():
        return
    try:
        content = _manifest(checkpoint)
    except CheckpointError as error:
        yield str(error)
        return
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
    module, layout = weight.module, weight.layout
    data, scale = weight.tensors[layout.data], weight.tensors[layout.scale]
    try:
        shape = (data.shape[0], data.shape[-1])
        meta = {s: torch.empty(t.shape, dtype=t.dtype, device="meta") for s, t in weight.tensors.items()}
        layout.weight(module, meta, torch.bfloat16)
    except CheckpointError as error:
        return [str(error)]
    values = scale.read().float()
    if bool((values > 0).all()) and bool(values.isfinite().all()):
        return []
    if layout.scheme.format.granularity == "tensor" and float(values.reshape(-1)[0]) == 0 and not _any_nonzero(data):
        return []  # a weight of zeros
    return [f"{scale.name}: holds scales that are not finite and positive ({list(shape)} weight)"]


def _any_nonzero(stored: Stored) -> bool:
    return bool(stored.read().reshape(-1).view(torch.uint8).any())


def _checksum_problems(stored: Stored, expected: str | None, on_bytes: Callable[[int], None]) -> list[str]:
    try:
        held = sha256(stored, on_bytes)
    except CheckpointError as error:
        return [str(error)]
    return (
        [] if held == expected else [f"{stored.name}: its bytes in {stored.path.name} are not those that were written"]
    )
