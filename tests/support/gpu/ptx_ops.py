"""What PTX instructions compute, by name of the operation. See machine.py; PTX ISA, "Instruction Set".

It is one file because all of it is one table, from names to a few lines each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .ptx import Fault, Instruction, Operand

if TYPE_CHECKING:
    from .machine import Machine

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, Any] = {16: np.float16, 32: np.float32, 64: np.float64}
WARP = 32
Mask = np.ndarray | None
Operation = Callable[["Machine", Instruction, Mask], None]
OPERATIONS: dict[str, Operation] = {}
_NAN = {np.dtype(kind): np.array((1 << bits - 1) - 1, UNSIGNED[bits]).view(kind) for bits, kind in FLOAT.items()}


def _operation(*names: str) -> Callable[[Operation], Operation]:
    def register(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


def _inputs(m: Machine, i: Instruction, kind: str | None = None) -> list[np.ndarray]:
    return [m.read(operand, kind or i.type) for operand in i.operands[1:]]


def _bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind))


def _pairs(m: Machine, i: Instruction) -> list[np.ndarray]:
    """The inputs of an instruction on two 16-bit halves, such as min.s16x2: twice as many elements as threads."""
    narrow = {"s": SIGNED, "u": UNSIGNED, "f": FLOAT}[i.type[0]][16]
    return [np.broadcast_to(v, (m.lanes,)).copy().view(narrow) for v in _inputs(m, i, "b32")]


def _unpaired(value: np.ndarray, kind: str) -> np.ndarray:
    return np.ascontiguousarray(value).view(np.uint32) if kind.endswith("16x2") else value


# Arithmetic ----------------------------------------------------------------------------------------------------------


@_operation("add", "sub", "mul", "mad", "fma")
def _arithmetic(m: Machine, i: Instruction, mask: Mask) -> None:
    kind, out = i.type, i.operands[0]
    if kind == "f32x2":
        halves = [np.broadcast_to(v, (m.lanes,)).copy().view(np.float32).reshape(-1, 2) for v in _inputs(m, i, "b64")]
        m.write(out, np.ascontiguousarray(_exact(i.op, *halves)).view(np.uint64)[:, 0], mask)
    elif kind.endswith("16x2") and i.op in ("add", "sub", "mul") and kind[0] != "b":
        m.write(out, _unpaired(_exact(i.op, *_pairs(m, i)), kind), mask)
    elif kind in ("f32", "f64"):
        m.write(out, _exact(i.op, *_inputs(m, i)), mask)
    elif kind[0] in "bf":
        raise Fault(f"not modelled: {i.text}")
    elif "wide" in i.modifiers:
        wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * _bits(kind)]
        product = m.read(i.operands[1], kind).astype(wide) * m.read(i.operands[2], kind).astype(wide)
        if i.op == "mad":
            product = product + m.read(i.operands[3], f"{kind[0]}{2 * _bits(kind)}")
        m.write(out, product, mask)
    elif "hi" in i.modifiers:
        if i.op != "mul" or _bits(kind) != 32:
            raise Fault(f"not modelled: {i.text}")
        a, b = (v.astype(SIGNED[64] if kind[0] == "s" else UNSIGNED[64]) for v in _inputs(m, i))
        m.write(out, (a * b >> a.dtype.type(32)).astype(UNSIGNED[32]), mask)
    else:
        m.write(out, _exact("fma" if i.op == "mad" else i.op, *_inputs(m, i)), mask)


@_operation("contract")
def _contract(m: Machine, i: Instruction, mask: Mask) -> None:
    a, b, c = _inputs(m, i)
    signs = i.modifiers[0]
    m.write(i.operands[0], _fma(-a if signs[0] == "-" else a, b, -c if signs[1] == "-" else c), mask)


def _exact(op: str, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> np.ndarray:
    if op == "add":
        return a + b
    if op == "sub":
        return a - b
    if op == "mul":
        return a * b
    assert c is not None
    if a.dtype != np.float32:
        return a * b + c  # fp64 rounds twice: only the sums behind SQNR are fp64.
    return _fma(a, b, c)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fp32 a * b + c, rounded once: the product is exact in fp64, and the sum is rounded to odd there before it is
    rounded to fp32, which then is the rounding of the exact sum."""
    product, c64 = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c64
    back = total - product
    error = (product - (total - back)) + (c64 - back)
    bits = np.asarray(total).view(np.int64)
    inexact = (error != 0) & (bits & 1 == 0) & np.isfinite(total) & np.isfinite(error)
    odd = np.where(inexact, bits + np.where((error > 0) == (total > 0), 1, -1), bits)
    return odd.view(np.float64).astype(np.float32)


