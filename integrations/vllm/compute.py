"""The products with published weights: on a CPU qtensor's own kernels, on a GPU vLLM's fp8 kernels.

A CPU has no fp8 units, so activations stay as they are there unless the option `activation` says "dynamic"; the
product decodes the weight on the way. On a GPU vLLM chooses the kernel as it does for its own fp8 layers.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from qtensor import kernels
from qtensor.kernels import FORMATS, WeightFormat
from qtensor.quantized import QTensor
from qtensor.scheme import Scheme

from . import compat
from .options import Options


class LinearCompute(Protocol):
    """scale: the name of a layer's scale. publish: set it and `weight` on the layer. apply: the product. dequantize:
    `[N, K]`."""

    scale: str

    def publish(self, layer: Any, weight: QTensor) -> None: ...
    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...
    def dequantize(self, layer: Any) -> torch.Tensor: ...


def linear_compute(scheme: Scheme, options: Options, shape: tuple[int, int], dtype: torch.dtype) -> LinearCompute:
    """What multiplies with weights of this scheme on the device that vLLM is building the model for."""
    if torch.get_default_device().type == "cpu":
        return CpuLinear(scheme, options.activation == "dynamic")
    return GpuLinear(scheme, shape, dtype)


def scale_name(fmt: WeightFormat) -> str:
    """vLLM's name for a weight's scale."""
    return "weight_scale_inv" if fmt.granularity == "block" else "weight_scale"


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class CpuLinear:
    """weight fp8 `[N, K]`, scale as `WeightFormat.scale_shape` says."""

    def __init__(self, scheme: Scheme, round_activations: bool) -> None:
        self.fmt, self.round_activations = scheme.format, round_activations
        self.scale = scale_name(scheme.format)

    def publish(self, layer: Any, weight: QTensor) -> None:
        layer.register_parameter("weight", frozen(weight.qdata))
        layer.register_parameter(self.scale, frozen(weight.scale))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scale = layer._parameters[self.scale]
        assert scale is not None
        out = torch.ops.qtensor_vllm.linear(flat, layer.weight, scale, self.fmt.name, self.round_activations, bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    def dequantize(self, layer: Any) -> torch.Tensor:
        return kernels.dequantize(layer.weight, getattr(layer, self.scale), self.fmt, layer.orig_dtype)


class GpuLinear:
    """vLLM's fp8 kernel for the layer: weight fp8 `[K, N]`, a transposed view of `[N, K]` memory (per-block `[N, K]`).

    Not tested where this was written: no GPU was at hand.
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.fmt, self.scale = scheme.format, scale_name(scheme.format)
        self.kernel = compat.fp8_linear_kernel(scheme, shape, dtype, torch.get_default_dtype())

    def publish(self, layer: Any, weight: QTensor) -> None:
        layer.input_scale = None
        blocks = self.fmt.granularity == "block"
        layer.register_parameter("weight", frozen(weight.qdata if blocks else weight.qdata.t()))
        layer.register_parameter(self.scale, frozen(weight.scale))
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = self.kernel.apply_weights(layer, x, bias)
        return out

    def dequantize(self, layer: Any) -> torch.Tensor:
        eye = torch.eye(layer.input_size_per_partition, dtype=layer.orig_dtype, device=layer.weight.device)
        return self.apply(layer, eye, None).t()


# Custom operators, so that torch.compile calls the kernels instead of tracing into them ------------------------------


def _linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, fmt: str, round_x: bool, bias: torch.Tensor | None
) -> torch.Tensor:
    form = FORMATS[fmt]
    if round_x:
        x = kernels.round_trip_activation(x, form)
    return kernels.linear(x, weight, scale, form, bias)


def _linear_shape(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, fmt: str, round_x: bool, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_library = torch.library.Library("qtensor_vllm", "FRAGMENT")


def _define(name: str, signature: str, run: Any, shape: Any) -> None:
    _library.define(f"{name}{signature}")
    _library.impl(name, run, "CPU")
    _library._register_fake(name, shape)


_define(
    "linear",
    "(Tensor x, Tensor weight, Tensor scale, str fmt, bool round_x, Tensor? bias) -> Tensor",
    _linear,
    _linear_shape,
)
