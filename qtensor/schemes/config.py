"""Config: which weights get which scheme, as a user writes it down.

A scheme for everything: a `Scheme` or its name. A scheme per pattern: `{"re:.*self_attn.*": "fp8_per_channel"}`. Or the
form of vLLM's `quantization_config`, from JSON or as a dictionary, with the keys `linear`, `moe`, `ignore`, `targets`:

    {"linear": "fp8_per_block", "moe": {"weight": "mxfp8"}, "ignore": ["re:.*gate$", "lm_head"]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import ConfigError
from .scheme import SCHEMES, SEARCHED, Scheme, SchemeLike, Targets, as_scheme, split_name

if TYPE_CHECKING:
    from .plan import Plan

KEYS = ("linear", "moe", "ignore", "targets")
_NOT_OPTIONS = {"quant_method", "plan"}
# vLLM's names for schemes that have another name here.
_VLLM_NAMES = {
    "fp8_per_tensor_static": "fp8_per_tensor",
    "fp8_per_channel_static": "fp8_per_channel",
    "fp8_per_block_static": "fp8_per_block",
    "int8_per_channel_static": "int8_per_channel",
    "int8_per_channel_weight_only": "int8_per_channel",
}

SchemeSpec: TypeAlias = "SchemeLike | Mapping[str, Any] | Plan"
"""What `online_quant` takes first: see the module's documentation."""


@dataclass(frozen=True)
class QuantConfig:
    """linear, moe: the scheme of linear layers and of expert stacks; None leaves them alone.
    ignore: patterns to leave alone, besides the session's own.
    targets: pattern → scheme; None if the choice is by kind of layer. When given, only these weights are quantized.
    """

    linear: Scheme | None
    moe: Scheme | None
    ignore: tuple[str, ...] = ()
    targets: Mapping[str, Scheme] | None = field(default=None)

    def __str__(self) -> str:
        schemes = [self.linear, self.moe] if self.targets is None else [*self.targets.values()]
        return ", ".join(dict.fromkeys(str(s) for s in schemes if s is not None)) or "none"


def read_config(spec: SchemeSpec, targets: Targets | None = None) -> QuantConfig:
    """The config that `spec` writes down, or `spec` for the patterns in `targets`.

    Raises ConfigError for unknown keys and schemes, naming the known ones, and for options that exclude each other.
    """
    if isinstance(spec, str) and spec.lstrip()[:1] == "{":
        try:
            spec = json.loads(spec)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"qtensor: the config is not JSON: {error}") from None
    if not isinstance(spec, (Mapping, Scheme, str)):
        from .plan import Plan

        if isinstance(spec, Plan):
            spec = {"targets": spec.targets}
    if not isinstance(spec, Mapping):
        scheme = as_scheme(spec)
        if targets is None:
            return QuantConfig(scheme, scheme)
        chosen = targets if isinstance(targets, Mapping) else dict.fromkeys(read_patterns("targets", targets), scheme)
        return QuantConfig(None, None, targets=read_targets("targets", chosen))
    if targets is not None:
        raise ConfigError("qtensor: the first argument says already what each pattern gets; leave out `targets`")
    if not any(key in KEYS for key in spec):
        return QuantConfig(None, None, targets=read_targets("targets", spec))
    unknown = [key for key in spec if key not in KEYS and key not in _NOT_OPTIONS]
    if unknown:
        raise ConfigError(f"qtensor: unknown option {unknown[0]!r}; the options are {', '.join(KEYS)}")
    if spec.get("targets") and (spec.get("linear") or spec.get("moe")):
        raise ConfigError(TARGETS_ALONE)
    return QuantConfig(
        read_scheme("linear", spec.get("linear")),
        read_scheme("moe", spec.get("moe")),
        read_patterns("ignore", spec.get("ignore") or ()),
        read_targets("targets", spec["targets"]) if spec.get("targets") else None,
    )


def by_recipe(config: QuantConfig, tool: str) -> QuantConfig:
    """The same choice, each scheme with the bytes of that tool. Raises ConfigError where there is no such recipe."""

    def of(scheme: Scheme | None) -> Scheme | None:
        return None if scheme is None else scheme.by_recipe(tool)

    targets = None if config.targets is None else {p: s.by_recipe(tool) for p, s in config.targets.items()}
    return replace(config, linear=of(config.linear), moe=of(config.moe), targets=targets)


TARGETS_ALONE = "qtensor: `targets` names every layer to quantize, so `linear` and `moe` cannot be given with it"


def read_scheme(key: str, value: Any) -> Scheme | None:
    """A scheme, its name or vLLM's, or vLLM's `{"weight": name}`; None or "none" for no scheme."""
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        return None
    if isinstance(value, Mapping) and "weight" in value and not (set(value) - {"weight", "activation"}):
        if value.get("activation") is not None:
            raise ConfigError(f"qtensor: {key}: activations follow from the weight's scheme; leave out `activation`")
        value = value["weight"]
    if isinstance(value, str):
        plain, suffix = split_name(value)
        value = _VLLM_NAMES.get(plain, plain) + suffix
    try:
        return as_scheme(value)
    except ConfigError as error:
        if isinstance(value, str) and split_name(value)[0] in SCHEMES:
            raise ConfigError(f"qtensor: {key}: {error}") from None
        known = ", ".join(sorted(SCHEMES))
        raise ConfigError(
            f'qtensor: {key}={value!r} is no scheme; use one of {known}, with "{SEARCHED}" behind it if its scales are '
            "to be searched or with a colon and a recipe, or none"
        ) from None


def pattern_list(key: str, value: Any) -> tuple[str, ...]:
    """Patterns as a caller gives them: in a list, so that none is taken for its characters."""
    if isinstance(value, str):
        raise ConfigError(f"{key} is a list of patterns; put the single pattern in a list")
    return read_patterns(key, value)


def read_patterns(key: str, value: Any) -> tuple[str, ...]:
    """Patterns, as a list or separated by commas; each "re:..." is one that `re` can compile."""
    patterns = split_patterns(key, value)
    _check_regexes(key, patterns)
    return patterns


def split_patterns(key: str, value: Any) -> tuple[str, ...]:
    """Patterns, as a list or separated by commas."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, Sequence) or not all(isinstance(p, str) for p in value):
        raise ConfigError(f"qtensor: {key} is a list of patterns, not {value!r:.200}")
    return tuple(value)


def read_targets(key: str, value: Any) -> dict[str, Scheme]:
    """Pattern → scheme."""
    if not isinstance(value, Mapping) or not all(isinstance(p, str) for p in value):
        raise ConfigError(f"qtensor: {key} maps patterns to schemes, not {value!r}")
    _check_regexes(key, value)
    schemes = {pattern: read_scheme(f"{key}[{pattern!r}]", name) for pattern, name in value.items()}
    empty = [pattern for pattern, scheme in schemes.items() if scheme is None]
    if empty:
        raise ConfigError(
            f"qtensor: {key}[{empty[0]!r}] names no scheme; put the pattern in `ignore` to leave layers alone"
        )
    return {pattern: scheme for pattern, scheme in schemes.items() if scheme is not None}


def _check_regexes(key: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise ConfigError(f"qtensor: {key}: {pattern!r} is not a regular expression: {error}") from None
