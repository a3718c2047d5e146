"""Where vLLM comes in: the first layer of a model that is being built begins its load, and calls that vLLM makes on
models of this plugin go to the transaction under way.

That is `model.load_weights`, whoever calls it, and the calls by which vLLM reloads: `reload_weights`, and the lifecycle
start_weight_update / update_weights / finish_weight_update of its weight transfer engines. The plugin's reloads stand
in for vLLM's layerwise reload there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from qtensor.callers import outermost_under_construction
from qtensor.errors import QTensorError
from qtensor.tensor.checksums import weight_checksums, weight_root

from . import compat, garbage, hooks, snapshots
from .incoming import Weights
from .layers import part_names
from .load import Load
from .loops import loops
from .options import Choice
from .reload import Reload
from .served import ServedModel, find_served

# Does the reload that is about to begin read a whole checkpoint, and do all ranks run it as one call?
_from_files: ContextVar[bool] = ContextVar("from_files", default=False)
_one_call: ContextVar[bool] = ContextVar("one_call", default=False)


# Loads ---------------------------------------------------------------------------------------------------------------


def load_of(choice: Choice) -> Load:
    """The load of the model that is being constructed by the caller's callers; begun if this is its first layer.

    vLLM gives a quantization method no handle on the model, so the model is taken from the stack: the outermost module
    whose `__init__` is running.
    """
    root = outermost_under_construction()
    if root is None:
        raise QTensorError("qtensor: vLLM created a layer outside of any model; the plugin does not know this route")
    served = ServedModel.of(root)
    if served is None:
        if compat.on_cpu() and choice.options.snapshot is None:
            loops()
        served = ServedModel(root, choice)
        load = Load(served)
        _listen(served)
        _take_over()
        return load
    assert isinstance(served.open, Load)
    return served.open


def _listen(served: ServedModel) -> None:
    """See every (name, tensor) that a loader hands to the model, and the load's end. Wrappers on this one model, not on
    its class."""
    _listen_for_the_end(served.root)
    inner = getattr(served.root, "load_weights", None)
    if inner is None:
        return

    @functools.wraps(inner)
    def load_weights(weights: Weights, *args: Any, **kwargs: Any) -> Any:
        if served.incoming.active or (served.open is None and served.report is None):
            return inner(weights, *args, **kwargs)  # The model calls itself, or its load has failed.
        if served.open is not None and served.open.unsettled:
            served.open.abort()  # What stopped it before its end has gone, perhaps.
        if served.open is not None:
            return served.open.load_weights(inner, weights, args, kwargs)
        reload = Reload(served, whole_checkpoint=False, one_call=True)
        loaded = reload.load_weights(inner, weights, args, kwargs)
        reload.finish()
        return loaded

    object.__setattr__(served.root, "load_weights", load_weights)


def _listen_for_the_end(root: nn.Module) -> None:
    """The last that vLLM's loaders do is `model.eval()`."""

    def over(*args: Any, **kwargs: Any) -> Any:
        object.__delattr__(root, "eval")
        garbage.take_in_again()
        if compat.on_cpu():
            loops.begin()
        return root.eval(*args, **kwargs)

    object.__setattr__(root, "eval", over)


# Reloads -------------------------------------------------------------------------------------------------------------


def _take_over() -> None:
    """Stand in for vLLM's reload, from now on, for models this plugin loads. Safe to call any number of times."""
    hooks.wrap_layerwise_reload(begin, finish)
    hooks.before_sparse_patches(_refuse_single_elements)
    hooks.wrap_worker("init_weight_transfer_engine", _not_by_recorded_copies)
    hooks.wrap_worker("reload_weights", _one_reload)
    hooks.wrap_worker("finish_weight_update", _end_of_update)
    hooks.add_worker_method("qtensor_report", worker_report)
    hooks.add_worker_method("qtensor_checksums", worker_checksums)
    hooks.add_worker_method("qtensor_root", worker_root)
    hooks.add_worker_method("qtensor_save_snapshot", worker_save_snapshot)
    hooks.add_worker_method("qtensor_abort_update", worker_abort_update)


def begin(model: nn.Module) -> bool:
    """Open a reload. False if the model is not this plugin's. One that an error left open is given up."""
    served = find_served(model)
    if served is None or served.report is None:
        return False
    if served.open is not None:
        served.open.abort()
    Reload(served, whole_checkpoint=_from_files.get(), one_call=_one_call.get())
    return True


def finish(model: nn.Module) -> bool:
    """Commit the open reload. False if the model is not this plugin's."""
    served = find_served(model)
    if served is None or served.report is None:
        return False
    if served.open is None:
        raise QTensorError("no reload of this model is open: it was never begun, or an error has ended it; begin anew")
    served.open.finish()
    return True


