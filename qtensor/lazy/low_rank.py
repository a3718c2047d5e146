"""Low-rank updates: a weight plus the product of two thin matrices, written unit by unit.

A trainer of LoRA has W, A and B. The engine needs `W + s * B @ A`, quantized: formed here for as many rows at a time as
a few megabytes hold, so that nobody has a second W in high precision.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import QTensorError, WeightShapeError
from ..interrupts import without_grad
from .lazy_tensor import LAZY

_CHUNK_BYTES = 2 << 20


def write_low_rank(
    weight: torch.Tensor,
    base: torch.Tensor | None,
    b: torch.Tensor,
    a: torch.Tensor,
    scaling: float = 1.0,
) -> None:
    """Write `base + scaling * b @ a` into a weight that is being loaded or reloaded, or into a part of it.

    Sums are of single floats, and are rounded once, to the weight's dtype. No more rows are formed at a time than whole
    units of two megabytes, and one unit at least. Like any write, it can be repeated, and is undone with the session.

    Args:
        weight: A Parameter of a model whose `online_reload` or `online_quant` is open, or a view of one (`[N, K]`, or
            `[E, N, K]`): one expert, the rows of q in a fused qkv.
        base: The weight without the update, in high precision, of the same shape.
        b: `[N, R]`, or `[E, N, R]`.
        a: `[R, K]`, or `[E, R, K]`.
        scaling: What the product is multiplied by (peft: `lora_alpha / r`).

    Raises:
        QTensorError: There is no base, or nobody has a session open for the weight.
        WeightShapeError: The shapes do not fit each other.
    """
    target: Any = weight
    if not isinstance(target, LAZY):
        raise QTensorError("write_low_rank: the weight is not being loaded; call it while online_reload(model) is open")
    armed = target._armed
    if base is None:
        raise QTensorError(
            f"{armed.name}: a low-rank update needs the weight that it is an update of, in high precision. The model "
            "holds rounded values alone: an update added to those, time after time, would add up their errors."
        )
    *lead, rows, cols = target.shape
    fits = base.shape == target.shape and b.shape[:-1] == (*lead, rows) and a.shape == (*lead, b.shape[-1], cols)
    if target.dim() not in (2, 3) or not fits:
        raise WeightShapeError(
            f"{armed.name}: {list(base.shape)} + {list(b.shape)} @ {list(a.shape)} does not fit {list(target.shape)}"
        )
    scheme = armed.decided()
    unit = scheme.format.unit_rows(armed.shape[-2]) if scheme else 1
    step = unit * max(1, _CHUNK_BYTES // (unit * max(1, cols) * 4))
    where = base.device

    def write() -> None:
        for e in range(lead[0]) if lead else (slice(None),):
            into, old, left, right = target.data[e], base[e], b[e], a[e].to(where, torch.float32)
            for first in range(0, rows, step):
                part = slice(first, first + step)
                formed = torch.addmm(old[part].float(), left[part].to(where, torch.float32), right, alpha=scaling)
                into[part].copy_(formed.to(target.dtype))

    without_grad(write)
