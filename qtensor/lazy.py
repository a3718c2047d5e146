"""LazyWeight: a weight that is still being loaded.

To a loader it is a tensor of the logical dtype on the real device. Views of it only move geometry (replayed on a meta
tensor); writes to any view are handed, as (view, source), to the `ArmedWeight` behind it; reads tell the truth or
raise. When the last element has arrived the same Python object changes class to `LiveQTensor`, and to `QTensor` once
the session ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map_only

from .armed import ArmedWeight
from .errors import QTensorError, WeightShapeError
from .ops import RANDOM, SCATTERED, accumulates, collectives, flatten, touched_elements, written_arguments
from .quantized import _OPS as _QUANTIZED_OPS
from .quantized import QTensor
from .store import View

aten = torch.ops.aten
_Handler = Callable[[Any, tuple, dict], Any]
_OPS: dict[Any, _Handler] = {}


def _implements(*ops: Any) -> Callable[[_Handler], _Handler]:
    def register(fn: _Handler) -> _Handler:
        _OPS.update(dict.fromkeys(ops, fn))
        return fn

    return register


class _Handle:
    """What LazyWeight and LiveQTensor answer alike: a loader's view of an armed weight.

    A loader calls narrow, select, indexing and copy_ a few times per weight shard. Answering those here, before
    PyTorch's dispatcher takes the arguments apart and puts them together again, halves the cost of a call.
    """

    __slots__ = ()
    _armed: ArmedWeight
    _meta: torch.Tensor

    def narrow(self, dim: int, start: Any, length: Any) -> LazyWeight:
        return _wrap(self._armed, self._meta.narrow(dim, start, length))

    def select(self, dim: int, index: Any) -> LazyWeight:
        return _wrap(self._armed, self._meta.select(dim, index))

    def __getitem__(self, index: Any) -> Any:
        if _is_basic(index):
            return _wrap(self._armed, self._meta[index])
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
        if (
            type(src) is not torch.Tensor
            or torch._C._len_torch_dispatch_stack()
            or sys._getframe(1).f_globals.get("__name__") == "torch.nn.init"
        ):
            return torch.Tensor.copy_(self, src, non_blocking)  # type: ignore[arg-type]
        self._armed.write(view_of(self), src)
        return self

    def module_load(self, other: torch.Tensor, assign: bool = False) -> torch.Tensor:
        return _module_load(self, other)

    def storage(self) -> Any:
        return _Storage(self)

    def untyped_storage(self) -> Any:
        return _Storage(self)

    def data_ptr(self) -> int:
        return self._armed.address + int(self._meta.storage_offset()) * self._meta.itemsize


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
        return _wrap(self._armed, self._meta)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        armed = self._armed
        if isinstance(value, LazyWeight) and value._armed is not armed:
            # `module.to(dtype)` and `.to(device)` assign a re-typed lazy weight to `.data`.
            torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
            value._armed.adopt(self)
            self._armed, self._meta = value._armed, value._meta
        elif not (isinstance(value, LazyWeight) and value._meta.shape == self._meta.shape):
            _assign(self, value)

    def numpy(self, *, force: bool = False) -> Any:
        return _materialize(self).numpy(force=force)

    def tolist(self) -> Any:
        return _materialize(self).tolist()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        armed = self._armed
        view = "" if self._meta.numel() == armed.coverage.numel else f" view {list(self.shape)} of"
        return (
            f"LazyWeight({armed.name}:{view} {list(armed.shape)}, {self.dtype}, {armed.target}, "
            f"{armed.coverage.covered} of {armed.coverage.numel} elements written)"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyWeight:
        copy = parameter(self._armed.clone(memo), self.requires_grad)
        copy.__dict__.update({k: v for k, v in self.__dict__.items() if not hasattr(copy, k)})
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise QTensorError(
            f"{self._armed.name} is still being loaded and cannot be pickled or saved. Finish the session first "
            "(leave the `with online_quant(...)` block)."
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        handler = _OPS.get(func)
        if handler is None:
            handler = _OPS[func] = _classify(func)
        return handler(func, args, kwargs or {})


class LiveQTensor(_Handle, QTensor):  # type: ignore[misc]
    """A quantized weight whose session is still open: products run on the quantized values, and everything a loader
    might do goes the way of a LazyWeight, so that late writes are seen."""

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return _wrap(self._armed, self._meta)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _assign(self, value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            return QTensor.__torch_dispatch__(func, types, args, kwargs)
        return LazyWeight.__torch_dispatch__(func, types, args, kwargs)


_LAZY = (LazyWeight, LiveQTensor)
_PRODUCTS = {
    op
    for op in _QUANTIZED_OPS
    if op.overloadpacket in (aten.linear, aten.mm, aten.addmm, aten.bmm, aten.embedding, aten.t, aten.transpose)
}


def parameter(armed: ArmedWeight, requires_grad: bool) -> LazyWeight:
    """A new Parameter that stands for the whole of `armed`."""
    meta = torch.empty(armed.shape, dtype=armed.dtype, device="meta")
    param = _wrap(armed, meta)
    param._is_param = True  # type: ignore[attr-defined]
    param.requires_grad_(requires_grad)
    armed.adopt(param)
    return param


def settle(param: Any, result: QTensor) -> None:
    """All elements are there: the object becomes a quantized weight that still follows late writes."""
    if not isinstance(param, LiveQTensor):
        param.requires_grad_(False)
        param.__class__ = LiveQTensor
    param.become(result.qdata, result.scale, result.scheme)


def reopen(param: Any) -> None:
    """Some elements have to be written again: back to lazy."""
    param.__class__ = LazyWeight


def close(param: Any) -> None:
    """The session is over: a plain QTensor."""
    if isinstance(param, LiveQTensor):
        param.__class__ = QTensor  # type: ignore[assignment]
        del param._armed, param._meta


def _wrap(armed: ArmedWeight, meta: torch.Tensor) -> LazyWeight:
    if torch.is_inference_mode_enabled():
        # A view of a normal tensor has to be a normal tensor; autograd's bookkeeping insists.
        with torch.inference_mode(False):
            return _wrap(armed, meta)
    lazy = torch.Tensor._make_wrapper_subclass(
        LazyWeight,
        meta.size(),
        strides=meta.stride(),
        storage_offset=meta.storage_offset(),
        dtype=armed.dtype,
        device=armed.device,
    )
    lazy._armed, lazy._meta = armed, meta
    return lazy


class _Storage:
    """What stands for the storage of a lazy weight. Tools that look for tied weights compare addresses and sizes; this
    address is the weight's own, and no memory has it."""

    def __init__(self, lazy: Any) -> None:
        self._address = lazy._armed.address
        self._meta = lazy._meta.untyped_storage()

    def data_ptr(self) -> int:
        return self._address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._meta, name)


