"""Products on a GPU: vLLM's kernels for linear layers, each given a finished weight in the layout that it packs from.

What a kernel makes of a weight's bytes is its own business: tiles of Marlin, CUTLASS's prepacked matrix, a swizzle. The
weight is read back through `packed.read`, which learns the order of the bytes from the kernel itself.

Nothing of this has run on a GPU; tests/vllm/test_gpus.py and test_gpu_values.py say how it was tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from qtensor.kernels import Parts
from qtensor.schemes.scheme import Scheme
from qtensor.tensor.qtensor import QTensor

from . import choices
from .layers import assembled, frozen, give_back, part_names
from .packed import Geometry, read


class GpuLinear:
    """One of vLLM's kernels, and the layout it is handed a weight `[N, K]` in: as it is, row-major.

    rounds: the dtype that the kernel keeps scales in; None if it keeps them as they are.
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, kernel: Any) -> None:
        self.scheme, self.fmt, self.shape, self.dtype, self.kernel = scheme, scheme.format, shape, dtype, kernel
        self.adds_bias = not choices.is_marlin(kernel)

    def publish(self, layer: Any, weight: QTensor) -> None:
        parts = weight.parts()
        self.pack(layer, parts)
        give_back(layer, parts)

    def pack(self, layer: Any, parts: Parts) -> None:
        """Give the layer these parts in the kernel's layout. Their memory may become the layer's, or be overwritten."""
        self.hand_over(layer, parts)
        with _without_bias(layer):
            self.kernel.process_weights_after_loading(layer)

    def hand_over(self, layer: Any, parts: Parts) -> None:
        """Register the parameters that the kernel's processing begins with."""
        for name, part in zip(part_names(self.fmt), parts, strict=True):
            layer.register_parameter(name, frozen(part))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.adds_bias or bias is None:
            out: torch.Tensor = self.kernel.apply_weights(layer, x, bias)
            return out
        # Marlin wants the bias in an order of its own; the layer's stays in the model's.
        return self.kernel.apply_weights(layer, x, None) + bias

    def read(self, layer: Any) -> QTensor | None:
        """The weight in row-major order, as it is served; None where the kernel's layout cannot be told."""
        parts = read(layer, Geometry(self.fmt, self.shape), self.pack, self._empty_layer)
        return None if parts is None else assembled(parts, self.scheme, layer.orig_dtype, self.shape[1])

    def dequantize(self, layer: Any) -> torch.Tensor:
        weight = self.read(layer)
        if weight is not None:
            return weight.dequantize()
        eye = torch.eye(self.shape[1], dtype=layer.orig_dtype, device=layer.weight.device)
        return self.apply(layer, eye, None).t()

    def _empty_layer(self, layer: Any) -> Any:
        """A layer without weights that the kernel cannot tell from this one."""
        twin = torch.nn.Module()
        homes = ("_parameters", "_buffers", "_modules")
        twin.__dict__.update({k: v for k, v in layer.__dict__.items() if k not in homes})
        return twin


class Fp8Linear(GpuLinear):
    """fp8 with fp32 scales: `[K, N]`, a transposed view of `[N, K]` memory (per-block `[N, K]`).

    padding: rows of zeros after the weight's own, for a kernel that wants a multiple of 16.
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(scheme, shape, dtype, choices.fp8_kernel(scheme, shape, dtype))
        by_row = self.fmt.granularity == "channel" and not choices.pads_rows_alone(self.kernel)
        self.padding = -shape[0] % 16 if by_row else 0

    def hand_over(self, layer: Any, parts: Parts) -> None:
        layer.input_scale = None
        if self.padding:
            parts = parts.map(lambda part: torch.cat([part, part.new_zeros(self.padding, part.shape[1])]))
        super().hand_over(layer, parts)
        if self.fmt.granularity != "block":
            layer.register_parameter("weight", frozen(parts.qdata.t()))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not self.padding:
            return super().apply(layer, x, bias)
        padded = None if bias is None else torch.nn.functional.pad(bias, (0, self.padding))
        return super().apply(layer, x, padded)[..., : -self.padding].contiguous()


class GroupedLinear(GpuLinear):
    """mxfp8, mxfp4 and nvfp4, row-major, by vLLM's names."""

    def __init__(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(scheme, shape, dtype, choices.grouped_kernel(scheme, shape))

    def hand_over(self, layer: Any, parts: Parts) -> None:
        layer.params_dtype = self.dtype
        super().hand_over(layer, parts)


class IntegerLinear(GpuLinear):
    """int8 and int4 with activations as they are: unsigned, in int32, and scales in the dtype of the activations.

    int8_per_channel's scales are in that dtype already; those of int4 are rounded here, of groups of 32 in fp16 alone.
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, int], all_columns: int, dtype: torch.dtype) -> None:
        super().__init__(scheme, shape, dtype, choices.integer_kernel(scheme, shape, all_columns, dtype))
        self.sign = 0x88 if self.fmt.per_byte == 2 else 0x80

    def hand_over(self, layer: Any, parts: Parts) -> None:
        unsigned = parts.qdata.view(torch.uint8).bitwise_xor_(self.sign).view(torch.int32)
        per_item = 4 * self.fmt.per_byte
        weight, scale = choices.packed_parameters(unsigned, parts.scale.to(self.dtype), per_item)
        layer.register_parameter("weight", weight)
        layer.register_parameter("weight_scale", scale)


class Int8Int8Linear(GpuLinear):
    """int8 with activations rounded to int8, where the option `activation` asks for it."""

    def __init__(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(scheme, shape, dtype, choices.int8_kernel())

    def hand_over(self, layer: Any, parts: Parts) -> None:
        layer.input_scale = layer.input_zero_point = layer.azp_adj = None
        super().hand_over(layer, parts)


@contextlib.contextmanager
def _without_bias(layer: Any) -> Iterator[None]:
    """Marlin's processing reorders a bias that it finds, where it is, each time."""
    held = {"bias": layer._parameters.pop("bias")} if "bias" in layer._parameters else {}
    try:
        yield
    finally:
        layer._parameters.update(held)
