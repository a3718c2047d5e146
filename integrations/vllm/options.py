"""Options: what a user may set, where it may come from, and the choice of a scheme per layer.

The keys follow vLLM's own online quantization: `linear`, `moe`, `ignore`, `targets`. They come as a dictionary (a
checkpoint's or hf_overrides' `quantization_config`), as JSON (`hf_overrides={"quantization_config_dict_json": ...}`),
or as environment variables QTENSOR_VLLM_<KEY>; a dictionary's keys win over variables.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from qtensor.errors import ConfigError
from qtensor.modules import weight_of
from qtensor.schemes.config import TARGETS_ALONE, read_patterns, read_scheme, read_targets
from qtensor.schemes.linear import LinearRegex
from qtensor.schemes.scheme import SCHEMES, Scheme, int8_per_channel
from qtensor.schemes.selection import DEFAULT_IGNORE, matches

OptionsError = ConfigError
"""The name that this error had here first."""

PREFIX = "QTENSOR_VLLM_"
_NOT_OPTIONS = {"quant_method", "plan"}


@dataclass(frozen=True)
class Options:
    """linear, moe: the scheme of linear layers and of routed experts; None leaves them alone.
    ignore: patterns of layers to leave alone, besides qtensor's defaults (heads, embeddings, norms, routers).
    targets: pattern → scheme; when given, only these layers are quantized.
    lm_head: the scheme of the output head, and so of the embedding it may be tied to; None leaves it alone.
    activation: "auto" quantizes activations where the device multiplies in fp8 (GPUs) and keeps them elsewhere;
        "dynamic" and "none" force it. Schemes that are weight-only have no "dynamic". "int8" rounds them to int8 for
        linear layers of int8 weights, on a CPU.
    on_nonfinite: "error" refuses NaN and infinity; "keep" stores them.
    reload: "atomic" makes every reload all or nothing, with a second copy of what is written; "per_weight" replaces
        each weight when it has arrived, without one.
    reload_partial: what a reload does that brings only a part of what shares a scale: "error" refuses it, "keep"
        quantizes the rest again from its quantized values.
    source: what becomes of a checkpoint that is quantized already: "own" loads it by its own method, "requantize"
        decodes it as it is read, "lossless" does so where the numbers stay the same, and refuses all else.
    snapshot: a folder that `save_snapshot` has written: its weights are mapped, whatever the checkpoint holds; where it
        is not there or does not fit, the checkpoint is loaded.
    verify: compares the checkpoint's files with their SHA-256 before any is loaded.
    report: where each worker writes its report, as JSON and HTML unless the path ends in .json or .html; "{rank}" in it
        is replaced.

    Raises ConfigError for values that exclude each other.
    """

    linear: Scheme | None
    moe: Scheme | None
    ignore: tuple[str, ...] = ()
    targets: Mapping[str, Scheme] = field(default_factory=dict)
    lm_head: Scheme | None = None
    activation: str = "auto"
    on_nonfinite: str = "error"
    reload: str = "atomic"
    reload_partial: str = "error"
    source: str = "own"
    snapshot: str | None = None
    verify: bool = False
    report: str | None = None

    def __post_init__(self) -> None:
        if self.targets and (self.linear or self.moe):
            raise ConfigError(TARGETS_ALONE)
        for scheme in filter(None, (self.linear, self.moe, self.lm_head, *self.targets.values())):
            if scheme.plain() not in SCHEMES.values():
                raise ConfigError(
                    f"qtensor: {scheme}: give the scheme by its name, and the option activation beside it"
                )
            if self.activation == "int8" and scheme.plain() != int8_per_channel:
                raise ConfigError(
                    f'qtensor: activation="int8" multiplies int8 activations with int8 weights, and {scheme.name} has '
                    "others; choose int8_per_channel, or leave the option out"
                )
            if self.activation == "dynamic" and scheme.activation == "none":
                raise ConfigError(
                    f'qtensor: activation="dynamic" quantizes activations to fp8, and {scheme.name} is weight-only; '
                    "leave the option out, or choose an fp8 scheme or mxfp8"
                )


def parse(scheme: Scheme, given: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Options:
    """Options from a user's dictionary and the environment. `scheme`: the default, from the quantization's name.

    Raises ConfigError for what it does not know, naming the key and the known ones.
    """
    known = {f.name for f in fields(Options)}
    merged = _from_environment(environment, known)
    for key, value in given.items():
        if key in _NOT_OPTIONS:
            continue
        if key not in known:
            raise ConfigError(f"qtensor: unknown option {key!r}; the options are {', '.join(sorted(known))}")
        merged[key] = value
    values = {key: _READERS[key](key, value) for key, value in merged.items()}
    by_kind = None if values.get("targets") else scheme
    values = {"linear": by_kind, "moe": by_kind} | values
    values["lm_head"] = (values["linear"] or scheme) if values.get("lm_head") else None
    return Options(**values)


def requantizes(environment: Mapping[str, str] = os.environ) -> bool:
    """Has the user asked, by a variable, that checkpoints be decoded which are quantized already? Their own
    quantization_config is where vLLM looks, so that no other option can say so."""
    return _from_environment(environment, _READERS.keys()).get("source") in REQUANTIZING


def names_experts(given: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> bool:
    """Has the user asked for a scheme of experts?"""
    return any("moe" in keys or "targets" in keys for keys in (given, _from_environment(environment, _READERS.keys())))


def require_harmless(given: Mapping[str, Any]) -> None:
    """A `quantization_config` may be the checkpoint's, and a stranger's: raise ConfigError if it names a file to write
    or read, or has a pattern that could run for ever."""
    by_user = "give it as quantization_config_dict_json, or as the variable " + PREFIX
    for key in ("report", "snapshot"):
        if key in given:
            raise ConfigError(
                f"qtensor: a quantization_config may be a checkpoint's and has no {key}; {by_user}{key.upper()}"
            )
    for key in ("ignore", "targets"):
        patterns = given.get(key) or ()
        for pattern in patterns.split(",") if isinstance(patterns, str) else patterns:
            try:
                if isinstance(pattern, str) and pattern.strip().startswith("re:"):
                    LinearRegex(pattern.strip()[3:])
            except ValueError as error:
                raise ConfigError(
                    f"qtensor: {key}: {pattern!r} is not used: {error}; if the pattern is yours, {by_user}{key.upper()}"
                ) from None


@functools.cache
def _regex(pattern: str) -> LinearRegex | re.Pattern[str]:
    """In linear time, if it can be: all that `require_harmless` admits. Others are the user's."""
    try:
        return LinearRegex(pattern)
    except ValueError:
        return re.compile(pattern)


