"""Mixtures of experts for a few tokens, laid out beforehand as `prepared` lays out single weights: routing, both
products and the sum over a token's experts are five C functions, with the activation between them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..formats import WeightFormat, ceil_div
from ..parts import Parts
from . import layouts, prepared, rows
from .instructions import FP32
from .laying import LAY_ROWS, PURPOSE, lay_rows
from .prepared import Multiplication, set_places

_MOST_PAIRS = 256  # Of a token and an expert; of one expert, two times what is decoded for at once.
AT_ONCE = 4  # Rows of x that a weight is decoded for.
_GAINS = [list(layouts.ROUTE.names or ()).index(name) for name in ("gains1", "gains2")]


def experts(
    x: torch.Tensor,
    first: Parts,
    second: Parts,
    fmt: WeightFormat,
    ids: torch.Tensor,
    weights: torch.Tensor,
    inner: int,
    activate: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor | None:
    """Σ over each token's experts of weight · second(activate(first(x))), for a few tokens; None for other calls.

    Args:
        x: `[T, H]`.
        first: The stack `[E, I', H]`.
        second: The stack `[E, H, I]`.
        fmt: Of both.
        ids: Experts, int32 `[T, k]`.
        weights: fp32 `[T, k]`.
        inner: I.
        activate: Between the two, `[P, I']` → `[P, I]` in fp32.

    Returns:
        `[T, H]` in x's dtype; what lies between is not rounded.
    """
    tensors = (*first, *second)
    if (
        not 0 < ids.numel() <= _MOST_PAIRS
        or x.dtype is not torch.bfloat16
        or x.stride(1) != 1
        or x.is_neg()
        or ids.dtype is not torch.int32
        or weights.dtype is not torch.float32
        or not (ids.is_contiguous() and weights.is_contiguous())
    ):
        return None

    def run() -> torch.Tensor | None:
        key = (*(part.data_ptr() for part in (*first[:2], *second[:2])), first[0].shape, second[0].shape, fmt.name)
        mixture = prepared._kept.get(key)
        if mixture is None or mixture.cols != (x.shape[1], inner):
            if not all(part.is_contiguous() and part.numel() for part in tensors):
                return None
            if len(prepared._kept) == prepared._MOST_KEPT:
                prepared._kept.clear()
            mixture = prepared._kept[key] = _Mixture(first, second, fmt, x.shape[1], inner)
        gains = [part[2] for part in (first, second) if len(part) == 3]
        found: torch.Tensor | None = mixture.run(x, gains, ids, weights, activate)
        return found

    return prepared.unless_busy(run)


class _Mixture:
    """A mixture of experts: stacks `[E, I', H]` and `[E, H, I]`, and what is between them."""

    def __init__(self, first: Parts, second: Parts, fmt: WeightFormat, hidden: int, inner: int) -> None:
        experts = first.qdata.shape[0]
        self.cols = hidden, inner
        self._first, self._second = (
            Multiplication(first, fmt, hidden),
            Multiplication(second, fmt, inner, torch.float32),
        )
        self._ends, self._found = np.zeros(experts + 1, np.int64), np.zeros(2, np.int64)
        self._where = np.zeros(_MOST_PAIRS, np.int64)
        self._route, self._combine = np.zeros(1, layouts.ROUTE), np.zeros(1, layouts.COMBINE)
        self._between = np.zeros(1, LAY_ROWS)
        one = self._first
        route = {"cols": hidden, "order": one.order, "out_stride": one.x_stride, "experts": experts}
        route |= {"most": 2 * AT_ONCE, "ends": self._ends.ctypes.data}
        route |= {"where": self._where.ctypes.data, "found": self._found.ctypes.data}
        for i, stack in ((1, self._first), (2, self._second)):
            route |= {f"matrices{i}": stack.matrices.ctypes.data, f"jobs{i}": stack.jobs.ctypes.data}
            route[f"counter{i}"] = stack.counters.ctypes.data
            if stack.tables is not None and stack.values is not None:
                route[f"values{i}"] = stack.values.data_ptr()
        set_places(self._route, route)
        two = self._second
        between = {"x_stride": one.sums_stride, "cols": inner, "order": two.order}
        set_places(self._between, between | {"out_stride": two.x_stride})
        set_places(self._combine, {"sums_stride": two.sums_stride, "where": self._where.ctypes.data, "cols": two.rows})
        # What changes with each call, as flat arrays, and what is called with them.
        all_places = self._route, self._between, self._combine
        self._flat = [places.view(np.int64) for places in all_places]
        lay_out = lay_rows(FP32, purpose=PURPOSE)
        loops = layouts.route(purpose=PURPOSE), lay_out, layouts.combine(purpose=PURPOSE)
        self._calls = [(loop, p.ctypes.data) for loop, p in zip(loops, all_places, strict=True)]
        self._pairs = 0

    def run(
        self,
        x: torch.Tensor,
        gains: list[torch.Tensor],
        ids: torch.Tensor,
        weights: torch.Tensor,
        activate: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor | None:
        threads = torch.get_num_threads()
        team = rows.team() if threads > 1 else None
        if threads > 1 and team is None:
            return None
        one, two = self._first, self._second
        tokens, each = ids.shape
        pairs = tokens * each
        if threads != one.threads or one.room is not prepared._room or pairs > self._pairs:
            self._place(pairs, threads)
        route, between, combine = self._flat
        (lay_out, at_route), (lay_out_sums, at_between), (add_up, at_combine) = self._calls
        route[0], route[1], route[6], route[7], route[8] = x.data_ptr(), 2 * x.stride(0), ids.data_ptr(), pairs, each
        if gains:
            route[_GAINS[0]], route[_GAINS[1]] = gains[0].data_ptr(), gains[1].data_ptr()
        lay_out(at_route)
        jobs = int(self._found[0])
        if not jobs:
            return None
        one.run_jobs(team, jobs)
        assert self._sums is not None
        hidden = activate(self._sums[:pairs])
        between[0], between[1], between[2] = hidden.data_ptr(), 4 * hidden.stride(0), pairs
        lay_out_sums(at_between)
        two.run_jobs(team, jobs)
        out = torch.empty((tokens, two.rows), dtype=torch.bfloat16, device="cpu")
        combine[3], combine[4], combine[5], combine[7] = weights.data_ptr(), each, tokens, out.data_ptr()
        add_up(at_combine)
        return out

    def _place(self, pairs: int, threads: int) -> None:
        one, two = self._first, self._second
        sizes = [pairs * size for size in (one.x_stride, one.sums_stride, two.x_stride, two.sums_stride)]
        sizes = [ceil_div(size, 64) * 64 for size in sizes]
        room, start = prepared.roomy(sum(sizes))
        at = [start + sum(sizes[:i]) for i in range(4)]
        one.place(room, threads, at[0], at[1])
        two.place(room, threads, at[2], at[3])
        offset = at[1] - room.data_ptr()
        self._sums = room[offset : offset + pairs * one.sums_stride].view(torch.float32).view(pairs, one.rows)
        self._route["out"], self._between["out"], self._combine["sums"] = at[0], at[2], at[3]
        self._pairs = pairs
