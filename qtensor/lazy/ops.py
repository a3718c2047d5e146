"""The operations of lazy weights: views, writes, reads, collectives, and the rule for all that have no entry here.

Views replay on the meta tensor; whatever writes ends in `ArmedWeight.write`, or, when an initialiser does it, in
`ArmedWeight.initialize`; whatever reads gets real tensors. `install` fills the tables of LazyWeight and LiveQTensor,
once, when qtensor is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from ..callers import asked_by_fsdp, copied_by_init, distributing, initialising, replaced_by_module, scatters
from ..errors import QTensorError, WeightDtypeError, WeightShapeError
from ..regions.views import View, whole
from ..tensor.qtensor import QTensor
from ..tensor.table import Handler, OpTable
from . import ops_live
from .casts import cast, vacate
from .effects import (
    INDEXED,
    RANDOM,
    SCATTERED,
    accumulates,
    collectives,
    flatten,
    touched_elements,
    whole_mask,
    written_arguments,
)
from .lazy_tensor import (
    LAZY,
    LIVE_OPS,
    OPS,
    answers_live,
    assign,
    at,
    materialize,
    recast,
    remember_cast,
    view_of,
    wrap,
    written,
)
from .uninitialised import mark

aten = torch.ops.aten
ENTRIES = OpTable()


# Views --------------------------------------------------------------------------------------------------------------


def _view(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    armed, out = lazy._armed, func(lazy._meta, *args, **kwargs)
    live = armed.in_place and answers_live(lazy)
    views = [wrap(armed, m, live) for m in (out if isinstance(out, (list, tuple)) else [out])]
    return views if isinstance(out, (list, tuple)) else views[0]


@ENTRIES.implements(aten.detach.default, aten.alias.default)
def _alias(func: Any, lazy: Any) -> Any:
    return at(lazy._armed, lazy._view)


@ENTRIES.implements(aten.as_strided.default)
def _as_strided(func: Any, lazy: Any, *args: Any) -> Any:
    """The one view that may leave the weight; a meta tensor does not mind."""
    view = _view(func, lazy, *args)
    size, stride, offset = view_of(view)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and not 0 <= last < view._armed.coverage.numel:
        raise WeightShapeError(
            f"{view._armed.name}: as_strided({list(size)}, {list(stride)}, {offset}) reaches element {last} of "
            f"a weight of {view._armed.coverage.numel}"
        )
    return view


@ENTRIES.implements(aten.view.dtype, aten.view_as_real.default, aten.view_as_complex.default)
def _reinterpret(func: Any, lazy: Any, *args: Any) -> NoReturn:
    raise QTensorError(
        f"{lazy._armed.name}: a lazy weight has no bytes to reinterpret ({func}); copy values of its dtype instead"
    )


@ENTRIES.implements(aten.resize_.default, aten.resize_as_.default)
def _resize(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise WeightShapeError(f"{lazy._armed.name}: a weight that is being loaded cannot be resized")


# Writes -------------------------------------------------------------------------------------------------------------


@ENTRIES.implements(aten.copy_.default)
def _copy_(func: Any, dst: Any, src: Any, non_blocking: bool = False) -> Any:
    if isinstance(src, LAZY):
        if isinstance(dst, LAZY) and src._armed is dst._armed and view_of(src) == view_of(dst):
            return dst  # set_model_state_dict completes a partial state dict with the model's own weights
        src = materialize(src)
    elif isinstance(src, QTensor):
        if isinstance(dst, LAZY) and dst._armed.accept(src, view_of(dst)):
            return dst
        src = src.dequantize(dst.dtype)
    if not isinstance(dst, LAZY):
        return func(dst, src, non_blocking)
    if (deliver := getattr(src, "deliver", None)) is not None:  # sources.undecoded: it has no values yet.
        deliver(dst._armed, view_of(dst))
        return dst
    if copied_by_init():
        values = src.clone()
        dst._armed.initialize(view_of(dst), lambda target: func(target, values), replaces=True)
    else:
        dst._armed.write(view_of(dst), src)
    return dst


@ENTRIES.implements(aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default)
def _fill_(func: Any, lazy: Any, *values: Any) -> Any:
    if initialising():
        lazy._armed.initialize(view_of(lazy), lambda target: func(target, *values), replaces=True)
    else:
        size, stride, offset = view_of(lazy)
        if func is not aten.fill_.Tensor:  # the others may fill an expanded view
            size = tuple(n if step else min(n, 1) for n, step in zip(size, stride, strict=True))
        value = values[0] if values else 0
        device = value.device if isinstance(value, torch.Tensor) else "cpu"
        lazy._armed.write(View(size, stride, offset), torch.as_tensor(value, dtype=lazy.dtype, device=device))
    return lazy


@ENTRIES.implements(aten._foreach_copy_.default)
def _foreach_copy_(func: Any, targets: Sequence[Any], sources: Sequence[Any], non_blocking: bool = False) -> None:
    for dst, src in zip(targets, sources, strict=True):
        dst.copy_(src)


@ENTRIES.implements(aten._foreach_zero_.default)
def _foreach_zero_(func: Any, targets: Sequence[Any]) -> None:
    for dst in targets:
        dst.zero_()


@ENTRIES.implements(aten.set_.source_Tensor)
def _set_(func: Any, lazy: Any, source: Any) -> Any:
    """An assignment; by a parametrization that is being put on, of what the weight holds so far in another form."""
    if initialising() and not isinstance(source, LAZY) and source.shape == lazy.shape and not source.is_meta:
        values = source.clone()
        lazy._armed.initialize(view_of(lazy), lambda target: target.copy_(values), replaces=True)
    else:
        assign(lazy, source)
    return lazy


@ENTRIES.implements(*SCATTERED)
def _scattered_write(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """Writes to elements that only the operation knows: run it once on values and once on a mask of what it touches."""
    if accumulates(func, (lazy, *args), kwargs):
        return _mutate(func, lazy, *args, **kwargs)
    rest, kwargs = tree_map_only(LAZY, materialize, (args, kwargs))
    armed, view = lazy._armed, view_of(lazy)
    values = torch.zeros(armed.shape, dtype=armed.dtype, device=armed.device)
    target, mask = values.as_strided(*view), whole_mask(func, (lazy, *rest))
    if func in INDEXED and mask is not None and mask.is_cpu and target.is_contiguous():
        # NumPy finds the positions of a mask eight times as fast.
        target.view(-1).index_put_((torch.from_numpy(np.flatnonzero(mask.numpy())),), rest[1])
    else:
        func(target, *rest, **kwargs)
    armed.write_masked(values, touched_elements(func, (lazy, *rest), kwargs, armed.shape, view))
    return lazy


_FEW_COLUMNS = 16


@ENTRIES.implements(aten.index_copy_.default, replaces=_scattered_write)
def _index_copy_(func: Any, lazy: Any, dim: int, index: torch.Tensor, source: torch.Tensor) -> Any:
    """Row by row in the order given, neighbouring rows together; many columns all at once."""
    # On meta first: it complains of shapes and dtypes before anything is written.
    func(_on_meta(lazy), dim, _on_meta(index), _on_meta(source))
    wanted = index.flatten().tolist()
    if source.dtype != lazy.dtype:
        raise WeightDtypeError(f"{lazy._armed.name}: index_copy_ of {source.dtype} into {lazy.dtype}; cast it first")
    if 0 not in lazy.shape and any(n > 1 and not step for n, step in zip(lazy.shape, lazy.stride(), strict=True)):
        raise QTensorError(
            f"{lazy._armed.name}: index_copy_ into an expanded view, which has each element several times"
        )
    size = lazy.shape[dim] if lazy.dim() else 1
    if wrong := [i for i in wanted if not 0 <= i < size]:
        raise IndexError(f"{lazy._armed.name}: index_copy_ at {wrong[0]} of dimension {dim}, which has {size}")
    if not lazy.dim():
        return lazy.copy_(source.reshape(()))
    if lazy.stride(dim) == 1 and len(set(wanted)) == len(wanted) > _FEW_COLUMNS:
        return _scattered_write(func, lazy, dim, index, source)
    start = 0
    for i in range(1, len(wanted) + 1):
        if i == len(wanted) or wanted[i] != wanted[i - 1] + 1:
            lazy.narrow(dim, wanted[start], i - start).copy_(source.narrow(dim, start, i - start))
            start = i
    return lazy


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._meta if isinstance(tensor, LAZY) else tensor.to("meta")


def _mutate(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Any other operation that writes: on a real tensor that is read first where it must be, then written back.

    An initialiser's operation (uniform_, normal_, or arithmetic inside torch.nn.init) is recorded, not counted.
    """
    specs = {spec.name: spec for spec in func._schema.arguments}
    bound = dict(zip(specs, args, strict=False)) | kwargs
    written = [
        n
        for n, v in bound.items()
        if (alias := specs[n].alias_info) and alias.is_write and any(isinstance(t, LAZY) for t in flatten([v]))
    ]
    first = bound[written[0]]
    alone = len(written) == 1 and isinstance(first, LAZY)
    random = func.overloadpacket in RANDOM
    if alone and (random or initialising() or first._armed.is_constructed()):
        rest = {n: tree_map_only(LAZY, materialize, v) for n, v in bound.items() if n != written[0]}
        if any(isinstance(t, torch.Tensor) and t.is_meta for t in flatten(list(rest.values()))):
            first._armed.initial.forget()
        else:
            first._armed.initialize(view_of(first), lambda target: func(**rest, **{written[0]: target}), random)
        return first
    pure_output = {n for n in written if specs[n].is_out}
    real = {n: tree_map_only(LAZY, _blank if n in pure_output else _own, v) for n, v in bound.items()}
    out = func(**real)
    for n in written:
        for lazy, values in zip(flatten([bound[n]]), flatten([real[n]]), strict=True):
            if isinstance(lazy, LAZY):
                lazy._armed.write(view_of(lazy), values)
    return first if alone else out


