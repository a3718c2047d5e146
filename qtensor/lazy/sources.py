"""What a loader may write to a weight: values that fit, and whose numbers mean something."""

from __future__ import annotations

import math

import torch

from ..errors import QTensorError, WeightShapeError
from ..regions.views import View, bounds


def fitted(name: str, shape: tuple[int, ...], view: View, source: torch.Tensor) -> torch.Tensor:
    """The source in the size of a view of a weight of `shape`. Raises WeightShapeError, or QTensorError on meta."""
    if source.is_meta:
        raise QTensorError(f"{name}: the source is on the meta device and has no values to copy.")
    try:
        return source.expand(view.size)
    except RuntimeError:
        where = "" if view.size == shape else f" into [{', '.join(f'{a}:{b}' for a, b in bounds(shape, view))}]"
        raise WeightShapeError(
            f"{name}: a source of shape {list(source.shape)} does not fit{where} {list(view.size)} of a "
            f"weight of shape {list(shape)}. Is this checkpoint made for this model and parallel layout?"
        ) from None


def is_high_precision(source: torch.Tensor) -> bool:
    """Only real floating point of 16 bits or more can be quantized without guessing what the numbers mean."""
    return source.dtype.is_floating_point and source.dtype.itemsize >= 2


def unusable_source(name: str, dtype: torch.dtype) -> str:
    return (
        f"{name}: the source is {dtype}, which has no meaning as high-precision values. If the checkpoint is "
        "quantized already, say so (`source=`, docs/sources.md) and load its scales with it."
    )


def nonfinite_at(source: torch.Tensor) -> tuple[int, int] | None:
    """Row and column of the first infinity or NaN in a matrix; None if all values are finite."""
    # One pass without temporaries, in the source's dtype: with a cast a bf16 sum is eight times as slow. The sum of
    # finite values may overflow, so only a finite sum is an answer.
    if math.isfinite(source.sum().item()) or torch.isfinite(source).all():
        return None
    row, col = (~torch.isfinite(source)).nonzero()[0].tolist()
    return row, col
