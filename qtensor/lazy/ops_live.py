"""What a quantized weight whose session is open answers as one: products, and the transposition that goes with them."""

from __future__ import annotations

from typing import Any

import torch

from ..tensor import ops_products
from ..tensor.qtensor import QTensor
from ..tensor.table import OpTable
from . import lazy_tensor

aten = torch.ops.aten
OPS = OpTable()
OPS.fill(ops_products.OPS, otherwise=lazy_tensor.OPS.handler)


def operand(lazy: Any) -> torch.Tensor:
    """What takes a lazy tensor's place in an operation that reads it: the transpose of a live weight as it is, for
    products, of all else the values."""
    if isinstance(lazy, lazy_tensor.LiveQTensor) and lazy.transposed:
        return lazy.with_parts(*lazy.parts())
    return lazy_tensor.materialize(lazy)


@OPS.implements(aten.t.default, aten.transpose.int, replaces=ops_products.transpose)
def _transpose(func: Any, live: Any, *dims: int) -> Any:
    """For products a quantized matrix, for writes the weight: what is written to it goes the way of all writes."""
    view, turned = lazy_tensor.OPS.dispatch(func, (live, *dims), None), ops_products.transpose(func, live, *dims)
    if not isinstance(turned, QTensor):
        return view
    turned.__class__ = lazy_tensor.LiveQTensor
    turned.__dict__.update(view.__dict__)
    return turned
