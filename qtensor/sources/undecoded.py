"""Undecoded: a weight whose quantized parts are all there, as the tensor in high precision that it stands for.

It is for loaders that take whole tensors, and split, fuse and shard them by views, which cost nothing here. A weight
that is being loaded takes the rows and columns that are copied into it: moved, where they are the same numbers in its
format, or decoded a few rows at a time. Any other operation has the decoded values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from math import lcm
from typing import Any, NoReturn, Protocol

import torch
from torch.utils._pytree import tree_map_only

from ..errors import LossySourceError, QTensorError
from ..kernels import WeightFormat
from ..regions.boxes import BoxView, as_box, contiguous_strides
from ..regions.coverage import Box
from ..regions.views import View, box_view
from ..schemes.scheme import Scheme
from ..tensor.dequantized_view import is_view
from ..tensor.ops_slices import sliceable, take_slice
from ..tensor.qtensor import QTensor, written_by
from . import DECODED, LOSSLESS, MOVED, REQUANTIZED
from .holding import CHUNK_BYTES, EVEN_ROWS
from .moving import moved_rows
from .rooms import DecodedRows, decoded
from .scales import has_nan
from .source import Matrix, Source

aten = torch.ops.aten
Span = tuple[int, int]


class Weight(Protocol):
    """A weight that is being loaded (`lazy.weight.ArmedWeight`)."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str: ...
    @property
    def refuses_nonfinite(self) -> bool: ...
    @property
    def host(self) -> Any: ...

    def decided(self) -> Scheme | None: ...
    def open(self) -> None: ...
    def write(self, view: View, source: torch.Tensor) -> None: ...
    def write_decoded(self, view: View, rows: DecodedRows) -> bool: ...
    def accept(self, source: QTensor, view: View | None = None) -> bool: ...
    def fail(self, error: QTensorError) -> NoReturn: ...


