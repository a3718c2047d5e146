"""Every Triton kernel against the reference, on a machine without a GPU.

Triton decides on import whether to interpret kernels on the CPU, so the cases live in triton_interpreter_cases.py and
run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = Path(__file__).parent / "support" / "triton_interpreter_cases.py"


@pytest.mark.slow
def test_kernels_equal_the_reference_in_the_interpreter() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES), "-k"]

    def run(selection: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, selection], env=env, cwd=CASES.parents[2], capture_output=True, text=True, timeout=600
        )

    # Two processes, because the interpreter is slow and uses one core.
    with ThreadPoolExecutor() as pool:
        halves = list(pool.map(run, ("non_finite", "not non_finite")))
    for half in halves:
        print(half.stdout[-8000:], half.stderr[-2000:])
    if all(half.returncode == pytest.ExitCode.NO_TESTS_COLLECTED for half in halves):
        pytest.skip("Triton's interpreter does not work here: " + halves[0].stdout[-300:])
    for half in halves:
        assert half.returncode == 0, "see the output above; to repeat: TRITON_INTERPRET=1 pytest " + str(CASES)
