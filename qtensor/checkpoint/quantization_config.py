"""QTensorConfig: what from_pretrained of transformers and of diffusers takes as `quantization_config`.

Both libraries know quantizers by the name in their configuration, and build one for each load. What these have in
common is here: the configuration, and the session that `online_quant(scheme, model)` would open on the model that the
library has built. The quantizers are in `quantizer` (transformers) and `diffusers`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..modules import parameters
from ..report.report import LoadReport
from ..schemes.config import SchemeSpec
from ..schemes.plan import Plan
from ..schemes.scheme import Scheme, SchemeLike, Targets, as_scheme
from ..schemes.selection import DEFAULT_IGNORE, Selection
from ..sessions.online import choose, open_load
from ..sessions.options import LoadOptions, OnMissing, OnNonfinite, StrictSource
from ..sessions.session import Session
from ..tensor.qtensor import QTensor, empty
from .layouts import PRODUCER

_Mixin: Any = object
with contextlib.suppress(ImportError):  # transformers registers no class that is not derived from this one.
    from transformers.utils.quantization_config import QuantizationConfigMixin as _Mixin


class Method(StrEnum):
    """What the libraries know the quantizer by: `quant_method`, of which diffusers wants the `value`."""

    QTENSOR = "qtensor"


METHOD = Method.QTENSOR


class QTensorConfig(_Mixin):  # type: ignore[misc]
    """What `from_pretrained` of transformers, and of a model of diffusers, takes as `quantization_config`.

    The loaded model has the bytes that `online_quant` gives with the same arguments. `save_pretrained` writes what
    `save_checkpoint` writes; `from_pretrained` reads that again, without a configuration.

    Args:
        scheme: As `online_quant` takes it: a `Scheme`, its name, `{pattern: scheme}`, vLLM's quantization_config, or a
            `Plan`; "fp8" by default. With `fit`, the schemes to choose from.
        fit: Bytes that the model may take, as a number or as "10GB".
        reserve: Of `fit`, bytes to leave free.
        ignore: Patterns of weights to leave alone.
        targets: Patterns that replace the default choice; they may be mapped to schemes.
        recipe: Give every weight the bytes of another tool, as `Scheme.by_recipe`.
        on_missing: What becomes of elements that the checkpoint lacks; "init" is what transformers does.
        on_nonfinite: "error" refuses NaN and infinity by name and index; "keep" stores them.
        strict_reads: Raise LossyReadError when the library reads back what is already quantized.
        min_sqnr: In dB; a weight whose signal-to-quantization-noise ratio falls below stays in high precision.
        measure_sqnr: Report every weight's signal-to-quantization-noise ratio.
        stored: What config.json of a folder written by qtensor says; the library passes it.
        source: The folder is quantized: its config.json's "quantization_config". transformers passes it.
        strict_source: "lossless" refuses a weight that arrives quantized and would be quantized a second time.

    Raises:
        ConfigError: An option is unknown, or has a value it cannot have.
    """

    def __init__(
        self,
        scheme: SchemeSpec | Sequence[SchemeLike] | None = None,
        *,
        fit: int | str | None = None,
        reserve: int | str = 0,
        ignore: Sequence[str] = DEFAULT_IGNORE,
        targets: Targets | None = None,
        recipe: str | None = None,
        on_missing: OnMissing = "error",
        on_nonfinite: OnNonfinite = "error",
        strict_reads: bool = False,
        min_sqnr: float | None = None,
        measure_sqnr: bool = False,
        stored: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
        strict_source: StrictSource = "any",
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise ConfigError(f"QTensorConfig: quant_method is {METHOD!r}, not {quant_method!r}")
        self.quant_method = METHOD  # type: ignore[assignment]
        scheme = "fp8" if scheme is None and fit is None else scheme
        self.fit, self.reserve = fit, reserve
        self.scheme, self.targets = _written(scheme), None if targets is None else _written_targets(targets)
        self.ignore, self.recipe = _written_list(ignore), recipe
        self.on_missing, self.on_nonfinite, self.strict_reads = on_missing, on_nonfinite, strict_reads
        self.min_sqnr, self.measure_sqnr = min_sqnr, measure_sqnr
        if not (stored is None or isinstance(stored, Mapping)):
            raise ConfigError(f"QTensorConfig: stored is what a config.json says, not {stored!r}")
        self.stored = dict(stored) if stored is not None else None
        self.source, self.strict_source = source, strict_source
        self.selection(), self.options()  # They raise for what cannot be.

    def selection(self) -> Selection:
        """Which weights become what."""
        targets = self.targets
        read = {p: _read(s) for p, s in targets.items()} if isinstance(targets, dict) else targets
        return choose(_read(self.scheme), self.ignore, read, self.fit, self.reserve, self.options(), self.recipe)

    def options(self) -> LoadOptions:
        """How the session treats what is missing, not finite, or lossy."""
        return LoadOptions(
            on_missing=self.on_missing,
            on_nonfinite=self.on_nonfinite,
            strict_reads=self.strict_reads,
            min_sqnr=self.min_sqnr,
            measure_sqnr=self.measure_sqnr,
            source=self.source,
            strict_source=self.strict_source,
        )

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration that `to_dict` wrote, or that config.json of a folder written by qtensor has."""
        given = dict(config_dict)
        if given.get("quant_method") != METHOD:
            given = {"stored": given}
        try:
            config = cls(**given)
        except TypeError as error:
            raise ConfigError(f"QTensorConfig: {error}") from None
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set the options among the arguments. Returns the others."""
        for key in kwargs.keys() & vars(self).keys():
            setattr(self, key, kwargs[key])
        return {key: value for key, value in kwargs.items() if key not in vars(self)}

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: what config.json says of a folder that was read, or the arguments."""
        found = vars(self) if self.stored is None else self.stored
        written: dict[str, Any] = json.loads(
            json.dumps({k: v for k, v in found.items() if k not in ("stored", "source")})
        )
        return written

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"QTensorConfig {self.to_json_string()}"


