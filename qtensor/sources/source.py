"""Source: one quantized format in which a checkpoint's matrices arrive, and how rows of it are decoded.

A matrix arrives as several tensors, its parts (values, scales, zero points), in any order and in slices. A source says
which parts there are, which entries of each a run of output rows needs, and what these rows are in high precision: the
numbers that the format's owner (the library that defines it) computes, bit for bit. It never sees a whole matrix unless
the format needs one. Everything that waits, collects and writes is in `collecting.py`; a format is only this.

To add a format: a frozen dataclass that derives from `Source`, a function `recognise` beside it, and a row in
`families.families`. `fp8.py` is the example to follow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any, Literal, NamedTuple, Protocol

import torch

from ..errors import CheckpointError
from ..kernels import Parts, WeightFormat

Shape = tuple[int, ...]
Matrix = tuple[int, int]
"""The shape `(N, K)` of a matrix, or of some of its rows."""
ANY = -1
"""In the shape of a part: a size that does not follow from the matrix's."""


class Spec(NamedTuple):
    """What is known of a part before its values: a tensor's dtype and shape."""

    dtype: torch.dtype
    shape: Shape


Specs = Mapping[str, Spec]
"""The tensors that a checkpoint has for one weight, by part name; perhaps not all of them yet."""


Unusable = CheckpointError
"""What a source raises for parts that mean no numbers. The message says why, as what is said of a weight ("has 7
columns"); whoever catches it puts the name before."""


