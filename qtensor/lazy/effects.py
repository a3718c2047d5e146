"""What PyTorch operations write: the knowledge that LazyWeight and CopyCounter share.

Most operations that write say so in their schema and write all of the view they are given. Two kinds need more:
scattered writes, whose target elements depend on values, and c10d collectives, whose schemas say nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

aten = torch.ops.aten

SCATTERED = {
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten.index_copy_.default,
    aten.index_fill_.int_Scalar,
    aten.index_fill_.int_Tensor,
    aten.masked_fill_.Scalar,
    aten.masked_fill_.Tensor,
    aten.masked_scatter_.default,
    aten.scatter_.src,
    aten.scatter_.value,
    aten.put_.default,
}
"""Operations that write some elements of their first argument, chosen by index or mask."""

INDEXED = {aten.index_put_.default, aten._index_put_impl_.default}
_MASKED = {aten.masked_fill_.Scalar, aten.masked_fill_.Tensor, aten.masked_scatter_.default}

RANDOM = {
    getattr(aten, name)
    for name in ("uniform_", "normal_", "exponential_", "bernoulli_", "random_", "cauchy_", "log_normal_", "geometric_")
}
"""Operations that initialise. No loader fills a weight with random numbers."""

COLLECTIVES = {
    "broadcast_": True,
    "allreduce_": True,
    "reduce_": True,
    "recv_": False,
    "recv_any_source_": False,
    "scatter_": False,
    "allgather_": False,
    "_allgather_base_": False,
    "reduce_scatter_": False,
    "_reduce_scatter_base_": False,
    "alltoall_": False,
    "alltoall_base_": False,
}
"""c10d operations that write the tensor, or (nested) list of tensors, of their first argument → whether they also read
it (all_reduce, the sending side of broadcast)."""


def collectives() -> dict[Any, bool]:
    """`COLLECTIVES` as operator overloads; empty where torch has no distributed support."""
    if not torch.distributed.is_available():
        return {}
    packets = {getattr(torch.ops.c10d, name, None): reads for name, reads in COLLECTIVES.items()}
    return {packet.default: reads for packet, reads in packets.items() if packet is not None}


@cache
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments whose memory an operation writes, by its schema."""
    arguments = func._schema.arguments
    return tuple((i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def accumulates(func: Any, args: tuple, kwargs: dict) -> bool:
    """Does a scattered write add to what is there instead of replacing it?"""
    names = [a.name for a in func._schema.arguments]
    bound = dict(zip(names, args, strict=False)) | kwargs
    return bool(bound.get("accumulate"))


def whole_mask(func: Any, args: tuple) -> torch.Tensor | None:
    """The mask, of the first argument's shape, by which a scattered write chooses its elements; None if it has none."""
    chosen = args[1][0] if func in INDEXED and len(args[1]) == 1 else args[1] if func in _MASKED else None
    if isinstance(chosen, torch.Tensor) and chosen.dtype == torch.bool and chosen.shape == args[0].shape:
        return chosen
    return None


def touched_elements(
    func: Any, args: tuple, kwargs: dict, shape: tuple[int, ...], view: tuple[Any, Any, int]
) -> torch.Tensor:
    """Which elements of an array of `shape` a scattered write touches whose first argument is a view (size, stride,
    offset) of it: the operation itself, run on the same view of a mask."""
    touched = torch.zeros(shape, dtype=torch.bool, device=args[0].device)
    marked: list[Any] = [touched.as_strided(*view)]
    if (mask := whole_mask(func, args)) is not None and all(view[1]):
        marked[0].copy_(mask)
        return touched
    for spec, arg in zip(func._schema.arguments[1:], args[1:], strict=False):
        if spec.name in ("values", "value", "source", "src"):
            arg = torch.ones_like(arg, dtype=torch.bool) if isinstance(arg, torch.Tensor) else True
        marked.append(arg)
    func(*marked, **kwargs)
    return touched


def flatten(value: Any) -> list[Any]:
    """The items of arbitrarily nested lists."""
    return [x for item in value for x in flatten(item)] if isinstance(value, (list, tuple)) else [value]
