"""QTensorConfig: what transformers' from_pretrained takes as `quantization_config`, and the quantizer behind it.

transformers knows quantizers by the name in their configuration. The one registered here opens the session that
`online_quant(scheme, model)` would open on the model that transformers has built, and ends it when transformers has
loaded it: the same bytes, the same errors. A folder that qtensor wrote says so in its config.json; with this module
imported, from_pretrained reads it back into QTensors by itself. transformers is imported by this file, and this file
only when somebody asks for `qtensor.QTensorConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, ConfigError
from ..modules import parameters
from ..report.report import LoadReport
from ..schemes.config import SchemeSpec
from ..schemes.scheme import Scheme, Targets, as_scheme
from ..schemes.selection import DEFAULT_IGNORE, Selection
from ..sessions.online import open_load
from ..sessions.options import LoadOptions, OnMissing, OnNonfinite
from ..sessions.session import Session
from ..tensor.qtensor import QTensor, empty
from .layouts import LAYOUTS, PRODUCER, reader
from .save_pretrained import equip
from .transformers import quantizer, transformers_asks

METHOD = "qtensor"
"""What transformers knows the quantizer by: `quant_method`."""
_theirs: dict[str, Any] = {}
"""Entries of transformers' table of configurations, while ours are in their place."""


class QTensorConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `from_pretrained` of transformers takes as `quantization_config`.

    The loaded model has the bytes that `online_quant` gives with the same arguments. `save_pretrained` writes what
    `save_checkpoint` writes; `from_pretrained` reads that again, without a configuration.

    Args:
        scheme: As `online_quant` takes it: a `Scheme`, its name, `{pattern: scheme}`, or vLLM's quantization_config.
        ignore: Patterns of weights to leave alone.
        targets: Patterns that replace the default choice; they may be mapped to schemes.
        on_missing: What becomes of elements that the checkpoint lacks; "init" is what transformers does.
        on_nonfinite: "error" refuses NaN and infinity by name and index; "keep" stores them.
        strict_reads: Raise LossyReadError when transformers reads back what is already quantized.
        min_sqnr: In dB; a weight whose signal-to-quantization-noise ratio falls below stays in high precision.
        measure_sqnr: Report every weight's signal-to-quantization-noise ratio.
        stored: What config.json of a quantized folder says; transformers passes it.

    Raises:
        ConfigError: An option is unknown, or has a value it cannot have.
    """

    def __init__(
        self,
        scheme: SchemeSpec = "fp8",
        *,
        ignore: Sequence[str] = DEFAULT_IGNORE,
        targets: Targets | None = None,
        on_missing: OnMissing = "error",
        on_nonfinite: OnNonfinite = "error",
        strict_reads: bool = False,
        min_sqnr: float | None = None,
        measure_sqnr: bool = False,
        stored: Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise ConfigError(f"QTensorConfig: quant_method is {METHOD!r}, not {quant_method!r}")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.scheme, self.targets = _written(scheme), None if targets is None else _written_targets(targets)
        self.ignore = _written_list(ignore)
        self.on_missing, self.on_nonfinite, self.strict_reads = on_missing, on_nonfinite, strict_reads
        self.min_sqnr, self.measure_sqnr = min_sqnr, measure_sqnr
        if not (stored is None or isinstance(stored, Mapping)):
            raise ConfigError(f"QTensorConfig: stored is what a config.json says, not {stored!r}")
        self.stored = dict(stored) if stored is not None else None
        self.selection(), self.options()  # They raise for what cannot be.

    def selection(self) -> Selection:
        """Which weights become what."""
        targets = self.targets
        read = {p: _read(s) for p, s in targets.items()} if isinstance(targets, dict) else targets
        return Selection(_read(self.scheme), self.ignore, read)

    def options(self) -> LoadOptions:
        """How the session treats what is missing, not finite, or lossy."""
        return LoadOptions(
            on_missing=self.on_missing,
            on_nonfinite=self.on_nonfinite,
            strict_reads=self.strict_reads,
            min_sqnr=self.min_sqnr,
            measure_sqnr=self.measure_sqnr,
        )

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration that `to_dict` wrote, or that config.json of a folder written by qtensor has."""
        given = dict(config_dict)
        if given.get("quant_method") != METHOD:
            given = {"stored": given}
        try:
            return super().from_dict(given, return_unused_kwargs, **kwargs)
        except TypeError as error:
            raise ConfigError(f"QTensorConfig: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: what config.json says of a folder that was read, or the arguments."""
        if self.stored is not None:
            return dict(self.stored)
        return {key: value for key, value in super().to_dict().items() if key != "stored"}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def _written(scheme: Any) -> Any:
    """A scheme, or schemes by pattern, as JSON can hold them."""
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
    return {key: _read(value) for key, value in written.items()} if isinstance(written, dict) else written


class QTensorQuantizer(quantizer()):  # type: ignore[misc]
    """What transformers calls while it loads a model with a `QTensorConfig`.

    Attributes:
        report: The report of the load, of a model that was quantized as it was loaded; on the model as
            `model.hf_quantizer.report`.
    """

    requires_calibration = False
    report: LoadReport | None = None
    _session: Session | None = None

    def __init__(self, config: QTensorConfig, **kwargs: Any) -> None:
        find = reader(config.stored) if config.stored is not None else lambda module: None
        super().__init__(config, find, **kwargs)
        self.pre_quantized = config.stored is not None  # config.json may also ask to quantize what is not

    def validate_environment(self, *_: Any, **__: Any) -> None:
        if self.pre_quantized and not transformers_asks():
            raise CheckpointError(
                "from_pretrained of a quantized folder needs transformers 5.21 or newer: older ones cast its values as "
                "they read them. Build the model from its config and call load_checkpoint"
            )

    def preprocess_model(self, model: Any, dtype: Any = None, **_: Any) -> None:
        model.is_quantized, model.quantization_method = True, METHOD
        if not self.pre_quantized:
            config: QTensorConfig = self.quantization_config
            self._selection = config.selection()
            self._session = open_load(config.selection(), model, config.options())
            self._session.__enter__()

    def postprocess_model(self, model: Any, **_: Any) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            self.report = session.finish()
        else:
            self.settle(model)
            equip(model)
        model.config.quantization_config = self.quantization_config
        model.hf_quantizer = self

    def update_weight_conversions(self, conversions: list[Any], model: Any = None) -> list[Any]:
        return super().update_weight_conversions(conversions, model) if self.pre_quantized else conversions

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        return super().get_new_dtype(converter, param, dtype) if self.pre_quantized else dtype

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """For device_map="auto": bytes per element of what the weight becomes."""
        if self.pre_quantized or self._session is None:
            return float(param.element_size())
        module_name, _, name = param_name.rpartition(".")
        owner = (module_name, model.get_submodule(module_name), name)
        scheme = self._selection.scheme_for([owner], param)
        return (
            empty(param.shape, scheme, param.dtype, "meta").nbytes / param.numel()
            if scheme and param.numel()
            else float(param.element_size())
        )

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of it are: gradients pass through quantized weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        plain: dict[int, torch.nn.Parameter] = {}
        for _, module, name, param in list(parameters(model)):
            if isinstance(param, QTensor):
                plain.setdefault(id(param), torch.nn.Parameter(param.dequantize(dtype), requires_grad=False))
                module._parameters[name] = plain[id(param)]
        return model


def _also_ours(original: Any) -> Any:
    """A configuration class of transformers that gives way where the folder was written by qtensor."""

    class Either(original):  # type: ignore[misc]
        @classmethod
        def from_dict(cls, config_dict: Any, *args: Any, **kwargs: Any) -> Any:
            ours = config_dict.get("producer") == PRODUCER
            return (QTensorConfig if ours else original).from_dict(config_dict, *args, **kwargs)

    return Either


def register() -> None:
    """Let transformers know the configuration and the quantizer. May be repeated."""
    table = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    if METHOD in table:
        return
    auto.register_quantization_config(METHOD)(QTensorConfig)
    auto.register_quantizer(METHOD)(QTensorQuantizer)
    for method in LAYOUTS:
        if method in table:
            _theirs[method] = table[method]
            table[method] = _also_ours(table[method])


def unregister() -> None:
    """transformers is as it was."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.update(_theirs)
    _theirs.clear()
