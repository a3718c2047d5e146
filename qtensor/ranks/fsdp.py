"""FSDP2: quantized weights as shards of `fully_shard`, which gathers them in quantized form before a layer runs.

FSDP splits a Parameter along its first dimension, keeps this rank's shard as the local tensor of a DTensor, padded in
memory to the size of the largest, and gathers the shards for each product. It takes a tensor subclass for raw memory
unless it has `fsdp_pre_all_gather` and `fsdp_post_all_gather`; those of QTensor hand over quantized values and scales
as bytes, and `tensor.ops_fsdp` has what else FSDP asks of a shard. `Hold` is a session's half: while weights are
arriving, FSDP must not touch them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from ..callers import FSDP
from ..errors import QTensorError
from ..interrupts import without_grad
from ..lazy.lazy_tensor import LazyWeight
from ..modules import local_tensor
from ..tensor.qtensor import QTensor


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
            without_grad(param.reset_sharded_param)
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
