"""DTensor: a Parameter that is split over a device mesh. Its local tensor is the weight that loads and quantizes."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

Split = tuple[int, "dist.ProcessGroup"]
"""A dimension of a weight, and the ranks it is split over."""


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
