"""Names: from a place in one of vLLM's fused weights back to the tensors a checkpoint should have had for it.

vLLM renames and fuses: `self_attn.qkv_proj.weight` is filled from q_proj, k_proj and v_proj, `experts.w13_weight` from
two tensors per expert. The names of tensors that did arrive are kept, so that those of their missing siblings can be
given as this checkpoint would spell them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import nn

from qtensor.errors import IncompleteLoadError
from qtensor.modules import full_name, weight_of
from qtensor.regions.coverage import Box
from qtensor.report.report import describe_boxes
from qtensor.text import joined

_QKV = ("q", "k", "v")
_SHOWN = 20
_ADVICE = (
    "Check that all of its files are there and listed in its index, and that it was made for this config.json; then "
    "load again."
)


def refuse_incomplete(what: str, lines: list[str], boxes: dict[str, list[Box]], advice: str = _ADVICE) -> NoReturn:
    """Raise IncompleteLoadError with one line per tensor that is missing."""
    shown = lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
    raise IncompleteLoadError(f"{what}:\n  " + joined(shown, "\n  ") + f"\n{advice}", boxes)


class Names:
    """parts: gives the layers that a checkpoint has for one of vLLM's, in order (see `Choice.parts`)."""

    def __init__(self, parts: Callable[[str], list[str]]) -> None:
        self._parts = parts
        self._seen: dict[tuple[str, str, Any, Any], str] = {}
        self._shapes: dict[str, list[int]] = {}

    def saw(
        self, prefix: str, name: str, shard: Any, expert: Any, source: str | None, shape: Sequence[int] | None = None
    ) -> None:
        """A tensor the checkpoint calls `source`, of this shape, is being loaded into the shard (and expert) of
        `prefix`.`name`."""
        if source is not None:
            self._seen[prefix, name, _key(shard), expert] = source
            self._shapes[source] = list(shape or ())

    def describe(
        self, prefix: str, layer: nn.Module, name: str, shape: tuple[int, ...], boxes: Sequence[Box]
    ) -> list[str]:
        """One line per tensor of the checkpoint that the unwritten boxes of a weight stand for."""
        if len(shape) == 3 and hasattr(layer, "ckpt_gate_proj_name"):
            return self._describe_experts(prefix, layer, name, shape, boxes)
        lines = []
        for start, stop, shard, part in self._shards(prefix, layer, shape):
            inside = [((max(a, start), min(b, stop)), *rest) for (a, b), *rest in boxes if a < stop and b > start]
            if not inside:
                continue
            source = self._missing_name(prefix, name, shard, part)
            local = [((a - start, b - start), *rest) for (a, b), *rest in inside]
            what = describe_boxes((stop - start, *shape[1:]), local)
            fused = "" if part == prefix else f" (of the fused {prefix}.{name})"
            lines.append(f"'{source}'{fused}: {what}{self._seen_shape(source)}")
        return lines or [f"'{full_name((prefix, layer, name))}': {describe_boxes(shape, boxes)}"]

    def _seen_shape(self, source: str) -> str:
        shape = self._shapes.get(source)
        return f" (the checkpoint's tensor is {shape})" if shape else ""

    def _shards(self, prefix: str, layer: nn.Module, shape: Sequence[int]) -> list[tuple[int, int, Any, str]]:
        """(first row, last row, vLLM's shard id, checkpoint's layer name) of the parts of a fused weight."""
        parts, sizes = self._parts(prefix), list(getattr(layer, "output_partition_sizes", []))
        if len(parts) != len(sizes) or sum(sizes) != shape[0]:
            return [(0, shape[0], None, prefix)]
        shards, start = [], 0
        for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            shard = None if len(parts) == 1 else _QKV[i] if prefix.endswith("qkv_proj") and len(parts) == 3 else i
            shards.append((start, start + size, shard, part))
            start += size
        return shards

    def _missing_name(self, prefix: str, name: str, shard: Any, part: str) -> str:
        """The checkpoint's spelling: that of a part of the same layer that arrived, or of a layer beside it, with the
        last module replaced."""
        last = part.rpartition(".")[2]
        for (seen_prefix, seen_name, seen_shard, _), source in self._seen.items():
            if seen_prefix == prefix and seen_name == name:
                if seen_shard == _key(shard):
                    return source
                head, _, tail = source.rpartition(".")
                return ".".join(filter(None, (head.rpartition(".")[0], last, tail)))
        parent = prefix.rpartition(".")[0]
        for (seen_prefix, *_), source in self._seen.items():
            place, _, own = source.rpartition(".")[0].rpartition(".")
            siblings = self._parts(seen_prefix) if seen_prefix.rpartition(".")[0] == parent else ()
            if place and own in [sibling.rpartition(".")[2] for sibling in siblings]:
                return f"{place}.{last}.{name}"
        return f"{part}.{name}"

    def _describe_experts(
        self, prefix: str, layer: Any, name: str, shape: tuple[int, ...], boxes: Sequence[Box]
    ) -> list[str]:
        lines = []
        shards = [("w2", layer.ckpt_down_proj_name, 0, shape[1])]
        if name.startswith("w13"):
            half = shape[1] // 2 if layer.ckpt_up_proj_name is not None else shape[1]
            shards = [("w1", layer.ckpt_gate_proj_name, 0, half), ("w3", layer.ckpt_up_proj_name, half, shape[1])]
        globals_of = _global_experts(layer, shape[0])
        for e in range(shape[0]):
            for shard, tensor, start, stop in shards:
                inside = [
                    ((max(a, start) - start, min(b, stop) - start), cols)
                    for (first, last), (a, b), cols in boxes
                    if first <= e < last and a < stop and b > start
                ]
                if inside:
                    source = self._missing_expert(prefix, name, shard, globals_of[e], tensor)
                    what = describe_boxes((stop - start, shape[2]), inside)
                    lines.append(
                        f"'{source}' (expert {globals_of[e]} of {prefix}.{name}): {what}{self._seen_shape(source)}"
                    )
        return lines

    def _missing_expert(self, prefix: str, name: str, shard: str, expert: int, tensor: str) -> str:
        """The spelling of the same tensor of another expert, if one arrived."""
        for (seen_prefix, seen_name, seen_shard, seen_expert), source in self._seen.items():
            if (seen_prefix, seen_name, seen_shard) != (prefix, name, shard) or seen_expert is None:
                continue
            pattern = rf"(experts\.){seen_expert}(\.)"
            return re.sub(pattern, rf"\g<1>{expert}\g<2>", source) if re.search(pattern, source) else source
        return weight_of(f"{prefix.removesuffix('.routed_experts')}.{expert}.{tensor}")


def _key(shard: Any) -> Any:
    return tuple(shard) if isinstance(shard, (list, tuple)) else shard


def _global_experts(layer: Any, local: int) -> list[int]:
    """The global number of every local expert; vLLM keeps the map the other way round."""
    found = list(range(local))
    to_local = getattr(layer, "_map_global_expert_id_to_local_expert_id", None)
    if to_local is not None:
        for expert in range(int(getattr(layer, "global_num_experts", local))):
            at = to_local(expert)
            if 0 <= at < local:
                found[at] = expert
    return found