@_operation("div", "rem")
def _divide(m: Machine, i: Instruction, mask: Mask) -> None:
    a, b = _inputs(m, i)
    if i.type[0] == "f":
        m.write(i.operands[0], a / b, mask)
        return
    b = np.where(b == 0, b.dtype.type(1), b)  # Undefined on the chip.
    quotient = a // b
    if i.type[0] == "s":  # PTX truncates, NumPy floors.
        quotient = quotient + ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)
    m.write(i.operands[0], quotient if i.op == "div" else a - quotient * b, mask)


@_operation("min", "max")
def _extremum(m: Machine, i: Instruction, mask: Mask) -> None:
    kind, ways = i.type, set(i.modifiers[:-1])
    if ways not in (set(), {"NaN"}, {"xorsign", "abs"}, {"NaN", "xorsign", "abs"}) and (*ways, kind) != ("relu", "s32"):
        raise Fault(f"not modelled: {i.text}")
    pick = np.minimum if i.op == "min" else np.maximum
    inputs = _pairs(m, i) if kind.endswith("16x2") else _inputs(m, i)
    if len(inputs) != 2 or kind[0] == "b":
        raise Fault(f"not modelled: {i.text}")
    a, b = inputs
    if kind[0] != "f":
        out = pick(a, b)
        m.write(i.operands[0], _unpaired(np.maximum(out, 0) if "relu" in ways else out, kind), mask)
        return
    negative = np.signbit(a) != np.signbit(b)
    if "abs" in ways:
        a, b = np.abs(a), np.abs(b)
    word = UNSIGNED[a.dtype.itemsize * 8]
    raw = (a.view(word) | b.view(word)) if i.op == "min" else (a.view(word) & b.view(word))
    out = np.where(a == b, raw.view(a.dtype), (np.fmin if i.op == "min" else np.fmax)(a, b))  # -0 is below 0.
    if "xorsign" in ways:
        out = np.where(negative, -out, out)
    nan = np.isnan(a) | np.isnan(b) if "NaN" in ways else np.isnan(a) & np.isnan(b)
    m.write(i.operands[0], _unpaired(np.where(nan, _NAN[a.dtype], out), kind), mask)


@_operation("neg", "abs", "not")
def _unary(m: Machine, i: Instruction, mask: Mask) -> None:
    (a,) = _pairs(m, i) if i.type.endswith("16x2") else _inputs(m, i)
    m.write(i.operands[0], _unpaired(-a if i.op == "neg" else np.abs(a) if i.op == "abs" else ~a, i.type), mask)


# Bits ----------------------------------------------------------------------------------------------------------------


@_operation("and", "or", "xor")
def _logic(m: Machine, i: Instruction, mask: Mask) -> None:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.op]
    m.write(i.operands[0], function(*_inputs(m, i)), mask)


@_operation("shl", "shr")
def _shift(m: Machine, i: Instruction, mask: Mask) -> None:
    a, count, bits = m.read(i.operands[1], i.type), m.read(i.operands[2], "u32"), _bits(i.type)
    within = np.minimum(count, bits - 1).astype(a.dtype)
    if i.op == "shl":
        out = np.where(count < bits, a << within, a.dtype.type(0))
    else:
        out = np.where((count < bits) | (i.type[0] == "s"), a >> within, a.dtype.type(0))
    m.write(i.operands[0], out, mask)


@_operation("shf")
def _funnel_shift(m: Machine, i: Instruction, mask: Mask) -> None:
    """Of two registers' 64 bits, the lower first: the upper half after a shift left, or the lower after one right."""
    left, mode, kind = i.modifiers
    if kind != "b32" or mode not in ("wrap", "clamp"):
        raise Fault(f"not modelled: {i.text}")
    low, high, count = (m.read(operand, "u32").astype(np.uint64) for operand in i.operands[1:])
    count = count & np.uint64(31) if mode == "wrap" else np.minimum(count, np.uint64(32))
    both = high << np.uint64(32) | low
    out = both << count >> np.uint64(32) if left == "l" else both >> count
    m.write(i.operands[0], out.astype(np.uint32), mask)


