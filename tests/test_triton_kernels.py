"""Every Triton kernel against the reference, on a machine without a GPU.

Triton decides on import whether to interpret kernels on the CPU, so the cases live in triton_interpreter_cases.py and
run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = Path(__file__).with_name("triton_interpreter_cases.py")


@pytest.mark.slow
def test_kernels_equal_the_reference_in_the_interpreter() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES), "-k"]
    options = {
        "env": env,
        "cwd": CASES.parent.parent,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    # Two processes, because the interpreter is slow and uses one core.
    halves = [subprocess.Popen([*command, half], **options) for half in ("non_finite", "not non_finite")]
    for half in halves:
        output, _ = half.communicate(timeout=600)
        print(output[-8000:])
        if half.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
            pytest.skip("Triton's interpreter does not work here: " + output[-300:])
        assert half.returncode == 0, "see the output above; to repeat: TRITON_INTERPRET=1 pytest " + str(CASES)
