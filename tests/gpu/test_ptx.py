"""The PTX interpreter against PTX written by hand: what each operation gives, and what is a fault."""

from __future__ import annotations

import struct

import pytest
import torch

from support.gpu.machine import launch
from support.gpu.ptx import Fault, Program
from support.gpu.ptx_ops import OPERATIONS

HEAD = """.version 8.8
.target sm_{arch}a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1
) .reqntid 32 {{
    .reg .pred %p<8>;
    .reg .b16 %rs<8>;
    .reg .b32 %r<16>;
    .reg .b64 %rd<16>;
    .loc 1 43 24
    ld.param.b64 %rd1, [kernel_param_0];  // in
    ld.param.b64 %rd2, [kernel_param_1];  // out
    mov.u32 %r0, %tid.x;
    mov.u32 %r15, %ctaid.x;
"""
TAIL = "\n    ret;\n}\n.section .debug { .b8 1 }\n"


def program(body: str, arch: int = 90) -> Program:
    return Program.parse(HEAD.format(arch=arch) + body + TAIL)


def bits(value: float | int) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0] if isinstance(value, float) else value & 0xFFFFFFFF


def execute(instruction: str, inputs: tuple[float | int, ...], arch: int = 90) -> int:
    """%r9 after `instruction` on %r1, %r2, %r3, as bits."""
    load = "".join(f"ld.global.b32 %r{n + 1}, [%rd1+{4 * n}];" for n in range(len(inputs)))
    given = torch.tensor([bits(v) for v in inputs], dtype=torch.int64).to(torch.int32)
    out = torch.zeros(1, dtype=torch.int32)
    launch(program(f"{load}\n{instruction}\nst.global.b32 [%rd2], %r9;", arch), [given, out])
    return int(out) & 0xFFFFFFFF


INF, NAN, TINY = float("inf"), float("nan"), 2.0**-149
THIRD = struct.unpack("<f", struct.pack("<f", 1 / 3))[0]

