from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from ..quantizers import auto

NAME = "diffusion_pytorch_model.safetensors"


class ModelMixin(torch.nn.Module):
    _internal_dict: dict[str, Any]

    def register_to_config(self, **kwargs: Any) -> None:
        self._internal_dict = getattr(self, "_internal_dict", {}) | kwargs

    @property
    def config(self) -> dict[str, Any]:
        return self._internal_dict

    @classmethod
    def from_pretrained(
        cls, folder: Path, quantization_config: Any = None, torch_dtype: Any = None, device_map: Any = None
    ) -> Any:
        config = json.loads((folder / "config.json").read_text())
        stored = config.get("quantization_config")
        quantizer = None
        if stored or quantization_config is not None:
            config["quantization_config"] = stored or quantization_config
            quantizer = auto.quantizer(config["quantization_config"], pre_quantized=bool(stored))
            quantizer.validate_environment(torch_dtype=torch_dtype, device_map=device_map)
            torch_dtype = quantizer.update_torch_dtype(torch_dtype)
            assert quantizer.quantization_config.quant_method.value
            json.dumps(quantizer.quantization_config.to_dict(), sort_keys=True)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch_dtype or default)
        with accelerate.init_empty_weights():
            model = cls()
        torch.set_default_dtype(default)
        model.register_to_config(**config)
        files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        keys = [key for file in files for key in file]
        if quantizer is not None:
            keys = quantizer.maybe_update_loaded_keys(keys, None)
            quantizer.preprocess_model(model=model, device_map=device_map, keep_in_fp32_modules=[])
            quantizer.validate_environment(device_map=device_map)
        expected = model.state_dict()
        assert set(keys) == set(expected)
        for file in files:
            for name, param in (file if quantizer is None else quantizer.maybe_update_state_dict(file)).items():
                value = param.to(torch_dtype or model.get_parameter(name).dtype).contiguous()
                assert expected[name].shape == value.shape
                if quantizer is not None and quantizer.check_if_quantized_param(model, value, name, file):
                    quantizer.create_quantized_param(model, value, name, "cpu", file, [], dtype=torch_dtype)
                else:
                    set_module_tensor_to_device(model, name, "cpu", value=value, dtype=torch_dtype)
        if quantizer is not None:
            quantizer.postprocess_model(model)
            model.hf_quantizer = quantizer
        return model.eval()

    def save_pretrained(self, folder: Path, max_shard_size: int | str = "10GB", variant: str | None = None) -> None:
        assert not hasattr(self, "hf_quantizer"), "it would be asked for the tensors"
        folder.mkdir()
        config = {"_class_name": type(self).__name__} | self.config
        (folder / "config.json").write_text(json.dumps(config))
        state = self.state_dict()
        pattern = NAME.replace(".", "{suffix}.", 1)
        split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size, filename_pattern=pattern)
        for file, names in split.filename_to_tensors.items():
            save_file({name: state[name].contiguous() for name in names}, folder / file)
