"""Runs test suites side by side, for `make test`: each line with its suite's name, and every summary at the end.

python tests/support/side_by_side.py NAME=COMMAND ...

One more than there are cores run at a time, in the order given: tests of several processes also wait for each other.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

SUMMARY = "short test summary info"


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
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        sys.stdout.write(f"{name} | {line}")
        sys.stdout.flush()
    code = process.wait()
    start = max((i for i, line in enumerate(lines) if SUMMARY in line), default=len(lines) - 1)
    return name, code, time.monotonic() - began, lines[max(start, 0) :]


def main(suites: list[str]) -> int:
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        results = list(pool.map(run, suites))
    for name, code, seconds, summary in results:
        print(
            f"\n{name}: {'passed' if code == 0 else 'FAILED'} in {seconds / 60:.1f} minutes\n{''.join(summary)}", end=""
        )
    return int(any(code for _, code, _, _ in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