@_operation("bfe")
def _extract(m: Machine, i: Instruction, mask: Mask) -> None:
    position, length = (operand.value for operand in i.operands[2:])
    a, bits = m.read(i.operands[1], i.type), _bits(i.type)
    if any(o.kind != "immediate" for o in i.operands[2:]) or not 0 < length <= bits - position:
        raise Fault(f"not modelled: {i.text}")
    m.write(i.operands[0], a << a.dtype.type(bits - position - length) >> a.dtype.type(bits - length), mask)


@_operation("prmt")
def _permute(m: Machine, i: Instruction, mask: Mask) -> None:
    a, b, selector = (np.broadcast_to(v, (m.lanes,)) for v in _inputs(m, i))
    if i.modifiers != ("b32",):
        raise Fault(f"not modelled: {i.text}")
    source = np.concatenate([v.copy().view(np.uint8).reshape(-1, 4) for v in (a, b)], 1)
    out = np.zeros((m.lanes, 4), np.uint8)
    for byte in range(4):
        choice = selector >> np.uint32(4 * byte) & np.uint32(15)
        taken = source[np.arange(m.lanes), (choice & 7).astype(int)]
        out[:, byte] = np.where(choice & 8, np.where(taken & 0x80, 255, 0), taken)
    m.write(i.operands[0], out.view(np.uint32)[:, 0], mask)


@_operation("lop3")
def _lop3(m: Machine, i: Instruction, mask: Mask) -> None:
    *inputs, table = i.operands[1:]
    a, b, c = (m.read(operand, "b32") for operand in inputs)
    out = np.zeros(m.lanes, np.uint32)
    for row in range(8):
        if table.value >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    m.write(i.operands[0], out, mask)


@_operation("mov", "cvta")
def _move(m: Machine, i: Instruction, mask: Mask) -> None:
    kind, (out, source) = i.type, i.operands
    if source.kind == "vector":
        whole, width = UNSIGNED[_bits(kind)], _bits(kind) // len(source.parts)
        total = whole(0)
        for place, part in enumerate(source.parts):
            total = total | m.read(part, f"u{width}").astype(whole) << whole(place * width)
        m.write(out, total, mask)
    elif out.kind == "vector":
        width, value = _bits(kind) // len(out.parts), m.read(source, f"u{_bits(kind)}")
        for place, part in enumerate(out.parts):
            if part.name != "_":
                m.write(part, (value >> value.dtype.type(place * width)).astype(UNSIGNED[width]), mask)
    else:
        m.write(out, m.read(source, kind), mask)


@_operation("copysign")
def _copysign(m: Machine, i: Instruction, mask: Mask) -> None:
    sign, size = (m.read(operand, "f32") for operand in i.operands[1:])
    m.write(i.operands[0], np.copysign(size, sign), mask)


# Predicates ----------------------------------------------------------------------------------------------------------


@_operation("setp")
def _compare(m: Machine, i: Instruction, mask: Mask) -> None:
    kind, relation = i.type, i.modifiers[0]
    pair = kind.endswith("16x2")
    a, b = _pairs(m, i) if pair else (m.read(operand, kind) for operand in i.operands[1:3])
    functions = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    }  # fmt: skip
    if kind[0] == "f":
        nan = np.isnan(a) | np.isnan(b)
        if relation in ("nan", "num"):
            out = nan if relation == "nan" else ~nan
        else:
            unordered = relation.endswith("u")
            found = functions[relation[:2]](a, b)
            out = found | nan if unordered else found & ~nan
    else:
        out = functions[relation](a, b)
    if len(i.operands) == 4:
        other = m.read(i.operands[3], "pred")
        out = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[i.modifiers[1]](out, other)
    if pair and i.operands[0].parts:  # one predicate for each half
        for half, register in enumerate(i.operands[0].parts):
            m.write(register, out.reshape(-1, 2)[:, half], mask)
    elif pair or i.operands[0].parts:
        raise Fault(f"not modelled: {i.text}")
    else:
        m.write(i.operands[0], out, mask)