def _module_load(lazy: Any, other: torch.Tensor) -> torch.Tensor:
    """What load_state_dict calls under `torch.__future__.set_swap_module_params_on_conversion`: take the values, and
    return another object in the state this one is in now, to swap with."""
    lazy.copy_(other)
    twin = _wrap(lazy._armed, lazy._meta)
    twin.__dict__.update(lazy.__dict__)
    twin._is_param = True  # type: ignore[attr-defined]
    twin.requires_grad_(lazy.requires_grad)
    twin.__class__ = type(lazy)
    return twin


def view_of(lazy: Any) -> View:
    meta = lazy._meta
    return View(meta.size(), meta.stride(), meta.storage_offset())


def _is_basic(index: Any) -> bool:
    """Does the index select a view, that is: integers, slices, None and ellipsis only?"""
    if isinstance(index, tuple):
        return all(i is None or i is Ellipsis or type(i) in (int, slice) for i in index)
    return index is None or index is Ellipsis or type(index) in (int, slice)


def _copied_by_init() -> bool:
    """Did torch.nn.init call the copy_ being dispatched? Its copies are initialisation, not a load."""
    frame = sys._getframe(1)
    for _ in range(5):  # the handler, two dispatches at most, the handle's own copy_, its caller
        if frame is None:
            return False
        if frame.f_globals.get("__name__") == "torch.nn.init":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _materialize(lazy: Any) -> torch.Tensor:
    return lazy._armed.read(view_of(lazy))


def _assign(lazy: Any, value: torch.Tensor) -> None:
    """`param.data = value` and `param.set_(value)`: a write of everything, which must fit exactly."""
    if value.shape != lazy.shape:
        raise WeightShapeError(
            f"{lazy._armed.name}: cannot become a tensor of shape {list(value.shape)}; it is {list(lazy.shape)}"
        )
    _copy_(aten.copy_.default, (lazy, value), {})


# Views --------------------------------------------------------------------------------------------------------------


def _view(func: Any, args: tuple, kwargs: dict) -> Any:
    lazy = args[0]
    armed, out = lazy._armed, func(lazy._meta, *args[1:], **kwargs)
    return [_wrap(armed, m) for m in out] if isinstance(out, (list, tuple)) else _wrap(armed, out)


@_implements(aten.detach.default, aten.alias.default)
def _alias(func: Any, args: tuple, kwargs: dict) -> Any:
    return _wrap(args[0]._armed, args[0]._meta)


