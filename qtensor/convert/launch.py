"""One checkpoint, many machines: a conversion's shards dealt out to torchrun's ranks, or to Ray.

Machines share a folder, and the ranks a key-value store, the one of their launcher. Each shard is a task of its own
that may be done by anyone, and again when whoever had it is lost (`attempt`), so the result is that of one process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..checkpoint.layouts import COMPRESSED_TENSORS
from ..errors import CheckpointError, QTensorError
from ..extras import require
from ..report.progress import ProgressLike
from ..schemes.config import SchemeSpec
from ..schemes.selection import DEFAULT_IGNORE
from ..sessions.options import StrictSource
from .cluster import LOST_AFTER, Ranks, await_visible
from .converting import (
    Conversion,
    ConversionReport,
    ShardTask,
    attempt,
    finished,
    prepare,
    quantize_checkpoint,
)
from .streaming import OnBytes


def quantize_on_ranks(
    source: str | Path,
    target: str | Path,
    scheme: SchemeSpec,
    *,
    ignore: Sequence[str] = DEFAULT_IGNORE,
    format: str = COMPRESSED_TENSORS,
    workers: int = 2,
    progress: ProgressLike = None,
    lost_after: float = LOST_AFTER,
    on_bytes: Callable[[int, int], None] | None = None,
    strict_source: StrictSource = "any",
) -> ConversionReport | None:
    """`quantize_checkpoint` by all ranks that torchrun started.

    Each rank takes a shard when it is done with the last. Rank 0 writes what is written once, after all shards.

    Args:
        source: As `quantize_checkpoint` takes it, and so do the next five.
        target: See there.
        scheme: See there.
        ignore: See there.
        format: See there.
        workers: Threads of each rank.
        progress: See there; of rank 0, about all ranks.
        lost_after: Seconds after which the shard of a rank that has given no sign of life is done by another.
        on_bytes: See there.
        strict_source: See there.

    Returns:
        The report on rank 0; None on the others.

    Raises:
        CheckpointError: On every rank, if one fails, naming that rank and its shard. What was finished is kept, for the
            next run.
    """
    ranks = Ranks(lost_after)

    def work() -> ConversionReport | None:
        if ranks.rank == 0:
            return quantize_checkpoint(
                source,
                target,
                scheme,
                ignore=ignore,
                format=format,
                workers=workers,
                progress=progress,
                on_bytes=on_bytes,
                strict_source=strict_source,
                share=lambda *given: ranks.lead(*given, workers=workers),
            )
        ranks.follow(lambda: prepare(source, Path(target), scheme, ignore, format, strict_source), target, workers)
        return None

    return ranks.run(work)


def quantize_on_ray(
    source: str | Path,
    target: str | Path,
    scheme: SchemeSpec,
    *,
    address: str | None = None,
    workers: int = 2,
    **options: Any,
) -> ConversionReport:
    """`quantize_checkpoint` with a Ray task for each shard.

    Every machine has qtensor, and the folders under the same paths. A shard whose worker is lost is given to another,
    three times.

    Args:
        source: As `quantize_checkpoint` takes it, and so do the next two.
        target: See there.
        scheme: See there.
        address: Of the cluster. None: the one this process or machine belongs to, or else a new one of this machine
            alone.
        workers: Threads and CPUs of each task.
        options: The others of `quantize_checkpoint`.

    Returns:
        The report.

    Raises:
        CheckpointError: A task failed; its machine and shard are named.
    """
    ray = require("ray", "ray", "quantize_on_ray")
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            stale = "" if address else ". If that cluster is gone, `ray stop` makes Ray forget it"
            raise CheckpointError(f"no Ray cluster at {address or 'this machine'}: {error}{stale}") from None

    def share(conversion: Conversion, todo: list[ShardTask], notes: Path, on_bytes: OnBytes) -> None:
        most = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        if most < workers:
            raise CheckpointError(f"no machine of the Ray cluster has {workers} CPUs; ask for {int(most)} workers")
        remote = ray.remote(num_cpus=workers, max_retries=3, scheduling_strategy="SPREAD")(_attempt_on_ray)
        waiting = {remote.remote(task, notes, workers): task for task in todo}
        try:
            while waiting:
                for done in ray.wait(list(waiting))[0]:
                    task = waiting.pop(done)
                    try:
                        failure = ray.get(done)
                    except ray.exceptions.RayError as error:
                        failure = f"{task.target.name}: {error}"
                    if failure is not None:
                        raise CheckpointError(failure)
                    await_visible(task, notes, LOST_AFTER)
                    on_bytes(task.nbytes)
        finally:
            for unneeded in waiting:
                ray.cancel(unneeded, force=True)

    try:
        return quantize_checkpoint(os.path.abspath(source), target, scheme, workers=workers, share=share, **options)
    finally:
        if ours:
            ray.shutdown()


def _attempt_on_ray(task: ShardTask, notes: Path, workers: int) -> str | None:
    """What went wrong, in words: an error would come back as Ray's, with its whole way."""
    import ray

    if finished(task, notes) is not None:
        return None  # The worker was lost after its work was done.
    try:
        with ThreadPoolExecutor(workers) as pool:
            attempt(task, notes, pool)
    except (QTensorError, OSError) as error:
        return f"{ray.util.get_node_ip_address()}, {task.target.name}: {error}"
    return None
