"""Checkpoints that are quantized already, in another scheme: their tensors are decoded as they stream by.

vLLM's loaders take whole tensors by name, split, fuse and shard them. So a matrix is handed on when the last of its
parts has come, under the name that it has in high precision; what is copied of it into a weight is moved or decoded
then, and each rank does so with its part (`qtensor.sources.undecoded`). What waits is held as the quantized bytes that
came.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from qtensor.errors import CheckpointError, IncompleteLoadError
from qtensor.lazy.sources import is_high_precision
from qtensor.sources.families import part_names, recognise
from qtensor.sources.source import Source, Spec
from qtensor.sources.undecoded import QuantizedMatrix, Undecoded

OWN = "*"


def decoded(
    weights: Iterable[tuple[str, torch.Tensor]], config: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint, or of a trainer, with quantized weights as if they were in `dtype`.

    config: its quantization_config, as far as anybody knows it. Raises CheckpointError for parts that mean nothing, and
    IncompleteLoadError for a weight that lacks one.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        part = _part_of(name, tensor)
        if part is None:
            yield name, tensor
            continue
        weight, kind = part
        group = groups.setdefault(weight, {})
        group[kind] = tensor
        ready = _decode(weight, group, config, dtype)
        if ready is None:
            group[kind] = tensor.clone()  # Whoever sends it may use its memory for the next one.
            continue
        del groups[weight]
        yield weight, ready
    for weight, group in groups.items():
        if OWN in group or any(not is_high_precision(tensor) for tensor in group.values()):
            found = ", ".join(kind.replace(OWN, weight.rpartition(".")[2]) for kind in group)
            raise IncompleteLoadError(
                f"{weight}: of its parts only {found} arrived, and no format that can be decoded is made of that alone"
            )
        for kind, tensor in group.items():  # No part of a weight after all: an attention's k_scale.
            yield weight.rpartition(".")[0] + "." + kind.replace(OWN, weight.rpartition(".")[2]), tensor


def _part_of(name: str, tensor: torch.Tensor) -> tuple[str, str] | None:
    """Which weight a tensor is a part of, and which part; None for one that stands for itself."""
    leaf = name.rpartition(".")[2]
    prefix = name[: len(name) - len(leaf)]
    if not is_high_precision(tensor) and tensor.dtype != torch.bool and leaf == "weight":
        return name, OWN
    found = None
    for part in part_names():
        ending = part.removeprefix(OWN)
        if part == OWN or not leaf.endswith(ending) or (not part.startswith(OWN) and leaf != part):
            continue
        attribute = leaf.removesuffix(ending) if part.startswith(OWN) else "weight"
        if attribute == "weight" or (attribute and found is None):
            found = prefix + attribute, part
    return found


def _decode(
    weight: str, group: Mapping[str, torch.Tensor], config: Mapping[str, Any], dtype: torch.dtype
) -> torch.Tensor | None:
    """The weight, if all of its parts are there."""
    specs = {part: Spec(tensor.dtype, tuple(tensor.shape)) for part, tensor in group.items()}
    try:
        source = recognise(specs, config)
        if source is None:
            return None
        stacked = _stack_of(source, specs)
        each = [{p: t[e] for p, t in group.items()} for e in range(stacked)] if stacked else [dict(group)]
        made = [_matrix(source, parts) for parts in each]
    except CheckpointError as error:
        raise CheckpointError(f"{weight}: {error}") from None
    matrices = [matrix for matrix in made if matrix is not None]
    return Undecoded.of(matrices, dtype, bool(stacked)) if len(matrices) == len(made) else None


def _stack_of(source: Source, specs: Mapping[str, Spec]) -> int:
    """How many matrices it is a stack of; 0: one matrix."""
    try:
        source.shape(specs)
    except CheckpointError:
        sizes = {spec.shape[0] for spec in specs.values() if spec.shape}
        if len(sizes) != 1:
            raise
        return sizes.pop()
    return 0


def _matrix(source: Source, parts: Mapping[str, torch.Tensor]) -> QuantizedMatrix | None:
    specs = {part: Spec(tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}
    shape = source.shape(specs)
    wanted = {part: spec for part, spec in source.parts(shape).items() if spec.needed}
    if wanted.keys() - parts.keys():
        return None
    for part, spec in wanted.items():
        if not spec.fits(specs[part]):
            raise CheckpointError(f"its {part.replace(OWN, '')} is {specs[part]}, which does not fit {list(shape)}")
    return QuantizedMatrix(source, parts, shape)
