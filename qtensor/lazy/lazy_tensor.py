"""LazyWeight: a weight that is still being loaded.

To a loader it is a tensor of the logical dtype on the real device. Views of it only move geometry (by arithmetic where
loaders slice, replayed on a meta tensor where they do anything else); writes to any view are handed, as (view, source),
to the `ArmedWeight` behind it; reads tell the truth or raise. When the last element has arrived the same Python object
changes class to `LiveQTensor`, and to `QTensor` once the session ends. What each operation does is in `ops`.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from functools import partial
from math import prod
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from ..callers import called_by_init, copies_to_train, makes_parameter
from ..errors import QTensorError, WeightShapeError
from ..interrupts import without_grad
from ..kernels.compiled import is_recording
from ..regions.views import View, whole
from ..tensor.qtensor import QTensor
from ..tensor.table import OpTable
from .casts import cast, vacate
from .quant_store import QuantStore
from .storage import Storage
from .swap import Swap
from .uninitialised import is_untouched
from .weight import ArmedWeight

OPS = OpTable()
"""What operations do to lazy weights."""
LIVE_OPS = OpTable()
"""What operations do to quantized weights whose session is open."""
# Looked up once: a loader makes a few handles for each name that it sends.
_make, _strided = torch.Tensor._make_wrapper_subclass, torch.strided
_in_inference_mode, _modes = torch.is_inference_mode_enabled, torch._C._len_torch_dispatch_stack
_view: Any = partial(tuple.__new__, View)


class _Handle:
    """What LazyWeight and LiveQTensor answer alike: a loader's view of an armed weight.

    A loader calls narrow, select, indexing and copy_ a few times per weight shard. Answering those here, before
    PyTorch's dispatcher takes the arguments apart and puts them together again, halves the cost of a call.
    """

    __slots__ = ()
    _armed: ArmedWeight
    _view: View
    _live = False

    @property
    def _meta(self: Any) -> torch.Tensor:
        """A meta tensor that shows the same elements, to replay operations on."""
        return torch.empty(self._armed.shape, dtype=self.dtype, device="meta").as_strided(*self._view)

    @property
    def device(self) -> torch.device:
        found: torch.device = torch.Tensor.device.__get__(self)  # type: ignore[attr-defined]
        return torch.device("meta") if self._armed.is_still_meta() else found

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    def narrow(self, dim: int, start: Any, length: Any) -> LazyWeight:
        size, stride, offset = self._view
        plain = type(dim) is type(start) is type(length) is int and 0 <= dim < len(size)
        if plain and 0 <= start <= start + length <= size[dim]:
            size = (*size[:dim], length, *size[dim + 1 :])
            return at(self._armed, _view((size, stride, offset + start * stride[dim])), self._live)
        return wrap(self._armed, self._meta.narrow(dim, start, length), self._live)

    def select(self, dim: int, index: Any) -> LazyWeight:
        size, stride, offset = self._view
        if type(dim) is type(index) is int and 0 <= dim < len(size) and 0 <= index < size[dim]:
            size, stride, step = size[:dim] + size[dim + 1 :], stride[:dim] + stride[dim + 1 :], stride[dim]
            return at(self._armed, _view((size, stride, offset + index * step)), self._live)
        return wrap(self._armed, self._meta.select(dim, index), self._live)

    def __getitem__(self, index: Any) -> Any:
        if type(index) is int:
            size, stride, offset = self._view
            if size and 0 <= index < size[0]:
                return at(self._armed, _view((size[1:], stride[1:], offset + index * stride[0])), self._live)
        if _is_basic(index):
            return wrap(self._armed, self._meta[index], self._live)
        return torch.Tensor.__getitem__(self, index)  # type: ignore[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        """PyTorch broadcasts the value before any dispatch, and its complaint knows no names."""
        try:
            torch.Tensor.__setitem__(self, index, value)  # type: ignore[index]
        except RuntimeError as error:
            if isinstance(error, QTensorError) or not ("expanded size" in str(error) or "shape mismatch" in str(error)):
                raise
            self._armed.fail(WeightShapeError(f"{self._armed.name}: {error}"))

    def copy_(self, src: torch.Tensor, non_blocking: bool = False) -> Any:
        if type(src) is not torch.Tensor or _modes() or called_by_init():
            return torch.Tensor.copy_(self, src, non_blocking)  # type: ignore[arg-type]
        self._armed.write(self._view, src)
        return self

    def detach(self) -> Any:
        """`nn.Parameter(weight)` is another Parameter of the weight, in the state that this one is in."""
        return self._armed.adopt(twin(self)) if makes_parameter() else at(self._armed, self._view)

    def module_load(self, other: torch.Tensor, assign: bool = False) -> torch.Tensor:
        return _module_load(self, other)

    def storage(self) -> Any:
        return Storage(self)

    def untyped_storage(self) -> Any:
        return Storage(self)

    def data_ptr(self) -> int:
        return self._armed.address + self._view.offset * self.dtype.itemsize  # type: ignore[attr-defined]


class LazyWeight(_Handle, torch.Tensor):  # type: ignore[misc]
    """A weight, or a view of one, whose elements are still arriving."""

    # Loaders call tensor methods a few times per weight shard; skipping __torch_function__ halves their cost.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: torch.Tensor, requires_grad: bool = False, **attributes: Any) -> Any:
        """Re-wrap, as `type(param)(param.to("meta"), **param.__dict__)` does in accelerate's init_empty_weights.

        With the attributes of a lazy weight: another handle on that weight. Without: `data` is a finished value, and
        the result is an ordinary Parameter.
        """
        armed = attributes.get("_armed")
        if armed is None:
            return torch.nn.Parameter(data, requires_grad=requires_grad)
        param = parameter(armed, requires_grad)
        param.__dict__.update({k: v for k, v in attributes.items() if not hasattr(param, k)})
        return param

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return at(self._armed, self._view)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, LazyWeight):
            set_data(self, value)
        elif value._armed is not self._armed or (value.dtype, value.device) != (self.dtype, self.device):
            # `.to(dtype)`, `.to(device)`: the same weight as another type.
            torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
            value._armed.adopt(self)
            self._armed, self._view = value._armed, value._view
        elif value._view.size != self._view.size:
            assign(self, value)

    def numpy(self, *, force: bool = False) -> Any:
        return materialize(self).numpy(force=force)

    def tolist(self) -> Any:
        return materialize(self).tolist()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        armed = self._armed
        view = "" if prod(self._view.size) == armed.coverage.numel else f" view {list(self.shape)} of"
        return (
            f"LazyWeight({armed.name}:{view} {list(armed.shape)}, {self.dtype}, {armed.target}, "
            f"{armed.coverage.covered} of {armed.coverage.numel} elements written)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy_of(self, memo)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise QTensorError(
            f"{self._armed.name} is still being loaded and cannot be pickled or saved. Finish the session first "
            "(leave the `with online_quant(...)` block)."
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return OPS.dispatch(func, args, kwargs)


class LiveQTensor(_Handle, QTensor):  # type: ignore[misc]
    """A quantized weight whose session is still open: products run on the quantized values, and everything a loader
    might do goes the way of a LazyWeight, so that late writes are seen."""

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return at(self._armed, self._view)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        set_data(self, value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return LIVE_OPS.dispatch(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """The copy of a model that is being constructed is loaded, too. Any other has the values of now."""
        return copy_of(self, memo) if self._armed.loads_copy(memo) else super().__deepcopy__(memo)


LAZY = (LazyWeight, LiveQTensor)
# Values that a cast of a weight gave → the weight, and what has been written so far to it and to them.
_casts: MutableMapping[torch.Tensor, Any] = WeakIdKeyDictionary()
# Attributes that make a tensor lazy or quantized; all others belong to the user and follow the Parameter.
_OWN = {"_armed", "_view", "_live", "_is_param", *QTensor.__annotations__}


def attributes_of(param: torch.Tensor) -> dict[str, Any]:
    """What a user has put on a Parameter."""
    return {k: v for k, v in param.__dict__.items() if k not in _OWN}


def parameter(armed: ArmedWeight, requires_grad: bool) -> LazyWeight:
    """A new Parameter that stands for the whole of `armed`."""
    param = at(armed, whole(armed.shape))
    param._is_param = True  # type: ignore[attr-defined]
    param.requires_grad_(requires_grad)
    armed.adopt(param)
    return param


def copy_of(lazy: LazyWeight | LiveQTensor, memo: dict[int, Any]) -> torch.Tensor:
    """A deep copy that is loaded on its own, in the state that this weight is in; or values to train."""
    if copies_to_train():
        memo[id(lazy)] = torch.nn.Parameter(materialize(lazy).clone())
        return memo[id(lazy)]
    weight = lazy._armed.clone(memo)
    copy = memo[id(lazy)] = parameter(weight, lazy.requires_grad)
    if weight.settled and isinstance(weight.store, QuantStore):
        settle(copy, weight.store.result)
    copy.__dict__.update(attributes_of(lazy))
    return copy


def settle(param: Any, result: QTensor) -> None:
    """All elements are there: the object becomes a quantized weight that still follows late writes."""
    if not isinstance(param, LiveQTensor):
        param.requires_grad_(False)
        param.__class__ = LiveQTensor
    param.become(result.qdata, result.scale, result.scheme, result.global_scale)


def reopen(param: Any) -> None:
    """Some elements have to be written again: back to lazy."""
    param.__class__ = LazyWeight
    for part in QTensor.__annotations__:
        param.__dict__.pop(part, None)


def arm(param: Any, armed: ArmedWeight) -> None:
    """A quantized weight that exists follows writes from now on. May be repeated."""
    param._armed, param._view = armed, whole(armed.shape)
    param.__class__ = LiveQTensor
    armed.adopt(param)


def close(param: Any) -> None:
    """The session is over: a plain QTensor. May be repeated."""
    if isinstance(param, LiveQTensor):
        param.__class__ = QTensor  # type: ignore[assignment]
    if type(param) is QTensor:
        param.__dict__.pop("_armed", None)
        param.__dict__.pop("_view", None)


def remember_cast(lazy: Any, values: torch.Tensor) -> torch.Tensor:
    """Values that `param.data.to(dtype)` gives. If they come back as they are, in `param.data = param.data.to(dtype)`,
    that is a cast of the weight, not a load of what it holds."""
    _casts[values] = (weakref.ref(lazy._armed), lazy._armed.writes, _version(values))
    return values


def _version(values: torch.Tensor) -> int:
    return 0 if values.is_inference() else values._version


def set_data(param: Any, value: torch.Tensor) -> None:
    """`param.data = value`."""
    weight, *state = _casts.get(value, (lambda: None,))
    if weight() is not param._armed or state != [param._armed.writes, _version(value)]:
        assign(param, value)
        return
    cast(param._armed, value.dtype, value.device)
    new = recast(param)
    new._is_param = True
    new.requires_grad_(param.requires_grad)
    Swap(param, new).do()


def wrap(armed: ArmedWeight, meta: torch.Tensor, live: bool = False) -> LazyWeight:
    """A handle on what `meta`, a view of a meta tensor of its shape, shows of a weight. live: see `answers_live`."""
    return at(armed, View(meta.size(), meta.stride(), int(meta.storage_offset())), live)


def at(armed: ArmedWeight, view: View, live: bool = False) -> LazyWeight:
    """A handle on a view of a weight. live: see `answers_live`."""
    if _in_inference_mode():
        # A view of a normal tensor has to be a normal tensor; autograd's bookkeeping insists.
        with torch.inference_mode(False):
            return at(armed, view, live)
    size, stride, offset = view
    # Strides, offset, memory format, dtype, layout, device: by position, as names take a third longer.
    lazy: Any = _make(LazyWeight, size, stride, offset, None, armed.dtype, _strided, armed.device)
    lazy._armed, lazy._view = armed, view
    if live:
        lazy._live = True
    return lazy


def _module_load(lazy: Any, other: torch.Tensor) -> torch.Tensor:
    """What load_state_dict calls under `torch.__future__.set_swap_module_params_on_conversion`: take the values, and
    return another object in the state this one is in now, to swap with."""
    lazy.copy_(other)
    new = twin(lazy)
    new._is_param = True
    new.requires_grad_(lazy.requires_grad)
    return new


def twin(lazy: Any) -> Any:
    """Another object that is what this one is: of its class, with its attributes."""
    new: Any = at(lazy._armed, lazy._view)
    new.__dict__.update(lazy.__dict__)
    new.__dict__.pop("_is_param", None)
    new.__class__ = type(lazy)
    return new


def recast(lazy: Any) -> Any:
    """What `module.to(...)` puts in the place of a weight that has another dtype, or is elsewhere, from now on."""
    armed = lazy._armed
    new: Any = at(armed, whole(armed.shape))
    new.__dict__.update(attributes_of(lazy))
    if isinstance(armed.store, QuantStore) and (armed.settled or armed.in_place):
        settle(new, armed.store.result)
    return new


def view_of(lazy: Any) -> View:
    found: View = lazy._view
    return found


def _is_basic(index: Any) -> bool:
    """Does the index select a view, that is: integers, slices, None and ellipsis only?"""
    if isinstance(index, tuple):
        return all(i is None or i is Ellipsis or type(i) in (int, slice) for i in index)
    return index is None or index is Ellipsis or type(index) in (int, slice)


def materialize(lazy: Any) -> torch.Tensor:
    """The values of a lazy tensor, for whoever reads it. A program that make_fx records has them as a constant."""
    if is_recording():
        with _disable_current_modes():
            return materialize(lazy)
    armed = lazy._armed
    return armed.live_values(view_of(lazy)) if answers_live(lazy) else written(lazy)


def answers_live(lazy: Any) -> bool:
    """Does it answer reads with what the model computes with, whatever a loader is writing? During a reload the
    Parameter itself does, and what modules make of it (`weight.t()`); `.data`, `detach()` and slices do not."""
    return lazy._live or (lazy._armed.in_place and any(param is lazy for param in lazy._armed.params))


def written(lazy: Any) -> torch.Tensor:
    """The values of a lazy tensor as far as they were written in this session."""
    return lazy._armed.read(view_of(lazy))


def assign(lazy: Any, value: torch.Tensor) -> None:
    """`param.data = value` and `param.set_(value)`: a write of everything, which must fit exactly."""
    if value.shape != lazy.shape:
        raise WeightShapeError(
            f"{lazy._armed.name}: cannot become a tensor of shape {list(value.shape)}; it is {list(lazy.shape)}"
        )
    if is_untouched(value):
        vacate(lazy._armed, value.device)
        return
    without_grad(partial(torch.Tensor.copy_, lazy, value))
