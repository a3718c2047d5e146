"""The number formats against vLLM's own quantizers: the same bytes.

What vLLM runs as plain torch is called as it is: its mxfp8 function, its int8 experts. Its mxfp4 quantizer is a Triton
kernel, run here in Triton's interpreter. Its nvfp4 quantizer is a CUDA operator; the comparison is with the reference
that vLLM tests that operator against.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qtensor import int8_per_channel, mxfp8, nvfp4, quantize

SCALES = (1e-30, 1e-4, 0.02, 1.0, 3e4)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def every(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a 16-bit dtype as the largest of a group of 32, with smaller ones beside them: `[N, 32]`."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    shares = torch.rand(len(values), 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shares[:, 7] = 1.0
    return (values.float()[:, None] * shares).to(dtype)


def weights(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    plain = [(torch.randn(96, 256, generator=generator) * s).clamp(-6e4, 6e4).to(dtype) for s in SCALES]
    plain[2][5], plain[2][6, 32:64] = 0, 0
    return [*plain, torch.zeros(3, 64, dtype=dtype)]


@HALVES
def test_mxfp8_equals_vllm(dtype: torch.dtype) -> None:
    from vllm.model_executor.layers.quantization.utils.mxfp8_utils import _mxfp8_e4m3_quantize_torch

    for w in [*weights(dtype), every(dtype)]:
        ours = quantize(w, mxfp8)
        qdata, scale = _mxfp8_e4m3_quantize_torch(w)
        assert torch.equal(ours.scale, scale)
        assert torch.equal(ours.qdata.view(torch.uint8), qdata.view(torch.uint8))


@HALVES
def test_nvfp4_equals_vllm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales by their bytes, elements by their values: vLLM's reference does not tell 0 from -0."""
    from vllm.model_executor.layers.quantization.online import nvfp4 as online
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
        break_fp4_bytes,
        dequantize_to_dtype,
        ref_nvfp4_quant,
    )

    def operator(x: torch.Tensor, gain: torch.Tensor, is_sf_swizzled_layout: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return ref_nvfp4_quant(x, gain, 16)

    monkeypatch.setattr(online, "scaled_fp4_quant", operator)
    for w in weights(dtype):
        ours = quantize(w, nvfp4)
        elements, scale, global_scale = online._quantize_moe_weight_to_nvfp4(w.unsqueeze(0))
        assert torch.equal(ours.global_scale, global_scale)
        assert torch.equal(ours.scale.float(), scale[0])
        assert torch.equal(break_fp4_bytes(ours.qdata, torch.float32), elements[0])
        restored = dequantize_to_dtype(ours.qdata, ours.scale, ours.global_scale, dtype, 16, swizzle=False)
        assert torch.equal(ours.dequantize(), restored)


@HALVES
def test_int8_equals_vllm(dtype: torch.dtype) -> None:
    from vllm.model_executor.layers.quantization.online.int8 import Int8OnlineMoEMethod

    generator = torch.Generator().manual_seed(2)
    w13, w2 = (torch.randn(3, n, k, generator=generator).mul(0.02).to(dtype) for n, k in ((96, 64), (64, 48)))
    layer = torch.nn.Module()
    layer.w13_weight, layer.w2_weight = (torch.nn.Parameter(w, requires_grad=False) for w in (w13, w2))
    layer.num_experts = layer.local_num_experts = 3
    layer.w13_scale, layer.w2_scale = (torch.nn.Parameter(torch.empty(3, w.shape[1])) for w in (w13, w2))
    with torch.no_grad():
        Int8OnlineMoEMethod._quantize_weights(SimpleNamespace(moe=SimpleNamespace(tp_size=1)), layer)
    for name, w in (("w13", w13), ("w2", w2)):
        ours = quantize(w, int8_per_channel)
        assert torch.equal(ours.scale.squeeze(-1), getattr(layer, f"{name}_scale"))
        assert torch.equal(ours.qdata, getattr(layer, f"{name}_weight"))


MXFP4 = """
import torch, triton, triton.language as tl
import vllm.triton_utils

vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl  # A CPU build of vLLM puts stand-ins there.
from vllm.model_executor.layers.quantization.utils.mxfp4_utils import downcast_to_mxfp
from qtensor import mxfp4, quantize
from test_vllm_formulas import every, weights

for dtype in (torch.bfloat16, torch.float16):
    # Every 16th to save time. Triton's interpreter widens subnormal bf16 wrongly: those must not be in the sources.
    wide = every(dtype)[::16]
    wide[(wide != 0) & (wide.abs() < 2.0**-126)] = 0
    for w in [*weights(dtype)[1:], wide]:
        ours = quantize(w, mxfp4)
        qdata, scale, _ = downcast_to_mxfp(w, -1)
        assert torch.equal(ours.scale, scale), (dtype, w.shape, (ours.scale != scale).nonzero()[:5])
        assert torch.equal(ours.qdata, qdata), (dtype, w.shape, (ours.qdata != qdata).nonzero()[:5])
print("equal")
"""


@pytest.mark.slow
def test_mxfp4_equals_vllm() -> None:
    pytest.importorskip("triton", reason="vLLM's mxfp4 quantizer is a Triton kernel")
    search = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search}
    done = subprocess.run([sys.executable, "-c", MXFP4], env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip().endswith("equal"), done.stdout[-2000:] + done.stderr[-2000:]
