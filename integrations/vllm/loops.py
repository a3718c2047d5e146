"""What this package takes of qtensor's compiled loops beside products: the loops, or torch where there is no numba."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from qtensor import kernels
from qtensor.kernels import Parts, WeightFormat
from qtensor.kernels.cpu.compiling import Once

from . import compat


@Once
def loops() -> Any:
    """The modules of loops, as attributes by their names; None where there is no numba.

    Importing numba takes as long as mapping a model does. So a start from a snapshot does it beside vLLM's own steps
    after the load (`loops.begin()`), and whoever needs a loop before that waits.
    """
    try:
        from qtensor.kernels.cpu import layouts, mixtures, prepared, routing
    except ImportError:
        return None
    compat.shield_llvmlite()
    return SimpleNamespace(layouts=layouts, mixtures=mixtures, prepared=prepared, routing=routing)


@contextlib.contextmanager
def kept_memory(nbytes: int) -> Iterator[torch.Tensor]:
    """Bytes that were used before, if there are some: the page faults of fresh memory cost more than writing it."""
    found = loops()
    if found is None:
        yield torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return
    with found.layouts.kept_memory(nbytes) as memory:
        yield memory


def round_into(out: torch.Tensor, sums: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor | None) -> None:
    """out `[M, N]` = sums in fp32, which may change, each row times its step, plus bias. All contiguous."""
    found = loops()
    if found is not None and out.dtype == torch.bfloat16 and (bias is None or bias.dtype == torch.bfloat16):
        found.layouts.round_into(out, sums, steps, bias)
        return
    sums *= steps
    out.copy_(sums if bias is None else sums.add_(bias))


class Kept:
    """What a layer needs for products of a few rows, worked out at the first of them, for as long as its parameters
    are those that it was worked out for."""

    def __init__(self) -> None:
        self._parts: list[tuple[str, torch.Tensor, int]] = []
        self._call: Callable[..., torch.Tensor | None] | None = None

    def __call__(self, layer: Any, *args: Any) -> torch.Tensor | None:
        """The product, or None where it has to be taken in another way."""
        if self._call is None:
            return None
        parameters = layer._parameters
        for name, part, _ in self._parts:
            if parameters[name] is not part:
                return None
        return self._call(*args)

    def for_linear(self, parts: dict[str, torch.Tensor], fmt: WeightFormat, cols: int) -> None:
        """From now on `(x, bias)`, as `prepared.Bound` takes it."""
        if self._are_others(parts):
            self._call = loops().prepared.Bound(Parts(*parts.values()), fmt, cols)

    def for_experts(
        self,
        first: dict[str, torch.Tensor],
        second: dict[str, torch.Tensor],
        fmt: WeightFormat,
        hidden: int,
        inner: int,
        activate: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        """From now on `(x, ids, weights)`, as `mixtures.Bound` takes it."""
        if self._are_others(first | second):
            stacks = Parts(*first.values()), Parts(*second.values())
            self._call = loops().mixtures.Bound(*stacks, fmt, hidden, inner, activate)

    def _are_others(self, parts: dict[str, torch.Tensor]) -> bool:
        """Whether these have not been looked at, and the loops serve them."""
        now = [(name, part, part.data_ptr()) for name, part in parts.items()]
        if len(now) == len(self._parts) and all(
            old[1] is new[1] and old[2] == new[2] for old, new in zip(self._parts, now, strict=True)
        ):
            return False
        self._parts, self._call = now, None
        plain = all(part.is_contiguous() and part.numel() for part in parts.values())
        return plain and loops() is not None and kernels.serving(*parts.values()).name == "numba"

    def drop(self) -> None:
        """Hold no parameters any more."""
        self._parts, self._call = [], None


def few_tokens(
    x: torch.Tensor,
    first: Parts,
    second: Parts,
    fmt: WeightFormat,
    ids: torch.Tensor,
    weights: torch.Tensor,
    inner: int,
    activate: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor | None:
    """See `mixtures.experts`; None where the loops do not serve."""
    found = loops()
    if found is None or kernels.serving(x, *first, *second).name != "numba":
        return None
    return found.mixtures.experts(x, first, second, fmt, ids, weights, inner, activate)


def combine_into(out: torch.Tensor, terms: torch.Tensor, where: torch.Tensor, weights: torch.Tensor) -> None:
    """out `[T, N]` = Σ over j of weights `[T, k]` · the row of terms that where `[T, k]` says; one below zero is 0."""
    found = loops()
    if found is not None and out.dtype == torch.bfloat16:
        found.routing.combine_into(out, terms.contiguous(), where, weights.float().contiguous())
        return
    weights = torch.where(where < 0, 0.0, weights.float())
    out.copy_((terms[where.clamp_min(0)].float() * weights.unsqueeze(-1)).sum(1))
