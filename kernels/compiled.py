"""Quantized weights as a few plain torch operations, for tracing: torch.compile, torch.export, fake and meta tensors.

No loop over chunks, no data-dependent branch, no kernel launch a compiler cannot see into; a compiler fuses it into
whatever reads the result. Same values as the other backends.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .codes import traceable_decode
from .formats import WeightFormat
from .parts import Parts
from .reference import Torch, saturated


def must_trace(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on these tensors is traced, or has no memory that a kernel could run on."""
    if torch.compiler.is_compiling():
        return True
    for t in tensors:  # Every product asks; with generators it takes three times as long.
        if t is not None and (type(t) not in _PLAIN or t.is_meta):
            return True
    return _transforming() is not None or is_recording()


def is_traced(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on these tensors is being recorded or transformed.

    A kernel's writes are in no graph that make_fx records, and what is allocated inside a torch.func transform is no
    memory but a wrapper; neither shows in the tensors' types.
    """
    if torch.compiler.is_compiling() or _transforming() is not None or is_recording():
        return True
    return any(isinstance(t, (FakeTensor, FunctionalTensor)) for t in tensors)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_transforming = torch._C._functorch.peek_interpreter_stack
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def is_recording() -> bool:
    """Is make_fx at work, before or after dispatch?"""
    found = torch._C._get_dispatch_mode(_PROXY) or torch._ops._get_dispatch_mode_pre_dispatch(_PROXY)
    return found is not None


class Traced(Torch):
    """The backend "traced"."""

    name = "traced"
    own: tuple[str, ...] = ("dequantize", "linear", "experts")

    def dequantize(
        self, parts: Parts, fmt: WeightFormat, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        values = traceable_decode(parts.qdata, fmt)
        rows, cols = values.shape[-2:]
        step = fmt.step(parts.scale)
        if parts.global_scale is not None:
            step = step * parts.global_scale[..., None]
        if fmt.granularity == "tensor":
            step = step.unsqueeze(-1)
        if fmt.block[0] > 1:
            step = step.repeat_interleave(fmt.block[0], -2)[..., :rows, :]
        if fmt.block[1] > 1:
            group = torch.arange(cols, dtype=torch.int64, device=step.device) // fmt.block[1]
            step = step[..., group]
            if fmt.has_zero_point:
                values = values - fmt.zero(parts.scale)[..., group]
        values = saturated(values * step, dtype).to(dtype)
        return values if out is None else out.copy_(values[..., : out.shape[-1]])

    def linear(
        self, x: torch.Tensor, parts: Parts, fmt: WeightFormat, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = self.dequantize(parts, fmt, x.dtype)[:, : x.shape[1]]
        return torch.nn.functional.linear(x, weight, bias)

    def experts(
        self,
        x: torch.Tensor,
        parts: Parts,
        fmt: WeightFormat,
        offsets: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Every row by every matrix: which rows belong to one is not known yet."""
        expert = torch.searchsorted(offsets, torch.arange(x.shape[0], dtype=torch.int64, device=x.device), right=True)
        out = x.new_zeros(x.shape[0], parts.qdata.shape[1])
        for e in range(parts.qdata.shape[0]):
            product = self.linear(x, parts.matrix(e), fmt, None if bias is None else bias[e])
            out = torch.where(expert[:, None] == e, product, out)
        return out


TRACED = Traced()