@_implements(aten.view.dtype, aten.view_as_real.default, aten.view_as_complex.default)
def _reinterpret(func: Any, args: tuple, kwargs: dict) -> NoReturn:
    raise QTensorError(
        f"{args[0]._armed.name}: a lazy weight has no bytes to reinterpret ({func}); copy values of its dtype instead"
    )


@_implements(aten.resize_.default, aten.resize_as_.default)
def _resize(func: Any, args: tuple, kwargs: dict) -> NoReturn:
    raise WeightShapeError(f"{args[0]._armed.name}: a weight that is being loaded cannot be resized")


# Writes -------------------------------------------------------------------------------------------------------------


@_implements(aten.copy_.default)
def _copy_(func: Any, args: tuple, kwargs: dict) -> Any:
    dst, src = args[0], args[1]
    if isinstance(src, _LAZY):
        if isinstance(dst, _LAZY) and src._armed is dst._armed and view_of(src) == view_of(dst):
            return dst  # set_model_state_dict completes a partial state dict with the model's own weights
        src = _materialize(src)
    elif isinstance(src, QTensor):
        if isinstance(dst, _LAZY) and dst._meta.numel() == dst._armed.coverage.numel and dst._armed.accept(src):
            return dst
        src = src.dequantize(dst.dtype)
    if not isinstance(dst, _LAZY):
        return func(dst, src, *args[2:], **kwargs)
    if _copied_by_init():
        dst._armed.initialize(view_of(dst), partial(_replay, func, (src.clone(),), {}))
    else:
        dst._armed.write(view_of(dst), src)
    return dst


@_implements(aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default)
def _fill_(func: Any, args: tuple, kwargs: dict) -> Any:
    lazy, value = args[0], args[1] if len(args) > 1 else 0
    if _initialising():
        lazy._armed.initialize(view_of(lazy), partial(_replay, func, args[1:], kwargs))
    else:
        lazy._armed.write(view_of(lazy), torch.as_tensor(value, dtype=lazy.dtype))
    return lazy


@_implements(aten._foreach_copy_.default)
def _foreach_copy_(func: Any, args: tuple, kwargs: dict) -> None:
    for dst, src in zip(args[0], args[1], strict=True):
        dst.copy_(src)


@_implements(aten.set_.source_Tensor)
def _set_(func: Any, args: tuple, kwargs: dict) -> Any:
    _assign(args[0], args[1])
    return args[0]


@_implements(aten.index_copy_.default)
def _index_copy_(func: Any, args: tuple, kwargs: dict) -> Any:
    """Row by row in the order given, neighbouring rows together."""
    lazy, dim, index, source = args
    wanted = index.tolist()
    start = 0
    for i in range(1, len(wanted) + 1):
        if i == len(wanted) or wanted[i] != wanted[i - 1] + 1:
            lazy.narrow(dim, wanted[start], i - start).copy_(source.narrow(dim, start, i - start))
            start = i
    return lazy


def _scattered_write(func: Any, args: tuple, kwargs: dict) -> Any:
    """Writes to elements that only the operation knows: run it once on values and once on a mask of what it touches."""
    if accumulates(func, args, kwargs):
        return _mutate(func, args, kwargs)
    lazy = args[0]
    rest, kwargs = tree_map_only(_LAZY, _materialize, (args[1:], kwargs))
    values = torch.zeros(lazy.shape, dtype=lazy.dtype, device=lazy.device)
    func(values, *rest, **kwargs)
    lazy._armed.write_masked(view_of(lazy), values, touched_elements(func, (lazy, *rest), kwargs))
    return lazy


def _mutate(func: Any, args: tuple, kwargs: dict) -> Any:
    """Any other operation that writes: on a real tensor that is read first where it must be, then written back.

    An initialiser's operation (uniform_, normal_, or arithmetic inside torch.nn.init) is recorded, not counted.
    """
    specs = {spec.name: spec for spec in func._schema.arguments}
    bound = dict(zip(specs, args, strict=False)) | kwargs
    written = [n for n, v in bound.items() if isinstance(v, _LAZY) and specs[n].alias_info and specs[n].alias_info.is_write]
    first = bound[written[0]]
    if len(written) == 1 and (func.overloadpacket in RANDOM or _initialising()):
        rest = {n: tree_map_only(_LAZY, _materialize, v) for n, v in bound.items() if n != written[0]}
        first._armed.initialize(view_of(first), lambda target: func(**rest, **{written[0]: target}))
        return first
    pure_output = {n for n in written if specs[n].is_out}
    real = {
        n: torch.empty(v.shape, dtype=v.dtype, device=v.device) if n in pure_output else tree_map_only(_LAZY, _own, v)
        for n, v in bound.items()
    }
    out = func(**real)
    for n in written:
        bound[n]._armed.write(view_of(bound[n]), real[n])
    return bound[written[0]] if len(written) == 1 else out


