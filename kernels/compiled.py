"""Dequantization as a few plain torch operations, for tracing: torch.compile, torch.export, fake and meta tensors.

No loop over chunks, no data-dependent branch, no kernel launch a compiler cannot see into; a compiler fuses it into
whatever reads the result. Same values as the other backends.
"""

from __future__ import annotations

import torch

from .codes import traceable_decode
from .formats import WeightFormat


def must_trace(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on these tensors is being recorded, or has no memory to run a kernel on."""
    if torch.compiler.is_compiling():
        return True
    return any(t is not None and (t.is_meta or type(t) not in (torch.Tensor, torch.nn.Parameter)) for t in tensors)


def dequantize(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    fmt: WeightFormat,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `qtensor.kernels.dequantize`."""
    values = traceable_decode(qdata, fmt)
    rows, cols = values.shape[-2:]
    step = fmt.step(scale)
    if global_scale is not None:
        step = step * global_scale[..., None]
    if fmt.granularity == "tensor":
        step = step.unsqueeze(-1)
    if fmt.block[0] > 1:
        step = step.repeat_interleave(fmt.block[0], -2)[..., :rows, :]
    if fmt.block[1] > 1:
        step = step[..., torch.arange(cols, dtype=torch.int64, device=step.device) // fmt.block[1]]
    values = (values * step).to(dtype)
    return values if out is None else out.copy_(values[..., : out.shape[-1]])