E2M1 = "cvt.rn.satfinite.e2m1x2.f32"
ROWS: list[tuple[str, tuple[float | int, ...], float | int]] = [
    ("add.s32 %r9, %r1, %r2;", (7, -9), -2),
    ("sub.s32 %r9, %r1, 0x10;", (7,), -9),
    ("mul.lo.s32 %r9, %r1, %r2;", (1 << 20, 1 << 13), 0),
    ("mad.lo.s32 %r9, %r1, %r2, %r3;", (3, 5, -20), -5),
    ("mul.hi.u32 %r9, %r1, %r2;", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
    ("mul.wide.s32 %rd9, %r1, %r2; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r9, %rd9;", (-2, 3), -1),
    ("mad.wide.u32 %rd9, %r1, %r2, 1; cvt.u32.u64 %r9, %rd9;", (2, 3), 7),
    ("add.rn.f32 %r9, %r1, %r2;", (1.0, 2.0**-25), 1.0),
    ("add.f32 %r9, %r1, %r2;", (TINY, TINY), 2 * TINY),
    ("mul.rn.f32 %r9, %r1, %r2;", (2.0**-100, 2.0**-49), TINY),
    ("fma.rn.f32 %r9, %r1, %r2, %r3;", (1 + 2.0**-23, 1 - 2.0**-23, -1.0), -(2.0**-46)),
    ("fma.rn.f32 %r9, %r1, %r2, %r3;", (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60), bits(1 + 2.0**-11) + 1),  # over a tie
    ("div.rn.f32 %r9, %r1, 0f40400000;", (1.0,), THIRD),
    ("div.s32 %r9, %r1, %r2;", (-7, 2), -3),
    ("rem.s32 %r9, %r1, %r2;", (-7, 2), -1),
    ("div.u32 %r9, %r1, %r2;", (-7, 2), 0x7FFFFFFC),
    ("max.f32 %r9, %r1, %r2;", (NAN, 2.0), 2.0),
    ("max.f32 %r9, %r1, %r2;", (-0.0, 0.0), 0.0),
    ("min.f32 %r9, %r1, %r2;", (0.0, -0.0), -0.0),
    ("min.NaN.f32 %r9, %r1, %r2;", (NAN, 2.0), 0x7FFFFFFF),
    ("min.NaN.xorsign.abs.f32 %r9, %r1, %r2;", (-3.0, 2.0), -2.0),
    ("min.xorsign.abs.f32 %r9, %r1, %r2;", (-1.0, -2.0), 1.0),
    ("min.s32 %r9, %r1, %r2;", (-1, 1), -1),
    ("max.relu.s32 %r9, %r1, %r2;", (-1, -2), 0),
    ("max.relu.s32 %r9, %r1, %r2;", (-1, 3), 3),
    ("max.u32 %r9, %r1, %r2;", (-1, 1), -1),
    ("max.s16x2 %r9, %r1, %r2;", (0x8000_0001, 0x0002_FFFF), 0x0002_0001),
    ("min.f16x2 %r9, %r1, %r2;", (0xC000_3C00, 0x3C00_8000), 0xC000_8000),
    ("add.s16x2 %r9, %r1, %r2;", (0xFFFF_7FFF, 0x0002_0001), 0x0001_8000),
    ("abs.f16x2 %r9, %r1;", (0xC000_3C00,), 0x4000_3C00),
    ("neg.f32 %r9, %r1;", (0.0,), -0.0),
    ("neg.s32 %r9, %r1;", (5,), -5),
    ("abs.f32 %r9, %r1;", (-2.0,), 2.0),
    ("copysign.f32 %r9, %r1, %r2;", (-0.0, 3.0), -3.0),
    ("not.b32 %r9, %r1;", (0xF0,), 0xFFFFFF0F),
    ("and.b32 %r9, %r1, %r2;", (0b1100, 0b1010), 0b1000),
    ("or.b32 %r9, %r1, %r2;", (0b1100, 0b1010), 0b1110),
    ("xor.b32 %r9, %r1, %r2;", (0b1100, 0b1010), 0b0110),
    ("lop3.b32 %r9, %r1, %r2, %r3, 0xCA;", (0b1100, 0b1010, 0b0011), 0b1011),  # a ? b : c
    ("shl.b32 %r9, %r1, 4;", (0x90000001,), 0x10),
    ("shl.b32 %r9, %r1, %r2;", (1, 32), 0),
    ("shr.u32 %r9, %r1, 31;", (-1,), 1),
    ("shr.s32 %r9, %r1, %r2;", (-8, 99), -1),
    ("bfe.u32 %r9, %r1, 8, 8;", (0x12F456,), 0xF4),
    ("bfe.s32 %r9, %r1, 8, 8;", (0x12F456,), -12),
    ("shf.l.wrap.b32 %r9, %r1, %r2, 4;", (0xA0000001, 0x70000002), 0x0000002A),
    ("shf.l.wrap.b32 %r9, %r1, %r2, 36;", (0xA0000001, 0x70000002), 0x0000002A),
    ("shf.r.wrap.b32 %r9, %r1, %r2, 4;", (0xA0000001, 0x70000002), 0x2A000000),
    ("shf.r.clamp.b32 %r9, %r1, %r2, 40;", (0xA0000001, 0x70000002), 0x70000002),
    ("shf.l.clamp.b32 %r9, %r1, %r2, 40;", (0xA0000001, 0x70000002), 0xA0000001),
    ("prmt.b32 %r9, %r1, %r2, 0x7610;", (0x33221100, 0x77665544), 0x77661100),
    ("prmt.b32 %r9, %r1, 0, 0x4448;", (0x80,), 0x000000FF),
    ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1};", (0x12345678,), 0x56781234),
    ("mov.b32 %r9, 0fC0000000;", (), -2.0),
    ("cvta.to.global.u64 %rd3, %rd1; ld.global.b32 %r9, [%rd3];", (42,), 42),
    ("setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, 1, 2, %p1;", (-1, 1), 1),
    ("setp.lt.u32 %p1, %r1, %r2; selp.b32 %r9, 1, 2, %p1;", (-1, 1), 2),
    ("setp.ne.f32 %p1, %r1, %r1; selp.b32 %r9, 1, 2, %p1;", (NAN,), 2),
    ("setp.neu.f32 %p1, %r1, %r1; selp.b32 %r9, 1, 2, %p1;", (NAN,), 1),
    ("setp.nan.f32 %p1, %r1, %r1; selp.b32 %r9, 1, 2, %p1;", (NAN,), 1),
    ("setp.eq.f16x2 %p1|%p2, %r1, %r2; selp.b32 %r3, 1, 2, %p1; selp.b32 %r9, %r3, 4, %p2;", (0x3C00, 0x3C00_3C00), 4),
    ("setp.eq.f16x2 %p1|%p2, %r1, %r2; selp.b32 %r3, 1, 2, %p1; selp.b32 %r9, %r3, 4, %p2;", (0x8000_7E00, 0x7E00), 2),
    ("setp.eq.s32 %p1, %r1, 5; setp.gt.and.s32 %p2, %r2, 0, %p1; selp.b32 %r9, 1, 2, %p2;", (5, 0), 2),
    ("setp.eq.s32 %p1, %r1, 5; not.pred %p2, %p1; and.pred %p3, %p1, %p2; selp.b32 %r9, 1, 2, %p3;", (5,), 2),
    ("mov.b32 %r9, 1; setp.eq.s32 %p1, %r1, 5; @!%p1 mov.b32 %r9, 2; @%p1 add.s32 %r9, %r9, 7;", (5,), 8),
    ("cvt.rn.f32.s32 %r9, %r1;", (-(2**24) - 1,), -(2.0**24)),
    ("cvt.rzi.s32.f32 %r9, %r1;", (-2.75,), -2),
    ("cvt.rni.s32.f32 %r9, %r1;", (2.5,), 2),
    ("cvt.rzi.s32.f32 %r9, %r1;", (1e20,), 0x7FFFFFFF),
    ("cvt.rzi.u32.f32 %r9, %r1;", (NAN,), 0),
    ("cvt.u16.u32 %rs1, %r1; cvt.s32.s8 %r9, %rs1;", (0x1280,), -128),
    ("cvt.u16.u32 %rs1, %r1; cvt.u32.u16 %r9, %rs1;", (0x12345678,), 0x5678),
    ("cvt.rn.f16.f32 %rs1, %r1; cvt.f32.f16 %r9, %rs1;", (65519.0,), 65504.0),
    ("cvt.rn.bf16.f32 %rs1, %r1; cvt.f32.bf16 %r9, %rs1;", (1 + 2.0**-8,), 1.0),
    ("cvt.rn.bf16x2.f32 %r9, %r1, %r2;", (1 + 3 * 2.0**-8, NAN), 0x3F82_7FFF),
    ("cvt.rn.f16x2.f32 %r9, %r1, %r2;", (1.0, -2.0), 0x3C00_C000),
    ("cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2; cvt.u32.u16 %r9, %rs1;", (1000.0, NAN), 0x7E7F),
    ("cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2; cvt.u32.u16 %r9, %rs1;", (17.0, -(2.0**-10)), 0x5880),  # to even
    (f"{{ .reg .b8 a; {E2M1} a, %r1, %r2; mov.b32 %r9, {{a, a, a, a}}; }}", (2.5, -0.25), 0x48484848),  # to even, twice
    (f"{{ .reg .b8 a; {E2M1} a, %r1, %r2; mov.b32 %r9, {{a, a, a, a}}; }}", (-100.0, NAN), 0xF7F7F7F7),
    ("cvt.u16.u32 %rs1, %r1; cvt.rn.f16x2.e4m3x2 %r9, %rs1;", (0x7E38,), 0x5F00_3C00),
    ("mov.b64 %rd9, {%r1, %r2}; add.rn.f32x2 %rd9, %rd9, %rd9; mov.b64 {_, %r9}, %rd9;", (1.0, 2.0), 4.0),
    ("cvt.f64.f32 %rd9, %r1; mul.f64 %rd9, %rd9, %rd9; cvt.rn.f32.f64 %r9, %rd9;", (3.0,), 9.0),
    ("atom.global.add.u32 %r9, [%rd1], 1; ld.global.b32 %r9, [%rd1];", (0,), 32),
    ("red.global.max.s32 [%rd1], %r0; ld.global.b32 %r9, [%rd1];", (-5,), 31),
    ("shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1; redux.sync.max.s32 %r9, %r2, -1;", (0,), 31),
    ("shfl.sync.idx.b32 %r9, %r0, 7, 31, -1;", (), 7),
    ("mov.u32 %r9, %laneid; add.s32 %r9, %r9, 1; redux.sync.min.u32 %r9, %r9, -1;", (), 1),
    ("{ .reg .b32 a; { .reg .b16 b, c; mov.b32 {b, c}, %r1; cvt.u32.u16 a, c; } mov.b32 %r9, a; }", (0x50000,), 5),
]


