"""What a load costs in memory: the anonymous bytes of a fresh child process, sampled from outside while it works.

Anonymous memory is what only RAM or swap can hold. Pages of a mapped checkpoint file are counted apart, because the
kernel may drop them at any time. The parent samples, so that nothing the child's interpreter is busy with hides a
moment. The child says when it is warm (`Child.ready`) and when the load is over (`Child.done`); each time it waits
until the parent has looked.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import IO, Any

from ..errors import QTensorError
from ..extras import require

_MARK = "@qtensor "


@dataclass(frozen=True)
class Measurement:
    """One child's load. Bytes are relative to `baseline`, the anonymous bytes the warm child held before it.

    peak, final: anonymous bytes above the baseline, at most and at the end. peak_file: mapped file bytes, at most.
    seconds: from ready to done. result: what the child reported. samples: (seconds, anonymous bytes) over time, at most
    about 200; the peak is among them.
    """

    baseline: int
    peak: int
    final: int
    peak_file: int
    seconds: float
    result: dict[str, Any]
    samples: list[tuple[float, int]] = field(default_factory=list)


class Child:
    """The child's side. Everything else it prints is dropped."""

    def ready(self) -> None:
        self._say("ready", {})

    def done(self, **result: Any) -> None:
        self._say("done", result)

    def add(self, **result: Any) -> None:
        """More results, found after the measurement has ended."""
        print(_MARK + json.dumps(["more", result]), flush=True)

    def _say(self, word: str, result: dict[str, Any]) -> None:
        print(_MARK + json.dumps([word, result]), flush=True)
        sys.stdin.readline()


def measure(command: Sequence[str], interval: float = 0.002) -> Measurement:
    """Run `command`, whose program speaks through `Child`, and sample it between its ready and its done.

    Raises QTensorError with the end of the child's error output if it fails.
    """
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(child.stdout, lines), daemon=True).start()
        result: dict[str, Any] = {}
        baseline = peak = final = peak_file = 0
        started = seconds = 0.0
        samples: list[tuple[float, int]] = []
        sampling = False
        while True:
            try:
                line = lines.get(timeout=interval if sampling else None)
            except queue.Empty:
                anonymous, mapped = resident_bytes(child.pid)
                peak, peak_file = max(peak, anonymous), max(peak_file, mapped)
                samples.append((time.perf_counter() - started, anonymous - baseline))
                continue
            if line is None:
                break
            word, values = json.loads(line)
            result.update(values)
            if word == "ready":
                baseline, _ = resident_bytes(child.pid)
                sampling, started = True, time.perf_counter()
            elif word == "done":
                seconds = time.perf_counter() - started
                final, mapped = resident_bytes(child.pid)
                peak, peak_file = max(peak, final), max(peak_file, mapped)
                samples.append((seconds, final - baseline))
                sampling = False
            if word != "more":
                child.stdin.write("\n")
                child.stdin.flush()
        if child.wait() != 0:
            errors.seek(0)
            raise QTensorError(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")
    return Measurement(baseline, peak - baseline, final - baseline, peak_file, seconds, result, _thinned(samples))


def _thinned(samples: list[tuple[float, int]], limit: int = 200) -> list[tuple[float, int]]:
    """At most about `limit` of the samples: of neighbours the highest, and the last."""
    step = max(1, ceil(len(samples) / limit))
    groups = [samples[i : i + step] for i in range(0, len(samples), step)]
    return [max(group, key=lambda s: s[1]) for group in groups] + samples[-1:]


def resident_bytes(pid: int | None = None) -> tuple[int, int]:
    """Anonymous and file-backed bytes that a process (by default this one) holds in RAM.

    Where the system does not tell them apart, all resident bytes count as anonymous.
    """
    status = Path(f"/proc/{pid or os.getpid()}/status")
    try:
        text = status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        if status.parent.parent.joinpath("self").exists():
            return 0, 0  # the process has ended
        psutil = require("psutil", "demo", "measuring memory")
        return int(psutil.Process(pid).memory_info().rss), 0
    return _field(text, "RssAnon"), _field(text, "RssFile")


def _field(status: str, name: str) -> int:
    for line in status.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _pump(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        if line.startswith(_MARK):
            lines.put(line.removeprefix(_MARK))
    lines.put(None)
