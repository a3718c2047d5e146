"""Vector instructions of LLVM, written through numba's intrinsics: one source for whatever chip numba compiles for.

Numba has no vectors of its own. `Instructions` writes the generic operations; what decodes weights, multiplies them and
quantizes is built from it.
"""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending, types  # type: ignore[attr-defined]
from numba.core import registry

from .compiling import Once

E4M3, E2M1, INT8, INT4 = range(4)
ELEMENTS = {"e4m3": E4M3, "e2m1": E2M1, "int8": INT8, "int4": INT4}
BF16, FP16, FP32 = range(3)
DTYPES = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}

CHUNK = 32  # Columns that are worked on together: two vectors.
LANES = CHUNK // 2

I8, I16, I32, I64 = map(ir.IntType, (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()


def intrinsic(prefer_literal: bool = False) -> Any:
    """A function that is LLVM instructions: what is decorated returns its signature and what writes them."""
    return extending.intrinsic(prefer_literal=prefer_literal)


class BFloat(ir.Type):  # type: ignore[misc]
    """bfloat16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


def vector(element: Any, lanes: int = LANES) -> Any:
    return ir.VectorType(element, lanes)


def splat(element: Any, value: float, lanes: int = LANES) -> Any:
    return ir.Constant(vector(element, lanes), [value] * lanes)


def int64(value: int) -> Any:
    return ir.Constant(I64, value)


@Once
def chip_features() -> list[str]:
    """Of the chip that numba compiles for. It sets numba up."""
    features: str = registry.cpu_target.target_context.codegen().magic_tuple()[2]
    return features.split(",")


@Once
def chip_name() -> str:
    """Of the chip that numba compiles for, as LLVM calls it."""
    name: str = registry.cpu_target.target_context.codegen().magic_tuple()[1]
    return name


class Instructions:
    """Writes vector instructions."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.b = builder

    def call(self, name: str, result: Any, *args: Any, **options: Any) -> Any:
        signature = ir.FunctionType(result, [arg.type for arg in args])
        function = self.b.module.globals.get(name) or ir.Function(self.b.module, signature, name)
        return self.b.call(function, args, **options)

    def load(self, address: Any, kind: Any, align: int = 1) -> Any:
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: Any, address: Any, align: int = 1) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=align)

    def at(self, base: Any, index: Any, size: int) -> Any:
        return self.b.add(base, self.b.mul(index, int64(size)))

    def shuffle(self, *operands: Any) -> Any:
        """Lanes of two vectors, those of the second counted on; the last operand says which."""
        a, b, lanes = operands
        return self.b.shuffle_vector(a, b, ir.Constant(vector(I32, len(lanes)), lanes))

    def broadcast(self, value: Any) -> Any:
        one = self.b.insert_element(ir.Constant(vector(value.type), ir.Undefined), value, ir.Constant(I32, 0))
        return self.shuffle(one, one, [0] * LANES)

    def prefetch(self, address: Any) -> None:
        pointer = self.b.inttoptr(address, I8.as_pointer())
        # To read, into which cache, data. The nearest of AMD's chips waits for few lines at a time, the next for more:
        # a product of one row is 1.3 to 1.8 times as fast so. Other chips get lines where they are used.
        flags = [ir.Constant(I32, flag) for flag in (0, 2 if chip_name().startswith("znver") else 3, 1)]
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, *flags)

    def opaque(self, address: Any) -> Any:
        """The same address, of which the compiler does not know that it is: what is there is loaded again."""
        kind = ir.FunctionType(I64, [I64])
        return self.b.asm(kind, "", "=r,0", [address], True)

    def now(self, value: Any) -> Any:
        """The same vector, made before what follows."""
        return self.b.asm(ir.FunctionType(value.type, [value.type]), "", "=v,0", [value], True)

    def from_half(self, bits: Any) -> Any:
        return self.b.fpext(self.b.bitcast(bits, vector(HALF)), vector(FLOAT))

    def to_bfloat(self, low: Any, high: Any) -> Any:
        name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        return self.b.bitcast(self.call(name, vector(BFloat(), CHUNK), high, low), vector(I16, CHUNK))

    def transposed(self, rows: list[Any]) -> list[Any]:
        """Sixteen vectors of sixteen 32-bit elements, the other way round."""
        for step in (8, 4, 2, 1):
            new = list(rows)
            for i in range(LANES):
                if i & step == 0:
                    a, b = rows[i], rows[i + step]
                    lanes = range(LANES)
                    new[i] = self.shuffle(a, b, [k if k & step == 0 else k - step + LANES for k in lanes])
                    new[i + step] = self.shuffle(a, b, [k + step if k & step == 0 else k + LANES for k in lanes])
            rows = new
        return rows


def _pointers(kind: Any) -> Any:
    @intrinsic()
    def pointers(typing_context, address):
        """An address as a pointer to such elements."""

        def emit(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(types.CPointer(kind)))

        return types.CPointer(kind)(types.int64), emit

    return pointers


int64s, int32s, uint16s, uint8s, float32s = map(
    _pointers, (types.int64, types.int32, types.uint16, types.uint8, types.float32)
)


@intrinsic()
def take(typing_context, counter):
    """Add one to the int64 at an address and return what it was, as one step for all threads."""

    def emit(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.inttoptr(args[0], I64.as_pointer()), int64(1), "monotonic")

    return types.int64(types.int64), emit