@pytest.mark.parametrize(("instruction", "inputs", "expected"), ROWS, ids=[row[0] for row in ROWS])
def test_operation(instruction: str, inputs: tuple[float | int, ...], expected: float | int) -> None:
    assert hex(execute(instruction, inputs, arch=100 if E2M1 in instruction else 90)) == hex(bits(expected))


def test_what_ptxas_may_fuse() -> None:
    """A product that is added up rounds twice, or once; one that asks for its rounding, or is overwritten, twice."""
    a = 1 + 2.0**-12
    given = torch.tensor([a, -(a * a)]).float()
    for last, fused in (("add.f32", True), ("add.rn.f32", False)):
        for between in ("", "mov.b32 %r1, %r1;"):
            body = f"ld.global.v2.b32 {{%r1, %r2}}, [%rd1]; mul.f32 %r3, %r1, %r1; {between} {last} %r4, %r2, %r3;"
            code = program(f"{body} sub.f32 %r5, 0f00000000, %r4; st.global.b32 [%rd2], %r5;")
            for contract in (False, True):
                out = torch.zeros(1)
                launch(code, [given, out], contract=contract)
                assert float(out) == (-(2.0**-24) if fused and contract and not between else 0)


def test_every_operation_is_tried() -> None:
    text = " ".join(row[0] for row in ROWS)
    elsewhere = {"st", "ldmatrix", "stmatrix", "contract", "cp", "mma"}
    assert {op for op in OPERATIONS if f"{op}." not in text} == elsewhere


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("div.full.f32 %r9, %r1, %r2;", "inexact"),
        ("mul.ftz.f32 %r9, %r1, %r2;", "inexact"),
        ("bmsk.clamp.b32 %r9, %r1, %r2;", "unknown"),
        ("ld.global.b32 %r9, [%rd1+8];", "outside of every tensor"),
        ("ld.global.b32 %r9, [%rd1+-4];", "outside of every tensor"),
        ("ld.global.b64 %rd9, [%rd1+4];", "misaligned"),
        ("ld.shared.b32 %r9, [global_smem+64];", "outside of shared memory"),
        ("setp.lt.s32 %p1, %r0, 5; @%p1 bra $there; bar.sync 0; $there: mov.b32 %r9, 0;", "not at this barrier"),
        ("setp.lt.s32 %p1, %r0, 5; @%p1 shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1;", "part of a warp"),
    ],
)
def test_faults(body: str, message: str) -> None:
    words = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(Fault, match=message):
        launch(program(body), [words, torch.zeros(1, dtype=torch.int32)], shared=64)


