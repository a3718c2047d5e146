"""Int8 weights with int8 activations (W8A8) on a CPU, where the option `activation` asks for them.

Each row of x is rounded to int8 by its largest magnitude, as vLLM's own W8A8 does; products of integers are summed
exactly, scaled in fp32 and rounded. On chips with VNNI that is vLLM's oneDNN. It keeps the bytes of a weight in an
order of its own, which takes the place of the row-major one: there is no second copy, and `Int8Linear.read` gives the
row-major one back. Other chips take qtensor's loops, with the same integers. Routed experts stay weight-only: their
products are no faster with int8 activations here.
"""

from __future__ import annotations

from typing import Any

import torch

from qtensor import kernels
from qtensor.kernels import INT8_PER_CHANNEL, Parts
from qtensor.schemes.scheme import int8_per_channel
from qtensor.tensor.qtensor import QTensor

from . import compat
from .layers import assembled, frozen, give_back, publish_parts, published_parts
from .loops import kept_memory, round_into
from .products import CpuLinear, _define

_ROWS = 256
_SUMS = 1 << 23  # fp32, held at a time
_ONE = torch.ones((), dtype=torch.float32, device="cpu")


class Int8Linear(CpuLinear):
    """A weight `[N, K]` of int8. packed: oneDNN keeps it, and the layer's `weight` is empty, as vLLM leaves it for
    products that keep their own."""

    def __init__(self, packed: bool) -> None:
        super().__init__(int8_per_channel, round_activations=False)
        self.packed = packed
        self._saves: Any = None  # The layer whose state dictionary `_put_weight` sees.

    def publish(self, layer: Any, weight: QTensor) -> None:
        publish_parts(layer, weight)
        if self.packed and weight.numel():
            layer.int8_product = compat.int8_product(weight.qdata.contiguous(), layer.weight_scale.data)
            layer.register_parameter("weight", frozen(torch.empty(0, dtype=torch.int8, device="cpu")))
            give_back(layer, weight.parts())
            if self._saves is not layer:
                self._saves = layer
                layer.register_state_dict_post_hook(lambda *args: self._put_weight(*args))  # torch marks it

    def _put_weight(self, layer: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """What saves a model finds the weight: in row-major order, made for it."""
        kept = state.get(f"{prefix}weight")
        if kept is not None and not kept.numel():
            state[f"{prefix}weight"] = self.read(layer).qdata

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        weight, scale = published_parts(layer, self.fmt).values()
        if weight.numel():
            out = torch.ops.qtensor_vllm.linear_int8(flat, weight, scale, bias)
        else:
            packed = torch.ops.qtensor_vllm.packed_int8 if torch.compiler.is_compiling() else packed_int8
            out = packed(flat, layer.int8_product.handler_tensor, scale.shape[0], bias)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])

    def read(self, layer: Any) -> QTensor:
        weight, scale = published_parts(layer, self.fmt).values()
        if not weight.numel():
            weight = _unpacked(layer.int8_product, scale)
        return assembled((weight, scale), self.scheme, layer.orig_dtype, layer.input_size_per_partition)


def _unpacked(product: Any, scale: torch.Tensor) -> torch.Tensor:
    """The integers `[N, K]`: the product with the rows of the identity is each of them times its row's scale."""
    rows, cols = product.n, product.k
    found = torch.empty((rows, cols), dtype=torch.int8, device="cpu")
    worth = torch.where(scale == 0, 1.0, scale).t()
    for start in range(0, cols, _ROWS):
        count = min(_ROWS, cols - start)
        ones = torch.zeros((count, cols), dtype=torch.int8, device="cpu")
        ones[:, start : start + count].fill_diagonal_(1)
        out = torch.empty((count, rows), dtype=torch.float32, device="cpu")
        torch.ops._C.onednn_scaled_mm(out, ones, _ONE, None, None, None, product.handler_tensor)
        found[:, start : start + count] = (out / worth).round_().t()
    return found


def packed_int8(x: torch.Tensor, handler: torch.Tensor, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
    """x `[M, K]`, rounded to int8, times a weight `[rows, K]` that oneDNN keeps, plus bias: `[M, rows]`.

    oneDNN is asked for sums in fp32, as if all rows of x had the step 1; what vLLM's operator does with the true ones
    takes longer than the product.
    """
    count = x.shape[0]
    out = x.new_empty((count, rows))
    if not out.numel():
        return out
    whole = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    steps = torch.empty((count, 1), dtype=torch.float32, device="cpu")
    torch.ops._C.dynamic_scaled_int8_quant(whole, x.contiguous(), steps, None)
    most = max(1, _SUMS // rows)
    with kept_memory(min(count, most) * rows * 4) as room:
        for start in range(0, count, most):
            stop = min(start + most, count)
            sums = room[: (stop - start) * rows * 4].view(torch.float32).view(stop - start, rows)
            torch.ops._C.onednn_scaled_mm(sums, whole[start:stop], _ONE, None, None, None, handler)
            round_into(out[start:stop], sums, steps[start:stop], bias)
    return out


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x `[M, K]` as whole numbers of at most 127, in a dtype that the loops take, and what they are worth `[M, 1]`."""
    step = x.abs().amax(-1, keepdim=True).float() / 127
    inverse = torch.where(step == 0, 0.0, 1 / step.double()).float()
    whole = (x.float() * inverse).round_().clamp_(-128, 127)
    return whole.to(torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32), step


def linear_int8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x `[M, K]`, rounded to int8, times a weight in row-major order, plus bias: `[M, N]`."""
    if not x.numel():
        return x.new_zeros((x.shape[0], weight.shape[0]))
    whole, step = round_rows(x)
    parts = Parts(weight, scale)
    out = kernels.serving(whole, *parts).linear(whole, parts, INT8_PER_CHANNEL) * step
    return (out if bias is None else out + bias).to(x.dtype)


_define(
    "linear_int8",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    linear_int8,
    lambda x, weight, scale, bias: x.new_empty((x.shape[0], weight.shape[0])),
)
_define(
    "packed_int8",
    "(Tensor x, Tensor handler, int rows, Tensor? bias) -> Tensor",
    packed_int8,
    lambda x, handler, rows, bias: x.new_empty((x.shape[0], rows)),
)
