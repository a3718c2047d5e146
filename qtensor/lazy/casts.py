"""What `module.to()`, `.half()`, `.cuda()`, `to_empty()` and their like do to a weight that is being loaded.

The values that PyTorch would cast may not be there, or be there in quantized form. So the weight itself changes its
dtype and place, and whatever arrives later is cast on arrival, as a copy into a Parameter of that dtype is.
"""

from __future__ import annotations

import torch

from ..errors import QTensorError, WeightDtypeError
from ..kernels import SOURCE_DTYPES
from .quant_store import QuantStore
from .weight import UNDECIDED, ArmedWeight


def cast(weight: ArmedWeight, dtype: torch.dtype, device: torch.device) -> None:
    """From now on the weight has this dtype, and is on this device.

    What is staged is cast now. What is quantized and no longer staged keeps its bytes: `weight.cast_from` has its dtype
    where the cast rounds. The meta device takes the values; until there are others, the weight says that it is there.
    """
    with weight.lock:
        if device.type == "meta":
            if not weight.is_still_meta():
                vacate(weight, device)
                weight.on_meta = "moved"
            device = weight.device
        if isinstance(weight.store, QuantStore) and dtype not in SOURCE_DTYPES:
            raise WeightDtypeError(
                f"{weight.name}: cannot become {dtype} while it is being quantized. Cast the model before the session "
                "or after it, or add the weight to `ignore`."
            )
        if weight.in_place:
            _stay(weight, device)
        if weight.settled:
            weight.host.hold(weight, -1)
        if weight.store is not None:
            weight.store.cast(dtype, device)
            weight.was = weight.was or weight.dtype
        elif weight.scheme is not UNDECIDED and (dtype in SOURCE_DTYPES) != (weight.dtype in SOURCE_DTYPES):
            weight.scheme = UNDECIDED
        weight.initial.cast(dtype, device)
        weight.dtype, weight.device = dtype, device
        if weight.settled:
            weight.host.hold(weight)


def vacate(weight: ArmedWeight, device: torch.device) -> None:
    """Memory without values takes the weight's place: nothing is written, and nothing is known. During a reload the
    values in use stay until there are others."""
    with weight.lock:
        if weight.in_place:
            _stay(weight, device)
            return
        if weight.settled:
            weight.settled = False
            weight.host.reopened(weight)
        weight.start_anew()
        if device.type != "meta":
            weight.device = weight.initial.device = device


def _stay(weight: ArmedWeight, device: torch.device) -> None:
    """Raises QTensorError for another device than the one a weight in use is on."""
    if torch.empty(0, dtype=weight.dtype, device=device).device != weight.device:  # "cuda" is one of its devices
        raise QTensorError(
            f"{weight.name}: a model whose weights are being reloaded cannot be moved to {device}; move it before or "
            "after the reload"
        )
