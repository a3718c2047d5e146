"""What trainers pack their weights into, how it is unpacked, and what reaches the kernels of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from qtensor.kernels.cpu.fused import Pieces
from qtensor.kernels.reference import Torch
from qtensor.lazy import quantized_rows


@contextmanager
def kernel_calls() -> Iterator[list[torch.Tensor]]:
    """The sources that quantizing kernels are given while the block runs."""
    sources: list[torch.Tensor] = []
    chosen: Torch = quantized_rows.kernels.choose(torch.device("cpu"))
    quantize_into, write = type(chosen).quantize_into, Pieces.write

    def noted(self: Any, source: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        sources.append(source)
        quantize_into(self, source, *args, **kwargs)

    def noted_piece(self: Pieces, source: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
        taken = write(self, source, *args, **kwargs)
        if taken and not kwargs:  # `quantize_into` uses it, too, and says how many elements at most.
            sources.append(source)
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(chosen), "quantize_into", noted)
        patch.setattr(Pieces, "write", noted_piece)
        yield sources


def packed(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """A buffer of bytes with one after the other."""
    return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts.values()])


def by_offsets(bucket: torch.Tensor, parts: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """As NeMo-RL: a buffer of bytes; each tensor is a run of it that is seen as its dtype and shape."""
    at = 0
    for name, part in parts.items():
        yield name, bucket[at : at + part.nbytes].view(part.dtype).view(part.shape)
        at += part.nbytes


def by_split(bucket: torch.Tensor, parts: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """As vLLM's packed weight transfer: the buffer is split by sizes in bytes."""
    pieces = torch.split(bucket, [part.nbytes for part in parts.values()])
    for (name, part), piece in zip(parts.items(), pieces, strict=True):
        yield name, piece.contiguous().view(part.dtype).view(*part.shape)
