"""What vLLM's layers make of their weights: what they publish for their kernels, and what is derived from it.

A quantized weight is published in the form its kernel wants. On a CPU an unquantized linear layer packs its weight for
a product of its own and drops it; experts are repacked; multi-head latent attention keeps absorbed copies of kv_b_proj.
After a reload all of it is computed from the new values while the old state still serves, and put in the old one's
place, at the same addresses wherever the geometry allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtensor.kernels import Parts, WeightFormat
from qtensor.lazy.weight import ArmedWeight
from qtensor.modules import full_name
from qtensor.regions.boxes import contiguous_strides
from qtensor.schemes.scheme import Scheme
from qtensor.tensor.qtensor import QTensor

_ROWS = 256


@dataclass
class Slot:
    """Where an armed weight lives. publish: gives the layer the finished weight in the form its kernel wants. split:
    the dimensions of its matrices that are split over ranks, 0 for rows and 1 for columns. read: the layer's weight, if
    it may have been published in another order of its bytes."""

    prefix: str
    layer: nn.Module
    name: str
    publish: Callable[[nn.Module], None]
    attributes: dict[str, Any]
    split: frozenset[int] = frozenset()
    read: Callable[[nn.Module], QTensor | None] | None = None

    @property
    def full_name(self) -> str:
        return full_name((self.prefix, self.layer, self.name))


@dataclass
class Published:
    """A weight that its layer has published. places: for each of its parts (see `QTensor.parts`), the layer's parameter
    that shares its memory, its shape and its address; None if the kernel keeps one of them in another form."""

    slot: Slot
    shape: tuple[int, ...]
    dtype: torch.dtype
    scheme: Scheme
    places: list[tuple[str, torch.Size, int]] | None

    @classmethod
    def find(cls, slot: Slot, weight: ArmedWeight, result: QTensor) -> Published:
        params = {p.data_ptr(): name for name, p in slot.layer._parameters.items() if p is not None and p.numel()}
        found = [(params.get(t.data_ptr()), t.shape, t.data_ptr()) for t in result.parts()]
        places = [(name, shape, address) for name, shape, address in found if name is not None]
        whole = len(places) == len(found)
        return cls(slot, weight.shape, weight.dtype, result.scheme, places if whole else None)

    def live(self) -> QTensor | None:
        """The weight where the layer's kernel reads it, row-major; None if it is not there in this form."""
        if self.places is None:
            return None
        parts = []
        for name, shape, address in self.places:
            param = self.slot.layer._parameters.get(name)
            if param is None or param.data_ptr() != address:
                return None
            parts.append(param.data.as_strided(shape, contiguous_strides(shape), param.storage_offset()))
        return assembled(parts, self.scheme, self.dtype, self.shape[-1])

    def read(self) -> QTensor | None:
        """The weight in row-major order: where it lives, or a copy; None if the layer cannot say."""
        live = self.live()
        return self.slot.read(self.slot.layer) if live is None and self.slot.read is not None else live


def assembled(parts: Sequence[torch.Tensor], scheme: Scheme, dtype: torch.dtype, cols: int) -> QTensor:
    """The weight `[..., N, cols]` whose `QTensor.parts` these are."""
    named = Parts(*parts)
    return QTensor(named.qdata, named.scale, scheme, dtype, global_scale=named.global_scale, cols=cols)


def part_names(fmt: WeightFormat, weight: str = "weight") -> tuple[str, ...]:
    """The parameters of a layer that hold its weight's parts, in the order of `QTensor.parts`, by vLLM's names."""
    names = (weight, f"{weight}_scale_inv" if fmt.granularity == "block" else f"{weight}_scale")
    return (*names, f"{weight}_global_scale") if fmt.has_global_scale else names


def publish_parts(layer: Any, weight: QTensor, name: str = "weight") -> None:
    """Give the layer a weight as it is, in plain Parameters."""
    for part_name, part in zip(part_names(weight.scheme.format, name), weight.parts(), strict=True):
        layer.register_parameter(part_name, frozen(part))


def published_parts(layer: Any, fmt: WeightFormat, name: str = "weight") -> dict[str, torch.Tensor]:
    """What `publish_parts` gave it, by the names of its parameters."""
    return {part_name: layer._parameters[part_name] for part_name in part_names(fmt, name)}


