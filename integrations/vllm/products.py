"""The products with published weights: on a CPU qtensor's own kernels, on a GPU vLLM's fp8 kernels.

A CPU has no fp8 units, so activations stay as they are there unless the option `activation` says "dynamic"; the
product decodes the weight on the way. On a GPU vLLM chooses the kernel as it does for its own fp8 layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from qtensor import kernels
from qtensor.kernels import FORMATS, Parts
from qtensor.schemes.scheme import Scheme
from qtensor.tensor.qtensor import QTensor

from . import compat
from .layers import assembled, frozen, part_names, publish_parts, published_parts


class LinearCompute(Protocol):
    """publish: give the layer its weight, under the names of `part_names`. apply: the product. dequantize: `[N, K]`."""

    def publish(self, layer: Any, weight: QTensor) -> None: ...
    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...
    def dequantize(self, layer: Any) -> torch.Tensor: ...


class CpuLinear:
    """The parts of a weight `[N, K]` as they are, of every scheme; see `WeightFormat` for their shapes."""

    def __init__(self, scheme: Scheme, round_activations: bool) -> None:
        self.scheme, self.fmt, self.round_activations = scheme, scheme.format, round_activations

    def publish(self, layer: Any, weight: QTensor) -> None:
        publish_parts(layer, weight)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        parts = published_parts(layer, self.fmt)
        # An operator's dispatch takes 10 µs; only compilers need to see one.
        linear = torch.ops.qtensor_vllm.linear if torch.compiler.is_compiling() else product
        out: torch.Tensor = linear(flat, parts, self.fmt.name, self.round_activations, bias)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])

    def read(self, layer: Any) -> QTensor:
        """The weight in row-major order."""
        parts = published_parts(layer, self.fmt)
        return assembled(parts, self.scheme, layer.orig_dtype, layer.input_size_per_partition)

    def dequantize(self, layer: Any) -> torch.Tensor:
        return self.read(layer).dequantize()


class GpuLinear:
    """vLLM's fp8 kernel for the layer: weight fp8 `[K, N]`, a transposed view of `[N, K]` memory (per-block `[N, K]`).
    padding: rows of zeros after the weight's own, for a kernel that wants a multiple of 16.

    Not tested where this was written: no GPU was at hand.
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.fmt = scheme.format
        self.kernel = compat.fp8_linear_kernel(scheme, shape, dtype, torch.get_default_dtype())
        by_row = self.fmt.granularity == "channel" and not compat.pads_rows_alone(self.kernel)
        self.padding = -shape[0] % 16 if by_row else 0

    def publish(self, layer: Any, weight: QTensor) -> None:
        layer.input_scale = None
        parts = weight.parts()
        if self.padding:
            parts = parts.map(lambda part: torch.cat([part, part.new_zeros(self.padding, part.shape[1])]))
        for part_name, part in zip(part_names(self.fmt), parts, strict=True):
            layer.register_parameter(part_name, frozen(part))
        if self.fmt.granularity != "block":
            layer.register_parameter("weight", frozen(parts.qdata.t()))
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not self.padding:
            out: torch.Tensor = self.kernel.apply_weights(layer, x, bias)
            return out
        padded = None if bias is None else torch.nn.functional.pad(bias, (0, self.padding))
        return self.kernel.apply_weights(layer, x, padded)[..., : -self.padding].contiguous()

    def dequantize(self, layer: Any) -> torch.Tensor:
        eye = torch.eye(layer.input_size_per_partition, dtype=layer.orig_dtype, device=layer.weight.device)
        return self.apply(layer, eye, None).t()


# Custom operators, so that torch.compile calls the kernels instead of tracing into them ------------------------------


def product(
    x: torch.Tensor, weight: Sequence[torch.Tensor], fmt: str, round_x: bool, bias: torch.Tensor | None
) -> torch.Tensor:
    """x `[M, K]` times the weight of these parts, plus bias: `[M, N]`. round_x: with x quantized to fp8 and back."""
    form = FORMATS[fmt]
    parts = Parts(*weight)
    if round_x:
        x = kernels.round_trip_activation(x, form)
    return kernels.serving(x, *parts).linear(x, parts, form, bias)


def _product_shape(
    x: torch.Tensor, weight: Sequence[torch.Tensor], fmt: str, round_x: bool, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight[0].shape[0]))


_library = torch.library.Library("qtensor_vllm", "FRAGMENT")


def _define(name: str, signature: str, run: Any, shape: Any) -> None:
    _library.define(f"{name}{signature}")
    _library.impl(name, run, "CPU")
    _library._register_fake(name, shape)


_define(
    "linear",
    "(Tensor x, Tensor[] weight, str fmt, bool round_x, Tensor? bias) -> Tensor",
    product,
    _product_shape,
)
