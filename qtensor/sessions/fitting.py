"""Fitting: the selection of a session that is told how many bytes there are.

It plans when the first weight is about to be loaded, from the shapes of the model as it stands, and keeps a little
back: that goes, in the order in which weights arrive, to those that lose more than the rule expects.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..errors import ConfigError
from ..modules import Owner, full_name
from ..schemes.config import QuantConfig, pattern_list
from ..schemes.plan import Plan, PlannedWeight, Tensor, in_gb
from ..schemes.planning import EXPECTED_SQNR, Size, bytes_of, make_plan, read_schemes, read_size
from ..schemes.scheme import Scheme, SchemeLike
from ..schemes.selection import DEFAULT_IGNORE, Selection

SPARE = 0.02
"""Of the bytes there are, what is kept back for weights that turn out worse than planned."""
MARGIN = 1.0
"""In dB below what the rule expects of a scheme."""
_ALONE = ("embedding", "attention out", "MLP out", "head", "other")
"""Kinds whose weights no engine fuses with others, all of which have to have one scheme."""


class Fitting(Selection):
    """schemes, fit, reserve: as `make_plan` takes them. ignore: as `online_quant` does."""

    may_change = True

    def __init__(self, schemes: Sequence[SchemeLike], ignore: Sequence[str], fit: Size, reserve: Size) -> None:
        self._schemes = read_schemes("scheme", schemes)
        self._fit, self._reserve = read_size("fit", fit), read_size("reserve", reserve)
        self.config = QuantConfig(None, None, targets={})
        self.ignore = () if tuple(ignore) == DEFAULT_IGNORE else pattern_list("ignore", ignore)
        self.targets = {}
        self._unused = {*self.ignore} - set(DEFAULT_IGNORE)
        self._places: dict[str, int] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return f"what fits into {in_gb(self._fit - self._reserve)} of {', '.join(map(str, self._schemes))}"

    def likely_scheme(self, module: nn.Module) -> Scheme | None:
        return self._schemes[0] if isinstance(module, nn.Linear) else None

    def prepare(self, tensors: Callable[[], Sequence[Tensor]]) -> None:
        with self._lock:
            if self.plan is None:
                found = list(tensors())
                kept = int(SPARE * (self._fit - self._reserve))
                try:
                    made = self._plan(found, kept)
                except ConfigError:
                    made = self._plan(found, 0)  # It says what would fit.
                self.targets = dict(made.targets)
                self._places = {name: i for i, tensor in enumerate(found) for name in tensor.names}
                self.plan = replace(made, reserve=self._reserve)

    def scheme_for(self, owners: Sequence[Owner], param: torch.Tensor) -> Scheme | None:
        """As the plan says. Raises ConfigError for a weight that was not there when it was made."""
        name = full_name(owners[0])
        if name not in self._places and self.candidate(owners[0][1], owners[0][2], param):
            raise ConfigError(
                f"{name} was constructed after the first weight of its model was loaded, when fit= had made its plan. "
                "Make one beforehand, with qtensor.plan(model or folder, fit), and give it instead of fit="
            )
        return super().scheme_for(owners, param)

    def better(self, name: str, scheme: Scheme | None, sqnr: float) -> Scheme | None:
        """The next better form for a weight that is worse than planned, if there are bytes for it."""
        with self._lock:
            assert self.plan is not None
            place = self._places[name]
            weight = self.plan.weights[place]
            if scheme is None or scheme != weight.scheme or weight.kind not in _ALONE:
                return scheme
            expected = EXPECTED_SQNR[scheme.name]
            if sqnr >= expected - MARGIN:
                return scheme
            left = self.plan.fit - self.plan.reserve - self.plan.bytes
            forms: list[tuple[int, Scheme | None]] = [(bytes_of(weight.tensor, s), s) for s in (*self._schemes, None)]
            forms = [
                (size, form)
                for size, form in forms
                if weight.bytes < size <= weight.bytes + left and (form is None or EXPECTED_SQNR[form.name] > expected)
            ]
            if not forms:
                return scheme
            size, chosen = min(forms, key=lambda form: form[0])
            self._take(place, replace(weight, scheme=chosen, bytes=size))
            return chosen

    def _plan(self, tensors: Sequence[Tensor], kept: int) -> Plan:
        return make_plan(tensors, self._fit, reserve=self._reserve + kept, schemes=self._schemes, ignore=self.ignore)

    def _take(self, place: int, weight: PlannedWeight) -> None:
        assert self.plan is not None
        weights = (*self.plan.weights[:place], weight, *self.plan.weights[place + 1 :])
        targets = dict(self.plan.targets)
        for name in weight.tensor.names:
            module = name.removesuffix(".weight")
            if weight.scheme is None:
                targets.pop(module, None)
            elif module in targets:
                targets[module] = weight.scheme
        self.plan = replace(self.plan, weights=weights, targets=targets)
