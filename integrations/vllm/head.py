"""The output head, and the embedding it is tied to: with the option lm_head both are quantized, as one weight.

A model ties its head while it is built. The embedding's plain weight is replaced by a lazy one at that moment; the
head keeps no weight of its own and multiplies with the embedding's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qtensor.errors import QTensorError
from qtensor.schemes.scheme import SCHEMES

from . import compat
from .dispatch import linear_compute
from .layers import assembled, published_parts
from .linear import QTensorLinearMethod
from .products import CpuLinear, LinearCompute, _define


class QTensorHeadMethod(QTensorLinearMethod):
    """An output head `[V, K]`, tied or not."""

    embedding_layer: Any = None

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x `[..., K]` → `[..., V]`."""
        tied = self.embedding_layer
        return super().apply(layer, x, bias) if tied is None else tied.quant_method.apply(tied, x, bias)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> nn.Module:
        """Quantize the embedding instead, and use its weight from here on."""
        assert self.load is not None
        if not isinstance(self.compute, CpuLinear):
            raise QTensorError(
                f"{self.prefix}: this output head is tied to the embedding, which a GPU's kernels cannot look up; "
                "leave the option lm_head out"
            )
        name = compat.embedding_name(self.load.served.root, embed_tokens)
        method = QTensorEmbeddingMethod(self.choice, name, self.scheme)
        weight = embed_tokens._parameters.pop("weight")
        self.load.disarm(layer, "weight")
        method.create_weights(
            embed_tokens,
            weight.shape[1],
            [weight.shape[0]],
            weight.shape[1],
            weight.shape[0],
            weight.dtype,
            **vars(weight),
        )
        embed_tokens.quant_method = method
        self.embedding_layer = embed_tokens
        return layer


class QTensorEmbeddingMethod(QTensorLinearMethod):
    """A table of embeddings `[V, K]` that is an output head too. Its rows have to lie as they are looked up."""

    def choose(self, shape: tuple[int, int], all_columns: int, dtype: torch.dtype) -> LinearCompute:
        return linear_compute(self.scheme, self.choice.options, shape, dtype, self.prefix, packs=False)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """input_ `[...]` of row numbers → `[..., K]`; only these rows are dequantized."""
        parts = list(published_parts(layer, self.scheme.format).values())
        out: torch.Tensor = torch.ops.qtensor_vllm.embedding(
            input_, parts, self.scheme.format.name, layer.orig_dtype, layer.input_size_per_partition
        )
        return out


def _embedding(
    rows: torch.Tensor, weight: Sequence[torch.Tensor], scheme: str, dtype: torch.dtype, cols: int
) -> torch.Tensor:
    return F.embedding(rows, assembled(weight, SCHEMES[scheme], dtype, cols)).contiguous()


_define(
    "embedding",
    "(Tensor rows, Tensor[] weight, str scheme, ScalarType dtype, int cols) -> Tensor",
    _embedding,
    lambda rows, weight, scheme, dtype, cols: weight[0].new_empty((*rows.shape, cols), dtype=dtype),
)