def give_back(layer: Any, parts: Parts) -> None:
    """Free the memory of parts that the layer has packed into other memory: a load holds them to its end, when those of
    all layers would stand beside what was made of them."""
    kept = {p.untyped_storage().data_ptr() for p in layer._parameters.values() if p is not None}
    for part in parts:
        storage = part.untyped_storage()
        if storage.data_ptr() not in kept and storage.resizable():
            storage.resize_(0)


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


# Derived from weights -----------------------------------------------------------------------------------------------


@dataclass
class Processed:
    """A layer's parameters and attributes as processing new values leaves them; `place` makes them the layer's own.
    method: what it left on the layer's method, such as the kernel of fused experts with the scales it reads."""

    layer: nn.Module
    parameters: dict[str, torch.Tensor]
    attributes: dict[str, Any]
    method: dict[str, Any]

    def place(self) -> None:
        own: dict[str, Any] = self.layer._parameters
        for name, new in self.parameters.items():
            if own.get(name) is None:
                own[name] = new
            else:
                put(own[name], new)
        self.layer.__dict__.update(self.attributes)
        _attributes_of_method(self.layer).update(self.method)


def process(layer: nn.Module, values: Mapping[str, torch.Tensor], run: Callable[[nn.Module], None]) -> Processed:
    """What `run(layer)` makes of these values, with the layer and its method left as they were. values: its parameters
    at load time."""
    method = _attributes_of_method(layer)
    before, method_before = dict(layer.__dict__), dict(method)
    parameters: dict[str, Any] = dict(values)
    layer.__dict__["_parameters"] = parameters
    try:
        run(layer)
        made = {k: v for k, v in layer.__dict__.items() if k != "_parameters" and before.get(k, layer) is not v}
        on_method = {k: v for k, v in method.items() if method_before.get(k, layer) is not v}
    finally:
        for attributes, old in ((layer.__dict__, before), (method, method_before)):
            for key in attributes.keys() - old.keys():
                del attributes[key]
            attributes.update(old)
    return Processed(layer, {name: p for name, p in parameters.items() if p is not None}, made, on_method)


def _attributes_of_method(layer: nn.Module) -> dict[str, Any]:
    return getattr(getattr(layer, "quant_method", None), "__dict__", {})


def put(old: torch.Tensor, new: torch.Tensor) -> None:
    """Give `old` the values of `new`, in its own memory if they are laid out alike."""
    if _geometry(old) == _geometry(new):
        if old.data_ptr() != new.data_ptr():
            old.data.copy_(new.data)
    else:
        old.data = new.data


def aliases(model: nn.Module) -> dict[tuple[int, str], torch.Tensor]:
    """Buffers that are views of all of a parameter, by the parameter's module (its id) and name. Asked before layers
    are processed: where that gives the parameter other memory, the buffer is what keeps the loaded values."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for module in model.modules():
        views = module._non_persistent_buffers_set
        found |= {(b.data_ptr(), b.numel()): b for n, b in module._buffers.items() if n in views and b is not None}
    return {
        (id(module), name): found[param.data_ptr(), param.numel()]
        for module in model.modules()
        for name, param in module._parameters.items()
        if param is not None and param.numel() and (param.data_ptr(), param.numel()) in found
    }


def absorb_again(attention: Any, dtype: torch.dtype) -> None:
    """Run an attention layer's own processing again; tensors that it makes anew go where the old ones were."""
    homes = (attention.__dict__, attention._parameters, attention._buffers)
    before = [(home, name, t) for home in homes for name, t in home.items() if isinstance(t, torch.Tensor)]
    attention.process_weights_after_loading(dtype)
    for home, name, old in before:
        new = home.get(name)
        if isinstance(new, torch.Tensor) and new is not old and _geometry(new) == _geometry(old):
            old.data.copy_(new.data)
            home[name] = old


def read_back(layer: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """A weight `[N, K]` that the layer has packed away: its product with the rows of the identity, which is exact.
    None if the layer has no such product."""
    product = getattr(layer, "cpu_linear", None)
    if product is None or len(shape) != 2:
        return None
    found = torch.empty(shape, dtype=dtype, device="cpu")
    for start in range(0, shape[1], _ROWS):
        rows = min(_ROWS, shape[1] - start)
        ones = torch.zeros(rows, shape[1], dtype=dtype, device="cpu")
        ones[:, start : start + rows].fill_diagonal_(1)
        found[:, start : start + rows] = product(ones, layer.weight, None).t()
    return found


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