def _refuse_single_elements(model: nn.Module) -> bool:
    if find_served(model) is not None:
        raise QTensorError(
            "qtensor: a sparse update changes single elements of a weight, and what shares a scale with them is known "
            "here only quantized. Nothing was changed. Send each tensor that has changed whole: by another backend of "
            "weight_transfer_config (nccl, ipc), or by reload_weights with an iterator of these tensors"
        )
    return False


@contextlib.contextmanager
def _not_by_recorded_copies(worker: Any, _: Any) -> Iterator[None]:
    """The engine sharded_rdt records once where vLLM's loaders copy to, and later writes there by itself."""
    engine = type(worker.weight_transfer_engine)
    if engine.__name__.startswith("ShardedRDT") and find_served(worker.model_runner.get_model()) is not None:
        raise QTensorError(
            "qtensor: the weight transfer backend sharded_rdt writes past the model's loaders, into memory of its own "
            "making, and cannot fill quantized weights. Use another one: nccl, ipc or m2n"
        )
    yield


@contextlib.contextmanager
def _one_reload(worker: Any, weights: Any) -> Iterator[None]:
    """A worker's `reload_weights`. A failed one leaves vLLM's idea of where the model is from as it was."""
    config = worker.vllm_config.model_config
    source = {name: getattr(config, name) for name in ("model", "model_weights", "revision") if hasattr(config, name)}
    tokens = _from_files.set(weights is None), _one_call.set(True)
    try:
        yield
    except BaseException as error:
        for name, value in source.items():
            setattr(config, name, value)
        served = find_served(worker.model_runner.get_model())
        if served is not None and served.open is not None:
            served.open.abort(error)
        _raise_on_the_last_rank(error)
    finally:
        _from_files.reset(tokens[0])
        _one_call.reset(tokens[1])


@contextlib.contextmanager
def _end_of_update(worker: Any, _: Any) -> Iterator[None]:
    """A worker's `finish_weight_update`. After a failed one vLLM would wait for the end of the update for ever."""
    try:
        yield
    except BaseException as error:
        _expect_no_end(worker)
        _raise_on_the_last_rank(error)


def _expect_no_end(worker: Any) -> None:
    worker._weight_update_active = False
    if worker.weight_transfer_engine is not None:
        worker.weight_transfer_engine.reset_weight_update_target()


def _raise_on_the_last_rank(error: BaseException) -> None:
    if not getattr(error, "told_all_ranks", False) or compat.answers_last():
        raise error
    compat.logger().error("qtensor: %s", error)


# What workers answer ------------------------------------------------------------------------------------------------


def worker_report(worker: Any) -> dict[str, Any] | None:
    """What `collective_rpc("qtensor_report")` answers in each worker; None if qtensor had no part in its model."""
    served = find_served(worker.get_model() if hasattr(worker, "get_model") else worker.model_runner.get_model())
    return served.as_dict() if served is not None else None


def worker_checksums(worker: Any) -> dict[str, str]:
    """What `collective_rpc("qtensor_checksums")` answers in each worker."""
    model = worker.model_runner.get_model()
    served = find_served(model)
    tensors = {name: param for name, param in model.named_parameters() if param.numel()}
    found: dict[str, str] = {}
    for published in served.published if served is not None else []:
        weight = published.read()
        if weight is not None:
            for name in part_names(published.scheme.format, published.slot.name):
                tensors.pop(f"{published.slot.prefix}.{name}", None)
            found |= weight_checksums({published.slot.full_name: weight})  # One by one: it may be a copy.
    return weight_checksums(tensors) | found


def worker_root(worker: Any) -> str:
    """What `collective_rpc("qtensor_root")` answers in each worker: `weight_root` of its checksums."""
    return weight_root(worker_checksums(worker))


def worker_abort_update(worker: Any) -> bool:
    """What `collective_rpc("qtensor_abort_update")` does in each worker. Was an update open?"""
    served = find_served(worker.model_runner.get_model())
    if served is None or served.report is None:
        return False
    was_open = served.open is not None
    if served.open is not None:
        served.open.abort()
    _expect_no_end(worker)
    return was_open


def worker_save_snapshot(worker: Any, folder: str) -> str:
    """What `collective_rpc("qtensor_save_snapshot")` does in each worker; the root of what it has written."""
    served = find_served(worker.model_runner.get_model())
    if served is None or served.report is None:
        raise QTensorError("this model was not loaded by qtensor, which has no snapshot of it")
    root = worker_root(worker)
    try:
        snapshots.save(served, folder, root)
    except QTensorError as error:
        _raise_on_the_last_rank(error)
    return root
