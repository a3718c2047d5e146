"""A checkpoint into a model, in a scheme: what it holds quantized is decoded as it is read, unit by unit.

Which tensors are the parts of which weight is told by names alone; what format they are, by their dtypes and shapes.
Every weight is looked at before the first is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..errors import CheckpointError
from ..lazy.lazy_tensor import LAZY
from ..regions.coverage import Box
from ..regions.views import View
from ..sources.collecting import Collector
from ..sources.families import part_names
from ..sources.source import Spec
from ..tensor.rooms import room_for
from .mapping import Part
from .reading import Stored

OWN = "*"
CHUNK_BYTES = 2 << 20
_LARGEST_ROW = 1 << 16
"""What is larger is no row, but a matrix of a stack."""
Group = dict[str, Stored]
"""The tensors of one quantized weight, by part name."""


def groups_of(tensors: Mapping[str, Stored], weights: Iterable[str]) -> tuple[dict[str, Group], dict[str, Stored]]:
    """The quantized ones of some weights, by name, each with its parts; and the tensors that are parts of none."""
    plain, groups, taken = dict(tensors), {}, set(weights)
    for name in sorted(taken):
        prefix, leaf = name[: len(name) - len(leaf_of(name))], leaf_of(name)
        names = {part: prefix + part.replace(OWN, leaf) for part in part_names()}
        group = {p: tensors[n] for p, n in names.items() if n in tensors and (p == OWN or n not in taken)}
        own = group.get(OWN)
        wide = own is not None and own.dtype.itemsize > 1
        if wide or (not group.keys() - {OWN} and (own is None or not own.dtype.is_floating_point)):
            continue
        groups[name] = group
        for stored in group.values():
            plain.pop(stored.name, None)
    return groups, plain


def weights_in(tensors: Iterable[str]) -> set[str]:
    """What the weights may be called that the tensors of a checkpoint are parts of, without a model to tell."""
    return {weight for name in tensors for weight, _ in parts_that(name)}


def parts_that(name: str) -> Iterator[tuple[str, str]]:
    """Which part of which weight a tensor of that name may be: the weight's name, the part's."""
    for part in part_names():
        before, own, after = part.partition(OWN)
        if part == OWN or not name.endswith(after):
            continue
        base = name.removesuffix(after) if own else name
        leaf = leaf_of(base)
        prefix = base[: len(base) - len(leaf)]
        if not own and leaf == part:
            yield prefix + "weight", part
        elif own and leaf.startswith(before) and not leaf[len(before) :].startswith("_") and leaf != before:
            yield prefix + leaf[len(before) :], part


def leaf_of(name: str) -> str:
    return name.rpartition(".")[2]


def collectors(
    targets: Mapping[str, Any], places: Mapping[str, Part], groups: Mapping[str, Group]
) -> dict[str, Collector]:
    """Who takes each group. Raises CheckpointError for one that cannot be decoded, or not into its weight."""
    found = {}
    for name, group in groups.items():
        part = places[name]
        target = targets[part.name]
        if not isinstance(target, LAZY):
            raise CheckpointError(f"{name}: is quantized in the checkpoint, and {part.name} is not being loaded")
        collector = target._armed.host.collector(target._armed, make=True, view=part.view)
        assert collector is not None
        collector.expect({p: Spec(stored.dtype, stored.shape) for p, stored in group.items()})
        collector.require_parts()
        found[name] = collector
    return found


def fill(collector: Collector, group: Group, buffer: Buffer) -> None:
    """Read the parts of a weight: the small ones first, so that values are decoded as they are read. Where a matrix
    waits for all of them, they are read all at once, instead of being held."""
    for part, stored in sorted(group.items(), key=lambda item: item[1].nbytes):
        matrix = stored.nbytes // max(1, collector.matrices)
        for box, piece in pieces(
            stored, buffer, max(CHUNK_BYTES, matrix) if collector.needs_all_values else CHUNK_BYTES
        ):
            collector.write(part, piece, box, stored.shape)


def copy_in_pieces(target: torch.Tensor, view: View, stored: Stored, buffer: Buffer) -> None:
    """Read a tensor in high precision into a view of a weight, rows at a time; all at once where they are not rows of
    it, or are not quantized before the last is there."""
    at_once = len(view.size) != 2 or view.stride[1] != 1
    if isinstance(target, LAZY):
        scheme = target._armed.decided()
        at_once = at_once or (scheme is not None and scheme.format.needs_whole_matrix)
    place = target.as_strided(*view)
    for box, piece in pieces(stored, buffer, stored.nbytes if at_once else CHUNK_BYTES):
        (place[slice(*box[0])] if box else place).copy_(piece)


class Buffer:
    """Memory that tensors are read to, one after the other. Were it new for each, and freed, the C allocator would keep
    holes of its size between the finished weights."""

    def __init__(self) -> None:
        self._held = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Of that shape, valid until the next is taken."""
        nbytes = int(torch.Size(shape).numel()) * dtype.itemsize
        if nbytes > self._held.numel():
            self._held = room_for((max(nbytes, CHUNK_BYTES),), torch.uint8, self._held.device)
        return self._held[:nbytes].view(dtype).view(shape)


def pieces(stored: Stored, buffer: Buffer, every: int = CHUNK_BYTES) -> Iterable[tuple[Box, torch.Tensor]]:
    """A tensor in runs along its first dimension, each in memory that the next is read to: whole blocks of rows, or
    whole matrices."""
    if stored.nbytes <= every or not stored.shape:
        yield tuple((0, n) for n in stored.shape), stored.read(0, buffer.take(stored.shape, stored.dtype))
        return
    length, *rest = stored.shape
    row = stored.nbytes // stored.dtype.itemsize // length
    step = max(1, every // max(1, row * stored.dtype.itemsize))
    if row * stored.dtype.itemsize <= _LARGEST_ROW:
        step = max(1, step // 128) * 128
    memory = buffer.take((min(step, length), *rest), stored.dtype)
    for start in range(0, length, step):
        piece = stored.read(start * row, memory[: min(step, length - start)])
        yield ((start, start + len(piece)), *((0, n) for n in rest)), piece
