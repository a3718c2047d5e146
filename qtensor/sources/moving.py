"""Rows moved as they are into another format: the source's numbers, in the form in which weights are stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..kernels import Parts, WeightFormat
from .source import Matrix, Source

_SIGNS = {"e4m3": 0x80, "e2m1": 0x88}
"""What is left of a byte of codes whose numbers are 0: their signs."""


def moved_rows(source: Source, parts: Mapping[str, torch.Tensor], shape: Matrix, fmt: WeightFormat) -> Parts | None:
    """As `source.move`, and codes whose scale is 0 become 0: the same numbers. Some tools leave what did not fit into a
    scale so small that it became 0, and a folder with values under such a scale counts as damaged."""
    made = source.move(parts, shape, fmt)
    if made is None or fmt.has_e8m0_scale:
        return made
    idle = made.scale.float() == 0
    if made.global_scale is not None:
        idle = idle | (made.global_scale == 0)
    if not bool(idle.any()):
        return made
    codes = made.qdata.view(torch.uint8)
    rows, cols = (size or whole for size, whole in zip(_sizes(fmt), shape, strict=True))
    wide = idle.reshape(fmt.scale_shape(shape) if fmt.granularity != "tensor" else (1, 1))
    wide = wide.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(max(cols // fmt.per_byte, 1), 1)
    kept = torch.where(wide[:, : codes.shape[1]], codes & _SIGNS.get(fmt.element, 0), codes)
    return Parts(kept.view(made.qdata.dtype), made.scale, made.global_scale)


def _sizes(fmt: WeightFormat) -> tuple[int, int]:
    """Rows and columns that share a scale; 0: all."""
    if fmt.granularity in ("tensor", "channel"):
        return (0 if fmt.granularity == "tensor" else 1), 0
    return fmt.block
