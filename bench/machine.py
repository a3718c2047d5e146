"""What the CPU benches share: what a result file says about machine and versions, tables in pages, a group of ranks."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable
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


def on_ranks(work: Callable[..., Any], world: int, *args: Any) -> Any:
    """What rank 0 returns of work(rank, world, *args), run by as many processes of one gloo group."""
    import torch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_on_rank, args=(work, world, port, args, queue), nprocs=world)
    return queue.get()


def _on_rank(rank: int, work: Callable[..., Any], world: int, port: int, args: tuple[Any, ...], queue: Any) -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    found = work(rank, world, *args)
    if rank == 0:
        queue.put(found)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


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
