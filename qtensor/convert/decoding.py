"""Decoded: a quantized weight, read as if it lay there in high precision, or moved where that is exact."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.reading import Checkpoint, Stored
from ..checkpoint.requantizing import groups_of, weights_in
from ..errors import CheckpointError, LossySourceError
from ..kernels import NonFinite
from ..schemes.scheme import Scheme
from ..sources.families import recognise
from ..sources.moving import moved_rows
from ..sources.scales import has_nan
from ..sources.source import Source, Spec, laid_out
from ..tensor.qtensor import QTensor


@dataclass(frozen=True)
class Decoded:
    """What conversions ask of a `Stored`, of a matrix that several tensors make up. Can be pickled.

    name: of the weight. group: its tensors by part name. dtype: of the values that it is decoded to.
    lossless: refuse what cannot be moved.
    """

    name: str
    source: Source
    group: Mapping[str, Stored]
    dtype: torch.dtype
    shape: tuple[int, ...]
    lossless: bool = False

    @property
    def bulk(self) -> Stored:
        """The largest of its tensors: the weight is written to the file that this one is in."""
        return max(self.group.values(), key=lambda stored: stored.nbytes)

    @property
    def path(self) -> Path:
        return self.bulk.path

    @property
    def offset(self) -> int:
        return self.bulk.offset

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.group.values())

    @property
    def matrix(self) -> tuple[int, int]:
        rows, cols = self.shape
        return rows, cols

    @property
    def unit_rows(self) -> int:
        """Rows that are read together. Of a tensor that has them along another dimension: all."""
        specs = self.source.parts(self.matrix)
        along = {spec.span.axis for name, spec in specs.items() if name in self.group and spec.needed}
        return self.source.unit(self.matrix) if along <= {0, None} else max(self.shape[0], 1)

    def read(self, first: int, out: torch.Tensor) -> torch.Tensor:
        """Into `out` `[rows, K]`, the rows from flat index `first` on, which begins a unit."""
        start = first // max(1, self.shape[1])
        size = (out.shape[0], self.shape[1])
        return out.copy_(self.source.decode(self._parts(start, start + len(out)), size, self.dtype))

    def moved(self, scheme: Scheme, start: int, stop: int) -> QTensor | None:
        """Rows start:stop in the scheme, if they are the same numbers in it. Raises LossySourceError if they have to
        be, and are not, and NonFinite."""
        fmt, size, made = scheme.format, (stop - start, self.shape[1]), None
        if self.source.moves(fmt) is not None:
            parts = self._parts(start, stop)
            made = moved_rows(self.source, parts, size, fmt)
            if made is not None and has_nan(made.qdata):
                at = int(((made.qdata.view(torch.uint8) & 0x7F) == 0x7F).reshape(-1).nonzero()[0])
                raise NonFinite(start * size[1] + at, float("nan"))
            if made is not None and (self.source.exact(parts, fmt) or not self.lossless):
                whole = made.global_scale
                return QTensor(made.qdata, made.scale, scheme, self.dtype, global_scale=whole, cols=size[1])
        if self.lossless:
            raise LossySourceError(
                f"{self.name}: {self.source} is not the same numbers in {scheme.name}, and strict_source is "
                '"lossless". Choose a scheme in which it is (docs/sources.md has the table), or allow the loss.'
            )
        return None

    def _parts(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        parts = {}
        for name, spec in self.source.parts(self.matrix).items():
            if not spec.needed:
                continue
            stored = self.group[name]
            if spec.span.axis != 0 or not stored.shape or stop - start == self.shape[0]:
                parts[name] = stored.read()
                continue
            a, b = spec.span.entries(start, stop, stored.shape[0])
            each = stored.nbytes // stored.dtype.itemsize // stored.shape[0]
            piece = torch.empty((b - a, *stored.shape[1:]), dtype=stored.dtype, device="cpu")
            parts[name] = stored.read(a * each, piece)
        try:
            self.source.check(parts, (stop - start, self.shape[1]))
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from None
        return parts


@dataclass(frozen=True)
class DecodedStack(Decoded):
    """A stack of such matrices in one tensor, `[E, …]`, which is only read in high precision, matrix by matrix."""

    @property
    def matrix(self) -> tuple[int, int]:
        a, b = self.shape[1:]
        return (b, a) if self.source.transposed else (a, b)

    def matrix_at(self, e: int) -> torch.Tensor:
        """One of them, as it lies in the stack."""
        parts = {}
        for name, spec in self.source.parts(self.matrix).items():
            if spec.needed:
                stored = self.group[name]
                piece = torch.empty(stored.shape[1:], dtype=stored.dtype, device="cpu")
                parts[name] = stored.read(e * piece.numel(), piece)
        try:
            self.source.check(parts, self.matrix)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name}: {error}") from None
        values = self.source.decode(parts, self.matrix, self.dtype)
        return (values.t() if self.source.transposed else values).contiguous()


def decoded(checkpoint: Checkpoint, lossless: bool) -> Checkpoint:
    """The checkpoint with each quantized weight as one tensor, under the name that it has in high precision.

    Raises CheckpointError for what is quantized and cannot be decoded.
    """
    config = checkpoint.quantization or {}
    groups, _ = groups_of(checkpoint.tensors, weights_in(checkpoint.tensors))
    tensors: dict[str, Any] = dict(checkpoint.tensors)
    for name, group in groups.items():
        specs = {part: Spec(stored.dtype, stored.shape) for part, stored in group.items()}
        try:
            source = recognise(specs, config)
            if source is None:
                continue
            count, shape = laid_out(source, specs, _reader(group))
            source = source.of(shape)
            for part, spec in source.parts(shape).items():
                if spec.needed and part not in specs:
                    raise CheckpointError(f"is in {source}, and has no {part}")
                if part in specs and not replace(spec, shape=(*count, *spec.shape)).fits(specs[part]):
                    raise CheckpointError(f"{group[part].name} does not fit a weight {[*count, *shape]} in {source}")
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        for stored in group.values():
            tensors.pop(stored.name, None)
        if count:
            shape = (*count, *(reversed(shape) if source.transposed else shape))
        make = DecodedStack if count else Decoded
        tensors[name] = make(name, source, group, _dtype_of(checkpoint.config), shape, lossless)
    left = [t.name for t in tensors.values() if isinstance(t, Stored) and len(t.shape) > 1 and _is_quantized(t.dtype)]
    if left and (checkpoint.quantization is not None or any(isinstance(t, Decoded) for t in tensors.values())):
        raise CheckpointError(
            f"{checkpoint.folder}: is quantized already, and {left[0]} is of no format that can be decoded, or "
            "lacks a part (docs/sources.md); start from its high-precision source"
        )
    found = copy.copy(checkpoint)
    found.tensors = tensors
    return found


def _reader(group: Mapping[str, Stored]) -> Callable[[str], torch.Tensor]:
    return lambda part: group[part].read()


def _is_quantized(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 1 or dtype in (torch.int32, torch.int16)


def _dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """What the model computes in, as config.json says."""
    text = config.get("text_config")
    told = [config.get("dtype"), config.get("torch_dtype")]
    told += [text.get("dtype"), text.get("torch_dtype")] if isinstance(text, Mapping) else []
    names = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32)}
    return next((names[t] for t in told if isinstance(t, str) and t in names), torch.bfloat16)
