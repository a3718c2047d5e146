"""Mixtures of experts for a few tokens, laid out beforehand as `prepared` lays out single weights: routing, both
products, the activation between them and the sum over a token's experts, which enter C once or, where the activation is
torch's, twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..formats import WeightFormat, ceil_div
from ..parts import Parts
from . import prepared, routing, rows, vectors
from .instructions import BF16, FP32
from .laying import LAY_ROWS, PURPOSE, lay_rows
from .prepared import Multiplication, set_places
from .steps import Step, Steps, setter

_MOST_PAIRS = 256  # Of a token and an expert; of one expert, two times what is decoded for at once.
AT_ONCE = 4  # Rows of x that a weight is decoded for.
_SET_ROUTE, _SET_BETWEEN, _SET_COMBINE = map(setter, (7, 3, 4))
_PIECES = 8 * list(vectors.PRODUCT.names or ()).index("pieces")
Activation = Callable[[torch.Tensor], torch.Tensor]


def experts(
    x: torch.Tensor,
    first: Parts,
    second: Parts,
    fmt: WeightFormat,
    ids: torch.Tensor,
    weights: torch.Tensor,
    inner: int,
    activate: Activation | None = None,
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
        activate: Between the two, `[P, I']` → `[P, I]` in fp32. None: silu of the first I columns, times the others.

    Returns:
        `[T, H]` in x's dtype; what lies between is not rounded.
    """

    def run() -> torch.Tensor | None:
        key = (*(part.data_ptr() for part in (*first[:2], *second[:2])), first[0].shape, second[0].shape, fmt.name)
        mixture = prepared._kept.get(key)
        if mixture is None or mixture.cols != (x.shape[1], inner):
            if not all(part.is_contiguous() and part.numel() for part in (*first, *second)):
                return None
            if len(prepared._kept) == prepared._MOST_KEPT:
                prepared._kept.clear()
            mixture = prepared._kept[key] = _Mixture(first, second, fmt, x.shape[1], inner)
        gains = [part[2] for part in (first, second) if len(part) == 3]
        found: torch.Tensor | None = mixture.run(x, gains, ids, weights, activate)
        return found

    return prepared.unless_busy(run) if _serves(x, ids, weights) else None


