"""Checkpoints that are quantized already, in another scheme: their tensors are decoded as they stream by.

vLLM's loaders take whole tensors by name, split, fuse and shard them. So a matrix is handed on when the last of its
parts has come, under the name that it has in high precision; what is copied of it into a weight is moved or decoded
then, and each rank does so with its part (`qtensor.sources.undecoded`). What waits is held as the quantized bytes that
came.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from qtensor.checkpoint.requantizing import leaf_of, parts_that
from qtensor.errors import CheckpointError, IncompleteLoadError
from qtensor.lazy.sources import is_high_precision
from qtensor.sources.families import recognise
from qtensor.sources.source import Matrix, Source, Spec, laid_out
from qtensor.sources.undecoded import QuantizedMatrix, Undecoded
from qtensor.tensor.rooms import passing_copy

OWN = "*"


def decoded(
    weights: Iterable[tuple[str, torch.Tensor]], config: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint, or of a trainer, with quantized weights as if they were in `dtype`.

    config: its quantization_config, as far as anybody knows it. Raises CheckpointError for parts that mean nothing, and
    IncompleteLoadError for a weight that lacks one.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    unshaped: dict[str, str] = {}  # Why a weight's parts do not tell its shape yet: those to come may.
    unused: dict[str, frozenset[str]] = {}  # Of weights that were handed on.
    for name, tensor in weights:
        part = _part_of(name, tensor)
        if part is None:
            yield name, tensor
            continue
        weight, kind = part
        if kind in unused.get(weight, ()):
            continue
        group = groups.setdefault(weight, {})
        group[kind] = tensor
        found = _decode(weight, group, config, dtype)
        unshaped[weight] = found.unshaped
        if found.values is None:
            group[kind] = passing_copy(tensor)  # Whoever sends it may use its memory for the next one.
            continue
        del groups[weight]
        unused[weight] = found.unused
        yield weight, found.values
    for weight, group in groups.items():
        if why := unshaped.get(weight):
            raise CheckpointError(f"{weight}: {why}")
        if OWN in group or any(not is_high_precision(tensor) for tensor in group.values()):
            came = ", ".join(kind.replace(OWN, weight.rpartition(".")[2]) for kind in group)
            raise IncompleteLoadError(
                f"{weight}: of its parts only {came} arrived, and no format that can be decoded is made of that alone"
            )
        for kind, tensor in group.items():  # No part of a weight after all: an attention's k_scale.
            yield weight.rpartition(".")[0] + "." + kind.replace(OWN, weight.rpartition(".")[2]), tensor


class _Found(NamedTuple):
    """What the parts of a weight make.

    values: the weight, if all of its parts are there. unused: parts that its format has and does not need.
    unshaped: why they do not tell its shape, if they do not.
    """

    values: torch.Tensor | None = None
    unused: frozenset[str] = frozenset()
    unshaped: str = ""


def _part_of(name: str, tensor: torch.Tensor) -> tuple[str, str] | None:
    """Which weight a tensor is a part of, and which part; None for one that stands for itself."""
    if not is_high_precision(tensor) and tensor.dtype != torch.bool:
        fp8 = tensor.is_floating_point()  # Experts in one tensor are called something else.
        if leaf_of(name) == "weight" or (fp8 and not any(weight != name for weight, _ in parts_that(name))):
            return name, OWN
    found = list(parts_that(name))
    return next((each for each in found if leaf_of(each[0]) == "weight"), found[0] if found else None)


def _decode(weight: str, group: Mapping[str, torch.Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> _Found:
    try:
        source = recognise(_specs_of(group), config)
        if source is None:
            return _Found()
        try:
            count, shape = laid_out(source, _specs_of(group), lambda part: group[part])
        except CheckpointError as error:
            return _Found(unshaped=str(error))
        stacked = count[0] if count else 0
        each = [{p: t[e] for p, t in group.items()} for e in range(stacked)] if stacked else [dict(group)]
        made = [_matrix(source, parts, shape) for parts in each]
    except CheckpointError as error:
        raise CheckpointError(f"{weight}: {error}") from None
    matrices = [matrix for matrix in made if matrix is not None]
    if len(matrices) != len(made):
        return _Found()
    parts = matrices[0].source.parts(matrices[0].shape) if matrices else {}
    unused = frozenset(part for part, spec in parts.items() if not spec.needed)
    return _Found(Undecoded.of(matrices, dtype, bool(stacked)), unused)


def _specs_of(parts: Mapping[str, torch.Tensor]) -> dict[str, Spec]:
    return {part: Spec(tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()}


def _matrix(source: Source, parts: Mapping[str, torch.Tensor], shape: Matrix) -> QuantizedMatrix | None:
    wanted = {part: spec for part, spec in source.parts(shape).items() if spec.needed}
    if wanted.keys() - parts.keys():
        return None
    for part, spec in wanted.items():
        found = Spec(parts[part].dtype, tuple(parts[part].shape))
        if not spec.fits(found):
            raise CheckpointError(f"its {part.replace(OWN, '')} is {found}, which does not fit {list(shape)}")
    return QuantizedMatrix(source, parts, shape)