class Span(NamedTuple):
    """Which entries of a part the output rows a to b need: along `axis`, `items` entries for each `rows` output rows,
    from `a * items / rows` on. With axis None every unit needs the whole part.

    ROWS              values `[N, ...]`: one entry per row
    Span(0, 1, 128)   scales of blocks of 128 rows
    Span(1, 1, 8)     AWQ's `[K, N / 8]`: a word along axis 1 holds 8 output rows
    Span(0, K // 2)   a flat tensor of K / 2 bytes per row
    Span(None)        one scale for all, a codebook, a group index over the columns
    """

    axis: int | None = 0
    items: int = 1
    rows: int = 1

    def entries(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """The entries along the axis, of `length`, that output rows start:stop need."""
        return start * self.items // self.rows, min(-(-stop * self.items // self.rows), length)


ROWS = Span()
"""One entry for each output row."""


@dataclass(frozen=True)
class PartSpec:
    """One part of a matrix of known shape.

    Attributes:
        shape: Of the tensor; `ANY` for a size that does not follow from the matrix's.
        dtypes: That it may have.
        span: Which of its entries output rows need.
        needed: Whether decoding needs it. One that is not is taken, whatever it is, and nothing is done with it
            ("input_scale").
    """

    shape: Shape
    dtypes: tuple[torch.dtype, ...]
    span: Span = ROWS
    needed: bool = True

    def fits(self, spec: Spec) -> bool:
        """Is that tensor this part?"""
        if not self.needed:
            return True
        if spec.dtype not in self.dtypes or len(spec.shape) != len(self.shape):
            return False
        return all(wanted in (ANY, found) for wanted, found in zip(self.shape, spec.shape, strict=True))

    def cut(self, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The entries for output rows start:stop, of a tensor that has those from a unit's first row, row 0, on."""
        if self.span.axis is None:
            return tensor
        a, b = self.span.entries(start, stop, tensor.shape[self.span.axis])
        return tensor.narrow(self.span.axis, a, b - a)


UNNEEDED = PartSpec((), (), Span(None), needed=False)


class Source(ABC):
    """One format with its parameters (block or group size, dtype of the scales): a frozen value.

    Part names are the names of the module's attributes, where `*` stands for the parameter's own name: the parts of
    `layer.weight` called "*" and "*_scale_inv" are `layer.weight` and `layer.weight_scale_inv`; "qweight" is
    `layer.qweight` whatever the parameter is called.

    A shape is `(N, K)`: N output rows, K inputs. A stack of matrices `[E, N, K]` is E of these: each of its parts has E
    before the sizes given here (a part `[]` is `[E]`), and whoever collects them takes the matrices one by one.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """As reports and errors call it, with its parameters: "fp8 (blocks of 128 × 128)"."""

    @property
    def transposed(self) -> bool:
        """Whether a model's stack holds the matrices that are stored here the other way round, `(K, N)`, if its shape
        allows it."""
        return False

    @property
    def later(self) -> tuple[str, ...]:
        """Parts that make it another source, where they come after it was recognised."""
        return ()

    @abstractmethod
    def shape(self, specs: Specs) -> Matrix:
        """The shape of the matrix with those parts. Raises Unusable where a part that tells it is not there, or has a
        shape that it cannot have. (Where a model tells the shape, this is not called.)"""

    def shape_told(self, specs: Specs, read: Callable[[str], torch.Tensor]) -> Matrix:
        """As `shape`, where the values of a part can be read: some formats write their shape there."""
        return self.shape(specs)

    def of(self, shape: Matrix) -> Source:
        """The same source with what nobody said of it, and the shape of its matrix tells."""
        return self

    @abstractmethod
    def parts(self, shape: Matrix) -> dict[str, PartSpec]:
        """Every part of a matrix of that shape by its name. Raises Unusable for a shape that the format has no form
        for."""

    @abstractmethod
    def decode(self, parts: Mapping[str, torch.Tensor], shape: Matrix, dtype: torch.dtype) -> torch.Tensor:
        """Rows in high precision, in the owner's arithmetic.

        Args:
            parts: The needed parts, each cut to the entries that these rows need by its span (those of axis None
                whole). They may be views of any strides, of the loader's own memory: they are not to be written to, and
                not to be kept.
            shape: `(rows, K)`: whole units of the matrix (see `unit`), or its last rows.
            dtype: Of the result: the model's.

        Returns:
            `[rows, K]`.
        """

    def decode_into(self, parts: Mapping[str, torch.Tensor], shape: Matrix, out: torch.Tensor) -> bool:
        """As `decode`, into memory that is there. False, with nothing done, where these numbers are not decoded so."""
        return False

    @property
    def quick(self) -> bool:
        """Does decoding rows twice take less than holding all of a matrix in high precision does?"""
        return False

    def amax(self, parts: Mapping[str, torch.Tensor], shape: Matrix, dtype: torch.dtype) -> float | None:
        """The largest magnitude of what `decode` returns for the same arguments, where codes and scales tell it sooner.
        None where they do not, or where it is not finite."""
        return None

    @abstractmethod
    def check(self, parts: Mapping[str, torch.Tensor], shape: Matrix) -> None:
        """What is called before `decode` and `move` with the same parts. Raises Unusable for values that mean nothing:
        a scale that is NaN or negative, an index out of range. NaN among the values is left to the weight, which
        refuses it by index."""

    def moves(self, fmt: WeightFormat) -> Literal["unit", "matrix"] | None:
        """Can weights of this source be the same numbers in the format `fmt`?

        None: no, or nobody has shown it. "unit": always, unit by unit. "matrix": it depends on the values, or needs all
        of them; `move` is asked once for all rows of a matrix, which is then moved as a whole or not at all.
        """
        return None

    def move(self, parts: Mapping[str, torch.Tensor], shape: Matrix, fmt: WeightFormat) -> Parts | None:
        """Rows in the format `fmt`, where every element stays the number it is: code times scale as real numbers,
        before any rounding to a model's dtype. None where the format has no form for one of them, which may be if
        `moves` says "matrix". Of "unit" they may lie in memory that the thread uses again for its next rows.
        """
        return None

    def never_moves(self, parts: Mapping[str, torch.Tensor], fmt: WeightFormat) -> bool:
        """Where `moves` says "matrix": do the parts beside the values, all there and whole, tell that `move` is going
        to return None? Then no matrix waits for its last values."""
        return False

    def exact(self, parts: Mapping[str, torch.Tensor], fmt: WeightFormat) -> bool:
        """Are the numbers that `move` gives those of the source to the last bit? False where codes and scales are moved
        as they are and something else is rounded (a divisor to its inverse): better than a second quantization, but
        not lossless."""
        return True

    def unit(self, shape: Matrix) -> int:
        """Output rows that can be decoded on their own: the least number for which every span is whole entries."""
        spans = [part.span for part in self.parts(shape).values() if part.needed and part.span.axis is not None]
        return lcm(*(span.rows for span in spans))

    def __str__(self) -> str:
        return self.name


class Recognise(Protocol):
    """Of a family: the source of a weight, or None if it is none of the family's.

    specs: the weight's tensors by part name, with "*" for the parameter's own name and every other name as it is in
        the module, the parameter's name in it replaced by "*". There may be more to come: then the answer is None as
        long as they do not tell. `"*"` alone, in a high-precision dtype, is no quantized weight.
    config: config.json's "quantization_config"; empty where nobody knows it. It decides where shapes and dtypes do not
        (symmetric or not, an order of columns), and is a stranger's: nothing in it is believed that the parts belie.

    Raises Unusable for parts, or a configuration, of the family that cannot be decoded ("fp8 with float16 scales").
    """

    def __call__(self, specs: Specs, config: Mapping[str, Any]) -> Source | None: ...


@dataclass(frozen=True)
class Family:
    """A row of `families.families`.

    Attributes:
        methods: What config.json calls it: values of "quant_method".
        names: Every part name its sources have, "*" included: by these a tensor is told to be a part of something.
        recognise: Which source a weight is.
    """

    methods: tuple[str, ...]
    names: tuple[str, ...]
    recognise: Recognise


def laid_out(source: Source, specs: Specs, read: Callable[[str], torch.Tensor]) -> tuple[tuple[int, ...], Matrix]:
    """How many matrices a weight with those parts is a stack of, `(E,)`, or `()` for one; and the shape of each.

    read: the values of a part. Raises Unusable.
    """
    why = None
    try:
        shape = source.shape_told(specs, read)
        wanted = {part: spec for part, spec in source.parts(shape).items() if spec.needed and part in specs}
        if all(len(spec.shape) == len(specs[part].shape) for part, spec in wanted.items()):
            return (), shape
    except Unusable as error:
        why = error
    counts = {spec.shape[:1] for spec in specs.values()}
    if len(counts) == 1 and counts != {()}:
        inner = {part: Spec(spec.dtype, spec.shape[1:]) for part, spec in specs.items()}
        try:
            return counts.pop(), source.shape_told(inner, lambda part: read(part)[0])
        except Unusable as error:
            why = why or error
    if why is not None:
        raise why
    return (), shape
