from __future__ import annotations

from typing import Any


class DiffusersQuantizer:
    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        self.quantization_config = quantization_config
        self.pre_quantized = kwargs.pop("pre_quantized", True)

    def preprocess_model(self, model: Any, **kwargs: Any) -> Any:
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method
        return self._process_model_before_weight_loading(model, **kwargs)

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        return self._process_model_after_weight_loading(model, **kwargs)

    def dequantize(self, model: Any) -> Any:
        model = self._dequantize(model)
        del model.hf_quantizer
        return model

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)
