"""The quantization names vLLM learns, and the configuration behind them: which layer gets which method."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from qtensor.errors import ConfigError
from qtensor.kernels import FORMATS
from qtensor.schemes.scheme import SCHEMES, Scheme, fp8

from . import compat
from .options import Choice, names_experts, parse, read_json, requantizes, require_harmless


class QTensorConfig(QuantizationConfig):
    """quantization="qtensor": every linear layer and routed expert becomes fp8 while it is loaded. Another scheme has a
    name, and a subclass, of its own.

    vLLM makes it without arguments, or through one of the `from_...` constructors where the user gave options, and
    pickles it into its worker processes.
    """

    name = "qtensor"
    scheme: Scheme = fp8

    def __init__(self, given: Mapping[str, Any] | None = None, stored: Mapping[str, Any] | None = None) -> None:
        """stored: what a checkpoint that is quantized already says of itself."""
        anything = type(self) is QTensorConfig and not names_experts(given or {})
        self.choice = Choice(parse(self.scheme, given or {}), experts_by_default=anything, stored=stored)
        super().__init__()
        if "llvmlite" in sys.modules:
            compat.shield_llvmlite()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.choice.options})"

    # What vLLM asks

    @property
    def packed_modules_mapping(self) -> Any:
        """Which layers a model fuses. vLLM puts its model's own dictionary here, or adds to the one it finds."""
        return self.choice.packed

    @packed_modules_mapping.setter
    def packed_modules_mapping(self, packed: Any) -> None:
        self.choice.packed = packed

    @classmethod
    def get_name(cls) -> Any:
        return cls.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.half, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # Marlin, vLLM's weight-only kernel, needs that much; a CPU is not asked.

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QTensorConfig:
        if str(config.get("quant_method", cls.name)) not in NAMES:
            return cls(stored=config)
        require_harmless(config)
        return cls(config)

    @classmethod
    def from_config_dict_json(cls, text: str) -> QTensorConfig:
        given = read_json("quantization_config_dict_json", text)
        if not isinstance(given, dict):
            raise ConfigError(f"qtensor: quantization_config_dict_json is an object of options, not {given!r}")
        return cls(given)

    @classmethod
    def from_config_file(cls, path: str) -> QTensorConfig:
        with open(path) as file:
            return cls.from_config_dict_json(file.read())

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, hf_config: Any = None) -> Any:
        """A checkpoint that is quantized already is left alone, and loaded by its own method, unless the user asks for
        it to be requantized."""
        own = str(hf_quant_cfg.get("quant_method", ""))
        if user_quant != cls.name or not own or own in NAMES:
            return None
        if requantizes():
            return cls.name
        compat.logger().warning(
            "qtensor: the checkpoint is quantized already (%s) and is left as it is; quantization=%r does nothing.",
            own,
            user_quant,
        )
        return _builtin_method(hf_quant_cfg, hf_config)

    @property
    def online_quantization_config(self) -> None:
        """vLLM composes its own online quantization with others' through this attribute."""
        return

    @online_quantization_config.setter
    def online_quantization_config(self, value: Any) -> None:
        if value is not None:
            raise ConfigError(
                "qtensor: --quantization-config is read by vLLM's own online quantization. Give qtensor its options by "
                'hf_overrides={"quantization_config": {"quant_method": "qtensor", ...}} or QTENSOR_VLLM_... variables.'
            )

    def maybe_update_config(self, model_name: str, hf_config: Any = None, **_: Any) -> None:
        """Models that ask their checkpoint's configuration in which format tensors come (GPT-OSS's) are handed them as
        if they were in high precision."""
        for config in (hf_config, getattr(hf_config, "text_config", None)):
            found = getattr(config, "quantization_config", None)
            if self.choice.stored and isinstance(found, dict):
                config.quantization_config = found | {"quant_method": _DECODED}  # type: ignore[union-attr]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        def rename(name: str) -> str:
            renamed: list[str] = hf_to_vllm_mapper.apply_list([name])
            return renamed[0] if renamed else name

        self.choice.rename = rename

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of one layer as the model is built. Raises ConfigError where the user's patterns clash."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from .head import QTensorHeadMethod
        from .linear import QTensorLinearMethod
        from .moe import expert_method

        choice = self.choice
        left = compat.builds_plain_draft()
        if isinstance(layer, LinearBase):
            scheme = None if left else choice.scheme(prefix, experts=False)
            return UnquantizedLinearMethod() if scheme is None else QTensorLinearMethod(choice, prefix, scheme)
        if isinstance(layer, compat.expert_layer()):
            scheme = None if left else choice.scheme(prefix, experts=True)
            return compat.unquantized_experts(layer) if scheme is None else expert_method(choice, prefix, scheme, layer)
        if isinstance(layer, ParallelLMHead) and choice.options.lm_head and not left:
            choice.head_found = True
            return QTensorHeadMethod(choice, prefix, choice.options.lm_head)
        return None

    def __getstate__(self) -> dict[str, Any]:
        # `rename` is a closure over vLLM's mapper; the worker that receives this makes its own.
        choice = self.choice
        again = Choice(
            choice.options, choice.packed, experts_by_default=choice.experts_by_default, stored=choice.stored
        )
        return self.__dict__ | {"choice": again}


_DECODED = "qtensor decodes it"


def _builtin_method(hf_quant_cfg: Any, hf_config: Any) -> str:
    """The method vLLM itself would pick for this checkpoint."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    for name in QUANTIZATION_METHODS:
        if name in NAMES:
            continue
        try:
            found = get_quantization_config(name).override_quantization_method(hf_quant_cfg, None, hf_config=hf_config)
        except Exception:
            continue  # A method whose own dependencies are missing has no say.
        if found is not None:
            return str(found)
    return str(hf_quant_cfg["quant_method"])


def _for_scheme(scheme: Scheme) -> type[QTensorConfig]:
    """A class per name: vLLM constructs a configuration by its class alone, and pickles it by its class's name."""
    label = "QTensorConfig_" + scheme.name
    made = type(label, (QTensorConfig,), {"name": f"qtensor_{scheme.name}", "scheme": scheme, "__module__": __name__})
    globals()[label] = made
    return made


NAMES: dict[str, type[QTensorConfig]] = {"qtensor": QTensorConfig}
for _name in FORMATS:
    NAMES[f"qtensor_{_name}"] = _for_scheme(SCHEMES[_name])


def register_names() -> None:
    """Tell vLLM all names, once per process."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    for name, config in NAMES.items():
        if name not in QUANTIZATION_METHODS:
            register_quantization_config(name)(config)
