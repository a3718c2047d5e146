"""vLLM on a CPU machine that takes itself for one with a GPU: its choice of kernels, and the plugin's set-up of them.

What stands in for CUDA is what vLLM asks its platform and its compiled library while it chooses. By default nothing is
computed: tensors have no memory (the meta device). With `values` they have, and the kernels' arithmetic is that of
`reference_kernels`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import vllm.platforms as platforms
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms.interface import DeviceCapability, PlatformEnum

import support.vllm.engines  # noqa: F401  Its settings of vLLM come first.
from support.vllm import reference_kernels

Chip = int | str
"""90 is NVIDIA's sm_90, "gfx942" is AMD's."""
CHIPS: tuple[Chip, ...] = (75, 80, 86, 89, 90, 100, 120, "gfx90a", "gfx942", "gfx950")
_MODULES = (
    "vllm._custom_ops",
    "vllm.utils.deep_gemm",
    "vllm.model_executor.kernels.linear",
    "vllm.model_executor.layers.quantization.online.fp8",
    "vllm.model_executor.layers.fused_moe.oracle.fp8",
    "vllm.model_executor.layers.fused_moe.experts.cutlass_moe",
    "vllm.model_executor.layers.quantization.utils.w8a8_utils",
    "vllm.model_executor.layers.quantization.utils.marlin_utils_fp8",
    "vllm.model_executor.layers.quantization.utils.marlin_utils_fp4",
    "vllm.model_executor.layers.quantization.utils.marlin_utils_test",
)
_CONFIG = VllmConfig()  # It cannot be made while a model is built.
_CAPABILITIES = {"gfx90a": 90, "gfx942": 94, "gfx950": 95}


@contextlib.contextmanager
def pretend(chip: Chip, *, values: bool = False) -> Iterator[None]:
    """What is imported of vLLM here was imported on a CPU. values: tensors have memory, and products are computed."""
    for name in _MODULES:
        importlib.import_module(name)
    amd = isinstance(chip, str)
    number = _CAPABILITIES[chip] if isinstance(chip, str) else chip
    fnuz, fp8 = chip == "gfx942", number >= (94 if amd else 89)

    def as_number(capability: Any) -> int:
        return capability if isinstance(capability, int) else capability[0] * 10 + capability[1]

    answers: dict[str, Any] = {
        "get_device_capability": DeviceCapability(number // 10, number % 10),
        "supports_fp8": fp8,
        "fp8_dtype": torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn,
        "is_fp8_fnuz": fnuz,
        "is_cpu": False,
        "is_cuda": not amd,
        "is_cuda_alike": True,
        "is_rocm": amd,
        "supports_mx": chip == "gfx950",
        "get_device_name": str(chip),
    }
    with pytest.MonkeyPatch.context() as patch:
        platform = type(platforms.current_platform)
        for name, answer in answers.items():
            patch.setattr(platform, name, classmethod(lambda cls, *_, answer=answer, **__: answer))
        for name, function in {
            "has_device_capability": lambda c: as_number(c) <= number,
            "is_device_capability": lambda c: as_number(c) == number,
            "is_device_capability_family": lambda c: as_number(c) // 10 == number // 10,
        }.items():
            patch.setattr(platform, name, classmethod(lambda cls, c, *_, f=function, **__: f(c)))
        patch.setattr(platform, "_enum", PlatformEnum.ROCM if amd else PlatformEnum.CUDA)
        patch.setattr(platform, "device_type", "cuda")
        _patch_everywhere(patch, _library(number, amd) | reference_kernels.FUNCTIONS)
        for name, operator in reference_kernels.OPERATORS.items():
            patch.setattr(torch.ops.vllm, name, operator, raising=False)
        patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        if amd:
            rocm: Any = ModuleType("vllm.platforms.rocm")
            rocm.__getattr__ = lambda name: lambda *_: name.removeprefix("on_") in (chip, "gfx9", "mi3xx")
            rocm.get_cdna_version = lambda: {"gfx90a": 2, "gfx942": 3, "gfx950": 4}[str(chip)]
            patch.setitem(sys.modules, "vllm.platforms.rocm", rocm)
        with set_current_vllm_config(_CONFIG), torch.device("cpu" if values else "meta"):
            yield


def _library(number: int, amd: bool) -> dict[str, Any]:
    """What vLLM's compiled library, and its checks that were made on import, say on the chip."""
    return {
        "cutlass_scaled_mm_supports_fp8": lambda c: number >= 89 and not amd,
        "cutlass_scaled_mm_supports_block_fp8": lambda c: number >= 90 and not amd,
        "cutlass_group_gemm_supported": lambda *_: 90 <= number < 110 and not amd,
        "cutlass_fp8_supported": lambda: number >= 89 and not amd,
        "cutlass_block_fp8_supported": lambda: number >= 90 and not amd,
        "CUTLASS_FP8_SUPPORTED": number >= 89 and not amd,
        "CUTLASS_BLOCK_FP8_SUPPORTED": number >= 90 and not amd,
        "is_fp8_marlin_supported": lambda: number >= 75 and not amd,
        "is_deep_gemm_supported": lambda: False,
        "num_compute_units": lambda *_: 132,
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_tensor_model_parallel_world_size": lambda: 1,
    }


def _patch_everywhere(patch: pytest.MonkeyPatch, values: dict[str, Any]) -> None:
    """In every module of vLLM that has a name, however it came by it."""
    for module in [m for name, m in sys.modules.items() if name.startswith("vllm.") and m is not None]:
        for name, value in values.items():
            if name in vars(module):
                patch.setattr(module, name, value)
