"""A weight that several ranks hold parts of, and what each part must be after a refit: the ranks' values put together,
quantized as if there were one rank, and cut up again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qtensor import QTensor, quantize
from qtensor.schemes.scheme import Scheme
from support.helpers import copy_unit
from support.programs import Box


@dataclass
class Weight:
    """A weight, of which this rank has the `span` of dimension `dim`. `full` is what a refit writes to this part in
    high precision, and else what it holds; `seen` where it writes."""

    name: str
    module: nn.Module
    scheme: Scheme
    shape: tuple[int, ...]
    dim: int
    span: tuple[int, int]
    expected: Any = None
    full: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    seen: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def param(self) -> Any:
        return next(iter(self.module.parameters()))

    @property
    def full_name(self) -> str:
        return f"{self.name}.{next(iter(self.module._parameters))}"

    @property
    def is_shared(self) -> bool:
        """Do ranks have to agree on its scales?"""
        fmt, axis = self.scheme.format, self.dim - len(self.shape)
        return axis != -3 and (fmt.needs_whole_matrix or (fmt.granularity == "channel" and axis == -1))

    @property
    def unit(self) -> int:
        return self.scheme.format.unit_rows(self.full.shape[-2])

    def has_whole_units(self, box: Box) -> bool:
        """A part of one would take away what is there of the rest of it."""
        *_, (first, last), columns = box
        rows = self.full.shape[-2]
        return columns == (0, self.full.shape[-1]) and not first % self.unit and (last == rows or not last % self.unit)

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.narrow(self.dim, self.span[0], self.span[1] - self.span[0]).contiguous()

    def values(self, seed: int) -> torch.Tensor:
        """Of the whole weight."""
        random = torch.Generator().manual_seed(seed)
        return (torch.randn(self.shape, generator=random) * (0.02 + seed % 7)).bfloat16()

    def part_of(self, quantized: QTensor, part: QTensor) -> list[torch.Tensor]:
        """This rank's bytes of the whole weight. part: of the same shape as this rank's."""
        found, axis = [], self.dim - len(self.shape) + 2
        for n, (whole, own) in enumerate(zip(quantized.parts(), part.parts(), strict=True)):
            if whole.shape != own.shape:
                per = self.scheme.format.block[axis] if axis >= 0 else 1
                if n == 0:  # Two codes may be in a byte.
                    per = 1 if whole.shape[self.dim] == self.shape[self.dim] else 2
                whole = whole.narrow(self.dim, self.span[0] // max(per, 1), own.shape[self.dim])
            found.append(whole)
        return found

    def after(self, ranks: list[tuple[torch.Tensor, torch.Tensor]]) -> QTensor:
        """What this rank has to hold when a refit has succeeded in which the ranks had this `full` and `seen`."""
        expected = self.expected.detach().clone()
        if self.is_shared and not any(bool(seen.any()) for _, seen in ranks):
            return expected
        whole = torch.cat([full for full, _ in ranks], self.dim)
        new = quantize(self.full, self.scheme)
        for target, source in zip(new.parts(), self.part_of(quantize(whole, self.scheme), new), strict=True):
            target.copy_(source)
        stack = self.full.dim() == 3
        for e in range(self.full.shape[0] if stack else 1):
            seen = self.seen[e] if stack else self.seen
            for first in range(0, len(seen), self.unit):
                last = min(first + self.unit, len(seen))
                if self.is_shared or bool(seen[first:last].any()):
                    copy_unit(expected, new, e if stack else None, first, last)
        return expected

    def matrices(self, weight: QTensor) -> list[tuple[torch.Tensor, ...]]:
        return [weight.parts().matrix(e) for e in range(self.full.shape[0])] if weight.dim() == 3 else [weight.parts()]
