"""The products with published weights: on a CPU qtensor's own kernels, on a GPU vLLM's fp8 kernels.

A CPU has no fp8 units, so activations stay as they are there unless the option `activation` says "dynamic"; the
product decodes the weight on the way. On a GPU vLLM chooses the kernel as it does for its own fp8 layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from qtensor import kernels
from qtensor.errors import ConfigError
from qtensor.kernels import FORMATS, Parts, WeightFormat
from qtensor.schemes.scheme import Scheme, fp8_per_block, fp8_per_channel, fp8_per_tensor
from qtensor.tensor.qtensor import QTensor
from qtensor.text import printable

from . import compat
from .layers import assembled
from .options import Options

_SERVED_ON_GPUS = (fp8_per_tensor, fp8_per_channel, fp8_per_block)


class LinearCompute(Protocol):
    """publish: give the layer its weight, under the names of `part_names`. apply: the product. dequantize: `[N, K]`."""

    def publish(self, layer: Any, weight: QTensor) -> None: ...
    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...
    def dequantize(self, layer: Any) -> torch.Tensor: ...


def linear_compute(
    scheme: Scheme, options: Options, shape: tuple[int, int], dtype: torch.dtype, name: str = "this layer"
) -> LinearCompute:
    """What multiplies with weights of this scheme on the device that vLLM is building the model for.

    Raises ConfigError, with the layer's name, where nothing does.
    """
    if torch.get_default_device().type == "cpu":
        compat.permit_amx()
        return CpuLinear(scheme, options.activation == "dynamic")
    require_served_on_gpus(scheme, name)
    across = scheme.format.block[1]
    if scheme is fp8_per_block and shape[1] % across:
        raise ConfigError(
            f"qtensor: {name}: its {shape[1]} input columns are no multiple of {across}, which vLLM's kernels for "
            f"{scheme.name} on a GPU ask for. Give it another scheme with the option `targets`, such as "
            "fp8_per_channel, or leave it alone with `ignore`."
        )
    with kernel_errors(scheme, name, "fp8_per_channel, fp8_per_tensor, fp8_per_block"):
        return GpuLinear(scheme, shape, dtype)


@contextlib.contextmanager
def kernel_errors(scheme: Scheme, name: str, others: str) -> Iterator[None]:
    """That vLLM finds no kernel is a ConfigError that names the layer and what to try instead."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"qtensor: {name}: vLLM has no kernel for {scheme.name} here: {printable(str(error))}. Try another scheme "
            f"({others}), or leave the layer alone with `ignore`."
        ) from error


def require_served_on_gpus(scheme: Scheme, name: str) -> None:
    """Raise ConfigError for a scheme that has no kernel of vLLM's behind it here, and on a GPU that has none at all."""
    problem = compat.amd_problem()
    if problem is not None:
        raise ConfigError(f"qtensor: {name}: {problem}.")
    if scheme not in _SERVED_ON_GPUS:
        served = ", ".join(s.name for s in _SERVED_ON_GPUS)
        raise ConfigError(
            f"qtensor: {name}: on a GPU the vLLM plugin serves {served}; {scheme.name} it serves on a CPU only. Use "
            "one of these, or vLLM's own method of that format where it has one."
        )


def part_names(fmt: WeightFormat, weight: str = "weight") -> tuple[str, ...]:
    """The parameters of a layer that hold its weight's parts, in the order of `QTensor.parts`, by vLLM's names."""
    names = (weight, f"{weight}_scale_inv" if fmt.granularity == "block" else f"{weight}_scale")
    return (*names, f"{weight}_global_scale") if fmt.has_global_scale else names


def publish_parts(layer: Any, weight: QTensor, name: str = "weight") -> None:
    """Give the layer a weight as it is, in plain Parameters."""
    for part_name, part in zip(part_names(weight.scheme.format, name), weight.parts(), strict=True):
        layer.register_parameter(part_name, frozen(part))


def published_parts(layer: Any, fmt: WeightFormat, name: str = "weight") -> list[torch.Tensor]:
    """What `publish_parts` gave it."""
    return [layer._parameters[part_name] for part_name in part_names(fmt, name)]


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class CpuLinear:
    """The parts of a weight `[N, K]` as they are, of every scheme; see `WeightFormat` for their shapes."""

    def __init__(self, scheme: Scheme, round_activations: bool) -> None:
        self.scheme, self.fmt, self.round_activations = scheme, scheme.format, round_activations

    def publish(self, layer: Any, weight: QTensor) -> None:
        publish_parts(layer, weight)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        parts = published_parts(layer, self.fmt)
        out = torch.ops.qtensor_vllm.linear(flat, parts, self.fmt.name, self.round_activations, bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    def dequantize(self, layer: Any) -> torch.Tensor:
        parts = published_parts(layer, self.fmt)
        return assembled(parts, self.scheme, layer.orig_dtype, layer.input_size_per_partition).dequantize()


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