def test_an_older_chip_has_no_fp8() -> None:
    with pytest.raises(Fault, match="not on sm_80"):
        execute("cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r1;", (1.0,), arch=80)
    with pytest.raises(Fault, match="not on sm_90"):
        execute(f"{{ .reg .b8 a; {E2M1} a, %r1, %r1; }}", (1.0,), arch=90)


def test_gaps_of_a_strided_tensor_are_inside_and_what_follows_it_is_not() -> None:
    words = torch.arange(12, dtype=torch.int32)
    out = torch.zeros(1, dtype=torch.int32)
    strided = words.view(3, 4)[:, :2]
    launch(program("ld.global.b32 %r9, [%rd1+36]; st.global.b32 [%rd2], %r9;"), [strided, out])
    assert int(out) == 9
    with pytest.raises(Fault, match="outside"):
        launch(program("ld.global.b32 %r9, [%rd1+40];"), [strided, out])


def test_divergent_threads_meet_again() -> None:
    """Thread t adds 1 t times, in a loop; the reduction after it needs all of them."""
    body = """
        mov.b32 %r9, 0; mov.b32 %r8, 0;
    $loop:
        setp.ge.s32 %p1, %r8, %r0;
        @%p1 bra $done;
        add.s32 %r9, %r9, 1; add.s32 %r8, %r8, 1;
        bra.uni $loop;
    $done:
        redux.sync.add.s32 %r9, %r9, -1;
        st.global.b32 [%rd2], %r9;
    """
    out = torch.zeros(1, dtype=torch.int32)
    for schedule in (None, 1):
        executed = launch(program(body), [out, out], schedule=schedule)
        assert int(out) == sum(range(32))
        assert executed["redux"] == 32


