"""What a worker says about its load: one line in vLLM's log, and files where the option `report` asks for them."""

from __future__ import annotations

from pathlib import Path

import torch

from qtensor.report.report import LoadReport

from . import compat

_WRITERS = {".json": LoadReport.to_json, ".html": LoadReport.to_html}


def announce(report: LoadReport, resident_peak: int) -> None:
    """One line. resident_peak: bytes by which anonymous memory rose."""
    compat.logger().info(
        "qtensor: %d weights quantized to %s while loading: %.1f MiB, and %.1f MiB left as they are; "
        "peak staging %.1f MiB, peak rise of anonymous memory %.1f MiB; %.2f seconds",
        len(report.layers),
        report.scheme or "nothing",
        report.quantized_bytes / 2**20,
        report.passthrough_bytes / 2**20,
        report.peak_staged_bytes / 2**20,
        resident_peak / 2**20,
        report.seconds,
    )


def write(report: LoadReport, where: str) -> list[Path]:
    """The files `report_paths` names for this rank, written."""
    paths = report_paths(where, *rank())
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        _WRITERS[path.suffix](report, path)
    return paths


def report_paths(where: str, number: int, world: int) -> list[Path]:
    """`where` with "{rank}" replaced, as .json and .html unless it ends in one of them. Several ranks without "{rank}"
    get "-rank<n>" before the ending, so that none overwrites another's."""
    path = Path(where.replace("{rank}", str(number)))
    endings = [path.suffix] if path.suffix in _WRITERS else list(_WRITERS)
    stem = path.name.removesuffix(path.suffix) if path.suffix in _WRITERS else path.name
    if world > 1 and "{rank}" not in where:
        stem += f"-rank{number}"
    return [path.with_name(stem + ending) for ending in endings]


def rank() -> tuple[int, int]:
    """This worker's rank, and how many there are."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
