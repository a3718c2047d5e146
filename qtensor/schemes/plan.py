"""Plan: a scheme for each weight of a model, what that takes, and the file it is kept in (see `planning.py`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..text import joined
from .scheme import Scheme

KINDS = ("embedding", "attention in", "attention out", "MLP in", "MLP out", "experts", "head", "other")
"""Of layers, in the order in which a plan lists them."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a model that is going to be loaded.

    names: every name it has, as `named_parameters` gives them. itemsize: bytes of an element in high precision.
    is_weight: a parameter in high precision; not a buffer, nor integers.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    itemsize: int
    is_weight: bool = True


@dataclass(frozen=True)
class PlannedWeight:
    """What one tensor becomes.

    Attributes:
        tensor: What it is in the model.
        scheme: None if it stays in high precision.
        bytes: Of values and scales.
        kind: Of the layer, one of `KINDS`; "" for what no plan quantizes.
        layer: Its number; None outside of the layers.
    """

    tensor: Tensor
    scheme: Scheme | None
    bytes: int
    kind: str
    layer: int | None

    @property
    def name(self) -> str:
        return self.tensor.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """`[N, K]`, `[E, N, K]`, or whatever a tensor has that stays."""
        return self.tensor.shape


@dataclass(frozen=True)
class Plan:
    """A scheme per weight, and what that takes. `online_quant`, `QTensorConfig` and `quantize_checkpoint` take it as
    their scheme; vLLM's plugin takes the file that `save` writes.

    Attributes:
        fit: Bytes there are.
        reserve: Bytes of them to leave free.
        weights: Every tensor of the model, in its order.
        targets: Pattern → scheme, as `online_quant` takes them: this is what counts.
        lm_head: For vLLM: quantize the output head, too.
    """

    fit: int
    reserve: int
    weights: tuple[PlannedWeight, ...]
    targets: Mapping[str, Scheme]
    lm_head: bool = False

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(weight.bytes for weight in self.weights)

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`: a quantization_config, and beside it, under "plan", what was known when it was made."""
        known = [
            {
                "names": list(weight.tensor.names),
                "shape": list(weight.shape),
                "itemsize": weight.tensor.itemsize,
                "is_weight": weight.tensor.is_weight,
                "kind": weight.kind,
                "layer": weight.layer,
                "scheme": weight.scheme and weight.scheme.name,
                "bytes": weight.bytes,
            }
            for weight in self.weights
        ]
        head = {"lm_head": True} if self.lm_head else {}
        return {
            "targets": {pattern: scheme.name for pattern, scheme in self.targets.items()},
            **head,
            "plan": {"fit": self.fit, "reserve": self.reserve, "bytes": self.bytes, "weights": known},
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON, for `load_plan`. `targets` may be edited: it is what counts."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        """A table: kind, layers, scheme, weights, bytes."""
        free = f" ({in_gb(self.fit)} less {in_gb(self.reserve)} kept free)" if self.reserve else ""
        lines = [f"{in_gb(self.bytes)} of {in_gb(self.fit - self.reserve)}{free}"]
        order = [*KINDS, ""]
        rows = sorted(self.weights, key=lambda w: (order.index(w.kind), str(w.scheme)))
        for (kind, scheme), found in groupby(rows, key=lambda w: (w.kind, w.scheme)):
            group = list(found)
            layers = _ranges(sorted({w.layer for w in group if w.layer is not None}))
            size = sum(w.bytes for w in group)
            what = str(scheme) if scheme is not None else "as they are"
            lines.append(
                f"  {kind or 'norms, biases, …':16} {'layers ' + layers if layers else '':24} {what:20}"
                f"{len(group):6} tensors {size / 1e6:12.1f} MB"
            )
        return joined(lines)


def _ranges(numbers: Sequence[int]) -> str:
    """ "0-3, 28-31" """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def in_gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
