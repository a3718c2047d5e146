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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", str(CASES)]
    done = subprocess.run(command, env=env, cwd=CASES.parent.parent, capture_output=True, text=True, timeout=600)
    print(done.stdout[-8000:], done.stderr[-2000:])
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("Triton's interpreter does not work here: " + done.stdout[-300:])
    assert done.returncode == 0, "see the output above; to repeat: TRITON_INTERPRET=1 pytest " + str(CASES)
