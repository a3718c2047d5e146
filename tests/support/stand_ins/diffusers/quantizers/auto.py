from __future__ import annotations

from typing import Any

AUTO_QUANTIZER_MAPPING: dict[str, Any] = {}
AUTO_QUANTIZATION_CONFIG_MAPPING: dict[str, Any] = {}


def quantizer(config: Any, pre_quantized: bool) -> Any:
    if isinstance(config, dict):
        config = AUTO_QUANTIZATION_CONFIG_MAPPING[config["quant_method"]].from_dict(config)
    return AUTO_QUANTIZER_MAPPING[config.quant_method](config, pre_quantized=pre_quantized)
