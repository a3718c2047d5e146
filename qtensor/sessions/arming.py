"""Arming: what is done to a Parameter so that it takes new values while it is in use, and what undoes it."""

from __future__ import annotations

from typing import Any, cast

import torch

from ..lazy.lazy_tensor import LazyWeight, arm, attributes_of, close, parameter
from ..lazy.plain_store import PlainStore
from ..lazy.quant_store import QuantStore
from ..lazy.swap import Swap
from ..lazy.weight import ArmedWeight
from ..tensor.qtensor import QTensor


class ArmedQuantized:
    """A quantized Parameter that takes new values. `do` and `undo` may be repeated, and undo what was half done; they
    put it back where `torch.utils.swap_tensors` has made something else of it."""

    def __init__(self, param: QTensor, weight: ArmedWeight) -> None:
        self.param, self._weight, self._attributes = param, weight, attributes_of(param)
        self.live = cast(QTensor, self.final)

    def do(self) -> bool:
        self._put_back()
        arm(self.param, self._weight)
        return True

    @property
    def final(self) -> torch.Tensor:
        """What it will stand for when it is committed."""
        return cast(QuantStore, self._weight.store).result

    def undo(self, committed: bool = False) -> None:
        if committed:
            self.live = cast(QTensor, self.final)
        self._put_back()
        close(self.param)

    def _put_back(self) -> None:
        if not isinstance(self.param, QTensor) or self.param.dtype != self.live.dtype:
            twin: Any = self.live.detach()
            twin.__dict__.update(self._attributes, _is_param=True)
            Swap(self.param, twin).do()


class ArmedPlain:
    """A Parameter in high precision that is a lazy weight while it takes new values. `do` and `undo` as above."""

    def __init__(self, param: torch.Tensor, weight: ArmedWeight) -> None:
        self.param, self.live, self._weight = param, param.detach(), weight
        self._other = parameter(weight, param.requires_grad)
        self._other.__dict__.update(attributes_of(param))
        self._swap = Swap(param, self._other)
        weight.params = [param]

    def do(self) -> bool:
        return self._swap.do()

    @property
    def final(self) -> torch.Tensor:
        return cast(PlainStore, self._weight.store).target.live(0)[0]

    def undo(self, committed: bool = False) -> None:
        if isinstance(self.param, LazyWeight):
            self._other.__dict__.update(attributes_of(self.param))
        self._swap.undo()
        if committed and self.final.data_ptr() != self.live.data_ptr():  # it was cast
            self.param.data = self.final


Arming = ArmedQuantized | ArmedPlain
