"""Where the plugin stands in for functions of vLLM, or runs around them. Each may be wrapped any number of times."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn


def wrap_layerwise_reload(initialize: Callable[[nn.Module], bool], finalize: Callable[[nn.Module], bool]) -> None:
    """Ask `initialize(model)` and `finalize(model)` before vLLM's functions of these names run, wherever vLLM calls
    them; where the answer is True, vLLM's do not run."""
    layerwise = importlib.import_module("vllm.model_executor.model_loader.reload.layerwise")
    for name, ours in (("initialize_layerwise_reload", initialize), ("finalize_layerwise_reload", finalize)):
        original = getattr(layerwise, name)
        if hasattr(original, "_qtensor"):
            continue
        wrapped = _asking_first(original, ours)
        # Modules that have imported the name hold vLLM's function; the package passes ours on to later ones.
        for key, module in list(sys.modules.items()):
            if key.startswith("vllm.") and vars(module).get(name) is original:
                setattr(module, name, wrapped)


def _asking_first(original: Any, ours: Callable[[nn.Module], bool]) -> Any:
    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs["model"]
        return None if ours(model) else original(*args, **kwargs)

    wrapped._qtensor = True  # type: ignore[attr-defined]
    return wrapped


def before_sparse_patches(ask: Callable[[nn.Module], bool]) -> None:
    """Ask `ask(model)` before single elements of a model's tensors are written, by any of vLLM's ways. A version that
    has none is left alone."""
    place = "vllm.model_executor.model_loader.checkpoint_weight_patch"
    if importlib.util.find_spec(place) is None:
        return
    module: Any = importlib.import_module(place)
    if not hasattr(module._load_nan_masked_weights, "_qtensor"):
        module._load_nan_masked_weights = _asking_first(module._load_nan_masked_weights, ask)


def wrap_worker(method: str, around: Callable[[Any, Any], AbstractContextManager[None]]) -> None:
    """Run a method of every worker within `around(worker, first argument)`. A version without it is left alone."""
    from vllm.v1.worker.gpu_worker import Worker

    inner = getattr(Worker, method, None)
    if inner is None or hasattr(inner, "_qtensor"):
        return

    @functools.wraps(inner)
    def wrapped(worker: Any, *args: Any, **kwargs: Any) -> Any:
        with around(worker, kwargs.get("weights_iterator", args[0] if args else None)):
            return inner(worker, *args, **kwargs)

    wrapped._qtensor = True  # type: ignore[attr-defined]
    setattr(Worker, method, wrapped)


def add_worker_method(name: str, function: Any) -> None:
    """Make `collective_rpc(name)` answer on every kind of worker."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, name, function)
