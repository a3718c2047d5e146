"""Aliases, copies and moves of quantized weights, and writes to them.

A write quantizes anew into the same storage, so it takes whole scale groups.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import kernels
from ..callers import replaced_by_module
from ..errors import NonFiniteWeightError, QTensorError, WeightDtypeError, WeightShapeError
from ..kernels import SOURCE_DTYPES, NonFinite
from .qtensor import QTensor, nonfinite_message
from .table import OpTable

aten = torch.ops.aten
OPS = OpTable()


@OPS.implements(aten.detach.default, aten.alias.default)
def alias(func: Any, w: QTensor) -> QTensor:
    return w.with_parts(*map(func, w.parts()))


@OPS.implements(aten.clone.default)
def _clone(func: Any, w: QTensor, *, memory_format: Any = None) -> QTensor:
    return w.with_parts(*(part.clone() for part in w.parts()), whole_units=True)


@OPS.implements(aten._to_copy.default)
def _to_copy(
    func: Any, w: QTensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> Any:
    if dtype is not None and dtype not in SOURCE_DTYPES:
        return func(w.dequantize(), dtype=dtype, device=device)
    move = {"device": device, "non_blocking": non_blocking, "copy": True}
    if w._padded is not None:
        room = w._padded.with_parts(*(part.to(**move) for part in w._padded.parts()), dtype=dtype or w.dtype)
        room._is_room = True
        return room[: w.shape[0]]
    return w.replaced_by(
        w.with_parts(*(part.to(**move) for part in w.parts()), dtype=dtype or w.dtype, whole_units=True)
    )


@OPS.implements(aten.copy_.default)
def _copy_(func: Any, dst: Any, src: Any, non_blocking: bool = False) -> Any:
    if not isinstance(dst, QTensor):
        return func(dst, src.dequantize(), non_blocking)
    if isinstance(src, QTensor):
        if src.scheme.format == dst.scheme.format and src.shape == dst.shape and src.transposed == dst.transposed:
            _require_whole_units(dst)
            for mine, theirs in zip(dst.parts(), src.parts(), strict=True):
                mine.copy_(theirs)
            return dst
        src = src.dequantize()
    _requantize(dst, src)
    return dst


@OPS.implements(aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default)
def _fill_(func: Any, dst: QTensor, value: Any = 0.0) -> QTensor:
    value = torch.as_tensor(value, dtype=dst.dtype, device=dst.device)
    _requantize(dst, value)
    return dst


def _requantize(dst: QTensor, src: torch.Tensor) -> None:
    """Quantize new high-precision values into the same storage."""
    _require_whole_units(dst)
    if not src.is_floating_point() or src.dtype.itemsize < 2:
        raise WeightDtypeError(f"QTensor {list(dst.shape)}: cannot take {src.dtype} values; pass a float tensor")
    try:
        src = src.detach().to(device=dst.device, dtype=dst.dtype).expand(dst.shape)
    except RuntimeError:
        raise WeightShapeError(f"QTensor {list(dst.shape)}: a source of shape {list(src.shape)} does not fit") from None
    try:
        stored = src.mT if dst.transposed else src
        kernels.choose(dst.device).quantize_into(stored, dst.parts(), dst.scheme.format)
    except NonFinite as error:
        raise NonFiniteWeightError(nonfinite_message("QTensor", stored.shape, error)) from None


def _require_whole_units(dst: QTensor) -> None:
    if not dst.whole_units:
        raise QTensorError(
            f"QTensor slice {list(dst.shape)}: these elements share a {dst.scheme.name} scale with others, so they "
            "cannot be written alone. Write whole rows, bands of 128 rows (per_block) or all of it (per_tensor, nvfp4)."
        )


@OPS.implements(aten.empty_like.default)
def _empty_like(func: Any, w: QTensor, **kwargs: Any) -> Any:
    """`module.to_empty()` leaves the module a quantized weight; whoever asks otherwise wants room for values."""
    if torch.compiler.is_compiling() or not replaced_by_module():
        return like(func, w, **kwargs)
    parts = (torch.empty_like(part, device=kwargs.get("device")) for part in w.parts())
    return w.replaced_by(w.with_parts(*parts, whole_units=True))


@OPS.implements(
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_empty.default,
    aten.new_ones.default,
    aten.new_full.default,
)
def like(func: Any, w: QTensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Only shape, dtype and device matter: a one-element stand-in saves the dequantization. (new_zeros: `ops_fsdp`.)"""
    return func(torch.empty((), dtype=w.dtype, device=w.device).expand(w.shape), *args, **kwargs)
