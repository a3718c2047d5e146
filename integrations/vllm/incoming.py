"""The tensors that a loader hands to a model, one after another: which is being loaded, and errors that name it.

What vLLM's weight loaders and PyTorch's copies raise speaks of shapes, or of nothing. Here it becomes an error that
names the checkpoint's tensor, the layer and the remedy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch

from qtensor.checkpoint.reading import describe_truncated
from qtensor.errors import QTensorError, WeightShapeError

from .layers import Slot
from .missing import Names

Weights = Iterable[tuple[str, torch.Tensor]]

# What vLLM's loaders and PyTorch's copies raise for a tensor of another shape.
_MISFITS = (AssertionError, IndexError, RuntimeError, ValueError)


class Incoming:
    """The one tensor of the checkpoint that is being loaded: which the model asked for last and has not finished with.

    decode: makes high-precision tensors of a stream that may hold quantized ones, if the user asked for that.
    names: is told what goes where. model: the class that loads, by name. folder: gives the checkpoint's folder, if it
    has one. active: the model's `load_weights` is running. current: the tensor's name; None between two tensors.
    """

    def __init__(
        self,
        names: Names,
        model: str,
        folder: Callable[[], str | None],
        decode: Callable[[Weights], Weights] | None = None,
    ) -> None:
        self._decode = decode
        self._names, self._model, self._folder = names, model, folder
        self.active = False
        self.current: str | None = None
        self._last: str | None = None
        self._shape: torch.Size | None = None
        self._failed: Exception | None = None

    def load(self, load_weights: Callable[..., Any], weights: Weights, args: Any, kwargs: Any) -> Any:
        """The model's own `load_weights`."""
        self.active = True
        try:
            stream = weights if self._decode is None else self._decode(weights)
            return load_weights(self._follow(stream), *args, **kwargs)
        except QTensorError:
            raise
        except Exception as error:
            self._explain(error)
        finally:
            self.active, self.current = False, None

    def guarded(self, slot: Slot, shape: tuple[int, ...], loader: Callable[..., Any]) -> Callable[..., Any]:
        """vLLM's weight loader of one parameter of this shape."""

        @functools.wraps(loader)
        def weight_loader(*args: Any, **kwargs: Any) -> Any:
            tensor = kwargs.get("loaded_weight", args[1] if len(args) > 1 else None)
            shard = kwargs.get("shard_id", kwargs.get("loaded_shard_id", args[2] if len(args) > 2 else None))
            self._names.saw(slot.prefix, slot.name, shard, kwargs.get("expert_id"), self.current, self._shape)
            try:
                return loader(*args, **kwargs)
            except QTensorError:
                raise
            except Exception as error:
                source = f"the checkpoint's tensor '{self.current}'" if self.current else "the tensor being loaded"
                found = f"{source} {list(tensor.shape) if isinstance(tensor, torch.Tensor) else ''}".strip()
                if isinstance(error, _MISFITS) and not isinstance(error, torch.OutOfMemoryError):
                    raise WeightShapeError(
                        f"{found} does not fit {slot.full_name} {list(shape)}{_because(error)}. "
                        "Is this checkpoint made for this model's config.json and this parallel layout?"
                    ) from error
                raise QTensorError(f"{found} could not be written to {slot.full_name}{_because(error)}") from error

        return weight_loader

    def _follow(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        seen: set[str] = set()
        source = iter(weights)
        while True:
            # While the iterator runs no tensor is current: what fails then is the reading of the checkpoint.
            self.current = None
            try:
                item = next(source, None)
            except Exception as error:
                self._failed = error
                raise
            if item is None:
                return
            name, tensor = item
            if name in seen:
                raise QTensorError(
                    f"the checkpoint holds the tensor '{name}' {list(tensor.shape)} more than once, in different files "
                    "perhaps; which one is meant cannot be known. Remove stale files from the checkpoint's folder."
                )
            seen.add(name)
            self.current = self._last = name
            self._shape = tensor.shape
            yield item

    def _explain(self, error: Exception) -> NoReturn:
        if self._failed is error or type(error).__name__ == "SafetensorError":
            where = f" after '{self._last}'" if self._last else ""
            files = describe_truncated(self._folder())
            raise QTensorError(
                f"the checkpoint could not be read{where}: {error}. {files} Download the checkpoint again, or convert "
                "it again."
            ) from error
        if self.current is None:
            raise error
        shape = list(self._shape) if self._shape is not None else ""
        raise QTensorError(
            f"the checkpoint's tensor '{self.current}' {shape} cannot be loaded into {self._model}{_because(error)}. "
            "Either the checkpoint is not made for this config.json, or this tensor does not belong in it."
        ) from error


def _because(error: Exception) -> str:
    return f": {str(error).rstrip('. ') or type(error).__name__}"
