"""The operations of quantized weights, put together: `install` fills the table of QTensor, once, when qtensor is
imported."""

from __future__ import annotations

from typing import Any

from . import ops_copies, ops_fsdp, ops_joins, ops_products, ops_slices
from .dequantized_view import is_view, view_of_values
from .qtensor import OPS, on_dequantized
from .table import Handler

PARTS = (ops_copies.OPS, ops_products.OPS, ops_slices.OPS, ops_joins.OPS, ops_fsdp.OPS)


def install() -> None:
    OPS.fill(*PARTS, otherwise=_dequantize_first)


def _dequantize_first(op: Any) -> Handler:
    return view_of_values if is_view(op) else on_dequantized
