"""Mixture of experts: stacks of expert matrices that quantize themselves, and the routed product with them.

w13_weight `[E, 2I, H]` holds gate and up projections (`[E, I, H]` where the activation has no gate), w2_weight
`[E, H, I]` the down projections; E counts the experts of this rank. Every row of every expert is its own unit for
per-channel scales, so gate and up may come in any order. On a CPU the product of all experts is one call
of qtensor's kernels; on a GPU it goes through vLLM's fused fp8 experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from qtensor import kernels
from qtensor.errors import QTensorError
from qtensor.kernels import FORMATS, Parts, WeightFormat
from qtensor.lazy.lazy_tensor import LazyWeight, LiveQTensor
from qtensor.schemes.scheme import Scheme, fp8_per_block, fp8_per_channel, fp8_per_tensor
from qtensor.tensor.qtensor import QTensor

from . import compat
from .dispatch import kernel_errors, require_fp8_experts
from .entry import load_of
from .layers import frozen, publish_parts, published_parts
from .load import Load
from .loops import Kept, combine_into, few_tokens
from .options import Choice
from .parallel import split_axes
from .products import _define

_STACKS = ("w13_weight", "w2_weight")
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai", "silu_no_mul", "gelu_no_mul", "relu2_no_mul")


def expert_method(choice: Choice, prefix: str, scheme: Scheme, layer: Any) -> Any:
    """The method for a layer of routed experts, on the device that vLLM is building the model for."""
    if compat.on_cpu():
        problem = compat.cpu_experts_problem()
        if problem is not None:
            raise QTensorError(f"{prefix}: {problem}")
        compat.permit_amx()
        return _cpu_class()(choice, prefix, scheme, layer.moe_config)
    if choice.experts_by_default and scheme is fp8_per_channel and not compat.has_fp8_units():
        # vLLM multiplies with Marlin there, which has no scales by row for experts.
        moe = layer.moe_config
        whole_blocks = moe.hidden_dim % 128 == moe.intermediate_size_per_partition % 128 == 0
        scheme = fp8_per_block if whole_blocks else fp8_per_tensor
    require_fp8_experts(scheme, prefix)
    with kernel_errors(scheme, prefix, "for experts: fp8_per_tensor, fp8_per_block"):
        return _gpu_class(scheme.format.granularity)(choice, prefix, scheme, layer.moe_config)


class _Experts:
    """What both devices share: arming, verification, publication."""

    choice: Choice
    prefix: str
    scheme: Scheme
    load: Load | None
    moe: Any

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        hidden, inner = hidden_size, intermediate_size_per_partition
        rows = inner * (2 if self.moe.is_act_and_mul else 1)
        layer.num_experts, layer.orig_dtype = num_experts, params_dtype
        layer.weight_block_size = list(self.scheme.format.block) if self.scheme.format.granularity == "block" else None
        layer.w13_input_scale = layer.w2_input_scale = None
        self.load = load_of(self.choice)
        for name, shape in zip(_STACKS, ((num_experts, rows, hidden), (num_experts, hidden, inner)), strict=True):
            parallel = self.moe.moe_parallel_config.tp_size > 1
            split = split_axes(rows=parallel and name == "w13_weight", columns=parallel and name == "w2_weight")
            weight = self.load.arm(
                self.prefix, layer, name, shape, params_dtype, self.scheme, self.publish, extra_weight_attrs, split
            )
            self.load.padding = True
            self._cover_padding(weight)
            self.load.padding = False
        if self.moe.has_bias:
            for name, shape2 in (("w13_bias", (num_experts, rows)), ("w2_bias", (num_experts, hidden))):
                bias = frozen(torch.zeros(shape2, dtype=params_dtype, device=weight.device))
                bias.__dict__.update(extra_weight_attrs)
                layer.register_parameter(name, bias)

    def _cover_padding(self, weight: Any) -> None:
        """Sizes that vLLM rounded up have columns and rows that no checkpoint fills: zeros."""
        hidden = getattr(self.moe, "hidden_dim_unpadded", None)
        inner = getattr(self.moe, "intermediate_size_per_partition_unpadded", None)
        _, rows, cols = weight.shape
        true_rows, true_cols = (inner, hidden) if weight.owner[1] == "w13_weight" else (hidden, inner)
        shards = 2 if weight.owner[1] == "w13_weight" and self.moe.is_act_and_mul else 1
        param = weight.params[0]
        zero = torch.zeros((), dtype=weight.dtype, device="cpu")
        if true_cols is not None and true_cols < cols:
            param.data[:, :, true_cols:].copy_(zero)
        step = rows // shards
        if true_rows is not None and true_rows < step:
            for shard in range(shards):
                param.data[:, shard * step + true_rows : (shard + 1) * step].copy_(zero)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Verify and publish, for loaders that do not call `model.load_weights`."""
        if any(isinstance(getattr(layer, name, None), (LazyWeight, LiveQTensor)) for name in _STACKS):
            assert self.load is not None
            self.load.finish()

    def publish(self, layer: Any) -> None:
        """Give the layer both finished stacks in the kernel's format."""
        weights = [layer._parameters.pop(name) for name in _STACKS]
        assert all(isinstance(w, QTensor) for w in weights)
        self._publish(layer, *weights)

    def _publish(self, layer: Any, w13: QTensor, w2: QTensor) -> None:
        raise NotImplementedError