class QuantizedMatrix:
    """One matrix in a quantized format, with all of its parts. Raises Unusable for parts that mean nothing."""

    def __init__(self, source: Source, parts: Mapping[str, torch.Tensor], shape: Matrix) -> None:
        source = source.of(shape)
        self.source, self.shape = source, shape
        self._specs = {name: spec for name, spec in source.parts(shape).items() if spec.needed}
        self._parts = {name: parts[name] for name in self._specs}
        self._unit = source.unit(shape)
        self._moved: tuple[WeightFormat, QTensor | None] | None = None
        source.check(self._parts, shape)

    def chunks(self, rows: Span, itemsize: int) -> Iterator[tuple[Span, Span]]:
        """Rows to decode at a time: whole units, and of these the rows that are asked for."""
        step = self._step(itemsize)
        for start in range(rows[0] // step * step, rows[1], step):
            stop = min(start + step, self.shape[0])
            yield (start, stop), (max(start, rows[0]), min(stop, rows[1]))

    def _step(self, itemsize: int) -> int:
        even = lcm(self._unit, EVEN_ROWS)
        return max(1, CHUNK_BYTES // max(1, even * self.shape[1] * itemsize)) * even

    def decoded_rows(self, rows: Span, dtype: torch.dtype) -> DecodedRows | None:
        """The same rows, for who takes all of them; None if they are not whole units."""
        first, last = rows
        if first % self._unit or (last % self._unit and last != self.shape[0]):
            return None
        shape = (last - first, self.shape[1])
        return DecodedRows(
            self.source, lambda a, b: self._cut((first + a, first + b)), shape, dtype, self._step(dtype.itemsize)
        )

    def decode(self, rows: Span, dtype: torch.dtype) -> torch.Tensor:
        """Whole units, in memory that the thread's next ones have, too."""
        return decoded(self.source, self._cut(rows), (rows[1] - rows[0], self.shape[1]), dtype)

    def move(self, rows: Span, scheme: Scheme, dtype: torch.dtype) -> QTensor | None:
        """Rows, whole units, in the scheme, if they are the same numbers in it."""
        fmt, how = scheme.format, self.source.moves(scheme.format)
        if how != "matrix":
            return None if how is None else self._in_form(rows, scheme, dtype)
        if self._moved is None or self._moved[0] != fmt:
            self._moved = (fmt, self._in_form((0, self.shape[0]), scheme, dtype))
        found = self._moved[1]
        return None if found is None else take_slice(found, 0, slice(*rows, 1))

    def exact(self, fmt: WeightFormat) -> bool:
        return self.source.exact(self._parts, fmt)

    def _in_form(self, rows: Span, scheme: Scheme, dtype: torch.dtype) -> QTensor | None:
        cols = self.shape[1]
        made = moved_rows(self.source, self._cut(rows), (rows[1] - rows[0], cols), scheme.format)
        if made is None:
            return None
        return QTensor(made.qdata, made.scale, scheme, dtype, global_scale=made.global_scale, cols=cols)

    def _cut(self, rows: Span) -> dict[str, torch.Tensor]:
        return {name: spec.cut(self._parts[name], *rows) for name, spec in self._specs.items()}


class Undecoded(torch.Tensor):
    """A weight `[N, K]`, or a stack of them `[E, N, K]`, or a view of it.

    _matrices: what it is made of. _meta: what this view shows of the contiguous weight.
    """

    _matrices: list[QuantizedMatrix]
    _stacked: bool
    _meta: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(matrices: list[QuantizedMatrix], dtype: torch.dtype, stacked: bool) -> Undecoded:
        """One matrix; or several of one shape, of a source whose matrices stacks may hold the other way round."""
        shape = (len(matrices), *matrices[0].shape) if stacked else matrices[0].shape
        meta = torch.empty(shape, dtype=dtype, device="meta")
        return _wrap(matrices, stacked, meta.mT if stacked and matrices[0].source.transposed else meta)

    def values(self) -> torch.Tensor:
        """In high precision, in memory of its own."""
        found = as_box(self._whole_shape, *self._view)
        if found is None:
            values = self._decoded(tuple((0, n) for n in self._whole_shape)).as_strided(*self._view)
        else:
            # The dimensions of the box, in the order that the view has them; others have one element.
            strides = contiguous_strides(tuple(b - a for a, b in found.box))
            step = {d: strides[at] for at, d in enumerate(found.order) if d is not None}
            values = self._decoded(found.box).as_strided(self.shape, [step.get(d, 1) for d in range(self.dim())])
        return values.contiguous() if self.is_contiguous() else values

    def deliver(self, weight: Weight, view: View) -> None:
        """Write it to a view of a weight that is being loaded."""
        source, target = as_box(self._whole_shape, *self._view), as_box(weight.shape, *view)
        if tuple(view.size) != tuple(self.shape) or source is None or target is None or not _alike(source, target):
            _require_lossless(self._matrices[0], weight)
            weight.write(view, self.values())
            outcomes = {DECODED if weight.decided() is None else REQUANTIZED}
        else:
            weight.open()
            first = source.box[0][0] if self._stacked else 0
            count = source.box[0][1] - first if self._stacked else 1
            outcomes = set()
            for e in range(count):
                at = target.box if len(target.box) == 2 else (_one(target.box[0][0] + e), *target.box[1:])
                outcomes.add(_give(self._matrices[first + e], source.box[-2:], weight, at))
        told = outcomes.pop() if len(outcomes) == 1 else REQUANTIZED
        weight.host.note_source(weight, str(self._matrices[0].source), told)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Undecoded({list(self.shape)}, {self.dtype}, {self._matrices[0].source})"

    @property
    def _view(self) -> View:
        return View(tuple(self._meta.shape), self._meta.stride(), int(self._meta.storage_offset()))

    @property
    def _whole_shape(self) -> tuple[int, ...]:
        return (len(self._matrices), *self._matrices[0].shape) if self._stacked else self._matrices[0].shape

    def _decoded(self, box: Box) -> torch.Tensor:
        """A box of the weight: one matrix at a time, and of that rows that are decoded together."""
        *lead, (first, last), (left, right) = box
        out = torch.empty([b - a for a, b in box], dtype=self.dtype, device="cpu")
        for e in range(*lead[0]) if lead else (0,):
            target = out[e - lead[0][0]] if lead else out
            for units, (a, b) in self._matrices[e].chunks((first, last), self.dtype.itemsize):
                values = self._matrices[e].decode(units, self.dtype)
                target[a - first : b - first] = values[a - units[0] : b - units[0], left:right]
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, first = kwargs or {}, args[0] if args else None
        if any(isinstance(t, Undecoded) for t in written_by(func, args, kwargs)):
            raise QTensorError(f"{func} would change {first!r} in place, which is quantized values; clone it first")
        if not isinstance(first, Undecoded):
            pass
        elif is_view(func):
            # What is no view of the values as they lie is one of a contiguous copy, or has to be refused by PyTorch.
            with contextlib.suppress(RuntimeError):
                out = func(first._meta, *args[1:], **kwargs)
                return tree_map_only(torch.Tensor, lambda meta: _wrap(first._matrices, first._stacked, meta), out)
        elif func is aten.clone.default and kwargs.get("memory_format") is torch.contiguous_format:
            # What a loader makes contiguous it copies from. How it lies in memory is nothing to a weight.
            return _wrap(first._matrices, first._stacked, first._meta, contiguous_strides(tuple(first.shape)))
        args, kwargs = tree_map_only(Undecoded, Undecoded.values, (args, kwargs))
        return func(*args, **kwargs)


def _wrap(
    matrices: list[QuantizedMatrix], stacked: bool, meta: torch.Tensor, strides: tuple[int, ...] | None = None
) -> Undecoded:
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # A view of a normal tensor has to be one.
            return _wrap(matrices, stacked, meta, strides)
    made: Undecoded = torch.Tensor._make_wrapper_subclass(
        Undecoded, meta.shape, strides=strides or meta.stride(), dtype=meta.dtype, device=torch.device("cpu")
    )
    made._matrices, made._stacked, made._meta = matrices, stacked, meta
    return made


# A part of a matrix into a weight --------------------------------------------------------------------------------


def _give(matrix: QuantizedMatrix, part: Box, weight: Weight, at: Box) -> str:
    """Rows and columns of a matrix, to a box of the weight that is one matrix thick. Returns what became of them."""
    scheme, (rows, cols) = weight.decided(), part
    together = scheme is not None and scheme.format.needs_whole_matrix and rows == (0, matrix.shape[0])
    first = rows[0] if scheme is None else _move(matrix, part, weight, at, scheme)
    if scheme is not None and first == rows[1]:
        return LOSSLESS if matrix.exact(scheme.format) else MOVED
    _require_lossless(matrix, weight)
    if scheme is not None and cols == (0, matrix.shape[1]) and (matrix.source.quick or not together):
        decoded_rows = matrix.decoded_rows((first, rows[1]), weight.dtype)
        view = _rows_at(weight, at, rows, (first, rows[1]))
        if decoded_rows is not None and weight.write_decoded(view, decoded_rows):
            return REQUANTIZED
    chunks = [(rows, rows)] if together else matrix.chunks((first, rows[1]), weight.dtype.itemsize)
    for units, taken in chunks:
        values = matrix.decode(units, weight.dtype)
        weight.write(_rows_at(weight, at, rows, taken), values[_within(taken, units), slice(*cols, 1)])
    return DECODED if scheme is None else REQUANTIZED


def _require_lossless(matrix: QuantizedMatrix, weight: Weight) -> None:
    """Rows of the matrix are to be quantized again. Raises LossySourceError where that is not allowed."""
    scheme = weight.decided()
    if scheme is not None and weight.host.lossless_only:
        error = (
            f"{weight.name}: {matrix.source} cannot be moved as it is into this weight, or part of a weight, in "
            f"{scheme.name}, and only lossless ones are allowed. Choose a scheme in which it is the same numbers "
            "(docs/sources.md has the table), or allow the loss."
        )
        weight.fail(LossySourceError(error))


def _move(matrix: QuantizedMatrix, part: Box, weight: Weight, at: Box, scheme: Scheme) -> int:
    """Give the weight rows in its format, as far as they are the same numbers there. Returns the first one that it did
    not take."""
    fmt, (rows, cols) = scheme.format, part
    everything = tuple((0, n) for n in matrix.shape)
    # Rows of a matrix with one scale for all of it would shut out those that come with another.
    whole = part == everything and at[-2:] == tuple((0, n) for n in weight.shape[-2:])
    if fmt.needs_whole_matrix and not whole:
        return rows[0]
    for units, taken in [(rows, rows)] if fmt.needs_whole_matrix else matrix.chunks(rows, 1):
        moved = matrix.move(units, scheme, weight.dtype)
        if weight.host.lossless_only and not matrix.exact(fmt):
            return taken[0]
        for dim, piece in ((0, _within(taken, units)), (1, slice(*cols, 1))):
            if moved is not None:
                moved = take_slice(moved, dim, piece) if sliceable(moved, dim, piece) else None
        if moved is None or (weight.refuses_nonfinite and has_nan(moved.qdata)):
            return taken[0]
        if not weight.accept(moved, _rows_at(weight, at, rows, taken)):
            return taken[0]
    return rows[1]


def _rows_at(weight: Weight, at: Box, rows: Span, taken: Span) -> View:
    """Where in the weight those rows go of the `rows` that go to the box `at`: a matrix."""
    first = at[-2][0] + taken[0] - rows[0]
    view = box_view(weight.shape, (*at[:-2], (first, first + taken[1] - taken[0]), at[-1]))
    return View(view.size[-2:], view.stride[-2:], view.offset)


def _within(taken: Span, units: Span) -> slice:
    return slice(taken[0] - units[0], taken[1] - units[0], 1)


def _one(e: int) -> Span:
    return e, e + 1


def _alike(source: BoxView, target: BoxView) -> bool:
    """Are both boxes of as many matrices, of the same size, in the same order of dimensions?"""
    sizes = [[b - a for a, b in (*[(0, 1)] * (3 - len(view.box)), *view.box)] for view in (source, target)]
    orders = [[d for d in view.order if d is not None] for view in (source, target)]
    return sizes[0] == sizes[1] and all(order == sorted(order) for order in orders)
