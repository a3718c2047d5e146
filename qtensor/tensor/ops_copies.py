"""Aliases, copies and moves of quantized weights, and writes to them.

A write quantizes anew into the same storage, whole scale groups at a time. Arithmetic in place, by which adapters are
merged, is `quantize(w.dequantize() + delta)`; a write to a part that cuts through scale groups, the same with all of
the weight. Both lose what rounding loses, and leave the weight as it was where they fail.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map_only

from .. import kernels
from ..callers import changes_base, initialising, replaced_by_module, writes_to_disk
from ..errors import NonFiniteWeightError, QTensorError, WeightDtypeError, WeightShapeError
from ..interrupts import without_grad
from ..kernels import SOURCE_DTYPES, NonFinite, compiled
from .qtensor import QTensor, nonfinite_message, quantize, refuse_disk, refuse_mutation, refuse_traced
from .table import OpTable

aten = torch.ops.aten
OPS = OpTable()


@OPS.implements(aten.detach.default, aten.alias.default)
def alias(func: Any, w: QTensor) -> QTensor:
    twin = w.with_parts(*map(func, w.parts()))
    if w._part_of is not None:
        twin._part_of = w._part_of
    return twin


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
        if (
            src.scheme.format.plain == dst.scheme.format.plain
            and src.shape == dst.shape
            and src.transposed == dst.transposed
        ):
            if not dst.whole_units:
                rewrite(dst, src.dequantize())
                return dst
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


@OPS.implements(
    aten.add_.Tensor,
    aten.add_.Scalar,
    aten.sub_.Tensor,
    aten.sub_.Scalar,
    aten.mul_.Tensor,
    aten.mul_.Scalar,
    aten.div_.Tensor,
    aten.div_.Scalar,
    aten.addmm_.default,
)
def _arithmetic(func: Any, dst: Any, *args: Any, **kwargs: Any) -> Any:
    """Adapters are merged, and unmerged, this way. An optimizer is not let through: its steps are too small for a
    quantized weight, and all of them would be lost."""
    args, kwargs = tree_map_only(QTensor, lambda w: w.dequantize(), (args, kwargs))
    if not isinstance(dst, QTensor):
        return func(dst, *args, **kwargs)
    if initialising() and not changes_base():
        refuse_mutation(func, dst)
    if dst.requires_grad:
        raise QTensorError(
            f"QTensor {list(dst.shape)} ({dst.scheme}): {func} on a quantized weight that requires a gradient. It "
            "cannot be trained: a step is smaller than what its elements can hold. Train adapters on top of it, or "
            "leave the weight in high precision with `ignore`."
        )
    rewrite(dst, func(dst.dequantize(), *args, **kwargs))
    return dst


@OPS.implements(torch.Tensor.__setitem__)
def _set_item(func: Any, dst: QTensor, index: Any, value: Any) -> None:
    """`w[index] = value`. Whole scale groups are quantized anew, or else all of the weight."""

    def write() -> None:
        part = dst[index]
        if isinstance(part, QTensor) and part.qdata.untyped_storage()._cdata == dst.qdata.untyped_storage()._cdata:
            part.copy_(torch.as_tensor(value, dtype=dst.dtype, device=dst.device))
            return
        values = dst.dequantize()
        values[index] = value.dequantize() if isinstance(value, QTensor) else value
        rewrite(dst, values)

    without_grad(write)


@OPS.implements(torch.Tensor.data)
def _set_data(func: Any, dst: QTensor, value: torch.Tensor) -> None:
    """`w.data = value`: a quantized value takes the weight's place, a plain one is quantized into it."""
    if not isinstance(value, QTensor):
        if value.shape != dst.shape:
            raise WeightShapeError(f"QTensor {list(dst.shape)}: cannot become a tensor of shape {list(value.shape)}")
        rewrite(dst, value.detach().to(dst.device))
        return
    torch.Tensor.data.__set__(dst, value)  # type: ignore[attr-defined]
    parts = value.parts()
    dst.become(parts.qdata, parts.scale, value.scheme, parts.global_scale, value.transposed, value.whole_units)


def rewrite(dst: QTensor, values: torch.Tensor) -> None:
    """Give a weight other values, all or none of them. A slice that shares scales has its weight rewritten."""
    if compiled.is_traced(*dst.parts()):
        refuse_traced(dst)
    if dst.whole_units:
        stored = values.to(dtype=dst.dtype).expand(dst.shape)
        fresh = quantize(stored.mT if dst.transposed else stored, dst.scheme)
        for mine, new in zip(dst.parts(), fresh.parts(), strict=True):
            mine.copy_(new)
        return
    if dst._part_of is None:
        _refuse_part(dst)
    assert dst._part_of is not None
    whole, dim, part = dst._part_of
    full = whole.dequantize()
    full[(slice(None),) * dim + (part,)] = values
    rewrite(whole, full)


def _requantize(dst: QTensor, src: torch.Tensor) -> None:
    """Quantize new high-precision values into the same storage."""
    if not src.is_floating_point() or src.dtype.itemsize < 2:
        raise WeightDtypeError(f"QTensor {list(dst.shape)}: cannot take {src.dtype} values; pass a float tensor")
    try:
        src = src.detach().to(device=dst.device, dtype=dst.dtype).expand(dst.shape)
    except RuntimeError:
        raise WeightShapeError(f"QTensor {list(dst.shape)}: a source of shape {list(src.shape)} does not fit") from None
    if not dst.whole_units:
        rewrite(dst, src)
        return
    if compiled.is_traced(*dst.parts()):
        refuse_traced(dst)
    try:
        stored = src.mT if dst.transposed else src
        kernels.choose(dst.device).quantize_into(stored, dst.parts(), dst.scheme.format)
    except NonFinite as error:
        raise NonFiniteWeightError(nonfinite_message("QTensor", stored.shape, error)) from None


@OPS.implements(aten._foreach_copy_.default)
def _foreach_copy_(func: Any, targets: Any, sources: Any, non_blocking: bool = False) -> None:
    for dst, src in zip(targets, sources, strict=True):
        dst.copy_(src, non_blocking)


def _refuse_part(dst: QTensor) -> NoReturn:
    raise QTensorError(
        f"QTensor slice {list(dst.shape)}: these elements share a {dst.scheme.name} scale with others, and it is not "
        "known of what weight. Write to a slice of the weight itself, whole rows, or all of it."
    )


@OPS.implements(aten.view.dtype)
def _view_dtype(func: Any, w: QTensor, dtype: torch.dtype) -> torch.Tensor:
    """The bits of the dequantized values; numpy has no bf16, so who writes arrays asks for them."""
    if writes_to_disk():
        refuse_disk(w)
    return func(w.dequantize(), dtype)


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
