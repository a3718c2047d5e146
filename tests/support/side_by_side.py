"""Runs test suites side by side, for `make test`: each line with its suite's name, and every summary at the end.

python tests/support/side_by_side.py NAME=COMMAND ...

One more than there are cores run at a time, in the order given: tests of several processes also wait for each other.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

SUMMARY = "short test summary info"
running: set[int] = set()  # groups of processes


def run(suite: str) -> tuple[str, int, float, list[str]]:
    """The suite's name, its exit code, the seconds it took, and its summary: what failed, what was skipped and why."""
    name, command = suite.split("=", 1)
    began = time.monotonic()
    process = subprocess.Popen(
        shlex.split(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},  # progress is seen while it happens
        process_group=0,
    )
    assert process.stdout is not None
    running.add(process.pid)
    threading.Thread(target=end, args=(process,), daemon=True).start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        sys.stdout.write(f"{name} | {line}")
        sys.stdout.flush()
    code = process.wait()
    start = max((i for i, line in enumerate(lines) if SUMMARY in line), default=len(lines) - 1)
    return name, code, time.monotonic() - began, lines[max(start, 0) :]


def end(process: subprocess.Popen[str]) -> None:
    """With a suite, what it started ends: a process that hangs would keep its output open, and all of us waiting."""
    process.wait()
    running.discard(process.pid)
    kill(process.pid)


def kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def stop(signum: int, frame: object) -> None:
    for group in list(running):
        kill(group)
    os._exit(128 + signum)


def main(suites: list[str]) -> int:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        results = list(pool.map(run, suites))
    for name, code, seconds, summary in results:
        print(
            f"\n{name}: {'passed' if code == 0 else 'FAILED'} in {seconds / 60:.1f} minutes\n{''.join(summary)}", end=""
        )
    return int(any(code for _, code, _, _ in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