def _serves(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> bool:
    return (
        0 < ids.numel() <= _MOST_PAIRS
        and x.dtype is torch.bfloat16
        and x.stride(1) == 1
        and not x.is_neg()
        and ids.dtype is torch.int32
        and weights.dtype is torch.float32
        and ids.is_contiguous()
        and weights.is_contiguous()
    )


class Bound:
    """`experts` for two stacks whose parts somebody holds, without what finds them anew. It takes plain tensors."""

    def __init__(
        self,
        first: Parts,
        second: Parts,
        fmt: WeightFormat,
        hidden: int,
        inner: int,
        activate: Activation | None = None,
    ) -> None:
        self._parts = first + second
        self._places = [part.data_ptr() for part in self._parts]
        self._gains = [part[2] for part in (first, second) if len(part) == 3]
        self._mixture, self._activate = _Mixture(first, second, fmt, hidden, inner), activate

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """x `[T, H]` → `[T, H]`; None for calls that are not of the kind, or where a part has moved."""
        if (
            type(x) is not torch.Tensor
            or not _serves(x, ids, weights)
            or [part.data_ptr() for part in self._parts] != self._places
        ):
            return None
        return prepared.unless_busy(lambda: self._mixture.run(x, self._gains, ids, weights, self._activate))


class _Mixture:
    """A mixture of experts: stacks `[E, I', H]` and `[E, H, I]`, and what is between them."""

    def __init__(self, first: Parts, second: Parts, fmt: WeightFormat, hidden: int, inner: int) -> None:
        experts = first.qdata.shape[0]
        self.cols = hidden, inner
        self._first, self._second = (
            Multiplication(first, fmt, hidden),
            Multiplication(second, fmt, inner, torch.float32),
        )
        self._ends, self._found = np.zeros(experts + 1, np.int64), np.zeros(1, np.int64)
        self._where = np.zeros(_MOST_PAIRS, np.int64)
        self._route, self._combine = np.zeros(1, routing.ROUTE), np.zeros(1, routing.COMBINE)
        self._between, self._gate = np.zeros(1, LAY_ROWS), np.zeros(1, routing.GATE)
        one, two = self._first, self._second
        route = {"cols": hidden, "order": one.order, "out_stride": one.x_stride, "experts": experts}
        route |= {"most": 2 * AT_ONCE, "ends": self._ends.ctypes.data}
        route |= {"where": self._where.ctypes.data, "found": self._found.ctypes.data}
        for i, stack in ((1, one), (2, two)):
            route |= {f"matrices{i}": stack.matrices.ctypes.data, f"jobs{i}": stack.jobs.ctypes.data}
            route |= {f"counter{i}": stack.counters.ctypes.data, f"count{i}": stack.places.ctypes.data + _PIECES}
            if stack.tables is not None and stack.values is not None:
                route[f"values{i}"] = stack.values.data_ptr()
        set_places(self._route, route)
        between = {"x_stride": one.sums_stride, "cols": inner, "order": two.order, "out_stride": two.x_stride}
        set_places(self._between, between)
        set_places(self._gate, between)
        set_places(self._combine, {"sums_stride": two.sums_stride, "where": self._where.ctypes.data, "cols": two.rows})
        self._pairs = 0

    def run(
        self,
        x: torch.Tensor,
        gains: list[torch.Tensor],
        ids: torch.Tensor,
        weights: torch.Tensor,
        activate: Activation | None,
    ) -> torch.Tensor | None:
        threads = torch.get_num_threads()
        one, two = self._first, self._second
        tokens, each = ids.shape
        pairs = tokens * each
        if threads != one.threads or one.room is not prepared._room or pairs > self._pairs:
            team = rows.team() if threads > 1 else None
            if threads > 1 and team is None:
                return None
            self._place(pairs, threads, team)
        first, second = (gains[0].data_ptr(), gains[1].data_ptr()) if gains else (0, 0)
        _SET_ROUTE(self._route, 0, x.data_ptr(), 2 * x.stride(0), ids.data_ptr(), pairs, each, first, second)
        out = torch.empty((tokens, two.rows), dtype=torch.bfloat16, device="cpu")
        _SET_COMBINE(self._combine, 0, weights.data_ptr(), each, tokens, out.data_ptr())
        if activate is None:
            self._gate_rows[0] = pairs
            self._gated.run()
            return out if self._found[0] else None
        self._before.run()
        if not self._found[0]:
            return None
        hidden = activate(self._sums[:pairs])
        _SET_BETWEEN(self._between, 0, hidden.data_ptr(), 4 * hidden.stride(0), pairs)
        self._after.run()
        return out

    def _place(self, pairs: int, threads: int, team: Any) -> None:
        one, two = self._first, self._second
        sizes = [pairs * size for size in (one.x_stride, one.sums_stride, two.x_stride, two.sums_stride)]
        sizes = [ceil_div(size, 64) * 64 for size in sizes]
        room, start = prepared.roomy(sum(sizes))
        at = [start + sum(sizes[:i]) for i in range(4)]
        one.place(room, threads, at[0], at[1])
        two.place(room, threads, at[2], at[3])
        offset = at[1] - room.data_ptr()
        self._sums = room[offset : offset + pairs * one.sums_stride].view(torch.float32).view(pairs, one.rows)
        self._route["out"], self._gate["x"], self._combine["sums"] = at[0], at[1], at[3]
        self._between["out"] = self._gate["out"] = at[2]
        self._route["pieces1"], self._route["pieces2"] = one.pieces, two.pieces
        loops = routing.route, routing.gate, routing.combine
        route, gate, combine = (loop(purpose=PURPOSE).address for loop in loops)
        begin = Step(route, self._route.ctypes.data, goes_on=self._found.ctypes.data), one.step(team, pairs)
        end = two.step(team, pairs), Step(combine, self._combine.ctypes.data)
        self._gated = Steps([*begin, Step(gate, self._gate.ctypes.data), *end])
        lay_out = Step(lay_rows(FP32, purpose=PURPOSE).address, self._between.ctypes.data)
        self._before, self._after = Steps(begin), Steps([lay_out, *end])
        self._gate_rows = self._gate.view(np.int64)
        self._pairs = pairs


def compile_loops() -> None:
    """What is no weight's own, for all processes to come."""
    for loop in (routing.route, routing.gate, routing.combine, routing.combine_rows):
        loop(purpose=PURPOSE)
    for dtype in (BF16, FP32):
        lay_rows(dtype, purpose=PURPOSE)