@_operation("selp")
def _select(m: Machine, i: Instruction, mask: Mask) -> None:
    a, b = (m.read(operand, i.type) for operand in i.operands[1:3])
    m.write(i.operands[0], np.where(m.read(i.operands[3], "pred"), a, b), mask)


# Conversions ---------------------------------------------------------------------------------------------------------


@_operation("cvt")
def _convert(m: Machine, i: Instruction, mask: Mask) -> None:
    to, kind = i.modifiers[-2:]
    out, *sources = i.operands
    if "e4m3x2" in (to, kind):
        if m.arch < 89:
            raise Fault(f"not on sm_{m.arch}: {i.text}")
        if to == "e4m3x2":
            high, low = (_to_e4m3(m.read(operand, kind)) for operand in sources)
            m.write(out, high << np.uint16(8) | low, mask)
        else:
            pair = np.broadcast_to(m.read(sources[0], "u16"), (m.lanes,)).copy().view(np.uint8)
            halves = torch.from_numpy(pair).view(torch.float8_e4m3fn).to(torch.float16).view(torch.int16).numpy()
            m.write(out, halves.view(np.uint32), mask)
    elif to == "e2m1x2":
        if m.arch < 100:
            raise Fault(f"not on sm_{m.arch}: {i.text}")
        high, low = (_to_e2m1(m.read(operand, kind)) for operand in sources)
        m.write(out, high << np.uint8(4) | low, mask)
    elif to in ("bf16x2", "f16x2"):
        high, low = (_narrow(m.read(operand, kind), to[:-2]).astype(np.uint32) for operand in sources)
        m.write(out, high << np.uint32(16) | low, mask)
    elif to in ("bf16", "f16") and kind[0] == "f":
        m.write(out, _narrow(m.read(sources[0], kind), to), mask)
    elif kind == "bf16":
        wide = m.read(sources[0], "u16").astype(np.uint32) << np.uint32(16)
        m.write(out, wide.view(np.float32).astype(FLOAT[_bits(to)]), mask)
    else:
        m.write(out, _between(m.read(sources[0], kind), to, i), mask)


def _between(value: np.ndarray, to: str, i: Instruction) -> np.ndarray:
    """Integers and fp16, fp32, fp64 into each other."""
    made = {"f": FLOAT, "s": SIGNED, "u": UNSIGNED}[to[0]][_bits(to)]
    if value.dtype.kind != "f" or to[0] == "f":
        if "sat" in i.modifiers:
            raise Fault(f"not modelled: {i.text}")
        return value.astype(made)
    ways = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
    rounded = ways[i.modifiers[0]](value.astype(np.float64))
    limits = np.iinfo(made)
    if limits.bits == 64:
        raise Fault(f"not modelled: {i.text}")
    return np.where(np.isnan(rounded), 0, np.clip(rounded, limits.min, limits.max)).astype(made)


def _narrow(value: np.ndarray, to: str) -> np.ndarray:
    """fp32 → bits of bf16 or fp16, to nearest even."""
    if to == "f16":
        return value.astype(np.float16).view(np.uint16)
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _to_e4m3(value: np.ndarray) -> np.ndarray:
    """cvt.rn.satfinite: fp32 → code in uint16; NaN is 0x7F."""
    near = torch.from_numpy(np.ascontiguousarray(np.clip(value, np.float32(-448), np.float32(448))))
    code = near.to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7F), code)


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _to_e2m1(value: np.ndarray) -> np.ndarray:
    """cvt.rn.satfinite: fp32 → code in uint8, half to even; NaN is 7, the largest."""
    distance = np.abs(np.minimum(np.abs(value), np.float32(6)).astype(np.float64)[..., None] - _E2M1)
    # Of two codes that are equally near, one is even: it is half a unit nearer in this order.
    nearest = np.lexsort((np.broadcast_to(np.arange(8) % 2, distance.shape), distance), axis=-1)[..., 0]
    code = np.where(np.isnan(value), 7, nearest).astype(np.uint8)
    return code | (np.signbit(value) & ~np.isnan(value)).astype(np.uint8) << np.uint8(3)


# Memory --------------------------------------------------------------------------------------------------------------