def _regeometry(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """unsqueeze_, t_ and their like give a tensor another shape in place. The shape of a handle is what it is."""
    changed = func(lazy._meta.detach(), *args, **kwargs)
    if View(changed.size(), changed.stride(), changed.storage_offset()) == view_of(lazy):
        return lazy
    name = func._schema.name.removeprefix("aten::")
    raise QTensorError(
        f"{lazy._armed.name}: {name} would change the shape of a weight that is being loaded, in place. Take a view "
        f"instead ({name.rstrip('_')}), or change it when the session is over."
    )


# Reads --------------------------------------------------------------------------------------------------------------


def _read(func: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tree_map_only(LAZY, ops_live.operand, (args, kwargs))
    return func(*args, **kwargs)


def _blank(lazy: Any) -> torch.Tensor:
    return torch.empty(lazy.shape, dtype=lazy.dtype, device=lazy.device)


def _own(lazy: Any) -> torch.Tensor:
    return written(lazy).clone()


@ENTRIES.implements(aten.clone.default)
def _clone(func: Any, lazy: Any, **kwargs: Any) -> Any:
    """A read, except where `distribute_tensor` cuts its shard out of a weight that nobody has written to: that makes
    the shard the weight."""
    armed = lazy._armed
    if not armed.coverage.covered and not armed.in_place and distributing():
        shard = armed.retyped(armed.dtype, armed.device, tuple(lazy.shape))
        return wrap(shard, torch.empty(shard.shape, dtype=armed.dtype, device="meta"))
    values, like = materialize(lazy), func(lazy._meta.detach(), **kwargs)
    # With the strides that a plain tensor's copy has: they follow from the view's and the memory format.
    return torch.empty_strided(like.size(), like.stride(), dtype=values.dtype, device=values.device).copy_(values)


@ENTRIES.implements(aten._to_copy.default)
def _to_copy(func: Any, lazy: Any, **kwargs: Any) -> Any:
    """A read, except where the result takes the weight's place: for `module.to(...)`, and of a weight that nobody has
    written to. That is the same weight as another type, or elsewhere."""
    armed, dtype, device = (
        lazy._armed,
        kwargs.get("dtype") or lazy.dtype,
        torch.device(kwargs.get("device") or lazy.device),
    )
    is_whole = view_of(lazy) == whole(armed.shape)
    if is_whole and replaced_by_module():
        cast(armed, dtype, device)
        return recast(lazy)
    if device.type == "meta":
        return torch.empty_strided(lazy.shape, lazy.stride(), dtype=dtype, device=device)
    if is_whole and not armed.coverage.covered and armed.coverage.numel and not armed.in_place:
        return wrap(retyped := armed.retyped(dtype, device), torch.empty(retyped.shape, dtype=dtype, device="meta"))
    out = func(materialize(lazy), **kwargs)
    return remember_cast(lazy, out) if is_whole else out


@ENTRIES.implements(
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten._has_compatible_shallow_copy_type.default,
)
def _undivided(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What is nothing, or `_to_copy`, or a question `module.to()` asks. In inference mode they come undivided."""
    return func.decompose(*args, **kwargs)


def _like(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """empty_like, new_zeros and the like: only shape, dtype and device matter."""
    return func(lazy._meta, *args, **({"device": lazy.device} | kwargs))


@ENTRIES.implements(aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default)
def _empty(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """Memory without values. `module.to_empty()` puts it in the weight's place, whose values are given up."""
    armed = lazy._armed
    if not armed.coverage.covered and not armed.in_place and scatters():
        raise QTensorError(
            f"{armed.name}: distribute_tensor would send pieces of it to other ranks, and it is not loaded yet. Pass "
            "src_data_rank=None, which parallelize_module takes too: each rank takes its own piece"
        )
    if func is aten.empty_like.default and view_of(lazy) == whole(armed.shape) and replaced_by_module():
        vacate(armed, torch.device(kwargs.get("device") or lazy.device))
        return recast(lazy)
    return mark(_like(func, lazy, *args, **kwargs))


@ENTRIES.implements(aten.new_zeros.default)
def _new_zeros(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    if asked_by_fsdp():
        raise QTensorError(
            f"{lazy._armed.name} is being loaded, and fully_shard cannot split it now. Call fully_shard before "
            "online_quant(scheme, model), or when the session is over."
        )
    return _like(func, lazy, *args, **kwargs)


def _classify(func: Any) -> Handler:
    """The handler of an operation that has no entry of its own, from its schema."""
    schema = func._schema
    name = schema.name.split("::")[-1]
    if torch.Tag.inplace_view in func.tags:
        return _regeometry
    if written_arguments(func):
        return _mutate
    if name.endswith("_like") or name.startswith("new_"):
        return _like
    if schema.arguments and schema.arguments[0].alias_info is not None:
        return _view
    return _read


# Collectives --------------------------------------------------------------------------------------------------------


_COLLECTIVES = collectives()
_RECEIVES = {op for op in _COLLECTIVES if "recv" in str(op)}


@ENTRIES.implements(*_COLLECTIVES)
def _collective(func: Any, targets: Any, *args: Any, **kwargs: Any) -> Any:
    """A c10d operation that writes into lazy weights: run it on real tensors and wait, then write those."""
    lazies = [w for w in flatten(targets) if isinstance(w, LAZY)]
    real: dict[int, torch.Tensor] = {}
    for w in lazies:
        readable = _COLLECTIVES[func] and w._armed.readable(view_of(w))
        real[id(w)] = _own(w) if readable else _blank(w)
    swapped = tree_map_only(LAZY, lambda w: real[id(w)] if id(w) in real else materialize(w), (targets, *args))
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


# The tables ---------------------------------------------------------------------------------------------------------


def install() -> None:
    """A quantized weight whose session is open answers products as any QTensor, and all else as a lazy weight."""
    OPS.fill(ENTRIES, otherwise=_classify)
    LIVE_OPS.fill(ops_live.OPS, otherwise=OPS.handler)
