"""What the GPU benchmarks share: finding the GPU, naming the machine, saving results."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def require_gpu() -> torch.device:
    """The current GPU; exits with status 2 where there is none."""
    if not torch.cuda.is_available():
        print("no GPU found: this benchmark measures GPU kernels and has nothing to say here", file=sys.stderr)
        raise SystemExit(2)
    return torch.device("cuda", torch.cuda.current_device())


def machine() -> dict[str, Any]:
    """Date, chip, driver and versions, for the record."""
    import triton

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "chip": torch.cuda.get_device_name(),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def save(name: str, record: dict[str, Any]) -> Path:
    """Write `record` under bench/results/, named after the benchmark, the chip and the date."""
    chip = re.sub(r"[^a-z0-9]+", "-", record["machine"]["chip"].lower()).strip("-")
    path = RESULTS / f"{name}-{chip}-{record['machine']['date'][:10]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys, as aligned text."""
    if not rows:
        return "(nothing measured)"
    cells = [list(rows[0])] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in cells)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
