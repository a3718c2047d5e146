"""C functions one after the other, entered from Python once: after weights went through the caches, each way from
Python into a loop and back costs microseconds, as much as reading some ten kilobytes."""

# The loops carry no annotations: numba compiles each for the types it is called with.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, types  # type: ignore[attr-defined]

from . import rows
from .compiling import Once
from .instructions import I8, I32, I64, int64s, intrinsic
from .laying import PURPOSE, c_function

_STEP = 4  # int64 of a step: what it calls and with what, how many threads, and what it depends on
STEPS = np.dtype([(name, np.int64) for name in ("count", "steps", "parallel")])


def setter(count: int) -> Any:
    """(structure, 0, int64s): writes the first `count` fields of one at once; one by one they take longer."""
    return struct.Struct(f"={count}q").pack_into


class Step(NamedTuple):
    """function: of one argument, the address of a structure. threads: of torch's; 1 is the one that calls. goes_on: the
    address of an int64; the steps end here if it is 0 after this one."""

    function: int
    argument: int
    threads: int = 1
    goes_on: int = 0


class Steps:
    """Some steps, which may run any number of times. What is at the steps' addresses is the caller's to keep."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps, self._places = np.array(steps, np.int64), np.zeros(1, STEPS)
        parallel: Any = rows.team()
        gomp = ctypes.cast(parallel, ctypes.c_void_p).value if parallel is not None else 0
        self._places[0] = len(steps), self._steps.ctypes.data, gomp
        self._loop, self._address = entering(purpose=PURPOSE), self._places.ctypes.data

    def run(self) -> None:
        self._loop(self._address)


@intrinsic()
def _call(typing_context, function, argument):
    """function(argument)."""

    def emit(context, b, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64])
        b.call(b.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic()
def _in_parallel(typing_context, parallel, function, argument, threads):
    """GOMP_parallel(function, argument, threads, 0)."""

    def emit(context, b, signature, args):
        pointer = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, I32, I32])
        parallel, function, argument, threads = args
        given = [
            b.inttoptr(function, pointer),
            b.inttoptr(argument, pointer),
            b.trunc(threads, I32),
            ir.Constant(I32, 0),
        ]
        b.call(b.inttoptr(parallel, kind.as_pointer()), given)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


@Once
def entering() -> Any:
    """The loop over steps."""

    def loop(pointer):
        p = carray(pointer, 1)[0]
        steps = carray(int64s(p.steps), p.count * _STEP)
        for at in range(0, p.count * _STEP, _STEP):
            if steps[at + 2] > 1:
                _in_parallel(p.parallel, steps[at], steps[at + 1], steps[at + 2])
            else:
                _call(steps[at], steps[at + 1])
            if steps[at + 3] != 0 and carray(int64s(steps[at + 3]), 1)[0] == 0:
                return

    return c_function(loop, STEPS)
