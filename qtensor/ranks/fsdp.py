"""FSDP2: quantized weights as shards of `fully_shard`, which gathers them in quantized form before a layer runs.

FSDP splits a Parameter along its first dimension, keeps this rank's shard as the local tensor of a DTensor, padded in
memory to the size of the largest, and gathers the shards for each product. It takes a tensor subclass for raw memory
unless it has `fsdp_pre_all_gather` and `fsdp_post_all_gather`; those of QTensor hand over quantized values and scales
as bytes. The operations here are what else FSDP asks of a shard. `Hold` is a session's half: while weights are
arriving, FSDP must not touch them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..callers import FSDP, asked_by_fsdp
from ..errors import QTensorError
from ..lazy.lazy_tensor import LazyWeight
from ..modules import local_tensor
from ..tensor.ops_slices import _take_slice
from ..tensor.qtensor import QTensor, _alias, _implements, _like, _on_dequantized, empty

aten = torch.ops.aten


# What FSDP asks of a shard ------------------------------------------------------------------------------------------


@_implements(aten.new_zeros.default)
def _new_zeros(func: Any, w: QTensor, size: Any, **kwargs: Any) -> Any:
    return _room(w, tuple(size)) if asked_by_fsdp() else _like(func, w, size, **kwargs)


def _room(w: QTensor, size: tuple[int, ...]) -> QTensor:
    """Zeros in quantized form, of `size`, to hold a shard of `w` and its padding. Scales that no row owns are `w`'s."""
    if w._padded is not None and w._padded.shape == size:
        return w._padded
    if w.transposed or size[1:] != w.shape[1:]:
        raise QTensorError(
            f"fully_shard: a quantized weight {list(w.shape)} is split along its first dimension only (Shard(0))"
        )
    block = w.scheme.format.block[0] if w.dim() == 2 else 1
    if block > 1 and size[0] % block and size[0] != w.shape[0]:
        raise QTensorError(
            f"fully_shard: a shard of {size[0]} rows of a weight {list(w.shape)} ends inside a group of {block} with "
            f"one {w.scheme.name} scale. Choose another number of ranks, or a scheme with a scale per row."
        )
    room = empty(size, w.scheme, w.dtype, w.device)
    by_rows = {id(part) for part in w._parts_by_rows()}
    for mine, theirs in zip(room.parts(), w.parts(), strict=True):
        if id(theirs) in by_rows:
            mine.view(torch.uint8).zero_()
        else:
            mine.copy_(theirs)
    room._is_room = True
    return room


@_implements(aten.view.default)
def _view(func: Any, w: QTensor, size: Any) -> Any:
    """FSDP keeps a flat view of a shard's memory, which it does not use where there are extensions."""
    if tuple(size) == (-1,) and asked_by_fsdp():
        return _alias(aten.alias.default, w)
    return _on_dequantized(func, w, size)


@_implements(aten.as_strided.default)
def _as_strided(func: Any, w: QTensor, size: Any, stride: Any, offset: int | None = None) -> Any:
    """The first rows of a gathered weight: those that are not padding."""
    size = tuple(size)
    in_rows = torch.empty(size, dtype=w.dtype, device="meta").stride()
    if w.transposed or size[1:] != w.shape[1:] or size[0] > w.shape[0] or tuple(stride) != in_rows or offset:
        return _on_dequantized(func, w, size, stride, offset)
    rows = _take_slice(w, 0, slice(0, size[0], 1))
    return rows._with(*rows.parts(), whole_units=w.whole_units)


@_implements(aten.is_pinned.default)
def _is_pinned(func: Any, w: QTensor, device: Any = None) -> bool:
    return all(part.is_pinned() for part in w.parts())


@_implements(aten._pin_memory.default)
def _pin_memory(func: Any, w: QTensor, device: Any = None) -> QTensor:
    return w._with(*(part.pin_memory() for part in w.parts()))


# Sessions -----------------------------------------------------------------------------------------------------------


class Hold:
    """While a session is open, FSDP lets go of the Parameters of a model, and takes them as they are at its end.

    Arming and loading need the sharded Parameters in their modules, and FSDP would pad local tensors (as raw memory, in
    high precision) each time a state dict has been loaded.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._modules = reshard(model) if model is not None else []
        self._params = [p for module in self._modules for p in _managed(module)]
        self._quantized = {id(p) for p in self._params if isinstance(_local(p), QTensor)}
        for param in self._params:
            param.reset_sharded_param = _nothing

    def reshard(self) -> None:
        for module in self._modules:
            module.reshard()

    def let_go_of_values(self) -> None:
        """Of those that are being loaded anew, FSDP holds the old values, too."""
        for param in self._params:
            local = _local(param)
            if isinstance(local, LazyWeight):
                self._refuse_what_cannot_gather(param, local)
                param._sharded_param_data = torch.empty(0, dtype=local.dtype, device=local.device)

    def _refuse_what_cannot_gather(self, param: Any, local: LazyWeight) -> None:
        if local._armed.scheme is None:
            return
        if param.fsdp_placement.dim != 0:
            raise QTensorError(
                f"{local._armed.name}: fully_shard split it along dimension {param.fsdp_placement.dim}; quantized "
                "weights are gathered along the first only. Leave shard_placement_fn out, or `ignore` this weight."
            )
        if param.post_forward_mesh_info not in (None, param.mesh_info):
            raise QTensorError(
                f"{local._armed.name}: fully_shard(reshard_after_forward=<number>) keeps a part of a gathered weight "
                "as raw memory, which a quantized one does not have. Pass True or False."
            )

    def release(self) -> None:
        """FSDP manages its Parameters again; those that became quantized are gathered as such from now on."""
        self.reshard()
        for param in self._params:
            param.__dict__.pop("reset_sharded_param", None)
            if id(param) in self._quantized or isinstance(_local(param), LazyWeight):
                continue
            param._init_extensions()
            param.all_gather_outputs = []
            param.__dict__.pop("_unsharded_param", None)
            with torch.no_grad():
                param.reset_sharded_param()
        self._modules, self._params = [], []


def reshard(model: nn.Module) -> list[Any]:
    """A forward pass leaves unsharded Parameters in the modules of FSDP; put the sharded ones there. Returns them."""
    fsdp = sys.modules.get(FSDP)  # not imported: then nobody has called fully_shard
    modules = [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp is not None else []
    for module in modules:
        module.reshard()
    return modules


def _managed(module: Any) -> list[Any]:
    """FSDP's records of the Parameters it manages together with this module."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before PyTorch 2.13 there was one
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return [param for group in groups for param in group.fsdp_params]


def _local(param: Any) -> Any:
    return local_tensor(param.sharded_param)


def _nothing() -> None:
    pass
