"""What diffusers calls while from_pretrained loads a model, or a pipeline's, with a `QTensorConfig`.

As transformers' counterpart: the session that `online_quant(scheme, model)` would open is opened on the model that
diffusers has built, and ended when diffusers has loaded it. A folder that qtensor wrote is read back into QTensors: its
values and scales are put together as they are read, also where they lie in different files. diffusers is not imported
by this file until somebody else has done so.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..modules import weight_of
from ..report.report import LoadReport
from ..tensor.qtensor import QTensor
from .layouts import LAYOUTS, Layout, reader
from .offload import refuse_offload
from .quantization_config import METHOD, ConfiguredLoad, QTensorConfig, also_ours, dequantized
from .save_pretrained import equip

TABLES = "diffusers.quantizers.auto"
"""The module with diffusers' tables of configurations and quantizers."""
_theirs: dict[str, Any] = {}
"""What diffusers' table of configurations had where ours are."""


class StoredWeights:
    """The quantized weights of a checkpoint, put together from the tensors of its files."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._find = reader(config)
        self._layouts: dict[str, Layout] = {}
        self._read: dict[str, dict[str, torch.Tensor]] = {}

    def names(self, keys: Iterable[str]) -> list[str]:
        """What the tensors of a whole checkpoint become: each quantized weight under its own name."""
        split = [(key, *_split(key)) for key in keys]
        for _, module, leaf in split:
            layout = self._find(module)
            if layout is not None and leaf == layout.scale:
                self._layouts[module] = layout
        plain = [key for key, module, leaf in split if not self._is_part(module, leaf)]
        return plain + [weight_of(module) for module in self._layouts]

    def join(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The same for the tensors of one file. A weight is there once the last of its parts is."""
        out: dict[str, torch.Tensor] = {}
        for key, tensor in tensors.items():
            module, leaf = _split(key)
            if not self._is_part(module, leaf):
                out[key] = tensor
                continue
            parts, layout = self._read.setdefault(module, {}), self._layouts[module]
            parts[leaf] = tensor
            if parts.keys() >= layout.entries.keys():
                out[weight_of(module)] = layout.weight(module, self._read.pop(module), dtype)
        return out

    def _is_part(self, module: str, leaf: str) -> bool:
        return module in self._layouts and leaf in self._layouts[module].entries


def _split(key: str) -> tuple[str, str]:
    module, _, leaf = key.rpartition(".")
    return module, leaf


@functools.cache
def quantizer() -> Any:
    """The class that diffusers makes a quantizer of; its base is only there once diffusers is."""
    from diffusers.quantizers.base import DiffusersQuantizer

    class QTensorQuantizer(DiffusersQuantizer):  # type: ignore[misc]
        """What diffusers calls; on the model as `model.hf_quantizer`."""

        use_keep_in_fp32_modules = True

        def __init__(self, config: QTensorConfig, **kwargs: Any) -> None:
            super().__init__(config, **kwargs)
            self.pre_quantized = config.stored is not None
            self._stored = StoredWeights(config.stored) if config.stored is not None else None
            self._load = ConfiguredLoad(config)
            self._dtype = torch.float32

        @property
        def report(self) -> LoadReport | None:
            """The report of the load, of a model that was quantized as it was loaded."""
            return self._load.report

        def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
            with self._load.ends_if_it_fails():
                refuse_offload(device_map, stored=self.pre_quantized)

        def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
            self._dtype = torch_dtype or self._dtype
            return torch_dtype

        def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
            return loaded_keys if self._stored is None else self._stored.names(loaded_keys)

        def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            return state_dict if self._stored is None else self._stored.join(state_dict, self._dtype)

        def check_if_quantized_param(self, model: Any, param_value: Any, *_: Any, **__: Any) -> bool:
            return isinstance(param_value, QTensor)

        def create_quantized_param(
            self, model: Any, param_value: Any, param_name: str, target_device: Any, *_: Any, **__: Any
        ) -> None:
            module, leaf = _split(param_name)
            weight = nn.Parameter(param_value.to(target_device), requires_grad=False)
            model.get_submodule(module)._parameters[leaf] = weight

        def get_special_dtypes_update(self, model: Any, torch_dtype: Any) -> dict[str, Any]:
            """For device_map="auto": accelerate's names for the bytes of what the weights become."""
            from accelerate.utils import CustomDtype

            widths = {1: CustomDtype.INT4, 2: CustomDtype.FP8}
            becomes = ((name, self._load.becomes(model, name, param)) for name, param in model.named_parameters())
            return {
                name: widths[round(2 * weight.qdata.nbytes / weight.numel())]
                for name, weight in becomes
                if weight is not None
            }

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            if not self.pre_quantized:
                self._load.begin(model)

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
            self._load.end()
            equip(model)

        @property
        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            """Adapters on top of it are: gradients pass through quantized weights."""
            return True

        @property
        def is_compileable(self) -> bool:
            return True

        def _dequantize(self, model: Any) -> Any:
            return dequantized(model)

    return QTensorQuantizer


def register() -> None:
    """Let diffusers, which has been imported, know the configuration and the quantizer. May be repeated."""
    tables = sys.modules[TABLES]
    configs = tables.AUTO_QUANTIZATION_CONFIG_MAPPING
    if METHOD in configs:
        return
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = quantizer()
    configs[METHOD] = QTensorConfig
    for method in LAYOUTS:
        _theirs[method] = configs.get(method)
        configs[method] = QTensorConfig if _theirs[method] is None else also_ours(_theirs[method])


def unregister() -> None:
    """diffusers is as it was."""
    tables = sys.modules.get(TABLES)
    if tables is None:
        return
    tables.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    configs = tables.AUTO_QUANTIZATION_CONFIG_MAPPING
    configs.pop(METHOD, None)
    for method, theirs in _theirs.items():
        configs.pop(method, None) if theirs is None else configs.update({method: theirs})
    _theirs.clear()
