"""What this package takes of qtensor's compiled loops beside products: the loops, or torch where there is no numba."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qtensor import kernels
from qtensor.kernels import Parts, WeightFormat
from qtensor.kernels.cpu.compiling import Task


def _import() -> Any:
    try:
        from qtensor.kernels.cpu import layouts, mixtures
    except ImportError:
        return None
    return layouts, mixtures


layouts, mixtures = Task(_import).result() or (None, None)


@contextlib.contextmanager
def kept_memory(nbytes: int) -> Iterator[torch.Tensor]:
    """Bytes that were used before, if there are some: the page faults of fresh memory cost more than writing it."""
    if layouts is None:
        yield torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return
    with layouts.kept_memory(nbytes) as memory:
        yield memory


def round_into(out: torch.Tensor, sums: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor | None) -> None:
    """out `[M, N]` = sums in fp32, which may change, each row times its step, plus bias. All contiguous."""
    if layouts is not None and out.dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16):
        layouts.round_into(out, sums, steps, bias)
        return
    sums *= steps
    out.copy_(sums if bias is None else sums.add_(bias))


def few_tokens(
    x: torch.Tensor,
    first: Parts,
    second: Parts,
    fmt: WeightFormat,
    ids: torch.Tensor,
    weights: torch.Tensor,
    inner: int,
    activate: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor | None:
    """See `mixtures.experts`; None where the loops do not serve."""
    if mixtures is None or kernels.serving(x, *first, *second).name != "numba":
        return None
    return mixtures.experts(x, first, second, fmt, ids, weights, inner, activate)


def combine_into(out: torch.Tensor, terms: torch.Tensor, where: torch.Tensor, weights: torch.Tensor) -> None:
    """out `[T, N]` = Σ over j of weights `[T, k]` · the row of terms that where `[T, k]` says; one below zero is 0."""
    if layouts is not None and out.dtype == torch.bfloat16:
        layouts.combine_into(out, terms.contiguous(), where, weights.float().contiguous())
        return
    weights = torch.where(where < 0, 0.0, weights.float())
    out.copy_((terms[where.clamp_min(0)].float() * weights.unsqueeze(-1)).sum(1))