@_operation("ld", "st")
def _access(m: Machine, i: Instruction, mask: Mask) -> None:
    kind = i.type
    registers, address = i.operands if i.op == "ld" else i.operands[::-1]
    if i.modifiers[0] == "param":
        value = np.array(m.launch.arguments[address.name] & ((1 << _bits(kind)) - 1), UNSIGNED[_bits(kind)])
        m.write(registers, value.view(SIGNED[_bits(kind)]) if kind[0] == "s" else value, mask)
        return
    parts = registers.parts or (registers,)
    size = _bits(kind) // 8
    words, first = m.locate(address, size * len(parts), size, i, mask)
    for place, register in enumerate(parts):
        if i.op == "ld":
            _write_active(m, register, words[first + place].view(_as(kind)), mask)
        else:
            value = np.broadcast_to(m.read(register, f"u{_bits(kind)}"), (m.lanes,))
            words[first + place] = value if mask is None else value[mask]


def _as(kind: str) -> Any:
    return (SIGNED if kind[0] == "s" else UNSIGNED)[_bits(kind)]


def _write_active(m: Machine, register: Operand, value: np.ndarray, mask: Mask) -> None:
    """A value per active thread."""
    if mask is not None:
        spread = np.zeros(m.lanes, value.dtype)
        spread[mask] = value
        value = spread
    m.write(register, value, mask)


