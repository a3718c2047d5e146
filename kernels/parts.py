"""Parts: the tensors that a quantized weight is made of, in the one order that everything here hands them on in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, SupportsIndex

import torch

from .formats import WeightFormat


class Parts(tuple[torch.Tensor, ...]):
    """Quantized values, scales and, for formats with one, the global scale: a tuple of the two or three there are.

    Of a weight `[N, K]` or a stack `[E, N, K]`; the shapes are the format's `qdata_shape`, `scale_shape` and
    `global_scale_shape`.
    """

    __slots__ = ()

    def __new__(cls, qdata: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor | None = None) -> Parts:
        return tuple.__new__(cls, (qdata, scale) if global_scale is None else (qdata, scale, global_scale))

    @classmethod
    def of(cls, shape: tuple[int, ...], fmt: WeightFormat, device: torch.device | str | None = None) -> Parts:
        """New memory for a weight of `shape`, not yet written."""
        whole = fmt.global_scale_shape(shape)
        return cls(
            torch.empty(fmt.qdata_shape(shape), dtype=fmt.dtype, device=device),
            torch.empty(fmt.scale_shape(shape), dtype=fmt.scale_dtype, device=device),
            None if whole is None else torch.empty(whole, dtype=torch.float32, device=device),
        )

    def __getnewargs__(self) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return tuple(self)

    @property
    def qdata(self) -> torch.Tensor:
        return self[0]

    @property
    def scale(self) -> torch.Tensor:
        return self[1]

    @property
    def global_scale(self) -> torch.Tensor | None:
        return self[2] if len(self) == 3 else None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Parts:
        """The function of each of them."""
        return Parts(*map(function, self))

    def matrix(self, e: SupportsIndex) -> Parts:
        """Of a stack: matrix e."""
        return tuple.__new__(Parts, [part[e] for part in self])

    def rows(self, start: int, stop: int, fmt: WeightFormat) -> Parts:
        """Of a matrix: rows start to stop, where `start` begins a block of `fmt` and `stop` ends one, or the matrix."""
        if stop - start == self[0].shape[0]:
            return self
        scale = self[1] if fmt.granularity == "tensor" else self[1][fmt.scale_rows(start, stop)]
        return tuple.__new__(Parts, (self[0][start:stop], scale, *self[2:]))


class Pieces(Protocol):
    """What writes rows of one weight, or of one stack, many times: what is the same each time was looked up before."""

    def write(self, source: torch.Tensor, row: int, unit: int, units: int, origin: int) -> bool:
        """Quantize `source` into rows that begin at `row`, and are so many units from `unit` on, both counted through
        all matrices. origin: as `Backend.quantize_into` takes it. False, and nothing is written, if the source is not
        of the kind that is taken here. Raises NonFinite before anything is stored."""
