"""Where a quantized weight of a layer is: while it is loaded, and once the layer has published it for its kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtensor.lazy.weight import ArmedWeight
from qtensor.regions.boxes import contiguous_strides
from qtensor.schemes.scheme import Scheme
from qtensor.tensor.qtensor import QTensor


@dataclass
class Slot:
    """Where an armed weight lives. publish: gives the layer the finished weight in the form its kernel wants. split:
    the dimensions of its matrices that are split over ranks, 0 for rows and 1 for columns."""

    prefix: str
    layer: nn.Module
    name: str
    publish: Callable[[nn.Module], None]
    attributes: dict[str, Any]
    split: frozenset[int] = frozenset()

    @property
    def full_name(self) -> str:
        return f"{self.prefix}.{self.name}"


@dataclass
class Published:
    """A weight that its layer has published. places: for each of its parts (see `QTensor.parts`), the layer's parameter
    that shares its memory, its shape and its address; None if the kernel keeps one of them in another form."""

    slot: Slot
    shape: tuple[int, ...]
    dtype: torch.dtype
    scheme: Scheme
    places: list[tuple[str, torch.Size, int]] | None

    @classmethod
    def find(cls, slot: Slot, weight: ArmedWeight, result: QTensor) -> Published:
        params = {p.data_ptr(): name for name, p in slot.layer._parameters.items() if p is not None}
        found = [(params.get(t.data_ptr()), t.shape, t.data_ptr()) for t in result.parts()]
        places = [(name, shape, address) for name, shape, address in found if name is not None]
        whole = len(places) == len(found)
        return cls(slot, weight.shape, weight.dtype, result.scheme, places if whole else None)

    def live(self) -> QTensor | None:
        """The weight where the layer's kernel reads it, row-major; None if it is not there in this form."""
        if self.places is None:
            return None
        parts = []
        for name, shape, address in self.places:
            param = self.slot.layer._parameters.get(name)
            if param is None or param.data_ptr() != address:
                return None
            parts.append(param.data.as_strided(shape, contiguous_strides(shape), param.storage_offset()))
        return assembled(parts, self.scheme, self.dtype, self.shape[-1])


def assembled(parts: Sequence[torch.Tensor], scheme: Scheme, dtype: torch.dtype, cols: int) -> QTensor:
    """The weight `[..., N, cols]` whose `QTensor.parts` these are."""
    qdata, scale, *rest = parts
    return QTensor(qdata, scale, scheme, dtype, global_scale=rest[0] if rest else None, cols=cols)
