"""What every result file of a CPU bench says about the machine and the versions it was measured with."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def facts(*packages: str) -> dict[str, Any]:
    """Date, command, CPU, and the versions of Python and `packages`."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def versions(python: str, *packages: str) -> dict[str, str]:
    """The versions of `packages` in another environment, of those that are installed there."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {name: found[name] for name in packages if name in found}


def save(name: str, results: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path


def into_page(page: Path, name: str, text: str) -> None:
    """Put a table between its two marks in a page of the documentation."""
    before, rest = page.read_text().split(f"<!-- {name}: ")
    source, rest = rest.split(" -->", 1)
    page.write_text(f"{before}<!-- {name}: {source} -->\n\n{text}\n\n{rest[rest.index('<!-- end -->') :]}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
