"""Selection: which weights are quantized, and how. Patterns are matched on the names a user sees.

A pattern is an exact name, "re:..." (`re.match`), or an fnmatch glob. It is tried on the weight's name
("model.layers.0.mlp.up_proj.weight") and its module's ("model.layers.0.mlp.up_proj"); an exact name also selects
everything below that module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..modules import Owner, full_name
from .config import SchemeSpec, by_recipe, pattern_list, read_config
from .scheme import Scheme, Targets

if TYPE_CHECKING:
    from .plan import Plan, Tensor

ROUTERS = r"re:(.*\.)?(\w*router|gate|wg|shared_expert_gate)$"
"""Of `DEFAULT_IGNORE`; a matrix by such a name with more rows than a mixture has experts is a layer like others."""
MOST_EXPERTS = 1024
NORMS = r"re:(.*\.)?\w*(norm|ln)(_?\w)?$"
# Output heads, embeddings, norms and expert routers: small, or known to cost accuracy.
DEFAULT_IGNORE: tuple[str, ...] = (
    "lm_head",
    "*.lm_head",
    "*.lm_head.*",  # What wraps it, for an adapter's sake or a head's own.
    r"re:(.*\.)?(wte|wpe|\w*embed(ding)?s?(_tokens|_in|_out)?)$",
    NORMS,
    ROUTERS,
)
_EXPERT_PARAMETERS = {
    "gate_up_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "w1",
    "w2",
    "w3",
    "w13",
    "w13_weight",
    "w2_weight",
}


class Selection:
    """The rule of one session, from what says which schemes (see config.py), `ignore` and `targets`.

    plan: what was chosen for a session that is told how many bytes there are; None before, and for all others.
    may_change: weights are staged whole, and `better` is asked when they are there.
    """

    plan: Plan | None = None
    may_change = False

    def __init__(
        self, scheme: SchemeSpec, ignore: Sequence[str], targets: Targets | None, recipe: str | None = None
    ) -> None:
        if targets is not None and not isinstance(targets, Mapping):
            targets = pattern_list("targets", targets)
        self.config = read_config(scheme, targets)
        if recipe is not None:
            self.config = by_recipe(self.config, recipe)
        self.ignore = (*pattern_list("ignore", ignore), *self.config.ignore)
        self.targets = self.config.targets
        self._unused = {*self.ignore, *(self.targets or ())} - set(DEFAULT_IGNORE)

    def __str__(self) -> str:
        return str(self.config)

    @property
    def targets(self) -> Mapping[str, Scheme] | None:
        """Pattern → scheme; None if the choice is by kind of layer."""
        return self._targets

    @targets.setter
    def targets(self, targets: Mapping[str, Scheme] | None) -> None:
        self._targets = targets
        self._order = {pattern: i for i, pattern in enumerate(targets or ())}
        self._globs = [p for p in self._order if p.startswith("re:") or any(c in p for c in "*?[")]

    def prepare(self, tensors: Callable[[], Sequence[Tensor]]) -> None:
        """A weight is about to be chosen; `tensors` are those of the model as it stands."""

    def better(self, name: str, scheme: Scheme | None, sqnr: float) -> Scheme | None:
        """What becomes of a weight that has this SQNR in its scheme."""
        return scheme

    def candidate(self, module: nn.Module, name: str, param: torch.Tensor) -> bool:
        """Could this weight be quantized, whatever it turns out to be called?"""
        if param.dim() not in (2, 3) or param.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return False
        if self.targets is not None:
            return True
        if isinstance(module, nn.Linear):
            return name == "weight"
        built_in = type(module).__module__.startswith("torch.nn.") and type(module) is not nn.Module
        return param.dim() == 3 and not built_in

    def scheme_for(self, owners: Sequence[Owner], param: torch.Tensor) -> Scheme | None:
        """The scheme of a weight known under these names; None to leave it alone.

        Ties are one weight: if any of its owners is ignored, or does not qualify, it stays in high precision.
        """
        schemes = [self._scheme_of(owner, param) for owner in owners]
        return schemes[0] if schemes and all(s is not None for s in schemes) else None

    def of_matrix(self, module_name: str, weight_name: str, rows: int) -> tuple[Scheme | None, str]:
        """The scheme of a matrix of a checkpoint, whose module nobody knows, or why it is left."""
        if ignored := self._ignoring(module_name, weight_name, rows):
            self._unused.difference_update(ignored)
            return None, f"ignored by {ignored[0]!r}"
        if self.targets is None:
            return self.config.linear, "of no scheme for linear layers"
        found = self._targeting(module_name, weight_name)
        self._unused.difference_update(found)
        return (self.targets[found[0]], "") if found else (None, "selected by no pattern")

    def why_left(self, owners: Sequence[Owner], param: torch.Tensor) -> str:
        """Why a weight that could be quantized stays as it is, for a report; nothing to say of all others."""
        for owner in owners:
            module_name, module, _ = owner
            named = self._targeting(module_name, full_name(owner))
            default = isinstance(module, nn.Linear) if param.dim() == 2 else _is_expert_stack(owner)
            ignored = self._ignoring(module_name, full_name(owner), param.shape[-2]) if param.dim() in (2, 3) else []
            if ignored and (named or default):
                return f"ignored by {ignored[0]!r}"
            if named and param.dim() > 3:
                self._unused.difference_update(named)
                return f"{list(param.shape)} is neither a matrix nor a stack of them, though {named[0]!r} selects it"
        return ""

    def _ignoring(self, module_name: str, weight_name: str, rows: int) -> list[str]:
        found = ignoring(self.ignore, module_name, weight_name, rows)
        # A weight that `targets` calls by its very name is meant, whatever is left alone by default.
        meant = any(name in (self.targets or ()) for name in (module_name, weight_name))
        return [pattern for pattern in found if not (meant and pattern in DEFAULT_IGNORE)]

    def _targeting(self, module_name: str, weight_name: str) -> list[str]:
        """The patterns in `targets` that select a weight, in their order. Names are looked up: a plan has as many as
        there are weights."""
        above = [module_name[:i] for i, c in enumerate(module_name) if c == "."]
        names = [name for name in (weight_name, module_name, *above) if name in self._order]
        found = names + [p for p in self._globs if p not in names and matches(p, module_name, weight_name)]
        return sorted(dict.fromkeys(found), key=self._order.__getitem__)

    def unused_patterns(self) -> list[str]:
        """The user's own patterns that matched nothing."""
        return sorted(self._unused)

    def _scheme_of(self, owner: Owner, param: torch.Tensor) -> Scheme | None:
        module_name, module, name = owner
        if not self.candidate(module, name, param):
            return None
        if self.targets is None and param.dim() == 3 and not _is_expert_stack(owner):
            return None
        full = full_name(owner)
        ignored = self._ignoring(module_name, full, param.shape[-2])
        self._unused.difference_update(ignored)
        if ignored:
            return None
        if self.targets is None:
            return self.config.linear if isinstance(module, nn.Linear) else self.config.moe
        found = self._targeting(module_name, full)
        self._unused.difference_update(found)
        return self.targets[found[0]] if found else None


def ignoring(patterns: Sequence[str], module_name: str, weight_name: str, rows: int) -> list[str]:
    """Those of the patterns in `ignore` that leave a matrix of so many rows alone."""
    found = [pattern for pattern in patterns if matches(pattern, module_name, weight_name)]
    return [pattern for pattern in found if pattern != ROUTERS or rows <= MOST_EXPERTS]


def matches(pattern: str, module_name: str, weight_name: str) -> bool:
    """Does the pattern select the weight `weight_name` of the module `module_name`?"""
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], name) for name in (weight_name, module_name))
    if pattern in (weight_name, module_name) or module_name.startswith(pattern + "."):
        return True
    return fnmatchcase(weight_name, pattern) or fnmatchcase(module_name, pattern)


def _is_expert_stack(owner: Owner) -> bool:
    """Is a 3-d parameter `[E, N, K]` the experts of a mixture? Told by its name, its module's, or its class's."""
    module_name, module, name = owner
    kind = type(module).__name__.lower()
    return name in _EXPERT_PARAMETERS or "moe" in kind or any("expert" in s.lower() for s in (kind, name, module_name))
