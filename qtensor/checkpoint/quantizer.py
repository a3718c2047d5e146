"""What transformers calls while from_pretrained loads a model with a `QTensorConfig`.

It opens the session that `online_quant(scheme, model)` would open on the model that transformers has built, and ends
it when transformers has loaded it: the same bytes, the same errors. A folder that qtensor wrote says so in its
config.json; with this quantizer registered, from_pretrained reads it back into QTensors by itself.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.quantizers import auto

from ..errors import CheckpointError
from ..report.report import LoadReport
from .layouts import LAYOUTS, PRODUCER, reader
from .offload import refuse_offload
from .quantization_config import METHOD, ConfiguredLoad, QTensorConfig, also_ours, dequantized
from .save_pretrained import equip
from .transformers import quantizer, transformers_asks

_theirs: dict[str, Any] = {}
"""Entries of transformers' table of configurations, while ours are in their place."""
_theirs_to_merge: list[Any] = []
_MERGE = "merge_quantization_configs"


class QTensorQuantizer(quantizer()):  # type: ignore[misc]
    """What transformers calls; on the model as `model.hf_quantizer`."""

    requires_calibration = False

    def __init__(self, config: QTensorConfig, **kwargs: Any) -> None:
        self._stored = config.stored is not None
        decodes = config.source is not None and not self._stored
        find = reader(config.stored) if config.stored is not None else lambda module: None
        super().__init__(config, None if decodes else find, **kwargs)
        self.pre_quantized = self._stored or decodes  # config.json may also ask to quantize what is not
        self._load = ConfiguredLoad(config)

    @property
    def report(self) -> LoadReport | None:
        """The report of the load, of a model that was quantized as it was loaded."""
        return self._load.report

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        with self._load.ends_if_it_fails():
            refuse_offload(device_map, stored=self._stored)
        if self.pre_quantized and not transformers_asks():
            raise CheckpointError(
                "from_pretrained of a quantized folder needs transformers 5.21 or newer: older ones cast its values as "
                "they read them. Build the model from its config and call load_checkpoint"
            )

    def preprocess_model(self, model: Any, dtype: Any = None, **_: Any) -> None:
        model.is_quantized, model.quantization_method = True, METHOD
        if not self._stored:
            self._load.begin(model)

    def postprocess_model(self, model: Any, **_: Any) -> None:
        if self.pre_quantized:
            self.settle(model)
        if self._stored:
            equip(model)
        self._load.end()
        model.config.quantization_config = self.quantization_config
        model.hf_quantizer = self

    def update_weight_conversions(self, conversions: list[Any], model: Any = None) -> list[Any]:
        return super().update_weight_conversions(conversions, model) if self.pre_quantized else conversions

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        return super().get_new_dtype(converter, param, dtype) if self.pre_quantized else dtype

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """For device_map="auto": bytes per element of what the weight becomes."""
        outline = None if self._stored else self._load.becomes(model, param_name, param)
        return float(param.element_size()) if outline is None else outline.nbytes / param.numel()

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
        return dequantized(model, dtype)


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
            table[method] = also_ours(table[method])
    _theirs_to_merge.append(auto.AutoHfQuantizer.__dict__[_MERGE])
    setattr(auto.AutoHfQuantizer, _MERGE, classmethod(_merge))


def _merge(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
    """A folder that is quantized, and a `QTensorConfig` from the user: ours, with what the folder says of itself. What
    qtensor wrote stays what it is, unless the user says that it is a source."""
    asked = quantization_config_from_args
    told = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
    ours = told.get("producer") == PRODUCER or told.get("quant_method") == METHOD
    if not isinstance(asked, QTensorConfig) or (ours and asked.source is None):
        return _theirs_to_merge[0].__func__(cls, quantization_config, asked)
    merged = copy.copy(asked)
    merged.source = {**told, **(asked.source or {})}
    return merged


def unregister() -> None:
    """transformers is as it was."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.update(_theirs)
    _theirs.clear()
    if _theirs_to_merge:
        setattr(auto.AutoHfQuantizer, _MERGE, _theirs_to_merge.pop())
