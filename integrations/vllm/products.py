"""The products with published weights on a CPU: qtensor's own kernels.

A CPU has no fp8 units, so activations stay as they are unless the option `activation` says "dynamic"; the product
decodes the weight on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from qtensor import kernels
from qtensor.kernels import FORMATS, Parts
from qtensor.schemes.scheme import Scheme
from qtensor.tensor.qtensor import QTensor

from .layers import assembled, publish_parts, published_parts
from .loops import Kept


class LinearCompute(Protocol):
    """publish: give the layer its weight, under the names of `part_names`. apply: the product. read: the weight in
    row-major order, None if it cannot be told. dequantize: `[N, K]`."""

    def publish(self, layer: Any, weight: QTensor) -> None: ...
    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...
    def read(self, layer: Any) -> QTensor | None: ...
    def dequantize(self, layer: Any) -> torch.Tensor: ...


class CpuLinear:
    """The parts of a weight `[N, K]` as they are, of every scheme; see `WeightFormat` for their shapes."""

    def __init__(self, scheme: Scheme, round_activations: bool) -> None:
        self.scheme, self.fmt, self.round_activations = scheme, scheme.format, round_activations
        self.kept = Kept()

    def publish(self, layer: Any, weight: QTensor) -> None:
        self.kept.drop()
        publish_parts(layer, weight)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        # An operator's dispatch takes 10 µs, and finding the weight's loops anew 50; only compilers need to see one.
        if torch.compiler.is_compiling():
            parts = list(published_parts(layer, self.fmt).values())
            out: torch.Tensor = torch.ops.qtensor_vllm.linear(flat, parts, self.fmt.name, self.round_activations, bias)
        else:
            few = self.kept(layer, flat, bias)
            out = self._product(layer, flat, bias) if few is None else few
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])

    def _product(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        parts = published_parts(layer, self.fmt)
        if x.dtype == torch.bfloat16 and not self.round_activations:
            self.kept.for_linear(parts, self.fmt, x.shape[1])
        return product(x, list(parts.values()), self.fmt.name, self.round_activations, bias)

    def read(self, layer: Any) -> QTensor:
        """The weight in row-major order."""
        parts = published_parts(layer, self.fmt)
        return assembled(list(parts.values()), self.scheme, layer.orig_dtype, layer.input_size_per_partition)

    def dequantize(self, layer: Any) -> torch.Tensor:
        return self.read(layer).dequantize()


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
    _library.impl(name, shape, "Meta")  # `register_fake` looks for its caller's source: 10 ms for each.


_define(
    "linear",
    "(Tensor x, Tensor[] weight, str fmt, bool round_x, Tensor? bias) -> Tensor",
    product,
    _product_shape,
)
