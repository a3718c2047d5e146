"""Tensors of a snapshot: each as the plain tensors that its file holds and a JSON object that says what they are.

A quantized weight is its parts, under its name and `::qdata`, `::scale`, `::global_scale`. A plain tensor is itself,
with its dimensions in the order of its memory (a convolution may be channels-last). What has memory in common with
another tensor, is split over ranks, or is of a class of another library has no such form, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..errors import SnapshotError
from ..kernels import Parts
from ..lazy.lazy_tensor import LAZY
from ..modules import is_dtensor
from ..schemes.scheme import Scheme, as_scheme
from ..tensor.checksums import weight_checksums
from ..tensor.qtensor import QTensor
from .reading import DTYPE_NAMES, DTYPES
from .writing import Names

_PARTS = ("qdata", "scale", "global_scale")
_PLAIN_CLASSES = (torch.Tensor, nn.Parameter)


@dataclass(frozen=True)
class Packed:
    """tensors: what the file holds. about: by name, what each of the snapshot's tensors is."""

    tensors: dict[str, torch.Tensor]
    about: dict[str, dict[str, Any]]


def pack(tensors: Mapping[str, torch.Tensor]) -> Packed:
    """Raises SnapshotError that names a tensor which cannot be in a snapshot."""
    names, found = Names(), Packed({}, {})
    spans: list[tuple[str, int, int, str]] = []
    for name, tensor in tensors.items():
        _require_packable(name, tensor)
        if isinstance(tensor, QTensor):
            parts = {f"{name}::{n}": part for n, part in zip(_PARTS, tensor.parts(), strict=False)}
            order = []
        else:
            order = _order(tensor)
            parts = {name: tensor.detach().permute(order)}
        for own, part in parts.items():
            names.claim(own, name)
            found.tensors[own] = part.detach().contiguous()
        spans += [(str(part.device), *_span(part), name) for part in parts.values() if part.numel()]
        found.about[name] = _about(tensor, order)
    for (device, _, end, name), (other_device, start, _, other) in pairwise(sorted(spans)):
        if device == other_device and start < end and name != other:
            raise SnapshotError(
                f"{name} and {other} have memory in common, and would be two tensors after a snapshot; clone one of "
                "them, or tie them as one Parameter"
            )
    sums = weight_checksums(tensors)
    for name, about in found.about.items():
        about["sha256"] = sums[name]
    return found


def unpack(name: str, about: Mapping[str, Any], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The tensor that `pack` was given. read: a tensor of the file, by its name there. Raises KeyError, TypeError,
    ValueError or RuntimeError where these are not the tensors of one."""
    dtype, shape = DTYPES[about["dtype"]], tuple(about["shape"])
    scheme = about["scheme"]
    if scheme is None:
        held = read(name)
        tensor = held.permute(sorted(range(held.dim()), key=about["order"].__getitem__))
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, and not {dtype} {list(shape)}")
        return tensor
    made = Scheme(as_scheme(scheme["name"]).format, scheme["activation"])
    fmt = made.format
    parts = [read(f"{name}::{part}") for part in _PARTS[: 3 if fmt.has_global_scale else 2]]
    stored = (*shape[:-2], shape[-1], shape[-2]) if scheme["transposed"] else shape
    wanted = _outline(stored, made)
    if [(p.shape, p.dtype) for p in parts] != wanted:
        raise ValueError(f"{name}: its parts are not those of {made} {list(shape)}")
    gain = parts[2] if fmt.has_global_scale else None
    return QTensor(parts[0], parts[1], made, dtype, scheme["transposed"], global_scale=gain, cols=stored[-1])


def require_sums(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Mapping[str, Any]], file: object) -> None:
    """Raises SnapshotError that names a tensor whose bytes are not those that were written."""
    for name, found in weight_checksums(tensors).items():
        if found != about[name]["sha256"]:
            raise SnapshotError(
                f"{file}: {name} is damaged: its bytes are not those that were written. Load the model in the ordinary "
                "way, and save a new snapshot of it."
            )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of its first byte, and behind its last."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def _outline(stored: tuple[int, ...], scheme: Scheme) -> list[tuple[torch.Size, torch.dtype]]:
    return [(part.shape, part.dtype) for part in Parts.of(stored, scheme.format, "meta")]


def _about(tensor: torch.Tensor, order: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "scheme": None}
    if isinstance(tensor, QTensor):
        scheme = tensor.scheme
        found["scheme"] = {"name": scheme.name, "activation": scheme.activation, "transposed": tensor.transposed}
    else:
        found["order"] = order
    return found


def _order(tensor: torch.Tensor) -> list[int]:
    """The dimensions from the slowest in memory to the fastest, if it has no gaps; else as they are."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    return order if tensor.permute(order).is_contiguous() else list(range(tensor.dim()))


def _require_packable(name: str, tensor: torch.Tensor) -> None:
    if isinstance(tensor, LAZY):
        raise SnapshotError(f"{name} is still being loaded; leave the `with online_quant(...)` block first")
    if is_dtensor(tensor):
        raise SnapshotError(f"{name} is split over ranks as a DTensor; save it with torch.distributed.checkpoint")
    if tensor.is_meta:
        raise SnapshotError(f"{name} is on the meta device and has no values to save")
    if isinstance(tensor, QTensor):
        if not tensor.whole_units or tensor._padded is not None or tensor._is_room:
            raise SnapshotError(f"{name} is a part of a quantized weight, and has scales in common with the rest of it")
        return
    if type(tensor) not in _PLAIN_CLASSES or tensor.layout != torch.strided:
        raise SnapshotError(
            f"{name} is a {type(tensor).__name__} ({tensor.layout}), and a snapshot holds QTensors and plain tensors"
        )
    if tensor.dtype not in DTYPE_NAMES:
        raise SnapshotError(f"{name} is {tensor.dtype}, which safetensors cannot hold")
