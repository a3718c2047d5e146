"""Weights that arrive quantized: where their parts reach a session, however a loader hands them over.

`load_state_dict` gives a module all its parts at once; other loaders assign or register them one by one under their
names, of which a plain module has only the weight's own. Both are told here from everything else a module may hold, and
reach the collector of their weight, one per weight (or part of one, for files that keep experts apart).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..callers import is_constructing
from ..errors import WeightDtypeError
from ..lazy.lazy_tensor import LAZY
from ..lazy.sources import is_high_precision, unusable_source
from ..lazy.weight import ArmedWeight
from ..regions.views import View, whole
from ..sources.collecting import Collector
from ..sources.families import NAMES
from ..sources.source import Spec
from . import registration

OWN = "*"
"""The part that is called as the weight itself."""


class Incoming:
    """The collectors of one session.

    config: config.json's "quantization_config"; None where nobody said that weights arrive quantized.
    lossless: refuse those that cannot be moved as they are.
    on_held: called with the change in held bytes.
    """

    def __init__(self, config: Mapping[str, Any] | None, lossless: bool, on_held: Any) -> None:
        self.config, self.lossless = config, lossless
        self._on_held = on_held
        self._collectors: WeakKeyDictionary[ArmedWeight, dict[View, Collector]] = WeakKeyDictionary()

    def of(self, weight: ArmedWeight, view: View | None = None, make: bool = True) -> Collector | None:
        """The collector of a weight, or of a part of it; a new one if there is none, and `make`."""
        view = view or whole(weight.shape)
        known = self._collectors.get(weight, {})
        if view in known or not make:
            return known.get(view)
        _, attribute = weight.owner
        made = Collector(weight, view, attribute, self.config or {}, self.lossless, self._on_held)
        self._collectors.setdefault(weight, {})[view] = made
        return made

    def finish(self, weight: ArmedWeight) -> None:
        """Nothing more comes for a weight. Raises what is wrong with what came, by name."""
        for collector in self._collectors.get(weight, {}).values():
            alone = collector.unrecognised
            if alone.keys() == {OWN}:
                raise WeightDtypeError(unusable_source(weight.name, alone[OWN].dtype))
            collector.finish()

    def told(self, weight: ArmedWeight) -> tuple[str, str]:
        """Of which source a weight was, and what became of its numbers: "" twice if it came in high precision."""
        found = [c for c in self._collectors.get(weight, {}).values() if c.outcome]
        outcomes = {c.outcome for c in found}
        return ", ".join(sorted({str(c.source) for c in found})), outcomes.pop() if len(
            outcomes
        ) == 1 else "requantized"

    def discard(self) -> None:
        """Free what is held."""
        for known in list(self._collectors.values()):
            for collector in known.values():
                collector.discard()
        self._collectors.clear()


def armed_in(module: nn.Module) -> Iterator[tuple[str, ArmedWeight]]:
    """The weights of a module that wait for a loader."""
    for name, param in module._parameters.items():
        if isinstance(param, LAZY) and not param._armed.host.closed:
            yield name, param._armed


def take_part(module: nn.Module, name: str, tensor: torch.Tensor) -> bool:
    """A tensor is put into a module under a name that it has no place for. If that is a part of a weight that is being
    loaded, the weight takes it."""
    if is_constructing(module) or tensor.is_meta:
        return False
    for attribute, weight in armed_in(module):
        for part in NAMES:
            if part != OWN and part.replace(OWN, attribute) == name:
                collector = weight.host.collector(weight, make=True)
                assert collector is not None
                collector.write(part, tensor.detach())
                return True
    return False


def take_parts(module: nn.Module, state: dict[str, Any], prefix: str) -> list[str]:
    """Take the parts of a module's weights out of a state dict. Returns the weights that some were of."""
    taken = []
    places = {*module._parameters, *module._buffers}
    for attribute, weight in list(armed_in(module)):
        names = {part: part.replace(OWN, attribute) for part in NAMES}
        found = {p: prefix + n for p, n in names.items() if (p == OWN or n not in places) and prefix + n in state}
        tensors = {part: value for part, key in found.items() if isinstance(value := state[key], torch.Tensor)}
        own = tensors.get(OWN)
        if own is not None and (type(own) not in (torch.Tensor, nn.Parameter) or is_high_precision(own)):
            continue
        eight_bit_float = own is not None and own.dtype.is_floating_point
        if not tensors or (tensors.keys() == {OWN} and not eight_bit_float):
            continue
        collector = weight.host.collector(weight, make=True)
        assert collector is not None
        collector.expect({part: Spec(t.dtype, tuple(t.shape)) for part, t in tensors.items()})
        for part in sorted(tensors, key=lambda part: tensors[part].nbytes):  # Values meet their scales.
            collector.write(part, tensors[part].detach())
            del state[found[part]]
        taken.append(attribute)
    return taken


_original: list[Any] = []


def _listen() -> None:
    """Hear of what `load_state_dict` gives each module. May be repeated."""
    if _original:
        return
    original = nn.Module._load_from_state_dict

    @functools.wraps(original)
    def load(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: Any) -> None:
        taken = take_parts(module, state, prefix)
        original(module, state, prefix, metadata, strict, *lists)
        missing = lists[0]
        for name in [prefix + attribute for attribute in taken]:
            if name in missing:
                missing.remove(name)

    _original.append(original)
    nn.Module._load_from_state_dict = load  # type: ignore[method-assign, assignment]


def _stop() -> None:
    if _original:
        nn.Module._load_from_state_dict = _original[0]  # type: ignore[method-assign]
        _original.clear()


registration.PATCHES.append((_listen, _stop))
