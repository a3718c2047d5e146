"""Processing after a reload: what vLLM's layers make of their new values, before and while these become live.

A layer that keeps its loaded weight in another form makes that form anew, beside the old one, for `Processed.place` to
put in its place. Attention layers that keep copies of other layers' weights make them again where they are, once those
weights are live, in such a way that all of it can be taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from qtensor.errors import QTensorError
from qtensor.lazy.plain_store import PlainStore
from qtensor.lazy.quant_store import QuantStore
from qtensor.lazy.weight import ArmedWeight

from . import compat
from .layers import Processed, Slot, absorb_again, process, read_back
from .missing import refuse_incomplete
from .served import ServedModel

WeightsOf = Mapping[nn.Module, Mapping[str, ArmedWeight]]
"""The armed weights of each layer, by their names in it."""


class Processing:
    """The layers of one reload. atomic: what `absorb` does can be taken back."""

    def __init__(
        self, served: ServedModel, weights_of: WeightsOf, slots: Mapping[ArmedWeight, Slot], atomic: bool
    ) -> None:
        self._served, self._weights_of, self._slots, self._atomic = served, weights_of, slots, atomic
        self._undo: list[Callable[[], None]] = []

    def quantized(self, module: nn.Module) -> list[ArmedWeight]:
        return [w for w in self._weights_of.get(module, {}).values() if w.scheme is not None]

    def made(self) -> Iterator[Processed]:
        """What the layers with new values make of them. Nothing is live before it is placed."""
        for module in list(self._weights_of):
            touched = self._touched(module)
            ours = self.quantized(module) if touched else []
            if any(not w.in_place and w.coverage.covered for w in ours):
                yield self._processed(module, self._slots[ours[0]].publish)
            elif touched and not ours and compat.processing_method(module) is not None:
                yield self._processed(module, compat.process_again)

    def absorb(self) -> None:
        """Make the weights that attention layers keep copies of live, and the copies again."""
        dtype = self._served.setting.dtype
        for attention in compat.attention_layers(self._served.root):
            feeding = self._touched(attention)
            if isinstance(getattr(attention, "kv_b_proj", None), nn.Module):
                feeding += self._touched(attention.kv_b_proj)
            if not feeding or dtype is None:
                continue
            if compat.has_let_go_of_its_source(attention):
                raise QTensorError(
                    f"{self._slots[feeding[-1]].full_name}: on a CPU with AMX vLLM's latent attention has packed this "
                    "weight for itself and let go of it, so it cannot be reloaded. Start the engine anew with the new "
                    "weights."
                )
            if self._atomic:
                saved = [(part, part.clone()) for weight in feeding for part in _live_parts(weight)]

                def take_back(attention: Any = attention, saved: Any = saved) -> None:
                    for part, old in saved:
                        part.copy_(old)
                    absorb_again(attention, dtype)

                self._undo.append(take_back)
            for weight in feeding:
                weight.commit()
            absorb_again(attention, dtype)

    def keep(self) -> None:
        """What `absorb` did stays."""
        self._undo.clear()

    def take_back(self) -> None:
        """Undo what `absorb` did. Begun again, it goes on where it was interrupted."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def _touched(self, module: nn.Module) -> list[ArmedWeight]:
        return [w for w in self._weights_of.get(module, {}).values() if w.coverage.covered]

    def _processed(self, module: nn.Module, run: Callable[[nn.Module], None]) -> Processed:
        values = self._values(module)
        made = process(module, values, run)
        for name, weight in self._weights_of[module].items():
            store, same = weight.store, made.parameters[name] is values[name]
            if same and weight.in_place and isinstance(store, PlainStore) and _same_memory(values[name], store.tensor):
                del made.parameters[name]  # Processing left it alone: its store makes it live.
        return made

    def _values(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The parameters of a layer as after loading, before processing."""
        like = compat.load_time_parameters(module)
        values: dict[str, torch.Tensor] = {}
        for name, weight in self._weights_of[module].items():
            store = weight.store
            if isinstance(store, QuantStore):
                values[name] = nn.Parameter(store.result, requires_grad=False)
                continue
            tensor = cast(PlainStore, store).tensor if weight.in_place else self._completed(module, name, weight)
            param = nn.Parameter(tensor, requires_grad=False)
            if name in like:
                param.__class__ = type(like[name])  # type: ignore[assignment]
                param.__dict__ = dict(like[name].__dict__)
            values[name] = param
        return values

    def _completed(self, module: nn.Module, name: str, weight: ArmedWeight) -> torch.Tensor:
        """A repacked weight with what was not sent read back from the layer."""
        store = weight._open_store()
        assert isinstance(store, PlainStore)
        if not weight.coverage.complete:
            live = module._parameters.get(name)
            old = read_back(module, weight.shape, weight.dtype) if name == "weight" else None
            if old is None and live is not None and live.shape == weight.shape and live.dim() < 3:
                old = live.detach().to(weight.dtype)
            if old is None:
                slot, missing = self._slots[weight], weight.coverage.missing()
                lines = self._served.names.describe(slot.prefix, slot.layer, slot.name, weight.shape, missing)
                refuse_incomplete(
                    "the update is incomplete, so nothing of it was taken", lines, {slot.full_name: missing},
                    "vLLM has packed this weight for its kernel; it can only be replaced as a whole."
                )  # fmt: skip
            for box in weight.coverage.missing():
                part = tuple(slice(*span) for span in box)
                store.tensor[part] = old[part]
        return store.tensor


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


def _live_parts(weight: ArmedWeight) -> tuple[torch.Tensor, ...]:
    if not weight.in_place:
        return ()
    store = weight.store
    return store.result.parts() if isinstance(store, QuantStore) else (cast(PlainStore, store).values(),)
