"""Collector: the parts of one weight as they arrive, in any order, in slices and more than once, decoded into it.

What format it is is told by the parts; what is held of them, and what they are enough for, is in `holding.py`. Where
the source is the same numbers in the weight's format its bytes are moved; all else is decoded and quantized.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import torch

from ..errors import CheckpointError, IncompleteLoadError, LossySourceError, MissingExtraError, QTensorError
from ..regions.coverage import Box
from ..regions.views import View
from ..schemes.scheme import Scheme
from ..tensor.qtensor import QTensor
from ..tensor.rooms import passing_copy
from . import DECODED, LOSSLESS, MOVED, REQUANTIZED
from .families import recognise
from .holding import MatrixParts
from .moving import moved_rows
from .rooms import DecodedRows
from .scales import has_nan
from .source import ANY, PartSpec, Source, Spec, Unusable


class Sink(Protocol):
    """The weight that decoded rows are written to."""

    lock: threading.RLock
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def name(self) -> str: ...
    @property
    def refuses_nonfinite(self) -> bool: ...

    def decided(self) -> Scheme | None:
        """What it becomes."""

    def touch(self) -> None: ...
    def open(self) -> None: ...
    def write(self, view: View, source: torch.Tensor) -> None: ...
    def write_decoded(self, view: View, rows: DecodedRows) -> bool: ...
    def accept(self, source: QTensor, view: View | None = None) -> bool: ...
    def fail(self, error: QTensorError, where: View | torch.Tensor | None = None) -> NoReturn: ...


class Collector:
    """What arrives for one matrix, or a stack of them, of a weight.

    sink, view: the weight, and the part of it that this is, `[N, K]` or `[E, N, K]`.
    attribute: what its parts are called after ("weight").
    config: config.json's "quantization_config", if anybody knows it.
    lossless: refuse what cannot be moved as it is.
    on_held: called with the change in held bytes.
    outcome: one of the above; "" before the first unit.
    """

    def __init__(
        self,
        sink: Sink,
        view: View,
        attribute: str,
        config: Mapping[str, Any],
        lossless: bool = False,
        on_held: Callable[[int], None] = lambda delta: None,
    ) -> None:
        self._sink, self._view, self._attribute = sink, view, attribute
        self._config, self._lossless, self._on_held = config, lossless, on_held
        self._lock = sink.lock
        self._specs: dict[str, Spec] = {}
        self._waiting: list[tuple[str, Box, torch.Tensor]] = []
        self._matrices: list[MatrixParts] = []
        self._held = 0
        self._expected = False
        self._failed: QTensorError | None = None
        self.source: Source | None = None
        self.outcome = ""

    @property
    def unrecognised(self) -> Mapping[str, Spec]:
        """The parts that are known, of no known source."""
        return {} if self.source is not None else self._specs

    def expect(self, specs: Mapping[str, Spec]) -> None:
        """These parts are going to come: which format it is may be told by all of them. May be repeated."""
        self._sink.touch()
        with self._lock:
            self._expected = True
            self._recognise(specs)

    def require_parts(self) -> None:
        """All parts that are going to come are known. Raises CheckpointError where they are no format, or not whole."""
        with self._lock:
            if self.source is None:
                self._refuse_unknown()
            for part, spec in self._parts.items():
                if spec.needed and part not in self._specs:
                    self._refuse(f"{self.source}, and there is no {self._called(part)}")

    @property
    def matrices(self) -> int:
        """How many there are, of a known format."""
        return len(self._matrices)

    @property
    def needs_all_values(self) -> bool:
        """Is nothing of a matrix decoded or moved before the last of its values is there? Scales may have told."""
        with self._lock:
            for matrix in self._matrices:
                self._settle(matrix)
            return any(matrix.is_one_unit for matrix in self._matrices)

    def write(self, part: str, tensor: torch.Tensor, box: Box | None = None, shape: tuple[int, ...] = ()) -> None:
        """Values of a part arrived. Nothing of them is kept that the caller owns.

        part: By its name in the source. box: Where in the part, of `shape`, they belong; None if they are all of it.
        """
        spec = Spec(tensor.dtype, tuple(shape if box is not None else tensor.shape))
        box = box if box is not None else tuple((0, n) for n in tensor.shape)
        # What the thread wrote to before is let go of now: with this weight's lock held, two could wait for each other.
        self._sink.touch()
        with self._lock:
            self._recognise({part: spec})
            if self.source is None:
                self._waiting.append((part, box, passing_copy(tensor)))
                self._account()
                return
            self._take(part, box, tensor)
            self._account()

    def _recognise(self, specs: Mapping[str, Spec]) -> None:
        for part, spec in specs.items():
            if self._specs.setdefault(part, spec) != spec:
                self._refuse(f"{self._called(part)} is {_told(spec)}, and was {_told(self._specs[part])} before")
        old = self._matrices
        if self.source is not None and specs.keys() & set(self.source.later) and all(m.keeps for m in old):
            self.source, self._matrices, self.outcome = None, [], ""
        if self.source is None:
            try:
                self.source = recognise(self._specs, self._config)
                if self.source is not None:
                    self.source, self._matrices = self._lay_out(self.source)
            except Unusable as error:
                self.source = None
                self._refuse(str(error))
            except MissingExtraError as error:
                self._fail(error)
            waiting, self._waiting = (self._waiting, []) if self.source is not None else ([], self._waiting)
            for part, box, tensor in waiting:
                self._take(part, box, tensor)
            for matrix, before in zip(self._matrices, old, strict=False):
                for part, box, tensor in before.held_boxes():
                    self._take_into(matrix, part, box, tensor)
        else:
            shape = (*self._view.size[:-2], *self._matrices[0].view.size) if self._matrices else self._view.size
            if unfit := self._misfit(self.source, self._parts, shape, specs):
                self._refuse(unfit)

    def _lay_out(self, source: Source) -> tuple[Source, list[MatrixParts]]:
        """The source with what the weight's shape tells of it, and the matrices, of the orientation that the parts
        have. Raises Unusable."""
        size, stride, offset = self._view
        lead = size[:-2]
        plain = View(size[-2:], stride[-2:], 0)
        turned = View((size[-1], size[-2]), (stride[-1], stride[-2]), 0)
        problem = ""
        for view in (turned, plain) if source.transposed and lead else (plain,):
            try:
                parts = source.parts((view.size[0], view.size[1]))
                problem = self._misfit(source, parts, (*lead, *view.size), self._specs)
            except Unusable as error:
                problem = str(error)
            if problem:
                continue
            source = source.of((view.size[0], view.size[1]))
            self._stacked, self._parts, self._scheme = bool(lead), parts, self._sink.decided()
            self._moves = self._how_moved(source, view is turned)
            # What needs the whole matrix waits as the bytes that came, not as staged rows in high precision.
            together = self._moves == "matrix" or (self._moves is None and self._needs_whole())
            unit = view.size[0] if together else source.unit((view.size[0], view.size[1]))
            count, step = (lead[0], stride[0]) if lead else (1, 0)
            views = (View(view.size, view.stride, offset + e * step) for e in range(count))
            # Who said which parts are going to come has said all of them.
            keeps = bool(source.later) and not self._expected
            return source, [MatrixParts(parts, view, unit, keeps) for view in views]
        raise Unusable(problem)

    def _needs_whole(self) -> bool:
        """Has the weight one scale for the whole matrix, and is this all of it?"""
        whole = self._view.size[-2:] == tuple(self._sink.shape)[-2:]
        return whole and self._scheme is not None and self._scheme.format.needs_whole_matrix

    def _how_moved(self, source: Source, turned: bool) -> str | None:
        """As `Source.moves`. Of a weight with one scale for all of it a part cannot be moved, if others may not be."""
        fmt = None if self._scheme is None else self._scheme.format
        if fmt is None or turned or (fmt.needs_whole_matrix and not self._needs_whole()):
            return None
        return source.moves(fmt)

    def _misfit(
        self, source: Source, parts: Mapping[str, PartSpec], shape: tuple[int, ...], specs: Mapping[str, Spec]
    ) -> str:
        """What is wrong with parts of a weight; "" if nothing is."""
        for name, spec in specs.items():
            part = parts.get(name)
            if part is None:
                return f"has {self._called(name)}, of which {source} knows nothing" + (
                    ". If it belongs to the weight, it came too late: hand it over with the weight's other parts, "
                    "before those of the next one, or tell of it by `source`, config.json's quantization_config"
                ) * bool(self._matrices)
            wanted = replace(part, shape=(*shape[:-2], *part.shape))
            if not wanted.fits(spec):
                dtypes = " or ".join(str(d).removeprefix("torch.") for d in part.dtypes)
                sizes = ", ".join("any" if n == ANY else str(n) for n in wanted.shape)
                return (
                    f"{self._called(name)} is {_told(spec)}; of a weight {list(shape)} in {source} it is "
                    f"{dtypes} [{sizes}]"
                )
        return ""

    def _take(self, part: str, box: Box, tensor: torch.Tensor) -> None:
        if not self._parts[part].needed:
            return
        if not self._stacked:
            self._take_into(self._matrices[0], part, box, tensor)
            return
        (first, last), inner = box[0], box[1:]
        for e in range(first, last):
            self._take_into(self._matrices[e], part, inner, tensor[e - first])

    def _take_into(self, matrix: MatrixParts, part: str, box: Box, tensor: torch.Tensor) -> None:
        self._settle(matrix)
        matrix.take(part, box, tensor, self._decode)

    def _settle(self, matrix: MatrixParts) -> None:
        """A matrix whose scales tell that it cannot be moved need not wait for all of its values."""
        if self._moves != "matrix" or not matrix.movable or self._needs_whole():
            return
        assert self.source is not None
        parts = matrix.beside_values()
        if parts is not None and self._scheme is not None and self.source.never_moves(parts, self._scheme.format):
            matrix.in_units(self.source.unit((matrix.view.size[0], matrix.view.size[1])))

    def _decode(self, matrix: MatrixParts, start: int, stop: int, parts: Mapping[str, torch.Tensor]) -> None:
        """Rows start:stop of a matrix, in chunks, into the weight."""
        assert self.source is not None
        source, scheme, cols = self.source, self._scheme, matrix.view.size[1]
        try:
            source.check(parts, (stop - start, cols))
        except Unusable as error:
            self._refuse(str(error))
        # Before anything is decoded, which then lies behind the weight in memory, and leaves no hole there.
        self._sink.open()
        first = start + self._move(matrix, start, stop, parts)
        if first == stop:
            return
        self._refuse_loss(scheme is None)
        self.outcome = REQUANTIZED if scheme is not None else DECODED
        dtype = self._sink.dtype

        def cut(a: int, b: int) -> dict[str, torch.Tensor]:
            return {
                name: matrix.cut(name, tensor, first - start + a, first - start + b) for name, tensor in parts.items()
            }

        step = matrix.chunk(dtype.itemsize, source.unit((stop - start, cols)))
        rows = DecodedRows(source, cut, (stop - first, cols), dtype, step)
        at_once = self._needs_whole() and not source.quick
        if not at_once and self._sink.write_decoded(matrix.rows(first, stop), rows):
            return
        for a in range(0, rows.count, max(rows.count, 1) if self._needs_whole() else step):
            b = rows.count if self._needs_whole() else min(a + step, rows.count)
            self._sink.write(matrix.rows(first + a, first + b), rows.decode(a, b))

    def _move(self, matrix: MatrixParts, start: int, stop: int, parts: Mapping[str, torch.Tensor]) -> int:
        """Rows start:stop as they are, in chunks where that may be. Returns how many the weight took."""
        source, scheme, cols = self.source, self._scheme, matrix.view.size[1]
        if source is None or scheme is None or self._moves is None or not matrix.movable:
            return 0
        step = max(stop - start, 1) if self._moves == "matrix" else matrix.chunk(1)
        for a in range(start, stop, step):
            b = min(a + step, stop)
            part = {name: matrix.cut(name, tensor, a - start, b - start) for name, tensor in parts.items()}
            moved = moved_rows(source, part, (b - a, cols), scheme.format)
            if moved is None or (self._sink.refuses_nonfinite and has_nan(moved.qdata)):
                return a - start
            whole, dtype = moved.global_scale, self._sink.dtype
            values = QTensor(moved.qdata, moved.scale, scheme, dtype, global_scale=whole, cols=cols)
            exact = source.exact(part, scheme.format)
            self._refuse_loss(exact)
            if not self._sink.accept(values, matrix.rows(a, b)):
                return a - start
            self.outcome = self.outcome or (LOSSLESS if exact else MOVED)
        return stop - start

    def _refuse_loss(self, lossless: bool) -> None:
        if self._lossless and not lossless:
            assert self._scheme is not None
            error = (
                f"{self._sink.name}: {self.source} is not the same numbers in {self._scheme.name}, and strict_source "
                '"lossless". Choose a scheme in which it is (docs/sources.md has the table), or allow the loss.'
            )
            self._fail(LossySourceError(error))

    def _fail(self, error: QTensorError) -> NoReturn:
        self._failed = error
        self._sink.fail(error, self._view)

    def _refuse(self, why: str) -> NoReturn:
        self._fail(CheckpointError(f"{self._sink.name}: {why}"))

    def _refuse_unknown(self) -> NoReturn:
        found = ", ".join(f"{self._called(part)} ({_told(spec)})" for part, spec in self._specs.items())
        self._refuse(f"{found} arrived, and no known format is made of that alone. Is a scale missing?")

    def _called(self, part: str) -> str:
        return part.replace("*", self._attribute)

    def _account(self) -> None:
        held = sum(matrix.held for matrix in self._matrices) + sum(t.nbytes for *_, t in self._waiting)
        self._on_held(held - self._held)
        self._held = held

    def finish(self) -> None:
        """Nothing more comes. Raises IncompleteLoadError where a unit waits for a part, and what went wrong before."""
        with self._lock:
            if self._failed is not None:
                raise self._failed
            if self.source is None:
                self._refuse_unknown()
            for e, matrix in enumerate(self._matrices):
                for part, box in matrix.lacking():
                    where = ", ".join(f"{a}:{b}" for a, b in (((e, e + 1),) * self._stacked + box))
                    raise IncompleteLoadError(
                        f"{self._sink.name}: {self._called(part)}[{where}] of {self.source} did not arrive, and "
                        "without it other parts that did mean nothing"
                    )
            self.release()

    def release(self) -> None:
        """The loader has gone on to another weight: what is decoded means what it means."""
        with self._lock:
            for matrix in self._matrices:
                matrix.release()
            self._account()

    def discard(self) -> None:
        """Free everything."""
        with self._lock:
            self._waiting, self._matrices = [], []
            self._account()


def _told(spec: Spec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"