def test_vectors_and_shared_memory() -> None:
    """Each CTA hands its own words on through shared memory, thread t to thread 63 - t."""
    body = """
        shl.b32 %r8, %r0, 4; cvt.u64.u32 %rd3, %r8; mad.wide.u32 %rd3, %r15, 1024, %rd3;
        add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd4];
        mov.b32 %r7, global_smem; add.s32 %r6, %r7, %r8;
        st.shared.v2.b32 [%r6], {%r1, %r2}; st.shared.v2.b32 [%r6+8], {%r3, %r4};
        bar.sync 0;
        sub.s32 %r6, 1008, %r8; add.s32 %r6, %r6, %r7;
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r6];
        st.global.v4.b32 [%rd5], {%r1, %r2, %r3, %r4};
    """
    given = torch.arange(2 * 64 * 4, dtype=torch.int32)
    out = torch.zeros_like(given)
    launch(program(body), [given, out], (2, 1, 1), threads=64, shared=1024, schedule=3)
    assert torch.equal(out.view(2, 64, 4), given.view(2, 64, 4).flip(1))


@pytest.mark.parametrize("left", [0, 1])
def test_asynchronous_copies_arrive_when_they_are_waited_for(left: int) -> None:
    """And no sooner: shared memory is read after a wait that leaves the newest group under way, or none."""
    body = f"""
        mov.b32 %r7, global_smem;
        cp.async.ca.shared.global [%r7 + 0], [%rd1 + 0], 0x8, 4; cp.async.commit_group;
        cp.async.ca.shared.global [%r7 + 0], [%rd1 + 8], 0x4; cp.async.commit_group;
        cp.async.wait_group {left};
        ld.shared.v2.b32 {{%r1, %r2}}, [%r7]; st.global.v2.b32 [%rd2], {{%r1, %r2}};
    """
    out = torch.full((2,), -1, dtype=torch.int32)
    launch(program(body), [torch.tensor([7, 8, 9], dtype=torch.int32), out], shared=64)
    assert out.tolist() == [9 if left == 0 else 7, 0]  # Only 4 of its 8 bytes are there; the others are zero.


