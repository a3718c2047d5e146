"""DequantizedView: a view of a quantized weight that cuts through its scale groups: a row, or every other column.

A reader has the plain tensor of dequantized values that it is in memory. A write goes to the weight: the operation is
carried out on all of its dequantized values, and they are quantized anew, or, where they cannot be, left as they were.

In a program that is recorded (torch.compile, torch.export, make_fx), or where the weight's memory is another library's
tensor class, it is a `RecordedView`: the same to readers, but a write is refused, since it would be lost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn, TypeGuard

import torch
from torch.utils._pytree import tree_map_only

from ..callers import makes_parameter
from ..errors import QTensorError
from ..kernels import compiled
from .ops_copies import rewrite
from .qtensor import QTensor, refuse_traced, written_by

Cut = Callable[[torch.Tensor], torch.Tensor]


class DequantizedView(torch.Tensor):
    """Values of a part of a weight, as they were when it was taken, or last written.

    _dense: the plain tensor of the same memory. _weight: None for a Parameter made of a part. _cut: takes the part out
    of all of the weight's values, without a copy.
    """

    _dense: torch.Tensor
    _weight: QTensor | None
    _cut: Cut

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(weight: QTensor | None, cut: Cut, dense: torch.Tensor) -> DequantizedView:
        view: DequantizedView = torch.Tensor._make_subclass(DequantizedView, dense)
        view._dense, view._weight, view._cut = dense, weight, cut
        return view

    def detach(self) -> torch.Tensor:
        """`nn.Parameter(part)` has values of its own: an optimizer's steps would be lost in a quantized weight."""
        if makes_parameter():
            return DequantizedView.of(None, self._cut, self._dense.clone())
        return super().detach()

    def numpy(self, *, force: bool = False) -> Any:
        return self._dense.numpy(force=force)

    def tolist(self) -> Any:
        return self._dense.tolist()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return repr(self._dense)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(self._dense, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._dense.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = [t for t in written_by(func, args, kwargs or {}) if _is_part(t)]
        if written:
            return _write(written, func, args, kwargs or {})
        out = func(*_plain(args), **_plain(kwargs or {}))
        first = args[0] if args else None
        if not _is_part(first) or first._weight is None or not is_view(func):
            return out
        return _views(first._weight, lambda full: func(first._cut(full), *args[1:], **kwargs or {}), out)


class RecordedView(torch.Tensor):
    """The same in a recorded program, whose tensors have no memory.

    One that a compiled function returns has values, and is refused to writers, too: its weight is not known any more.
    """

    _dense: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, dense: torch.Tensor) -> RecordedView:
        view: RecordedView = torch.Tensor._make_wrapper_subclass(
            cls,
            dense.shape,
            strides=dense.stride(),
            storage_offset=dense.storage_offset(),
            dtype=dense.dtype,
            device=dense.device,
        )
        view._dense = dense
        return view

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["_dense"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> RecordedView:
        return RecordedView(inner["_dense"])

    numpy = DequantizedView.numpy
    tolist = DequantizedView.tolist
    __deepcopy__ = DequantizedView.__deepcopy__
    __reduce_ex__ = DequantizedView.__reduce_ex__

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return repr(self._dense)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for written in written_by(func, args, kwargs or {}):
            if isinstance(written, RecordedView):
                refuse_traced(written)
        args, kwargs = tree_map_only(RecordedView, lambda t: t._dense, (args, kwargs or {}))
        out = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, RecordedView, out) if is_view(func) else out


def _is_part(tensor: Any) -> TypeGuard[DequantizedView]:
    return isinstance(tensor, DequantizedView) and tensor._weight is not None


def is_view(op: Any) -> bool:
    """Does an operation give a tensor, or several, on the memory of its first argument?"""
    returns = op._schema.returns
    alias = returns[0].alias_info if returns else None
    return alias is not None and not alias.is_write


def view_of_values(func: Any, weight: QTensor, *args: Any, **kwargs: Any) -> Any:
    """A view operation on the dequantized values."""
    full = weight.dequantize()
    out = func(full, *args, **kwargs)
    if not is_view(func) or weight.is_meta:
        return out
    if compiled.must_trace(*weight.parts()):
        return tree_map_only(torch.Tensor, RecordedView, out)
    return _views(weight, lambda values: func(values, *args, **kwargs), out)


def _views(weight: QTensor, cut: Callable[[torch.Tensor], Any], out: Any) -> Any:
    """What a view operation gave: one view, or a list of them."""
    if isinstance(out, torch.Tensor):
        return DequantizedView.of(weight, cut, out)
    return [DequantizedView.of(weight, lambda full, i=i: cut(full)[i], part) for i, part in enumerate(out)]  # type: ignore[misc]


def _write(written: list[DequantizedView], func: Any, args: Any, kwargs: Any) -> Any:
    view, weight = written[0], written[0]._weight
    assert weight is not None
    if len(written) > 1 or torch.Tag.inplace_view in func.tags:
        _refuse(func, view, weight)
    full = weight.dequantize()
    target = view._cut(full)
    if target.untyped_storage().data_ptr() != full.untyped_storage().data_ptr():
        _refuse(func, view, weight)  # an operation that is a view of most tensors, and made a copy of these values
    args, kwargs = tree_map_only(DequantizedView, lambda t: target if t is view else t._dense, (args, kwargs))
    out = func(*args, **kwargs)
    rewrite(weight, full)
    view._dense.copy_(view._cut(weight.dequantize()))
    return tree_map_only(torch.Tensor, lambda t: view if t is target else t, out)


def _refuse(func: Any, view: torch.Tensor, weight: QTensor) -> NoReturn:
    raise QTensorError(
        f"{func} on a part {list(view.shape)} of a quantized weight {list(weight.shape)}: what it does to the part "
        "cannot be done to the weight. Write to the part with copy_, or assign new values to the weight."
    )


def _plain(values: Any) -> Any:
    return tree_map_only(DequantizedView, lambda t: t._dense, values)
