"""DTensor: a Parameter that is split over a device mesh. Its local tensor is the weight that loads and quantizes."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

Split = tuple[int, "dist.ProcessGroup"]
"""A dimension of a weight, and the ranks it is split over."""
FSDP = "torch.distributed.fsdp"
_CALLERS = 4  # frames between an operation's handler and who called for it, at most


def is_dtensor(param: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then nobody has made one
    return module is not None and isinstance(param, module.DTensor)


def local_tensor(param: Any) -> Any:
    """What this rank holds of a parameter: of an ordinary one, itself."""
    return param._local_tensor if is_dtensor(param) else param


def splits(param: Any) -> list[Split]:
    """How a DTensor is split."""
    mesh = param.device_mesh
    return [(p.dim % param.dim(), mesh.get_group(i)) for i, p in enumerate(param.placements) if not p.is_replicate()]


def home(param: Any) -> torch.device:
    """The device a parameter's values belong on, also while it is on the meta device."""
    device: torch.device = local_tensor(param).device
    if device.type != "meta":
        return device
    return torch.device(param.device_mesh.device_type if is_dtensor(param) else "cpu")


def rehome(param: Any) -> Any:
    """A DTensor Parameter like `param`, on the device of its local tensor: one made on meta says so for ever."""
    new = type(param)(param._local_tensor, param._spec, requires_grad=param.requires_grad)
    new.__dict__.update(param.__dict__)
    return new


def asked_by_fsdp() -> bool:
    """Is FSDP calling the operation whose handler asks? What it does to pad a shard has a meaning of its own."""
    frame = sys._getframe(2)
    for _ in range(_CALLERS):
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").startswith(FSDP):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