def test_matrix_units() -> None:
    """16 × 16 times 16 × 8, by the PTX ISA's figures of which thread holds what."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=generator) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b = a.bfloat16(), b.bfloat16()
    held = torch.zeros(32, 6, 2, dtype=torch.bfloat16)
    sums = torch.zeros(32, 4)
    for thread in range(32):
        row, pair = thread // 4, thread % 4 * 2
        for half in range(2):
            held[thread, 0, half], held[thread, 1, half] = a[row, pair + half], a[row + 8, pair + half]
            held[thread, 2, half], held[thread, 3, half] = a[row, pair + 8 + half], a[row + 8, pair + 8 + half]
            held[thread, 4, half], held[thread, 5, half] = b[pair + half, row], b[pair + 8 + half, row]
            sums[thread, half], sums[thread, 2 + half] = c[row, pair + half], c[row + 8, pair + half]
    words = torch.cat([held.flatten(1).view(torch.int32), sums.view(torch.int32)], 1).contiguous()
    names = [f"%r{n}" for n in range(1, 11)]
    load = "".join(f"ld.global.b32 {name}, [%rd3+{4 * n}];" for n, name in enumerate(names))
    code = program(f"""
        mad.wide.u32 %rd3, %r0, 40, %rd1; mad.wide.u32 %rd4, %r0, 16, %rd2; {load}
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%r7, %r8, %r9, %r10}}, {{%r1, %r2, %r3, %r4}},
            {{%r5, %r6}}, {{%r7, %r8, %r9, %r10}};
        st.global.v4.b32 [%rd4], {{%r7, %r8, %r9, %r10}};
    """)
    out, expected = torch.zeros(32, 4), a.double() @ b.double() + c.double()
    launch(code, [words, out])
    for thread in range(32):
        row, pair = thread // 4, thread % 4 * 2
        found = torch.cat([expected[row, pair : pair + 2], expected[row + 8, pair : pair + 2]])
        torch.testing.assert_close(out[thread], found.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_matrices(transposed: str) -> None:
    """Two 8 × 8 matrices into shared memory and out of it; transposed by the way back."""
    body = f"""
        and.b32 %r8, %r0, 15; shl.b32 %r8, %r8, 4; mov.b32 %r7, global_smem; add.s32 %r7, %r7, %r8;
        shl.b32 %r6, %r0, 2; cvt.u64.u32 %rd3, %r6; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
        ld.global.b32 %r1, [%rd4]; ld.global.b32 %r2, [%rd4+128];
        stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r7], {{%r1, %r2}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x2{transposed}.shared.b16 {{%r3, %r4}}, [%r7];
        st.global.b32 [%rd5], %r3; st.global.b32 [%rd5+128], %r4;
    """
    given = torch.arange(128, dtype=torch.int16)
    out = torch.zeros_like(given)
    launch(program(body), [given, out], shared=256)
    expected = given.view(2, 8, 8)
    assert torch.equal(out.view(2, 8, 8), expected.mT if transposed else expected)


@pytest.mark.parametrize("atomic", [True, False])
def test_ctas_interleave_at_every_instruction(atomic: bool) -> None:
    """Without an atomic some order of the instructions loses an addition; with one, none does."""
    add = "atom.global.add.u32 %r9, [%rd1], 1;"
    if not atomic:
        add = "ld.global.b32 %r9, [%rd1]; add.s32 %r9, %r9, 1; st.global.b32 [%rd1], %r9;"
    code, totals = program(f"setp.eq.s32 %p1, %r0, 0; @!%p1 bra $end; {add} $end:"), set()
    for schedule in range(20):
        count = torch.zeros(1, dtype=torch.int32)
        launch(code, [count, count], (2, 1, 1), schedule=schedule)
        totals.add(int(count))
    assert totals == ({2} if atomic else {1, 2})
