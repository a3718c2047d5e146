"""Linear layers: weights that quantize themselves under vLLM's loaders, and the product with them.

vLLM gives a method it does not know its first-generation weight loaders, on every layer class. They narrow
`param.data` and copy into it, which is all a lazy weight needs; whatever else a model's own loader does to the
parameter ends in copy_ too.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase

from qtensor.lazy.lazy_tensor import LazyWeight, LiveQTensor
from qtensor.schemes.scheme import Scheme
from qtensor.tensor.qtensor import QTensor

from .dispatch import linear_compute
from .entry import load_of
from .load import Load
from .options import Choice
from .parallel import split_axes
from .products import LinearCompute


class QTensorLinearMethod(LinearMethodBase):
    """One linear layer `[N, K]`, fused ones (qkv_proj, gate_up_proj) as one matrix.

    After loading the layer has what vLLM's own quantized layers have: `weight`, `weight_scale` (per-block:
    `weight_scale_inv`) and, for nvfp4, `weight_global_scale`, as ordinary Parameters in the layout the device's kernel
    wants.
    """

    def __init__(self, choice: Choice, prefix: str, scheme: Scheme) -> None:
        self.choice, self.prefix, self.scheme = choice, prefix, scheme
        self.load: Load | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        shape = (sum(output_partition_sizes), input_size_per_partition)
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = input_size_per_partition
        layer.output_size_per_partition = shape[0]
        layer.orig_dtype = params_dtype
        layer.weight_block_size = list(self.scheme.format.block) if self.scheme.format.granularity == "block" else None
        self.compute = self.choose(shape, input_size, params_dtype)
        self.load = load_of(self.choice)
        attributes = {"input_dim": 1, "output_dim": 0, **extra_weight_attrs}
        split = split_axes(rows=shape[0] < output_size, columns=shape[1] < input_size)
        self.load.arm(
            self.prefix, layer, "weight", shape, params_dtype, self.scheme, self.publish, attributes, split,
            self.compute.read,
        )  # fmt: skip

    def choose(self, shape: tuple[int, int], all_columns: int, dtype: torch.dtype) -> LinearCompute:
        """What multiplies with the weight. all_columns: of the layer on all ranks."""
        return linear_compute(self.scheme, self.choice.options, shape, dtype, self.prefix, all_columns=all_columns)

    def publish(self, layer: Any) -> None:
        """Give the layer its finished weight in the kernel's format. `layer.weight` is complete and quantized."""
        weight = layer.weight
        assert isinstance(weight, QTensor)
        del layer._parameters["weight"]
        self.compute.publish(layer, weight)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Verify and publish, for loaders that do not call `model.load_weights`. The weights are quantized already."""
        if isinstance(getattr(layer, "weight", None), (LazyWeight, LiveQTensor)):
            assert self.load is not None
            self.load.finish()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x `[..., K]` → `[..., N]`."""
        return self.compute.apply(layer, x, bias)

    def dequantize_weight(self, layer: Any) -> torch.Tensor:
        """The weight in high precision `[N, K]`, for vLLM's code that absorbs or requantizes it."""
        return self.compute.dequantize(layer)
