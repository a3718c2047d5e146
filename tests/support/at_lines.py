"""Exceptions at a given line of qtensor, and at another one after that."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import qtensor


class AtLine:
    """Raises at a line of qtensor when it is run for the n-th time (-1: never); notes all lines that are run."""

    def __init__(self, line: str, n: int, stop: type[BaseException]) -> None:
        self._line, self._n, self._stop = line, n, stop
        self.seen: Counter[str] = Counter()

    def __enter__(self) -> AtLine:
        self._before = sys.gettrace()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._on_line if _file(frame.f_code) else None

    def _on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            where = f"{_file(frame.f_code)}:{frame.f_lineno}"
            self.seen[where] += 1
            if where == self._line and self.seen[where] == self._n:
                raise self._stop("at a line")
        return self._on_line


class ThenAtLine(AtLine):
    """As AtLine, and again at another line ("": at none) that is run after that; notes the lines in between.

    Python takes a tracer away that raises: a profiler brings it back at the next call.
    """

    def __init__(self, line: str, n: int, stop: type[BaseException], later: str) -> None:
        super().__init__(line, n, stop)
        self._later, self.stopped = later, 0
        self.after: dict[str, None] = {}

    def _on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and self.stopped:
            where = f"{_file(frame.f_code)}:{frame.f_lineno}"
            self.after[where] = None
            if where == self._later and self.stopped == 1:
                self.stopped = 2
                raise self._stop("again")
            return self._on_line
        try:
            return super()._on_line(frame, event, arg)
        except self._stop:
            self.stopped = 1
            sys.setprofile(self._come_back)
            raise

    def _come_back(self, frame: FrameType | None, event: str, arg: Any) -> None:
        sys.setprofile(None)
        while frame is not None:
            if _file(frame.f_code):
                frame.f_trace = self._on_line
            frame = frame.f_back
        sys.settrace(self._on_call)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        super().__exit__()


PACKAGE = str(Path(qtensor.__file__).parent)


@functools.cache
def _file(code: CodeType) -> str:
    """Of qtensor's own files that keep state: sessions, weights, ranks."""
    package, _, rest = code.co_filename.partition(PACKAGE + "/")
    return rest if not package and rest.split("/")[0] in ("sessions", "lazy", "ranks") else ""
