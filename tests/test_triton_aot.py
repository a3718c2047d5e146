"""Every Triton kernel compiled ahead of time for every GPU it is meant for, on a machine without any.

The machine code is then read: 16-byte accesses wherever the addresses allow it, nothing spilled, and the hardware's own
fp8 conversion exactly where the target has one. Every case is compiled for sm_90 and, unless it only differs by the
figures it takes, for gfx942; one case of each kernel for every target, and with other dtypes and layouts. `make
endurance` compiles all for all.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qtensor.kernels import FORMATS
from qtensor.kernels.triton import activation, dequant, launch, per_block, per_channel, per_group, per_tensor

ENDURANCE = bool(os.environ.get("QTENSOR_ENDURANCE"))
at_length = pytest.mark.skipif(not ENDURANCE, reason="the whole grid of kernels and GPUs: make endurance")
NVIDIA = [GPUTarget("cuda", capability, 32) for capability in (80, 89, 90, 100)]
AMD = [GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")]
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
}
GROUPED = [fmt for fmt in FORMATS.values() if fmt.granularity == "group"]
SCALES = {torch.float32: "*fp32", torch.uint8: "*u8", torch.float8_e4m3fn: "*u8"}
UNIT_STRIDES = {"x_k": 1, "q_k": 1, "s_k": 1, "o_k": 1}
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)  # 3.6 was seen to spill 8 bytes, 3.9 none


@dataclass(frozen=True)
class Case:
    """A kernel with the constexprs its launcher gives it. `wide` is the pointer to bf16 data: source, or output."""

    name: str
    kernel: Any
    threads: int
    constants: dict[str, Any]
    wide: str = "x"
    loads: bool = True  # 16 bytes at a time, and so the stores
    stores: bool = True
    scale: str = "*fp32"
    encodes: str = "e4m3"  # what is e4m3: the elements, only the "scale", or nothing


def whole_rows(cols: int) -> tuple[int, dict[str, Any]]:
    rows, block, threads = launch.row_tile(cols)
    return threads, {"ROWS": rows, "BLOCK": block}


def along_rows(cols: int) -> tuple[int, dict[str, Any]]:
    rows, block, threads = launch.loop_tile(cols)
    return threads, {"ROWS": rows, "BLOCK": block}


def cases() -> Iterator[Case]:
    block = {"DOWN": 128, "ACROSS": 128}
    for measure in (False, True):
        checks = {"CHECK": True, "MEASURE": measure, "FUSED": True}
        mark = "-sqnr" if measure else ""
        for cols in (256, 1408, 4096, per_channel.ONE_PASS_COLS):
            threads, tile = whole_rows(cols)
            yield Case(
                f"per_channel-{cols}{mark}", per_channel.one_pass, threads, {**tile, **checks, "ELEMENT": "e4m3"}
            )
        two_reads = {"BLOCK": 8192, **checks}
        yield Case(f"per_channel-two_reads{mark}", per_channel.two_reads, 256, {**two_reads, "ELEMENT": "e4m3"})
        threads, tile = whole_rows(4096)
        int8 = {**checks, "ELEMENT": "int8"}
        yield Case(f"int8_per_channel{mark}", per_channel.one_pass, threads, {**tile, **int8}, encodes="")
        yield Case(f"int8_per_channel-two_reads{mark}", per_channel.two_reads, 256, {**two_reads, **int8}, encodes="")
        for fmt in GROUPED:
            # nvfp4's scales are e4m3, its elements are not.
            kind = {"mxfp8": "e4m3", "nvfp4": "scale"}.get(fmt.name, "")
            yield Case(
                f"{fmt.name}{mark}",
                per_group.quantize_kernel,
                128,
                {**per_group.constants(fmt), **checks},
                stores=fmt.name != "nvfp4",  # A group is 8 bytes there.
                scale=SCALES[fmt.scale_dtype],
                encodes=kind,
            )
        yield Case(f"per_block{mark}", per_block.per_block, 256, {**block, **checks})
        threads, tile = along_rows(4096)
        yield Case(f"per_tensor-cast{mark}", per_tensor.cast_kernel, threads, {**tile, **checks})
    threads, tile = along_rows(4096)
    yield Case("per_tensor-amax", per_tensor.amax_kernel, threads, {**tile, "CHECK": True}, stores=False)
    for group in (128, 4096, activation.ONE_PASS_COLS):
        threads, tile = whole_rows(group)
        yield Case(f"activation-{group}", activation.one_pass, threads, {**tile, "FUSED": True})
    yield Case("activation-two_reads", activation.two_reads, 256, {"BLOCK": 8192, "FUSED": True})
    threads, tile = along_rows(4096)
    for element in ("e4m3", "int8"):
        kind = "e4m3" if element == "e4m3" else ""
        tile["ELEMENT"] = element
        yield Case(f"dequantize-{element}-per_row", dequant.per_row, threads, dict(tile), wide="out", encodes=kind)
    yield Case("dequantize-per_block", dequant.per_block, 256, block, wide="out")
    for fmt in GROUPED:
        kind = {"mxfp8": "e4m3", "nvfp4": "scale"}.get(fmt.name, "")
        constants, scale = per_group.constants(fmt), SCALES[fmt.scale_dtype]
        yield Case(
            f"dequantize-{fmt.name}",
            per_group.dequantize_kernel,
            128,
            constants,
            wide="out",
            scale=scale,
            loads=fmt.name != "nvfp4",
            encodes=kind,
        )


CASES = list(cases())
TYPICAL = {case.kernel: case.name for case in reversed(CASES) if case.encodes == "e4m3"}.values()
"""One of each kernel."""


def name_of(target: GPUTarget) -> str:
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def grid(targets: list[GPUTarget], always: Callable[[Case, str], bool] = lambda *_: False) -> list[Any]:
    """Cases × targets; at length, what is neither typical nor `always`."""
    cells = [(case, target, name_of(target)) for case in CASES for target in targets]
    return [
        pytest.param(case, target, id=f"{case.name}-{name}", marks=() if usual else at_length)
        for case, target, name in cells
        for usual in [case.name in TYPICAL or always(case, name)]
    ]


def compile_for(case: Case, target: GPUTarget, dtype: torch.dtype = torch.bfloat16, aligned: bool = True) -> Any:
    """The compiled kernel; `aligned`: pointers, sizes and strides are multiples of 16 and the last strides are 1."""
    kinds = {
        "q": "*u8",
        "s": case.scale,
        "gain": "*fp32",
        "g": "*fp32",
        "found": "*i64",
        "sums": "*fp64",
        "amax": "*i32",
        case.wide: POINTERS[dtype],
    }
    if case.kernel is per_tensor.cast_kernel:
        kinds["amax"] = "*fp32"
    constants = {**case.constants, "CAST": launch.cast(target.backend, target.arch)}
    if aligned:
        constants |= UNIT_STRIDES
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(i,)] = constants[name]
            continue
        signature[name] = kinds.get(name, "i32")
        if aligned and name not in ("rows", "origin"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, values, attributes)
    return triton.compile(source, target=target, options={"num_warps": case.threads // target.warp_size})


def local_bytes(compiled: Any) -> int:
    """Bytes of local memory a thread of the NVIDIA kernel needs: what did not fit in its registers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    return int(found.group(1)) + int(found.group(2))