@functools.cache
def _cpu_class() -> type:
    base: Any = compat.expert_method_base()

    class QTensorExpertsCpu(_Experts, base):  # type: ignore[misc]
        """Tokens sorted by expert, in one call for all of them."""

        def __init__(self, choice: Choice, prefix: str, scheme: Scheme, moe: Any) -> None:
            base.__init__(self, moe)
            self.choice, self.prefix, self.scheme, self.load = choice, prefix, scheme, None
            self.kept = Kept()
            activation = _activation_name(moe.activation)
            if activation not in _ACTIVATIONS:
                raise QTensorError(
                    f"{prefix}: the CPU path has no activation {activation!r} for experts (it has "
                    f'{", ".join(_ACTIVATIONS)}); add "{prefix}" to the option `ignore`'
                )

        def _publish(self, layer: Any, w13: QTensor, w2: QTensor) -> None:
            self.kept.drop()
            for name, weight in zip(_STACKS, (w13, w2), strict=True):
                publish_parts(layer, weight, name)

        def get_fused_moe_quant_config(self, layer: Any) -> None:
            return None

        def apply(
            self,
            layer: Any,
            x: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            shared_experts: Any = None,
            shared_experts_input: torch.Tensor | None = None,
            **_: Any,
        ) -> torch.Tensor:
            """x `[T, H]`, topk_weights and topk_ids `[T, k]` (global expert numbers) → `[T, H]`."""
            compiling = torch.compiler.is_compiling()
            few = None if compiling else self.kept(layer, x, topk_ids, topk_weights)
            if few is not None:
                return few
            fmt, activation = self.scheme.format, _activation_name(layer.activation)
            w13, w2 = (published_parts(layer, fmt, name) for name in _STACKS)
            biases = getattr(layer, "w13_bias", None), getattr(layer, "w2_bias", None)
            on_input, round_x = bool(layer.apply_router_weight_on_input), self.choice.options.activation == "dynamic"
            plain = x.dtype == torch.bfloat16 and layer.expert_map is biases[0] is biases[1] is None
            if plain and not (compiling or on_input or round_x):
                inner = w13["w13_weight"].shape[1] // (1 if activation.endswith("_no_mul") else 2)
                self.kept.for_experts(w13, w2, fmt, x.shape[1], inner, _between(activation))
            stacks = list(w13.values()), list(w2.values())
            routed = topk_weights, topk_ids, layer.expert_map
            experts: Any = torch.ops.qtensor_vllm.experts if compiling else _experts
            out: torch.Tensor = experts(x, *stacks, *biases, *routed, fmt.name, activation, on_input, round_x)
            return out

    return QTensorExpertsCpu


@functools.cache
def _gpu_class(granularity: str) -> type:
    native: Any = compat.native_expert_method(granularity)

    class QTensorExpertsGpu(_Experts, native):  # type: ignore[misc]
        """vLLM's fused fp8 experts: its choice of kernel and its set-up, from weights that are quantized already.

        Not tested where this was written: no GPU was at hand.
        """

        uses_meta_device = False

        def __init__(self, choice: Choice, prefix: str, scheme: Scheme, moe: Any) -> None:
            native.__init__(self, moe=moe)
            self.choice, self.prefix, self.scheme, self.load = choice, prefix, scheme, None

        def _publish(self, layer: Any, w13: QTensor, w2: QTensor) -> None:
            scales = [w.scale.squeeze(-1) if granularity == "tensor" else w.scale for w in (w13, w2)]
            for name, weight in zip(_STACKS, (w13, w2), strict=True):
                layer.register_parameter(name, frozen(weight.qdata))
            self._setup_kernel(layer, w13.qdata, w2.qdata, *scales, None, None)

    return QTensorExpertsGpu


