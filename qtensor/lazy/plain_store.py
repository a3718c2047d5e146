"""PlainStore: a weight that is not quantized, in an ordinary tensor, that knows which of its elements were written."""

from __future__ import annotations

import torch

from ..errors import QTensorError
from ..regions.coverage import Box, Coverage, boxes_of
from ..regions.views import View, cover, regions, view_mask


class NeverWritten(QTensorError):
    """A read touched elements that were never written. `boxes` holds them, in the weight's dimensions."""

    def __init__(self, boxes: list[Box]) -> None:
        super().__init__(boxes)
        self.boxes = boxes


class PlainStore:
    """A weight that stays in high precision: a real tensor of the weight's shape.

    initialised: the tensor held meaningful values before any load, so that unwritten elements may be read.
    """

    def __init__(self, tensor: torch.Tensor, coverage: Coverage, initialised: bool = False) -> None:
        self.tensor = tensor
        self.coverage = coverage
        self.initialised = initialised

    def copy(self, coverage: Coverage) -> PlainStore:
        return PlainStore(self.tensor.clone(), coverage, self.initialised)

    def write(self, view: View, source: torch.Tensor) -> None:
        self.at(view).copy_(source)
        cover(self.coverage, view)

    def start_over(self) -> None:
        """Forget everything that was written: values that were there before are gone."""
        self.initialised = False

    def write_masked(self, values: torch.Tensor, touched: torch.Tensor) -> None:
        """Take those elements of `values` (of the weight's shape) where `touched` is true."""
        self.tensor.copy_(torch.where(touched.to(self.tensor.device), values.to(self.tensor), self.tensor))
        self.coverage.add_mask(touched.cpu().numpy())

    def at(self, view: View) -> torch.Tensor:
        """The elements of a view, where they are. The tensor is contiguous; it may be a part of a larger one."""
        return self.tensor.as_strided(view.size, view.stride, self.tensor.storage_offset() + view.offset)

    def read(self, view: View) -> tuple[torch.Tensor, bool]:
        """The elements (a live view of the store) and whether they are lossy, which they never are."""
        if not self.initialised:
            require_covered(self.coverage, view)
        return self.at(view), False


def require_covered(coverage: Coverage, view: View) -> None:
    if coverage.complete:
        return
    found = regions(coverage.shape, view)
    if found is None:
        boxes = boxes_of(view_mask(coverage.shape, view) & ~coverage.mask())
    else:
        boxes = [gap for box, _ in found for gap in coverage.missing(box)]
    if boxes:
        raise NeverWritten(boxes)