def _from_environment(environment: Mapping[str, str], known: Collection[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX):
            continue
        key = variable[len(PREFIX) :].lower()
        if key not in known:
            names = ", ".join(PREFIX + name.upper() for name in sorted(known))
            raise ConfigError(f"qtensor: unknown variable {variable}; the variables are {names}")
        found[key] = read_json(variable, text) if text[:1] in ("[", "{") else text
    return found


def read_json(what: str, text: str) -> Any:
    """Options as JSON. `what` gave them, for the error."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"qtensor: {what} is not JSON: {error}") from None


def _flag(key: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("1", "true", "yes", "0", "false", "no"):
        return value.lower() in ("1", "true", "yes")
    if not isinstance(value, bool):
        raise ConfigError(f"qtensor: {key} is true or false, not {value!r}")
    return value


def _one_of(*allowed: str) -> Callable[[str, Any], str]:
    def read(key: str, value: Any) -> str:
        if value not in allowed:
            raise ConfigError(f"qtensor: {key} is one of {', '.join(allowed)}, not {value!r}")
        return str(value)

    return read


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"qtensor: {key} is a path, not {value!r}")
    return value


REQUANTIZING = ("requantize", "lossless")
"""Values of `source` with which the plugin takes a checkpoint that is quantized already."""
_READERS: dict[str, Callable[[str, Any], Any]] = {
    "linear": read_scheme,
    "moe": read_scheme,
    "ignore": read_patterns,
    "targets": read_targets,
    "lm_head": _flag,
    "activation": _one_of("auto", "dynamic", "int8", "none"),
    "on_nonfinite": _one_of("error", "keep"),
    "reload": _one_of("atomic", "per_weight"),
    "reload_partial": _one_of("error", "keep"),
    "source": _one_of("own", "requantize", "lossless"),
    "snapshot": _text,
    "verify": _flag,
    "report": _text,
}


class Choice:
    """Decides layer by layer, and remembers which of the user's patterns have matched.

    packed: the parts that a checkpoint has for a fused layer of vLLM's, in order, by the last part of their names.
    rename: maps a checkpoint's module name to vLLM's, for models whose names differ.
    experts_by_default: nobody has asked for the scheme of experts, so that a GPU may have another.
    stored: the quantization_config of a checkpoint that is quantized already, and is requantized.
    """

    def __init__(
        self,
        options: Options,
        packed: Mapping[str, Sequence[str]] | None = None,
        *,
        experts_by_default: bool = False,
        stored: Mapping[str, Any] | None = None,
    ) -> None:
        self.options = options
        self.experts_by_default = experts_by_default
        self.stored = dict(stored or {})
        self.packed = {} if packed is None else packed
        self.rename: Callable[[str], str] = str
        self.unused = {*options.ignore, *options.targets}
        self.head_found = False

    def parts(self, prefix: str) -> list[str]:
        """The layers that a checkpoint has for the layer vLLM calls `prefix`: [prefix] if it is not fused."""
        parent, _, last = prefix.rpartition(".")
        dot = f"{parent}." if parent else ""
        return [dot + part for part in self.packed.get(last, (last,))]

    def scheme(self, prefix: str, *, experts: bool) -> Scheme | None:
        """The scheme of the layer vLLM calls `prefix`; None to leave it alone.

        Raises ConfigError if patterns clash or split a fused layer.
        """
        shards = self.parts(prefix)
        ignored = self._agree(prefix, shards, self.options.ignore, "ignore")
        targeted = self._agree(prefix, shards, tuple(self.options.targets), "targets")
        if ignored and targeted:
            raise ConfigError(
                f"qtensor: {prefix} matches both ignore ({', '.join(ignored)}) and targets ({', '.join(targeted)}); "
                "remove one of them"
            )
        schemes = {self.options.targets[pattern] for pattern in targeted}
        if len(schemes) > 1:
            raise ConfigError(
                f"qtensor: {prefix} matches targets with different schemes ({', '.join(targeted)}); a layer, all parts "
                "of a fused one included, has one scheme"
            )
        if ignored:
            return None
        if self.options.targets:
            return schemes.pop() if schemes else None
        if any(matches(pattern, name, weight_of(name)) for pattern in DEFAULT_IGNORE for name in shards):
            return None
        return self.options.moe if experts else self.options.linear

    def require_all_used(self) -> None:
        """Raise ConfigError for patterns that matched no layer of the model, and for an absent head."""
        if self.options.lm_head and not self.head_found:
            raise ConfigError(
                "qtensor: lm_head is set, and this model has no output head of its own that could be quantized; leave "
                "the option out."
            )
        if self.unused:
            raise ConfigError(
                f"qtensor: these patterns match no layer of this model: {', '.join(sorted(self.unused))}. Patterns are "
                "layer names (model.layers.0.mlp.down_proj), globs (*.down_proj) or re:<regular expression>."
            )

    def _agree(self, prefix: str, shards: Sequence[str], patterns: Sequence[str], option: str) -> list[str]:
        """The patterns that select the layer. One that selects only some parts of a fused layer is an error, unless
        others of the same option select the rest."""
        found = {name: [p for p in patterns if self._matches(p, name)] for name in (prefix, *shards)}
        hits = sorted({p for names in found.values() for p in names})
        self.unused.difference_update(hits)
        if hits and not found[prefix] and not all(found[name] for name in shards):
            left = ", ".join(name for name in shards if not found[name])
            raise ConfigError(
                f"qtensor: {option} selects only a part of the fused layer {prefix}: {', '.join(hits)} leaves out "
                f"{left}. Select all of its parts or none."
            )
        return hits

    def _matches(self, pattern: str, name: str) -> bool:
        if pattern.startswith("re:"):
            regex = _regex(pattern[3:])
            return any(regex.match(text) for text in (weight_of(name), name))
        if matches(pattern, name, weight_of(name)):
            return True
        if any(c in pattern for c in "*?["):
            return False
        renamed = self.rename(pattern)
        return renamed != pattern and matches(renamed, name, weight_of(name))
