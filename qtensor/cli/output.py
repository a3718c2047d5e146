"""What a command prints, wherever that goes: a pipe without a reader, a full disk, a terminal without UTF-8, nowhere.

While a command runs, `sys.stdout` is an `Output`: characters that the encoding lacks, or that a terminal would obey,
are escaped, and what cannot be written at all is one exception, `OutputLost`, from wherever it was printed.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TextIO

from ..text import printable_lines

BROKEN_PIPE = 141
"""What a shell reports of a command that the end of its reader has ended: 128 + SIGPIPE."""


class OutputLost(BaseException):
    """Standard output cannot be written. Like KeyboardInterrupt it ends the command, and is no error of its work."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.pipe = isinstance(error, BrokenPipeError)

    def told(self) -> int:
        """The exit code, when standard error has the reason. A reader that has read enough needs none."""
        if self.pipe:
            return BROKEN_PIPE
        complain(f"qtensor: standard output cannot be written: {self}")
        return 1


class Output(io.TextIOBase):
    """Standard output, escaped. stream: None where the process was started without one."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self._stream is None:
            raise OutputLost(OSError("it is closed"))
        try:
            self._stream.write(_shown(text, self._encoding))
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> NoReturn:
        _give_up(self._stream)
        self._stream = None
        raise OutputLost(error) from None

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()


@contextmanager
def standard_output() -> Iterator[None]:
    """Within it `print` goes through an `Output`."""
    _occupy_standard_files()
    before, sys.stdout = sys.stdout, Output(sys.stdout)
    try:
        yield
    finally:
        sys.stdout = before


def complain(text: str) -> None:
    """Say it on standard error, if anyone can hear it."""
    if sys.stderr is None:
        return
    try:
        print(_shown(text, getattr(sys.stderr, "encoding", None) or "utf-8"), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _give_up(sys.stderr)


def _shown(text: str, encoding: str) -> str:
    return printable_lines(text).encode(encoding, "backslashreplace").decode(encoding)


def _give_up(stream: TextIO | None) -> None:
    """What the stream still holds goes nowhere, or Python would try once more at its exit, and fail."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


def _occupy_standard_files() -> None:
    """Where standard input, output or error is closed, the next file to be opened would be taken for it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