def wide_accesses(assembly: str, access: str) -> int:
    """16-byte global accesses ("load" or "store") in PTX or AMD assembly."""
    short = {"load": "ld", "store": "st"}[access]
    return len(re.findall(rf"{short}\.global\S*\.v4\.b32|(?:global|buffer)_{access}_dwordx4", assembly))


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("case", "target"), grid(NVIDIA, lambda _, name: name == "sm_90"))
def test_nvidia(case: Case, target: GPUTarget) -> None:
    compiled = compile_for(case, target)
    ptx = compiled.asm["ptx"]
    if case.loads:
        assert wide_accesses(ptx, "load"), "no 16-byte load"
    if case.stores:
        assert wide_accesses(ptx, "store"), "no 16-byte store"
    assert local_bytes(compiled) == 0
    assert ".ftz" not in ptx, "subnormal numbers would be lost"
    to_fp8, from_fp8 = "cvt.rn.satfinite.e4m3x2.f32", "cvt.rn.f16x2.e4m3x2"
    encodes = case.wide == "x" and case.encodes and case.kernel is not per_tensor.amax_kernel
    assert (to_fp8 in ptx) == bool(encodes and target.arch >= 89)
    if case.wide == "out":
        assert (from_fp8 in ptx) == bool(case.encodes and target.arch >= 89)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("case", "target"), grid(AMD, lambda case, name: name == "gfx942" and "sqnr" not in case.name))
def test_amd(case: Case, target: GPUTarget) -> None:
    assembly = compile_for(case, target).asm["amdgcn"]
    if case.loads:
        assert wide_accesses(assembly, "load"), "no 16-byte load"
    if case.stores:
        assert wide_accesses(assembly, "store"), "no 16-byte store"
    spills = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", assembly)
    assert spills
    assert set(spills) == {"0"}
    encodes = case.wide == "x" and case.encodes and case.kernel is not per_tensor.amax_kernel
    # gfx942's instructions of the same name convert to fnuz: it must use none of them.
    assert bool(re.search(r"v_cvt_\w*pk_fp8_f32", assembly)) == bool(encodes and target.arch == "gfx950")


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("case", "target"), grid([NVIDIA[2], AMD[0]]))
def test_other_dtypes_and_layouts_compile(case: Case, target: GPUTarget) -> None:
    usual = torch.float32 if target.backend == "cuda" else torch.float16
    for dtype in (torch.float16, torch.float32) if ENDURANCE else (usual,):
        compiled = compile_for(case, target, dtype)
        if target.backend == "cuda":
            assert local_bytes(compiled) <= (8 if OLD_TRITON and case.name == "int4_per_group" else 0)
    compile_for(case, target, aligned=False)