def _written(scheme: Any) -> Any:
    """A scheme, or schemes by pattern, as JSON can hold them."""
    if isinstance(scheme, Plan):
        scheme = scheme.to_json()
    if isinstance(scheme, list | tuple):
        return [_written(each) for each in scheme]
    if isinstance(scheme, Mapping):
        return {key: _written(value) for key, value in scheme.items()}
    if not isinstance(scheme, Scheme):
        return scheme
    only_weights = scheme.activation == "none" and scheme != as_scheme(scheme.name)
    return {"weight": scheme.name, "activation": "none"} if only_weights else scheme.name


def _written_targets(targets: Targets) -> Any:
    return _written(targets) if isinstance(targets, Mapping) else _written_list(targets)


def _written_list(patterns: Any) -> Any:
    """A list of what is one; all else is refused when it is read."""
    return list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else patterns


def _read(written: Any) -> Any:
    if isinstance(written, dict) and written.keys() == {"weight", "activation"} and written["activation"] == "none":
        return as_scheme(written["weight"]).weight_only()
    if isinstance(written, list):
        return [_read(each) for each in written]
    return {key: _read(value) for key, value in written.items()} if isinstance(written, dict) else written


class ConfiguredLoad:
    """The session of one from_pretrained, from the model that the library has built to the end of its load.

    Attributes:
        report: The report of the load, once it has ended.
    """

    report: LoadReport | None = None

    def __init__(self, config: QTensorConfig) -> None:
        self._selection, self._options = config.selection(), config.options()
        self._session: Session | None = None

    def begin(self, model: nn.Module) -> None:
        self._session = open_load(self._selection, model, self._options)
        self._session.__enter__()

    def end(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            self.report = session.finish()

    @contextlib.contextmanager
    def ends_if_it_fails(self) -> Iterator[None]:
        """Around what may find that the load cannot go on."""
        try:
            yield
        except BaseException:
            if self._session is not None:
                self._session.abort()
            raise

    def becomes(self, model: nn.Module, name: str, param: torch.Tensor) -> QTensor | None:
        """What a weight of the model is going to be, without values; None where it stays as it is."""
        module_name, _, leaf = name.rpartition(".")
        scheme = self._selection.scheme_for([(module_name, model.get_submodule(module_name), leaf)], param)
        return empty(param.shape, scheme, param.dtype, "meta") if scheme is not None and param.numel() else None


def dequantized(model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
    """The model with plain Parameters of its quantized weights' values, in `dtype` or each in its own."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    plain: dict[int, nn.Parameter] = {}
    for _, module, name, param in list(parameters(model)):
        if isinstance(param, QTensor):
            plain.setdefault(id(param), nn.Parameter(param.dequantize(dtype), requires_grad=False))
            module._parameters[name] = plain[id(param)]
    return model


def also_ours(original: Any) -> Any:
    """A library's configuration class that gives way where the folder was written by qtensor."""

    class Either(original):  # type: ignore[misc]
        @classmethod
        def from_dict(cls, config_dict: Any, *args: Any, **kwargs: Any) -> Any:
            ours = config_dict.get("producer") == PRODUCER
            return (QTensorConfig if ours else original).from_dict(config_dict, *args, **kwargs)

    return Either