def _replay(func: Any, args: Sequence[Any], kwargs: dict, target: torch.Tensor) -> None:
    func(target, *args, **kwargs)


_INIT_MODULES = ("torch.nn.init", "transformers.initialization")
_INIT_FUNCTIONS = ("reset_parameters", "_reset_parameters", "_init_weights", "init_weights")


def _initialising() -> bool:
    """Is a fill being done by an initialiser rather than a loader? A module's __init__, or torch.nn.init, is calling."""
    frame = sys._getframe(2)
    for _ in range(40):
        if frame is None:
            return False
        code = frame.f_code
        if frame.f_globals.get("__name__") in _INIT_MODULES or code.co_name in _INIT_FUNCTIONS:
            return True
        if code.co_name == "__init__" and code.co_argcount and isinstance(
            frame.f_locals.get(code.co_varnames[0]), torch.nn.Module
        ):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


# Reads --------------------------------------------------------------------------------------------------------------


def _read(func: Any, args: tuple, kwargs: dict) -> Any:
    args, kwargs = tree_map_only(_LAZY, _materialize, (args, kwargs))
    return func(*args, **kwargs)


def _own(lazy: Any) -> torch.Tensor:
    return _materialize(lazy).clone()


@_implements(aten.clone.default)
def _clone(func: Any, args: tuple, kwargs: dict) -> Any:
    return _own(args[0])


@_implements(aten._to_copy.default)
def _to_copy(func: Any, args: tuple, kwargs: dict) -> Any:
    """A read, except before anything was written: then `.to(dtype)` and `.to(device)` re-type the weight itself."""
    lazy = args[0]
    armed, dtype, device = lazy._armed, kwargs.get("dtype") or lazy.dtype, torch.device(kwargs.get("device") or lazy.device)
    if device.type == "meta":
        return torch.empty_strided(lazy.shape, lazy.stride(), dtype=dtype, device=device)
    if lazy._meta.numel() == armed.coverage.numel and not armed.coverage.covered and armed.coverage.numel:
        return _wrap(retyped := armed.retyped(dtype, device), torch.empty(retyped.shape, dtype=dtype, device="meta"))
    return func(_materialize(lazy), **kwargs)


def _like(func: Any, args: tuple, kwargs: dict) -> Any:
    """empty_like, new_zeros and the like: only shape, dtype and device matter."""
    lazy = args[0]
    stand_in = torch.empty((), dtype=lazy.dtype, device=lazy.device).expand(lazy.shape)
    return func(stand_in, *args[1:], **kwargs)


def _classify(func: Any) -> _Handler:
    """The handler of an operation that has no entry of its own, from its schema. The answer is cached in the table."""
    schema = func._schema
    name = schema.name.split("::")[-1]
    if written_arguments(func):
        return _mutate
    if name.endswith("_like") or name.startswith("new_"):
        return _like
    if schema.arguments and schema.arguments[0].alias_info is not None:
        return _view
    return _read


# Collectives --------------------------------------------------------------------------------------------------------


def _collective(func: Any, args: tuple, kwargs: dict) -> Any:
    """A c10d operation that writes into lazy weights: run it on real tensors and wait, then write those."""
    lazies = [w for w in flatten(args[0]) if isinstance(w, _LAZY)]
    real: dict[int, torch.Tensor] = {}
    for w in lazies:
        readable = _COLLECTIVES[func] and w._armed.readable(view_of(w))
        real[id(w)] = _own(w) if readable else torch.empty(w.shape, dtype=w.dtype, device=w.device)
    swapped = tree_map_only(_LAZY, lambda w: real[id(w)] if id(w) in real else _materialize(w), args)
    result = func(*swapped, **kwargs)
    (result[-1] if isinstance(result, (tuple, list)) else result).wait()
    for w in lazies:
        w._armed.write(view_of(w), real[id(w)])
    return _done() if func in _RECEIVES else result


def _done() -> Any:
    """A finished Work: the caller waits again, and gloo's receives never return from a second wait."""
    future: torch.futures.Future = torch.futures.Future()
    future.set_result([])
    return torch._C._distributed_c10d._create_work_from_future(future).boxed()  # type: ignore[attr-defined]


_COLLECTIVES = collectives()
_RECEIVES = {op for op in _COLLECTIVES if "recv" in str(op)}
_OPS.update(dict.fromkeys(_COLLECTIVES, _collective))
_OPS.update(dict.fromkeys(SCATTERED - set(_OPS), _scattered_write))
