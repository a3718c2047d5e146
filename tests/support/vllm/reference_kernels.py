"""What vLLM's compiled kernels for linear layers compute, in torch: the packing of weights for them, and products with
packed weights. Layouts are those of vLLM's own test utilities, which its compiled kernels are tested with; Machete's
packing is not documented anywhere, and stands here as some order of the bytes.

Products are summed in fp32 and rounded once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.model_executor.layers.quantization.utils import marlin_utils_test
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales
from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_weights
from vllm.scalar_type import scalar_types

get_weight_perm = functools.cache(marlin_utils_test.get_weight_perm)
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_TYPES = {t.id: t for t in (scalar_types.uint4b8, scalar_types.uint8b128, scalar_types.float8_e4m3fn)}
_TYPES[scalar_types.float4_e2m1f.id] = scalar_types.float4_e2m1f


def codes_of(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The unsigned codes in int32 `[R, C]`, the first in the lowest bits, side by side along `dim`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    if dim == 0:
        return (packed.unsqueeze(1) >> shifts.view(1, -1, 1) & (1 << bits) - 1).flatten(0, 1)
    return (packed.unsqueeze(2) >> shifts & (1 << bits) - 1).flatten(1, 2)


def int32_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[R, C]` → int32 `[R, C * bits / 32]`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int64, device=codes.device)
    words = (codes.to(torch.int64).unflatten(1, (-1, 32 // bits)) << shifts).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def decode(codes: torch.Tensor, kind: Any) -> torch.Tensor:
    """Codes → their values in fp32."""
    if kind == scalar_types.float4_e2m1f:
        return _E2M1.to(codes.device)[codes]
    if kind == scalar_types.float8_e4m3fn:
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    return codes.float() - kind.bias


# Marlin ---------------------------------------------------------------------------------------------------------------


def gptq_marlin_repack(
    b_q_weight: torch.Tensor, perm: Any = None, size_k: int = 0, size_n: int = 0, num_bits: int = 8, **_: Any
) -> torch.Tensor:
    if b_q_weight.is_meta:
        return b_q_weight.new_empty((size_k // 16, size_n * 16 * num_bits // 32))
    codes = codes_of(b_q_weight, num_bits, 0)
    assert codes.shape == (size_k, size_n)
    assert (size_n % 64, size_k % 128) == (0, 0) or (size_n % 128, size_k % 64) == (0, 0)
    return marlin_weights(codes, size_k, size_n, num_bits, get_weight_perm(num_bits))


def marlin_dequantize(
    weight: torch.Tensor, scales: torch.Tensor, global_scale: Any, kind: Any, size_k: int, size_n: int, dtype: Any
) -> torch.Tensor:
    """A packed weight in fp32 `[K, N]`. dtype: of the activations."""
    bits = kind.size_bits
    perm = get_weight_perm(bits)
    tiles = codes_of(weight, bits, 1).reshape(-1, perm.numel())[:, perm.argsort()]
    codes = tiles.view(size_k // 16, size_n // 16, 16, 16).permute(0, 2, 1, 3).reshape(size_k, size_n)
    groups = scales.shape[0]
    order = torch.arange(scales.numel()).view(scales.shape)
    order = marlin_permute_scales(order, size_k, size_n, size_k // groups)
    bytewise = scales.element_size() == 1
    if bytewise:
        order = order.view(-1, 4)[:, [0, 2, 1, 3]]
    plain = torch.empty_like(scales)
    plain.view(-1).view(torch.uint8 if bytewise else scales.dtype)[order.flatten()] = scales.flatten().view(
        torch.uint8 if bytewise else scales.dtype
    )
    half = dtype == torch.float16
    if global_scale is not None:  # nvfp4
        step = (plain.view(torch.uint8).to(torch.int16) << 7).view(torch.float16).double()
        step = step * global_scale.double() / 2.0 ** (14 if half else 126)
    elif bytewise:  # mxfp4, mxfp8
        step = plain.view(torch.float8_e8m0fnu).double()
    elif kind == scalar_types.float8_e4m3fn:
        step = plain.double() / 2.0 ** (8 if half else 120)
    else:
        step = plain.double()
    return (decode(codes, kind).double() * step.repeat_interleave(size_k // groups, 0)).float()


def marlin_gemm(
    a: torch.Tensor,
    b_q_weight: torch.Tensor,
    b_bias: torch.Tensor | None,
    b_scales: torch.Tensor,
    a_scales: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    b_zeros: torch.Tensor | None,
    workspace: Any,
    b_q_type_id: int,
    size_m: int,
    size_n: int,
    size_k: int,
    **_: Any,
) -> torch.Tensor:
    assert (a.shape, a_scales, b_bias) == ((size_m, size_k), None, None)
    assert b_zeros is None or not b_zeros.numel()
    weight = marlin_dequantize(b_q_weight, b_scales, global_scale, _TYPES[b_q_type_id], size_k, size_n, a.dtype)
    return (a.float() @ weight).to(a.dtype)


# Machete, Triton and CUTLASS ------------------------------------------------------------------------------------------


def machete_prepack_B(b_q_weight: torch.Tensor, a_type: Any, b_type: Any, group_scales_type: Any) -> torch.Tensor:
    if b_q_weight.is_meta:
        return torch.empty_like(b_q_weight, memory_format=torch.contiguous_format)
    assert b_q_weight.stride(0) == 1, "column-major"
    codes = codes_of(b_q_weight, b_type.size_bits, 0)
    return int32_of(codes.flatten().flip(0).view(codes.shape).t().reshape(codes.shape), b_type.size_bits).view(
        b_q_weight.shape
    )


def machete_mm(
    a: torch.Tensor, b_q: torch.Tensor, b_type: Any, b_group_zeros: Any, b_group_scales: torch.Tensor, b_group_size: int
) -> torch.Tensor:
    assert b_group_zeros is None
    bits, (size_k, size_n) = b_type.size_bits, (a.shape[1], b_group_scales.shape[1])
    codes = codes_of(b_q.reshape(size_k, -1), bits, 1).reshape(size_n, size_k).t().reshape(-1).flip(0)
    step = b_group_scales.float().repeat_interleave(size_k if b_group_size == -1 else b_group_size, 0)
    return (a.float() @ (decode(codes.view(size_k, size_n), b_type) * step)).to(a.dtype)


def triton_w4a16_gemm(
    a: torch.Tensor, b_q: torch.Tensor, scales: torch.Tensor, qzeros: Any, group_size: int, zp_bias: int = 8
) -> torch.Tensor:
    assert qzeros is None
    weight = (codes_of(b_q, 4, 1).float() - zp_bias) * scales.float().repeat_interleave(group_size, 0)
    return (a.float() @ weight).to(a.dtype)


def scaled_int8_quant(
    x: torch.Tensor, scale: Any = None, azp: Any = None, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, None]:
    assert scale is azp is None
    step = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / step.clamp_min(1e-30)).round().to(torch.int8), step, None


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    out = (a.float() @ b.float()) * scale_a.reshape(-1, 1) * scale_b.reshape(1, -1)
    return (out if bias is None else out + bias).to(out_dtype)


FUNCTIONS: dict[str, Any] = {
    "gptq_marlin_repack": gptq_marlin_repack,
    "machete_prepack_B": machete_prepack_B,
    "machete_mm": machete_mm,
    "scaled_int8_quant": scaled_int8_quant,
    "cutlass_scaled_mm": scaled_mm,
    "triton_scaled_mm": scaled_mm,
}
"""By the names that vLLM's modules know them by."""
OPERATORS: dict[str, Any] = {"marlin_gemm": marlin_gemm, "triton_w4a16_gemm": triton_w4a16_gemm}
"""torch.ops.vllm's."""
