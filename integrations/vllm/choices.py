"""vLLM's own choice of a kernel for a linear layer on a GPU, by scheme: the same functions that its methods ask, in the
spelling of each version."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from qtensor.errors import ConfigError
from qtensor.schemes.scheme import Scheme

MODULE = "QTensorLinearMethod"


def fp8_kernel(scheme: Scheme, weight_shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """For the three fp8 schemes with fp32 scales. Chips without fp8 units get Marlin, which multiplies weight-only."""
    from vllm.model_executor.kernels.linear import init_fp8_linear_kernel
    from vllm.model_executor.layers.quantization.utils import quant_utils

    granularity = scheme.format.granularity
    if granularity == "block":
        weight_key = quant_utils.create_fp8_quant_key(
            static=True, group_shape=quant_utils.GroupShape(*scheme.format.block)
        )
        activation_key = quant_utils.kFp8Dynamic128Sym
    elif granularity == "channel":
        weight_key, activation_key = quant_utils.kFp8StaticChannelSym, quant_utils.kFp8DynamicTokenSym
    else:
        from vllm.model_executor.layers.quantization.utils.w8a8_utils import cutlass_fp8_supported

        weight_key = quant_utils.kFp8StaticTensorSym
        activation_key = (
            quant_utils.kFp8DynamicTokenSym if cutlass_fp8_supported() else quant_utils.kFp8DynamicTensorSym
        )
    return init_fp8_linear_kernel(
        activation_quant_key=activation_key,
        weight_quant_key=weight_key,
        weight_shape=weight_shape,
        input_dtype=dtype,
        out_dtype=torch.get_default_dtype(),
        module_name=MODULE,
    )


def pads_rows_alone(kernel: Any) -> bool:
    """Whether the kernel pads a weight whose rows are no multiple of 16, with a scale for each, by itself. vLLM's
    CUTLASS kernel means to, and fails: it sets an attribute of the padded weight twice."""
    return type(kernel).__name__ != "CutlassFP8ScaledMMLinearKernel"


def is_marlin(kernel: Any) -> bool:
    return "Marlin" in type(kernel).__name__


def grouped_kernel(scheme: Scheme, weight_shape: tuple[int, int]) -> Any:
    """For mxfp8, mxfp4 and nvfp4. The 4-bit ones multiply weight-only: activations of four bits would be another
    model. Raises ValueError where vLLM would decode the whole weight, at each product or once, into memory."""
    from vllm.model_executor.kernels import linear

    if scheme.format.name == "mxfp8":
        takes_shape = "weight_shape" in inspect.signature(linear.init_mxfp8_linear_kernel).parameters
        kernel = linear.init_mxfp8_linear_kernel(**({"weight_shape": weight_shape} if takes_shape else {}))
    elif scheme.format.name == "mxfp4":
        kernel = linear.init_mxfp4_linear_kernel()
    else:
        kernel = linear.init_nvfp4_linear_kernel(use_a16=True)
    name = type(kernel).__name__
    whole = 128  # Columns that gfx950's kernel multiplies at a time.
    if name.startswith("Emulation"):
        raise ValueError("it would decode the weight to 16 bits and multiply that")
    if name == "RocmDotScaledMxfp8LinearKernel" and weight_shape[1] % whole:
        raise ValueError(f"{weight_shape[1]} input columns are no multiple of {whole}, and it would decode the weight")
    return kernel


def integer_kernel(scheme: Scheme, weight_shape: tuple[int, int], all_columns: int, dtype: torch.dtype) -> Any:
    """For int8 and int4 with activations as they are. all_columns: of the layer on all ranks."""
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.scalar_type import scalar_types

    fmt = scheme.format
    config = MPLinearLayerConfig(
        full_weight_shape=(all_columns, weight_shape[0]),
        partition_weight_shape=(weight_shape[1], weight_shape[0]),
        weight_type=scalar_types.uint4b8 if fmt.per_byte == 2 else scalar_types.uint8b128,
        act_type=dtype,
        group_size=fmt.block[1] if fmt.granularity == "group" else -1,
        zero_points=False,
    )
    chosen = choose_mp_linear_kernel(config)
    can, why_not = chosen.can_implement(config)
    if not can:
        raise ValueError(why_not)
    return chosen(config, w_q_param_name="weight", w_s_param_name="weight_scale")


def int8_kernel() -> Any:
    """For int8 with activations that are rounded to int8, a step for each token."""
    from vllm.model_executor.kernels.linear import init_int8_linear_kernel

    return init_int8_linear_kernel(
        is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name=MODULE
    )


def packed_parameters(weight: torch.Tensor, scale: torch.Tensor, per_item: int) -> tuple[Any, Any]:
    """Unsigned integers, several to an int32 `[N, K / per_item]`, and scales `[N, groups]`, as parameters of the
    classes that kernels for integers ask for."""
    from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

    def no_loader(*_: Any) -> None:
        raise ConfigError("qtensor: a packed weight is not loaded; its layer's weight is")

    return (
        PackedvLLMParameter(
            data=weight,
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=per_item,
            weight_loader=no_loader,
        ),
        GroupQuantScaleParameter(data=scale, input_dim=1, output_dim=0, weight_loader=no_loader),
    )
