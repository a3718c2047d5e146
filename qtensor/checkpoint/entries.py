"""Entries: the tensors that a quantized matrix becomes in a checkpoint, each with the way there and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..errors import CheckpointError
from ..kernels import WeightFormat
from ..kernels.formats import ceil_div
from ..tensor.qtensor import QTensor


@dataclass(frozen=True)
class Entry:
    """One of the tensors that a quantized matrix `[N, K]` becomes.

    encode: the tensor for a band of the matrix's rows, given as a QTensor, and N.
    decode: the part of a QTensor that it is, given the tensor, the format and `(N, K)`. None: it is no part of one.
    shared: it belongs to the matrix, and is the same for each band of rows.
    rows: of the matrix that share an item: a band begins at a multiple of it.
    """

    encode: Callable[[QTensor, int], torch.Tensor]
    decode: Callable[[torch.Tensor, WeightFormat, tuple[int, int]], torch.Tensor] | None
    shared: bool = False
    rows: int = 1


def _to_words(weight: QTensor, rows: int) -> torch.Tensor:
    """Integers as compressed-tensors packs them: without sign (offset by half the range), the first in the lowest bits
    of a 32-bit word, zeros at the end of a row."""
    codes = weight.qdata.view(torch.uint8) ^ _SIGNS[weight.scheme.format.per_byte]
    return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 4)).contiguous().view(torch.int32)


def _from_words(words: torch.Tensor, fmt: WeightFormat, shape: tuple[int, int]) -> torch.Tensor:
    codes = words.contiguous().view(torch.uint8)[:, : fmt.qdata_shape(shape)[-1]]
    return (codes ^ _SIGNS[fmt.per_byte]).contiguous().view(fmt.dtype)


_SIGNS = {1: 0x80, 2: 0x88}
"""The sign bits of a byte, by the integers in it: to flip them is to add half the range."""


def _to_zeros(weight: QTensor, rows: int) -> torch.Tensor:
    """Zero points as compressed-tensors packs them: without sign, those of eight rows in a word, zeros at the end."""
    zeros = (weight.scheme.format.zero(weight.scale) + _HALF).to(torch.uint8).t()
    padded = torch.nn.functional.pad(zeros, (0, -zeros.shape[1] % _ROWS_IN_WORD))
    pairs = (padded[:, ::2] | padded[:, 1::2] << 4).clone(memory_format=torch.contiguous_format)
    return pairs.view(torch.int32).t().contiguous()


def _from_zeros(words: torch.Tensor, fmt: WeightFormat, shape: tuple[int, int]) -> torch.Tensor:
    by_group = words.reshape(ceil_div(shape[0], _ROWS_IN_WORD), -1).t().clone(memory_format=torch.contiguous_format)
    held = by_group.view(torch.uint8)
    return torch.stack((held & 0xF, held >> 4), -1).flatten(1)[:, : shape[0]].t().int() - _HALF


_HALF, _ROWS_IN_WORD = 8, 8

ELEMENTS = Entry(lambda w, rows: w.qdata, lambda t, fmt, shape: t)
WORDS = Entry(_to_words, _from_words)
SHAPE = Entry(lambda w, rows: torch.tensor([rows, w.cols], dtype=torch.int64, device="cpu"), None, shared=True)
SCALE = Entry(lambda w, rows: w.scale, lambda t, fmt, shape: t.to(fmt.scale_dtype).reshape(fmt.scale_shape(shape)))
ONE_SCALE = replace(SCALE, shared=True)
# Of a scale word, the scale and the zero point.
STEP = Entry(
    lambda w, rows: w.scheme.format.step(w.scale), lambda t, fmt, shape: t.float().reshape(fmt.scale_shape(shape))
)
ZERO = Entry(_to_zeros, _from_zeros, rows=_ROWS_IN_WORD)
# A divisor on disk. Of every fp32 g that is some 1 / G, 1 / (1 / g) is g again, so the way there and back is exact.
GAIN = Entry(lambda w, rows: w.parts()[2].reciprocal(), lambda t, fmt, shape: t.float().reciprocal(), shared=True)


def require_held(module: str, given: torch.Tensor, held: torch.Tensor, fmt: WeightFormat) -> None:
    """Raises CheckpointError for scales in a file that the format rounds."""
    if held.dtype == torch.bfloat16 and not given.is_meta and not torch.equal(held.flatten(), given.flatten()):
        raise CheckpointError(
            f"{module}: has scales in {given.dtype} that bfloat16 does not hold, in which {fmt.name} stores them. "
            "Quantize it anew: online_quant takes such files as a source"
        )


def word(module: str, step: torch.Tensor, zero: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """Scale words. Raises CheckpointError for scales that they do not hold."""
    found = fmt.word(step, zero)
    if not step.is_meta and not torch.equal(fmt.step(found), step):
        raise CheckpointError(
            f"{module}: has scales of more than 20 significant bits (no bfloat16 or float16 has), which {fmt.name} "
            "does not store. Quantize it anew: online_quant takes such files as a source"
        )
    return found
