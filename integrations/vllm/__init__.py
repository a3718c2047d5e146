"""qtensor inside vLLM: `quantization="qtensor"`, and every loader and architecture quantizes itself while it loads.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every process (API server,
engine core, workers), whether anybody asks for qtensor or not. So this file imports nothing of vLLM, and `register`
only what vLLM has imported by then.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

__all__ = ["abort_update", "checksums", "register", "reports", "root", "save_snapshot"]


def register() -> None:
    """Make the names "qtensor", "qtensor_fp8_per_tensor", ... known to vLLM. Safe to call any number of times.

    Silent where vLLM is absent. On a vLLM version this plugin was not made for, the names are not registered and one
    warning says which versions work.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # Absent, or a mere folder of that name on the path.
        return
    from . import compat

    problem = compat.version_problem()
    if problem is not None:
        compat.logger().warning("%s", problem)
        return
    from .config import register_names

    register_names()


def reports(llm: Any) -> list[dict[str, Any]]:
    """The load report of every worker of a `vllm.LLM`, one dictionary per worker: `LoadReport`'s fields, and "rank",
    "model", "resident_peak_bytes" (see docs/vllm.md). Empty if the model was loaded by another method."""
    return _ask(llm, "qtensor_report")


def checksums(llm: Any) -> list[dict[str, str]]:
    """`qtensor.weight_checksums` of every worker's model, one dictionary per worker. Quantized weights go by the names
    of vLLM's layers (`...qkv_proj.weight`) and have the checksum that `quantize` of the fused weight has. Empty if the
    model was loaded by another method."""
    return _ask(llm, "qtensor_checksums")


def root(llm: Any) -> str:
    """One sha256 for all weights that a `vllm.LLM` serves: `qtensor.weight_root` of `checksums`; of several workers, of
    their roots, by "rank-0", "rank-1", .... Empty if the model was loaded by another method."""
    from qtensor.tensor.checksums import weight_root

    found = _ask(llm, "qtensor_root")
    if len(found) < 2:
        return found[0] if found else ""
    return weight_root({f"rank-{rank}": value for rank, value in enumerate(found)})


def abort_update(llm: Any) -> bool:
    """Give up a weight update that was begun (`start_weight_update`) and will not be finished, because its trainer is
    gone, say: all workers serve what they served before it, and the next update works. Finishing it instead would make
    live what has arrived. With the option `reload="per_weight"` weights that have arrived whole are live already.

    Returns whether an update of a model that this plugin loaded was open.
    """
    return any(_ask(llm, "qtensor_abort_update"))


def save_snapshot(llm: Any, folder: str | Path) -> list[str]:
    """Write the weights that a `vllm.LLM` serves, for the option `snapshot` of the next start with as many ranks.

    Every worker writes a file, so all of them have to see the folder. It appears in one step, or not at all.

    Args:
        llm: Whose model was loaded with one of the plugin's names.
        folder: It keeps a snapshot for each number of ranks that one was saved for.

    Returns:
        The root of each worker's weights.

    Raises:
        SnapshotError: A weight cannot be read back from its kernel's form, or the folder is another's.
        QTensorError: The model was loaded by another method.
    """
    from qtensor.errors import QTensorError

    found = _ask(llm, "qtensor_save_snapshot", os.path.abspath(folder))
    if not found:
        raise QTensorError("save_snapshot: this model was not loaded by qtensor; load it with quantization='qtensor'")
    return found


def _ask(llm: Any, method: str, *args: Any) -> list[Any]:
    from .config import NAMES

    if llm.llm_engine.vllm_config.model_config.quantization not in NAMES:
        return []
    found: list[Any] = llm.collective_rpc(method, args=args)
    return found
