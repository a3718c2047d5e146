"""Weights that arrive quantized: where their parts reach a session, however a loader hands them over.

`load_state_dict` gives a module all its parts at once; other loaders assign or register them one by one under their
names, of which a plain module has only the weight's own. Both are told here from everything else a module may hold, and
reach the collector of their weight, one per weight (or part of one, for files that keep experts apart).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..callers import is_constructing
from ..errors import WeightDtypeError
from ..kernels.cpu.compiling import Once
from ..lazy.lazy_tensor import LAZY
from ..lazy.sources import is_high_precision, unusable_source
from ..lazy.weight import ArmedWeight
from ..regions.views import View, whole
from ..sources import REQUANTIZED
from . import registration

if TYPE_CHECKING:
    from ..sources.collecting import Collector
    from ..sources.source import Spec

OWN = "*"
"""The part that is called as the weight itself."""
_OURS = "_qtensor_original"


class _Sources(NamedTuple):
    part_names: tuple[str, ...]
    spec: type[Spec]
    collector: type[Collector]


@Once
def _sources() -> _Sources:
    """Imported by the first load: `import qtensor` is quicker without, and here no interrupt comes."""
    from ..sources.collecting import Collector
    from ..sources.families import part_names
    from ..sources.source import Spec

    return _Sources(part_names(), Spec, Collector)


class Incoming:
    """The collectors of one session.

    config: config.json's "quantization_config"; None where nobody said that weights arrive quantized.
    lossless: refuse those that cannot be moved as they are.
    on_held: called with the change in held bytes. collects: there is, or was, a collector.
    """

    def __init__(self, config: Mapping[str, Any] | None, lossless: bool, on_held: Any) -> None:
        self.config, self.lossless = config, lossless
        self._on_held = on_held
        self.collects = False
        self._collectors: WeakKeyDictionary[ArmedWeight, dict[View, Collector]] = WeakKeyDictionary()
        self._noted: WeakKeyDictionary[ArmedWeight, set[tuple[str, str]]] = WeakKeyDictionary()
        self.buffers: list[tuple[weakref.ref[nn.Module], str]] = []  # that a loader registered, of parts

    def of(self, weight: ArmedWeight, view: View | None = None, make: bool = True) -> Collector | None:
        """The collector of a weight, or of a part of it; a new one if there is none, and `make`."""
        view = view or whole(weight.shape)
        with weight.lock:
            known = self._collectors.get(weight, {})
            if view in known or not make:
                return known.get(view)
            _, attribute = weight.owner
            self.collects = True
            made = _sources().collector(weight, view, attribute, self.config or {}, self.lossless, self._on_held)
            self._collectors.setdefault(weight, {})[view] = made
            return made

    def release(self, weight: ArmedWeight) -> None:
        """Its writer has gone on to another."""
        for collector in list(self._collectors.get(weight, {}).values()):
            collector.release()

    def finish(self, weight: ArmedWeight) -> None:
        """Nothing more comes for a weight. Raises what is wrong with what came, by name."""
        for collector in self._collectors.get(weight, {}).values():
            alone = collector.unrecognised
            if alone.keys() == {OWN}:
                raise WeightDtypeError(unusable_source(weight.name, alone[OWN].dtype))
            collector.finish()

    def note(self, weight: ArmedWeight, source: str, outcome: str) -> None:
        """As `Host.note_source`."""
        with weight.lock:
            self._noted.setdefault(weight, set()).add((source, outcome))

    def told(self, weight: ArmedWeight) -> tuple[str, str]:
        """Of which source a weight was, and what became of its numbers: "" twice if it came in high precision."""
        collectors = self._collectors.get(weight, {}).values()
        found = {(str(c.source), c.outcome) for c in collectors if c.outcome} | self._noted.get(weight, set())
        if not found:
            return "", ""
        outcomes = {outcome for _, outcome in found}
        return ", ".join(sorted({source for source, _ in found})), outcomes.pop() if len(outcomes) == 1 else REQUANTIZED

    def discard(self) -> None:
        """Free what is held, and take away the buffers that are parts. May be repeated."""
        for reference, name in self.buffers:
            module = reference()
            if module is not None:
                module._buffers.pop(name, None)
                module._non_persistent_buffers_set.discard(name)
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
        for part in _sources().part_names:
            if part != OWN and part.replace(OWN, attribute) == name:
                collector = weight.host.collector(weight, make=True)
                assert collector is not None
                collector.write(part, tensor.detach())
                return True
    return False


def _on_buffer(module: nn.Module, name: str, buffer: torch.Tensor | None) -> None:
    """A buffer was registered: PyTorch keeps it until the session is over."""
    if buffer is not None and take_part(module, name, buffer):
        for _, weight in armed_in(module):
            weight.host.note_buffer(module, name)
            return


def take_parts(module: nn.Module, state: dict[str, Any], prefix: str) -> list[str]:
    """Take the parts of a module's weights out of a state dict. Returns the weights that some were of."""
    taken = []
    sources = _sources()
    places = {*module._parameters, *module._buffers}
    for attribute, weight in list(armed_in(module)):
        names = {part: part.replace(OWN, attribute) for part in sources.part_names}
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
        collector.expect({part: sources.spec(t.dtype, tuple(t.shape)) for part, t in tensors.items()})
        for part in sorted(tensors, key=lambda part: tensors[part].nbytes):  # Values meet their scales.
            collector.write(part, tensors[part].detach())
            del state[found[part]]
        taken.append(attribute)
    return taken


def _listen() -> None:
    """Hear of what `load_state_dict` gives each module, and of buffers. May be repeated."""
    if _on_buffer not in torch_module._global_buffer_registration_hooks.values():
        torch_module.register_module_buffer_registration_hook(_on_buffer)
    original = nn.Module._load_from_state_dict
    if hasattr(original, _OURS):
        return

    @functools.wraps(original)
    def load(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: Any) -> None:
        taken = take_parts(module, state, prefix)
        original(module, state, prefix, metadata, strict, *lists)
        missing = lists[0]
        for name in [prefix + attribute for attribute in taken]:
            if name in missing:
                missing.remove(name)

    setattr(load, _OURS, original)
    nn.Module._load_from_state_dict = load  # type: ignore[method-assign, assignment]


def _stop() -> None:
    """PyTorch's own again. May be repeated."""
    hooks = torch_module._global_buffer_registration_hooks
    for key in [key for key, hook in hooks.items() if hook is _on_buffer]:
        hooks.pop(key, None)
    original = getattr(nn.Module._load_from_state_dict, _OURS, None)
    if original is not None:
        nn.Module._load_from_state_dict = original  # type: ignore[method-assign]


registration.PATCHES.append((_listen, _stop))
