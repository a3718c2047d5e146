"""The final form of a Parameter: another tensor takes its place, for whoever holds it. Each step may be repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..lazy.lazy_tensor import LAZY, attributes_of, close, settle, view_of
from ..lazy.plain_store import PlainStore
from ..lazy.quant_store import QuantStore
from ..lazy.swap import Swap
from ..lazy.weight import ArmedWeight
from ..modules import Owner
from ..regions.views import whole
from ..tensor.qtensor import QTensor

WHEN_FINISHED: list[Callable[[nn.Module], object]] = []
"""What else is done to a model whose load has finished. Each may be repeated, and raises nothing."""


class Replacement:
    """A Parameter that becomes another tensor, for everyone who holds it. Where PyTorch refuses to exchange the two,
    its owners get the new object. `do` may be repeated."""

    def __init__(self, param: torch.Tensor, new: torch.Tensor, owners: Sequence[Owner]) -> None:
        new.__dict__.update(attributes_of(param))
        self._swap, self._new, self._owners = Swap(param, new), new, owners

    def do(self) -> None:
        if not self._swap.do():
            for _, module, name in self._owners:
                module._parameters[name] = self._new  # type: ignore[assignment]


def become_quantized(param: Any, result: QTensor) -> None:
    """A lazy weight, complete or half-way there, becomes the quantized weight of these values."""
    if isinstance(param, LAZY):
        settle(param, result)
    close(param)


def plain_parameter(lazy: torch.Tensor, tensor: torch.Tensor) -> nn.Parameter:
    """An ordinary Parameter of these values, for a lazy weight that stays in high precision."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        tensor = tensor.clone()  # Of one that inference mode made no gradient may be asked outside of it.
    return nn.Parameter(tensor, requires_grad=lazy.requires_grad)


def final_step(weight: ArmedWeight, param: Any, owners: Sequence[Owner]) -> Callable[[], object]:
    """What gives a Parameter of a weight that is complete its final form."""
    if isinstance(weight.store, QuantStore) and view_of(param) == whole(weight.shape):
        return partial(become_quantized, param, weight.store.result)
    return Replacement(param, plain_parameter(param, values_of(param)), owners).do


def values_of(lazy: Any) -> torch.Tensor:
    """What a weight, or a view of one (`nn.Parameter(other.weight[:8])`, a buffer), stands for at the end: memory of
    the weight; of one that is quantized, a copy in high precision."""
    store = lazy._armed.store
    return store.at(view_of(lazy)) if isinstance(store, PlainStore) else store.read(view_of(lazy))[0]
