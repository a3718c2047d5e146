"""The kernels in Triton's own interpreter (TRITON_INTERPRET=1), which is how to step through one in a debugger.

Triton decides on import whether to interpret, so this runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(
    not os.environ.get("QTENSOR_ENDURANCE"),
    reason="test_kernels.py tries the same on what Triton compiles: make endurance",
)

CODE = """
import sys, torch, triton, triton.language as tl
@triton.jit
def loop(out, n):
    for i in range(n):
        tl.store(out, i)
try:
    loop[(1,)](torch.zeros(1, dtype=torch.int32), 2)
except Exception as error:
    sys.exit(f"not with this NumPy: {error}")
from qtensor.kernels import FORMATS, SEARCHES
from qtensor.schemes.scheme import SCHEMES
from qtensor.kernels.triton import TRITON
from support.kernel_cases import check_dequantize, check_quantize, make_values
for name in SEARCHES:
    check_quantize(TRITON, make_values("normal", (3, 40), torch.bfloat16), SCHEMES[name].searched().format)
for fmt in FORMATS.values():
    check_quantize(TRITON, make_values("edges", (3, 40), torch.bfloat16), fmt)
    check_dequantize(TRITON, (3, 40), fmt, torch.bfloat16, 1)
"""


def test_kernels_in_tritons_interpreter(tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    script = tmp_path / "kernels.py"  # Triton reads the source of what it is given.
    script.write_text(CODE)
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=300)
    if "not with this NumPy" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
