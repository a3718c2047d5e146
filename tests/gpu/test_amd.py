"""The kernels compiled for AMD's GPUs, whose machine code is read: no interpreter here executes it."""

from __future__ import annotations

import os
import re

import pytest
import torch

pytest.importorskip("triton")

from qtensor.kernels import FORMATS, SOURCE_DTYPES, Audit, Parts
from qtensor.kernels.triton import TRITON
from support.gpu.driver import simulated_gpu

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
ENDURANCE = bool(os.environ.get("QTENSOR_ENDURANCE"))
at_length = pytest.mark.skipif(not ENDURANCE, reason="every format and dtype on both chips: make endurance")
USUAL = {("fp8_per_channel", "gfx942"), ("fp8_per_channel", "gfx950"), ("nvfp4", "gfx942")}


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        pytest.param(name, arch, marks=() if (name, arch) in USUAL else at_length)
        for name in FORMATS
        for arch in ("gfx942", "gfx950")
    ],
)
def test_machine_code(name: str, arch: str) -> None:
    fmt = FORMATS[name]
    for dtype in SOURCE_DTYPES if ENDURANCE else (torch.bfloat16,):
        for source in (torch.zeros(48, 256, dtype=dtype), torch.zeros(5, 257, dtype=dtype))[: 2 if ENDURANCE else 1]:
            with simulated_gpu(arch) as gpu:
                parts = Parts.of(tuple(source.shape), fmt)
                TRITON.quantize_into(source, parts, fmt, Audit(measure_sqnr=ENDURANCE))
                quantizing = {program.text: program for program, _, _ in gpu.launches}
                TRITON.dequantize(parts, fmt, dtype, torch.empty_like(source))
            restoring = gpu.launches[-1][0]
            for text in (*quantizing, restoring.text):
                # Scalars that find no register lie in lanes of vector registers; no memory is used for them.
                in_memory = re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text)
                assert in_memory
                assert set(in_memory) == {"0"}
                # gfx942's instructions of this name convert to fnuz: it must use none of them.
                assert arch == "gfx950" or not re.search(r"v_cvt_\w*pk_(fp8_f32|f32_fp8)", text)
            if arch == "gfx950" and fmt.element == "e4m3":
                assert any(re.search(r"v_cvt_\w*pk_fp8_f32", text) for text in quantizing)
            for program in (*quantizing.values(), restoring) if source.shape[1] == 256 and name != "nvfp4" else ():
                assert re.search(r"(?:global|buffer)_load_dwordx4", program.text), f"{program.name}: no 16-byte load"
                stores = re.search(r"(?:global|buffer)_store_dwordx4", program.text)
                assert stores or "amax" in program.name, f"{program.name}: no 16-byte store"
