"""One tensor of a conversion: copied, or quantized, from one file to another in chunks of rows.

The bytes do not depend on where chunks end: each is of whole units, so that its scales depend on nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import lcm
from typing import IO, Any

import torch

from .. import kernels
from ..checkpoint.layouts import layout_of
from ..checkpoint.reading import Stored
from ..checkpoint.writing import ShardWriter
from ..errors import LossySourceError, NonFiniteWeightError
from ..kernels import NonFinite
from ..schemes.scheme import Scheme
from ..tensor.qtensor import QTensor, nonfinite_message
from .decoding import Decoded, DecodedStack

CHUNK_BYTES = 4 << 20
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class TensorTask:
    """What becomes of one tensor. scheme None: copied. partners: those (itself included) it shares a scale with."""

    stored: Stored | Decoded
    scheme: Scheme | None = None
    partners: tuple[Stored | Decoded, ...] = ()


class _Buffers(threading.local):
    """Memory a thread uses again for each chunk: fresh memory costs more than what is done in it."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        nbytes = dtype.itemsize * int(torch.Size(shape).numel())
        held = self._held.get(use)
        if held is None or held.numel() < nbytes:
            held = self._held[use] = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return held[:nbytes].view(dtype).view(shape)


_buffers = _Buffers()


def copy(stored: Stored | Decoded, writer: ShardWriter, out: IO[bytes], on_bytes: OnBytes) -> None:
    if isinstance(stored, DecodedStack):
        for e in range(stored.shape[0]):
            writer.write(out, stored.name, stored.matrix_at(e))
            on_bytes(_read(stored, e, e + 1))
        return
    if isinstance(stored, Decoded):
        for start, stop in _chunks(stored, 1):
            size = (stop - start, stored.shape[1])
            writer.write(out, stored.name, stored.read(start * size[1], _buffers.take("source", size, stored.dtype)))
            on_bytes(_read(stored, start, stop))
        return
    step, total = max(1, CHUNK_BYTES // stored.dtype.itemsize), int(torch.Size(stored.shape).numel())
    for first in range(0, total, step):
        piece = stored.read(first, _buffers.take("source", (min(step, total - first),), stored.dtype))
        writer.write(out, stored.name, piece)
        on_bytes(piece.nbytes)


def quantize(tensor: TensorTask, format: str, writer: ShardWriter, out: IO[bytes], on_bytes: OnBytes) -> None:
    """Chunk by chunk: whole units, so that each chunk's scales depend on nothing else.

    A scale of the whole matrix depends on all of it, and on its partners. Their amax is found in a first pass, and put
    into an extra row above each chunk: every chunk then has the scale of the whole.
    """
    stored, scheme = tensor.stored, tensor.scheme
    assert scheme is not None
    layout, fmt = layout_of(scheme, format, stored.name), scheme.format
    rows, cols = stored.shape
    extra = int(fmt.needs_whole_matrix)
    prefix = stored.name.removesuffix("weight")

    def write(band: Any, start: int, stop: int) -> None:
        for suffix, entry in layout.entries.items():
            if not entry.shared or stop == rows:
                writer.write(out, prefix + suffix, entry.encode(band, rows))
        on_bytes(_read(stored, start, stop))

    if isinstance(stored, Decoded) and _may_move(stored, tensor, scheme):
        whole = stored.source.moves(fmt) == "matrix"
        for start, stop in [(0, rows)] if whole else _chunks(stored, layout.rows):
            moved = stored.moved(scheme, start, stop)
            if moved is None:  # The first, or none: "unit" sources always are.
                break
            write(moved, start, stop)
        else:
            return
    amax = max(_amax(partner) for partner in tensor.partners) if extra else 0.0
    for start, stop in _chunks(stored, layout.rows):
        source = _buffers.take("source", (extra + stop - start, cols), stored.dtype)
        if extra and cols:
            source[0].zero_()
            source[0, 0] = amax
        stored.read(start * cols, source[extra:])
        made = _empty((source.shape[0], cols), scheme)
        try:
            kernels.choose(source.device).quantize_into(source, made.parts(), fmt, None, (start - extra) * cols)
        except NonFinite as error:
            raise NonFiniteWeightError(_nonfinite(stored, error)) from None
        write(made[extra:], start, stop)


def _empty(shape: tuple[int, int], scheme: Scheme) -> QTensor:
    """A QTensor in memory that the thread uses again."""
    fmt = scheme.format
    qdata = _buffers.take("data", fmt.qdata_shape(shape), fmt.dtype)
    scale = _buffers.take("scale", fmt.scale_shape(shape), fmt.scale_dtype)
    global_scale = torch.empty(1, dtype=torch.float32, device="cpu") if fmt.has_global_scale else None
    return QTensor(qdata, scale, scheme, global_scale=global_scale, cols=shape[1])


def _may_move(stored: Decoded, tensor: TensorTask, scheme: Scheme) -> bool:
    """Of matrices that share one scale, none is moved with its own."""
    alone = len(tensor.partners) < 2
    if not alone and stored.lossless:
        raise LossySourceError(
            f"{stored.name}: shares its {scheme.name} scale with the matrices that servers fuse it with, so it cannot "
            'keep its own, and strict_source is "lossless"'
        )
    return alone


def _read(stored: Stored | Decoded, start: int, stop: int) -> int:
    """Bytes of the source that rows start:stop are."""
    rows = max(stored.shape[0], 1)
    return stored.nbytes * stop // rows - stored.nbytes * start // rows


def _amax(stored: Stored | Decoded) -> float:
    cols = stored.shape[1]
    found = 0.0
    for start, stop in _chunks(stored, 1):
        chunk = stored.read(start * cols, _buffers.take("source", (stop - start, cols), stored.dtype))
        low, high = (float(v) for v in torch.aminmax(chunk)) if chunk.numel() else (0.0, 0.0)
        found = max(found, -low, high)
        if not (low - low == 0 and high - high == 0):
            bad = int((~chunk.isfinite()).reshape(-1).nonzero()[0])
            raise NonFiniteWeightError(_nonfinite(stored, NonFinite(start * cols + bad, float(chunk.reshape(-1)[bad]))))
    return found


def _chunks(stored: Stored | Decoded, unit: int) -> Iterator[tuple[int, int]]:
    rows, cols = stored.shape
    unit = lcm(unit, stored.unit_rows)
    step = max(1, CHUNK_BYTES // max(1, unit * cols * stored.dtype.itemsize)) * unit
    yield from ((start, min(start + step, rows)) for start in range(0, max(rows, 1), step))


def _nonfinite(stored: Stored | Decoded, error: NonFinite) -> str:
    return nonfinite_message(stored.name, stored.shape, error).partition("; pass")[0] + "."