def _activation_name(activation: Any) -> str:
    return str(getattr(activation, "value", activation))


# The product on a CPU -----------------------------------------------------------------------------------------------


_PAIRS = 4096  # of a token and an expert that are multiplied at a time


def _experts(
    x: torch.Tensor,
    w13: Sequence[torch.Tensor],
    w2: Sequence[torch.Tensor],
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    fmt: str,
    activation: str,
    weight_on_input: bool,
    round_x: bool,
) -> torch.Tensor:
    """Σ over a token's experts of weight · w2(act(w13(x))), summed in fp32. Experts of other ranks add nothing.
    round_x: with activations quantized to fp8 and back.

    Pairs of a token and an expert are sorted by expert for `Backend.experts`, about `_PAIRS` of them at a time, so that
    what lies between the two matrices is held for no more.
    """
    first, second, form = Parts(*w13), Parts(*w2), FORMATS[fmt]
    if expert_map is w13_bias is w2_bias is None and not (weight_on_input or round_x):
        inner = first.qdata.shape[1] // (1 if activation.endswith("_no_mul") else 2)
        few = few_tokens(x, first, second, form, topk_ids, topk_weights, inner, _between(activation))
        if few is not None:
            return few
    local = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()].long()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = max(1, _PAIRS // topk_ids.shape[1])
    for start in range(0, x.shape[0], step):
        tokens = slice(start, start + step)
        expert, weights = local[tokens].flatten(), topk_weights[tokens]
        order = expert.argsort(stable=True)
        order = order[int((expert < 0).sum()) :]  # Those of other ranks come first.
        where = torch.full_like(expert, -1)
        where[order] = torch.arange(order.numel(), dtype=where.dtype, device=where.device)
        offsets = expert[order].bincount(minlength=first.qdata.shape[0]).cumsum(0)
        rows = x[tokens][order // topk_ids.shape[1]]
        if weight_on_input:
            rows = rows * weights.flatten()[order].unsqueeze(1).to(x.dtype)
            weights = torch.ones_like(weights)
        hidden = _activate(_routed(rows, first, form, offsets, w13_bias, round_x), activation)
        down = _routed(hidden, second, form, offsets, w2_bias, round_x)
        combine_into(out[tokens], down, where.view(-1, topk_ids.shape[1]), weights)
    return out


def _routed(
    x: torch.Tensor, parts: Parts, fmt: WeightFormat, offsets: torch.Tensor, bias: torch.Tensor | None, round_x: bool
) -> torch.Tensor:
    """x, sorted by expert, times the matrices of its experts; `round_x`: quantized to fp8 and back."""
    if round_x:
        x = kernels.round_trip_activation(x, fmt)
    return kernels.serving(x, *parts).experts(x, parts, fmt, offsets, bias)


def _between(activation: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The activation as `mixtures.experts` takes it."""
    return None if activation == "silu" else functools.partial(_activate, name=activation)


def _activate(x: torch.Tensor, name: str) -> torch.Tensor:
    """The experts' activation, `[T, 2I]` → `[T, I]`; names ending in _no_mul have no gate and keep the width."""
    if name == "swigluoai":
        # GPT-OSS: gate and up interleaved, clamped, sigmoid slope 1.702.
        gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)
    if name.endswith("_no_mul"):
        return _nonlinear(x, name.removesuffix("_no_mul"))
    gate, up = x.chunk(2, dim=-1)
    return _nonlinear(gate, name) * up


def _nonlinear(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "silu":
        return F.silu(x)
    if name == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


_define(
    "experts",
    "(Tensor x, Tensor[] w13, Tensor[] w2, Tensor? w13_bias, Tensor? w2_bias, "
    "Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, str fmt, str activation, bool weight_on_input, "
    "bool round_x) -> Tensor",
    _experts,
    lambda x, *_: torch.empty_like(x),
)
