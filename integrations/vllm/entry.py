"""Who begins and ends a reload: the plugin's transactions stand in for vLLM's layerwise reload.

That is: `reload_weights`, the lifecycle start_weight_update / update_weights / finish_weight_update of its weight
transfer engines, and frameworks that call `model.load_weights` themselves, each for models this plugin loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from qtensor.errors import QTensorError
from qtensor.tensor.checksums import weight_checksums

from . import compat
from .load import Load, find_load
from .reload import Reload

# Does the reload that is about to begin read a whole checkpoint, and do all ranks run it as one call?
_from_files: ContextVar[bool] = ContextVar("from_files", default=False)
_one_call: ContextVar[bool] = ContextVar("one_call", default=False)


def take_over() -> None:
    """Stand in for vLLM's reload, from now on, for models this plugin loads. Safe to call any number of times."""
    compat.wrap_layerwise_reload(begin, finish)
    compat.wrap_worker("reload_weights", _one_reload)
    compat.wrap_worker("finish_weight_update", _end_of_update)
    compat.add_worker_method("qtensor_checksums", worker_checksums)


def worker_checksums(worker: Any) -> dict[str, str]:
    """What `collective_rpc("qtensor_checksums")` answers in each worker."""
    model = worker.model_runner.get_model()
    load = find_load(model)
    tensors = {name: param for name, param in model.named_parameters() if param.numel()}
    for published in load.published if load is not None else []:
        live = published.live()
        if live is not None:
            for name, _, _ in published.places or ():
                tensors.pop(f"{published.slot.prefix}.{name}", None)
            tensors[published.slot.full_name] = live
    return weight_checksums(tensors)


def begin(model: nn.Module) -> bool:
    """Open a reload. False if the model is not this plugin's. One that an error left open is given up."""
    load = find_load(model)
    if load is None or load.report is None:
        return False
    if load.reload is not None:
        load.reload.abort()
    load.reload = Reload(load, whole_checkpoint=_from_files.get(), one_call=_one_call.get())
    return True


def finish(model: nn.Module) -> bool:
    """Commit the open reload. False if the model is not this plugin's."""
    load = find_load(model)
    if load is None or load.report is None:
        return False
    if load.reload is None:
        raise QTensorError("no reload of this model is open: it was never begun, or an error has ended it; begin anew")
    load.reload.finish()
    return True


def load_again(load: Load, inner: Any, weights: Iterable[tuple[str, torch.Tensor]], args: Any, kwargs: Any) -> Any:
    """`model.load_weights` of a model that is being served: a chunk of the open reload, or a reload of its own."""
    if load.reload is not None:
        return load.reload.load_weights(inner, weights, args, kwargs)
    load.reload = reload = Reload(load, whole_checkpoint=False, one_call=True)
    loaded = reload.load_weights(inner, weights, args, kwargs)
    reload.finish()
    return loaded


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
        load = find_load(worker.model_runner.get_model())
        if load is not None and load.reload is not None:
            load.reload.abort(error)
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
        worker._weight_update_active = False
        if worker.weight_transfer_engine is not None:
            worker.weight_transfer_engine.reset_weight_update_target()
        _raise_on_the_last_rank(error)


def _raise_on_the_last_rank(error: BaseException) -> None:
    if not getattr(error, "told_all_ranks", False) or compat.answers_last():
        raise error
    compat.logger().error("qtensor: %s", error)