@_operation("cp")
def _copy_async(m: Machine, i: Instruction, mask: Mask) -> None:
    """From global to shared memory, at the last moment that `wait_group` allows; bytes beyond the source size are 0."""
    if i.modifiers[1] == "commit_group":
        m.copies.append([])
    elif i.modifiers[1] == "wait_group":
        while len(m.copies) > i.operands[0].value + 1:
            for arrive in m.copies.pop(0):
                arrive()
    else:
        to, source, size, *given = i.operands
        nbytes = size.value
        valid = np.broadcast_to(m.read(given[0], "u32") if given else np.uint32(nbytes), (m.lanes,))
        active = np.ones(m.lanes, bool) if mask is None else mask
        if (valid[active] % 4).any():
            raise Fault(f"not modelled: {i.text}")
        data = np.zeros((m.lanes, nbytes // 4), np.uint32)
        for word in range(nbytes // 4):
            reads = active & (valid >= 4 * (word + 1))
            if reads.any():
                words, first = m.locate(source, nbytes, 4, i, reads, shared=False)
                data[reads, word] = words[first + word]
        words, first = m.locate(to, nbytes, 4, i, mask, shared=True)

        def arrive(values: np.ndarray = data[active]) -> None:
            for word in range(nbytes // 4):
                words[first + word] = values[:, word]

        m.copies[-1].append(arrive)


@_operation("atom", "red")
def _atomic(m: Machine, i: Instruction, mask: Mask) -> None:
    """Thread by thread, in an order that the chip does not promise either."""
    kind, what = i.type, i.modifiers[-2]
    address, value = i.operands[-2:]
    size = _bits(kind) // 8
    words, at = m.locate(address, size, size, i, mask)
    cells = words.view(FLOAT[8 * size] if kind[0] == "f" else _as(kind))
    given = np.broadcast_to(m.read(value.parts[0] if value.parts else value, kind), (m.lanes,))
    given = given if mask is None else given[mask]
    apply = {"add": np.add, "max": np.maximum, "min": np.minimum, "or": np.bitwise_or}[what]
    old = np.zeros(len(at), cells.dtype)
    for thread in m.random.sample(range(len(at)), len(at)):
        old[thread] = cells[at[thread]]
        cells[at[thread]] = apply(cells[at[thread]], given[thread])
    if i.op == "atom":
        _write_active(m, i.operands[0], old, mask)


# Among the threads of a warp -----------------------------------------------------------------------------------------


def _whole_warps(m: Machine, i: Instruction, mask: Mask) -> None:
    if mask is not None and (mask.reshape(-1, WARP).any(1) != mask.reshape(-1, WARP).all(1)).any():
        raise Fault(f"a part of a warp: {i.text}")


@_operation("shfl")
def _shuffle(m: Machine, i: Instruction, mask: Mask) -> None:
    _whole_warps(m, i, mask)
    way = i.modifiers[1]
    if way not in ("bfly", "idx") or i.operands[3].value != 31:
        raise Fault(f"not modelled: {i.text}")
    value = np.broadcast_to(m.read(i.operands[1], "b32"), (m.lanes,))
    lane, other = np.arange(m.lanes) % WARP, np.broadcast_to(m.read(i.operands[2], "u32"), (m.lanes,)).astype(np.int64)
    other = (lane ^ other if way == "bfly" else other) % WARP
    m.write(i.operands[0], value[np.arange(m.lanes) - lane + other], mask)


@_operation("redux")
def _reduce(m: Machine, i: Instruction, mask: Mask) -> None:
    _whole_warps(m, i, mask)
    function: Any = {"min": np.minimum, "max": np.maximum, "add": np.add, "or": np.bitwise_or}[i.modifiers[1]]
    value = np.broadcast_to(m.read(i.operands[1], i.type), (m.lanes,)).reshape(-1, WARP)
    m.write(i.operands[0], np.repeat(function.reduce(value, axis=1), WARP), mask)


@_operation("mma")
def _multiply_matrices(m: Machine, i: Instruction, mask: Mask) -> None:
    """16 × 16 times 16 × 8, spread over a warp as the PTX ISA draws it, summed in fp64 and rounded to fp32."""
    _whole_warps(m, i, mask)
    if i.modifiers[:5] != ("sync", "aligned", "m16n8k16", "row", "col") or i.modifiers[5] != "f32":
        raise Fault(f"not modelled: {i.text}")
    kind, warps = i.modifiers[6], m.lanes // WARP
    group, within = np.divmod(np.arange(WARP), 4)

    def pairs(register: Operand) -> np.ndarray:
        value = np.broadcast_to(m.read(register, "u32"), (m.lanes,)).reshape(warps, WARP)
        halves = np.stack([value & np.uint32(0xFFFF), value >> np.uint32(16)], -1)
        if kind == "bf16":
            return (halves << np.uint32(16)).view(np.float32)
        return halves.astype(np.uint16).view(np.float16).astype(np.float32)

    a, b, c = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
    two = 2 * within[:, None] + np.arange(2)
    for n, register in enumerate(i.operands[1].parts):
        a[:, group[:, None] + n % 2 * 8, two + n // 2 * 8] = pairs(register)
    for n, register in enumerate(i.operands[2].parts):
        b[:, two + n * 8, group[:, None]] = pairs(register)
    spots = [(group + n // 2 * 8, 2 * within + n % 2) for n in range(4)]
    for spot, register in zip(spots, i.operands[3].parts, strict=True):
        c[:, spot[0], spot[1]] = np.broadcast_to(m.read(register, "f32"), (m.lanes,)).reshape(warps, WARP)
    total = (a @ b + c).astype(np.float32)
    for spot, register in zip(spots, i.operands[0].parts, strict=True):
        m.write(register, np.ascontiguousarray(total[:, spot[0], spot[1]]).reshape(-1), mask)


@_operation("ldmatrix", "stmatrix")
def _matrices(m: Machine, i: Instruction, mask: Mask) -> None:
    """8 × 8 matrices of 2 bytes: thread 8 j + r of a warp points at row r of matrix j, and thread t holds two elements
    of row t / 4; transposed, of column t / 4."""
    _whole_warps(m, i, mask)
    address, registers = i.operands[::-1] if i.op == "ldmatrix" else i.operands
    parts, lane = registers.parts or (registers,), np.arange(m.lanes) % WARP
    pointing = (lane < 8 * len(parts)) & (True if mask is None else mask)
    words, found = m.locate(address, 16, 2, i, pointing)
    rows = np.zeros(m.lanes, np.int64)
    rows[pointing] = found
    for j, register in enumerate(parts):
        base = np.arange(m.lanes) - lane + 8 * j
        places = []
        for half in range(2):
            row, col = lane // 4, lane % 4 * 2 + half
            row, col = (col, row) if "trans" in i.modifiers else (row, col)
            places.append(rows[base + row] + col)
        if i.op == "ldmatrix":
            low, high = (words[place].astype(np.uint32) for place in places)
            m.write(register, high << np.uint32(16) | low, mask)
        else:
            value = np.broadcast_to(m.read(register, "u32"), (m.lanes,))
            active = slice(None) if mask is None else mask
            words[places[0][active]] = value[active].astype(np.uint16)
            words[places[1][active]] = (value[active] >> np.uint32(16)).astype(np.uint16)
