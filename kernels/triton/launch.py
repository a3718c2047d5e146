"""What every launch needs: shapes and strides as three numbers, tile sizes, and how the target casts."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton

from ..audit import Audit
from ..formats import WeightFormat

TILE = 4096


def geometry(t: torch.Tensor) -> tuple[int, int, int]:
    """(E, N, K) of a matrix `[N, K]` or a stack of them `[E, N, K]`."""
    return (1, *t.shape) if t.dim() == 2 else tuple(t.shape)  # type: ignore[return-value]


def strides(t: torch.Tensor) -> tuple[int, int, int]:
    return (0, *t.stride()) if t.dim() == 2 else tuple(t.stride())  # type: ignore[return-value]


def codes(qdata: torch.Tensor) -> torch.Tensor:
    """The fp8 tensor as bytes: not every target's compiler knows the dtype."""
    return qdata.view(torch.uint8)


def scales(scale: torch.Tensor) -> torch.Tensor:
    """As `codes` for scales that are one byte each; those in bfloat16 as their bits."""
    return scale if scale.itemsize > 2 else scale.view(torch.int16 if scale.itemsize == 2 else torch.uint8)


def scale_kind(fmt: WeightFormat) -> str:
    """SCALE of the kernels for groups: how a scale is stored."""
    if fmt.has_zero_point:
        return "word"
    if fmt.scale_dtype == torch.bfloat16:
        return "bf16"
    return "e8m0" if fmt.has_e8m0_scale else "e4m3" if fmt.has_global_scale else "fp32"


def row_tile(cols: int) -> tuple[int, int, int]:
    """(rows, columns, threads) of a tile of whole rows: 16 elements per thread, 32 where the rows are long."""
    block = max(16, triton.next_power_of_2(cols))
    return max(1, TILE // 2 // block), block, min(512, max(128, block // 32))


def split(cols: int) -> tuple[int, int]:
    """Two powers of two for the columns of a row, the second 0 if one does: 1408 is 1024 + 384, of which 1024 + 512
    leave a twelfth idle, and 2048 a third."""
    whole = max(16, triton.next_power_of_2(cols))
    tail = max(128, triton.next_power_of_2(cols - whole // 2))
    return (whole // 2, tail) if whole >= 1024 and tail < whole // 2 else (whole, 0)


def loop_tile(cols: int) -> tuple[int, int, int]:
    """(rows, columns, threads) of a tile of TILE elements that walks along its rows."""
    block = min(TILE, max(16, triton.next_power_of_2(cols)))
    return TILE // block, block, 128


def warps(threads: int) -> int:
    return threads // (32 if torch.version.hip is None else 64)


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def findings(audit: Audit, stand_in: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The audit's two pointers, int64 finding and float64 sums; `stand_in` where no kernel will follow them."""
    buffer = audit.device_buffer(stand_in.device)
    if buffer is None:
        buffer = stand_in.new_empty(2, dtype=torch.int64)
    return buffer[:1], buffer[1:].view(torch.float64)


@functools.cache
def target(device: torch.device) -> dict[str, Any]:
    """The constexprs of encode.py for kernels on `device`: CAST and FUSED."""
    if device.type == "cpu":
        from triton._C.libtriton import interpreter

        return {"CAST": "interpreter", "FUSED": hasattr(interpreter, "fma_fp32")}
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return {"CAST": cast("hip", arch), "FUSED": True}
    major, minor = torch.cuda.get_device_capability(device)
    return {"CAST": cast("cuda", major * 10 + minor), "FUSED": True}


def cast(backend: str, arch: int | str) -> str:
    """How a target ("cuda", 90) or ("hip", "gfx942") turns fp32 into e4m3fn; see encode.py."""
    if backend == "cuda":
        return "e2m1x2" if int(arch) >= 100 else "satfinite" if int(arch) >= 89 else "integer"
    return "clamp" if str(arch).startswith(("gfx950", "gfx12")) else "integer"
