"""Every error qtensor raises. All derive from `QTensorError`, name the weight, and say what to do.

Kernels have two of their own, in `qtensor.kernels`; they derive from it, too.
"""

from __future__ import annotations

from .text import printable, printable_lines

_MOST_CHARACTERS = 4000


class QTensorError(RuntimeError):
    """Base of all errors raised by qtensor. Names in its message are escaped where a terminal would obey them."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable_lines(arg) if isinstance(arg, str) else arg for arg in args))


class IncompleteLoadError(QTensorError):
    """A session finished (or a weight was read) while some elements had never been written.

    Attributes:
        missing: Each weight's name and the boxes that were not written, one `(start, stop)` per dimension.
    """

    def __init__(self, message: str, missing: dict[str, list[tuple[tuple[int, int], ...]]] | None = None) -> None:
        super().__init__(message)
        self.missing = missing or {}


class NonFiniteWeightError(QTensorError, ValueError):
    """The source of a write holds NaN or infinity and on_nonfinite is "error"."""


class LossyReadError(QTensorError):
    """A loader read back elements that only exist in quantized form, and strict_reads is on."""


class WeightShapeError(QTensorError, ValueError):
    """A source tensor does not fit the weight, or the slice of it, that it was written to."""


class WeightDtypeError(QTensorError, TypeError):
    """A source tensor, or a weight, has a dtype that cannot be quantized or cast without guessing."""


class ConfigError(QTensorError, ValueError):
    """An option is unknown, has a value of the wrong kind, or its patterns clash or match nothing."""


class LossySourceError(QTensorError, ValueError):
    """strict_source is "lossless", and a weight arrives in a format whose numbers the scheme's cannot all be."""


class MissingExtraError(QTensorError, ImportError):
    """An optional package is not installed; the message has the pip line that brings it."""


class CheckpointError(QTensorError, ValueError):
    """A checkpoint folder is missing, damaged, unsafe, or holds what cannot be read or written as asked.

    Its message is one line, and of what is endless its beginning.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_one_line(arg) if isinstance(arg, str) else arg for arg in args))


class SnapshotError(CheckpointError):
    """A snapshot is damaged, or is of another model, configuration, version or chip; or a model's state cannot be one.

    The message names what differs. What to do: load the model in the ordinary way, and save a new snapshot of it.
    """


def _one_line(text: str) -> str:
    return printable(text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…")
