"""docs/examples/rl_refit.py as it stands: a trainer process, a served model, and a fresh engine to compare with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "rl_refit.py"


def test_a_refit_engine_is_a_fresh_engine() -> None:
    command = [sys.executable, str(EXAMPLE), "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert "version 1: " in done.stdout, done.stderr[-3000:]
    assert "checksums equal; answers equal" in done.stdout
