"""The machine that executes PTX (see ptx.py): the part of it that our kernels use.

Every register is a NumPy array with an element per thread, and one step executes an instruction for all threads that
stand at it, so that all CTAs of a launch advance together; threads that took different branches advance where the
program counter is lowest, until they meet again. `schedule` lets each CTA advance by itself instead. Floats compute as
IEEE 754 asks; an instruction that does not (.approx, .ftz), that is unknown here or newer than the chip, an access
outside of all tensors or across its alignment, and a barrier that a thread of its CTA misses are a `Fault`. What
instructions compute is in ptx_ops.py. Not modelled: time, caches, the order of what one instruction reads and writes,
and the rounding of the fp8 conversions, which is torch's.
"""

from __future__ import annotations

import ctypes
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .ptx import Fault, Instruction, Operand, Program
from .ptx_ops import FLOAT, OPERATIONS, SIGNED, UNSIGNED, WARP

_LANES = 1 << 16  # threads that advance together
_POISON = 0xDEADBEEFDEADBEEF  # what a register holds that was never written


class Memory:
    """The tensors that a kernel was given: the bytes from each one's first element to its last, and no others."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._spans: list[tuple[int, int, Any]] = []
        for t in tensors:
            if t.numel():
                start = t.data_ptr()
                last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
                stop = start + (last + 1) * t.element_size()
                base = start & ~15
                raw = (ctypes.c_uint8 * (-(-stop // 16) * 16 - base)).from_address(base)
                self._spans.append((start, stop, (base, np.ctypeslib.as_array(raw))))

    def words(self, address: np.ndarray, nbytes: int, word: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        """(an array of words of so many bytes, index of the first word of each access in it)."""
        if (address % nbytes).any():
            raise Fault(f"misaligned: {what}")
        lowest, highest = int(address.min()), int(address.max()) + nbytes
        for start, stop, (base, raw) in self._spans:
            if start <= lowest and highest <= stop:
                return raw.view(UNSIGNED[8 * word]), (address - base) // word
        raise Fault(f"outside of every tensor, {lowest:#x} to {highest:#x}: {what}")


@dataclass
class Launch:
    """A launch. arguments: of the kernel, by their names in the PTX. shared: bytes of shared memory of each CTA."""

    program: Program
    arguments: dict[str, int]
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arch: int
    memory: Memory
    random: random.Random
    contract: bool


class Machine:
    """The threads of some CTAs of a launch. `mask`: which of them execute this instruction; None for all."""

    def __init__(self, of: Launch, ctas: Sequence[tuple[int, int, int]]) -> None:
        self.launch, self.program, self.arch, self.random = of, of.program, of.arch, of.random
        self.ctas, self.lanes = ctas, len(ctas) * of.threads
        self.cta = np.repeat(np.arange(len(ctas)), of.threads)
        self.shared_bytes = -(-max(of.shared, 16) // 16) * 16
        self.shared = np.full(len(ctas) * self.shared_bytes, 0xCD, np.uint8)
        self.copies: list[list[Callable[[], None]]] = [[]]  # under way, a list for each group of them
        self.registers: dict[str, np.ndarray] = {}
        self.alive = np.ones(self.lanes, bool)
        self.executed: Counter[str] = Counter()

    # Registers

    def read(self, operand: Operand, kind: str) -> np.ndarray:
        """The operand as that type (u32, s64, f32, b16, pred, ...): an array, or a scalar if it is the same for all."""
        if kind == "pred":
            value = self._raw(operand, 1)
            return ~value if operand.negated else value
        bits = int(re.sub(r"\D", "", kind))
        value = self._raw(operand, bits)
        if value.dtype.itemsize * 8 != bits:
            value = value.astype(UNSIGNED[bits])
        if kind[0] in "sf":
            value = value.view((SIGNED if kind[0] == "s" else FLOAT)[bits])
        return value

    def _raw(self, operand: Operand, bits: int) -> np.ndarray:
        if operand.kind == "register":
            value = self.registers.get(operand.name)
            if value is None:
                width = self.program.widths[operand.name]
                value = np.full(self.lanes, _POISON & ((1 << width) - 1), UNSIGNED.get(width, bool))
            return value
        if operand.kind == "immediate":
            return np.array(operand.value & ((1 << bits) - 1), UNSIGNED.get(bits, bool))
        if operand.kind == "special":
            return self._special(operand.name)
        if operand.kind == "symbol":
            return np.array(0, UNSIGNED[bits])  # global_smem: where shared memory begins
        raise Fault(f"no value: {operand}")

    def _special(self, name: str) -> np.ndarray:
        what, _, axis = name.partition(".")
        place, threads = "xyz".find(axis), self.launch.threads
        thread = np.arange(self.lanes, dtype=np.uint32) % threads
        if what == "ctaid":
            return np.array([cta[place] for cta in self.ctas], np.uint32)[self.cta]
        if what == "tid":
            return thread if axis == "x" else np.array(0, np.uint32)
        if what == "nctaid":
            return np.array(self.launch.grid[place], np.uint32)
        if what == "laneid":
            return thread % WARP
        raise Fault(f"unknown register %{name}")

    def write(self, operand: Operand, value: Any, mask: np.ndarray | None) -> None:
        """A narrower value is extended: by its sign if it is of a signed type."""
        width = self.program.widths[operand.name]
        value = np.asarray(value)
        if width > 1:
            if value.dtype.itemsize * 8 < width:
                value = value.astype((SIGNED if value.dtype.kind == "i" else UNSIGNED)[width])
            elif value.dtype.itemsize * 8 > width:
                value = value.view(UNSIGNED[value.dtype.itemsize * 8]).astype(UNSIGNED[width])
            value = value.view(UNSIGNED[width])
        value = np.broadcast_to(value, (self.lanes,))
        if mask is not None:
            value = np.where(mask, value, self._raw(operand, width))
        self.registers[operand.name] = value

    # Memory

    def locate(
        self,
        operand: Operand,
        nbytes: int,
        word: int,
        instruction: Instruction,
        mask: np.ndarray | None,
        shared: bool | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(words, index of the first one, for the active threads) of an access of so many bytes."""
        in_shared = any(m.startswith("shared") for m in instruction.modifiers) if shared is None else shared
        base = Operand("register" if operand.name in self.program.widths else "symbol", operand.name)
        address = np.broadcast_to(self.read(base, "u32" if in_shared else "u64").astype(np.int64), (self.lanes,))
        address = address + operand.value
        address = address if mask is None else address[mask]
        if not in_shared:
            return self.launch.memory.words(address, nbytes, word, f"{self.program.name}: {instruction.text}")
        if (address % nbytes).any() or address.min() < 0 or address.max() + nbytes > self.shared_bytes:
            raise Fault(f"misaligned or outside of shared memory: {instruction.text}")
        cta = self.cta if mask is None else self.cta[mask]
        return self.shared.view(UNSIGNED[8 * word]), (address + cta * self.shared_bytes) // word

    # Control

    def run(self, apart: bool) -> None:
        """To the end. apart: CTAs advance in random order, each time to its next access to global memory."""
        crews = [self.cta == i for i in range(len(self.ctas))] if apart else [np.ones(self.lanes, bool)]
        waiting = [{0: crew} for crew in crews]
        with np.errstate(all="ignore"):
            while waiting:
                at = self.random.randrange(len(waiting)) if apart else 0
                if not self._advance(waiting[at], one=apart):
                    del waiting[at]

    def _advance(self, groups: dict[int, np.ndarray], one: bool) -> bool:
        """Let the threads with the lowest program counter execute until they meet others; False at the end."""
        code, contracted = self.program.code, self.program.contracted if self.launch.contract else {}
        counter = min(groups)
        group = groups.pop(counter)
        ahead = min(groups, default=len(code))
        everyone = not groups and not one and bool(group.all())
        while counter < len(code):
            instruction = contracted.get(counter) or code[counter]
            mask = group
            if instruction.guard is not None:
                register, negated = instruction.guard
                chosen = self._raw(Operand("register", register), 1)
                mask = group & (~chosen if negated else chosen)
            whole = mask is group
            self.executed[instruction.op] += self.lanes if whole and everyone else int(mask.sum())
            counter += 1
            if instruction.op in ("bra", "ret", "exit"):
                if mask.any():
                    target = self.program.labels[instruction.operands[0].name] if instruction.op == "bra" else len(code)
                    if target == len(code):
                        self.alive &= ~mask
                    else:
                        groups[target] = groups[target] | mask if target in groups else mask
                    group = group & ~mask
                    if not group.any():
                        break
                    ahead, everyone = min(groups, default=len(code)), False
            elif instruction.op in ("bar", "barrier"):
                if "warp" not in instruction.modifiers:
                    self._barrier(mask, instruction)
            elif whole or mask.any():
                self._execute(instruction, None if whole and everyone else mask)
            shared_with_others = instruction.op in ("ld", "st", "atom", "red") and "global" in instruction.modifiers
            if counter >= ahead or (one and shared_with_others):
                groups[counter] = groups[counter] | group if counter in groups else group
                break
        return bool(groups)

    def _barrier(self, mask: np.ndarray, instruction: Instruction) -> None:
        here = np.bincount(self.cta, mask, len(self.ctas))
        if ((here > 0) & (here != np.bincount(self.cta, self.alive, len(self.ctas)))).any():
            raise Fault(f"some threads of a CTA are not at this barrier: {self.program.name}: {instruction.text}")

    def _execute(self, instruction: Instruction, mask: np.ndarray | None) -> None:
        inexact = {"approx", "ftz", "full"}.intersection(instruction.modifiers)
        operation = OPERATIONS.get(instruction.op)
        if operation is None or inexact:
            raise Fault(f"{'inexact' if inexact else 'unknown'}: {self.program.name}: {instruction.text}")
        try:
            operation(self, instruction, mask)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Fault(f"{instruction.text}: {type(error).__name__}: {error}") from error


def launch(
    program: Program,
    arguments: Sequence[torch.Tensor | int | float],
    grid: tuple[int, int, int] = (1, 1, 1),
    *,
    threads: int = WARP,
    shared: int = 0,
    arch: int | None = None,
    schedule: int | None = None,
    contract: bool = False,
) -> Counter[str]:
    """Run a kernel on tensors in CPU memory.

    Args:
        program: The kernel.
        arguments: Its parameters; what the PTX has more of them (Triton's scratch memory) is zero.
        grid: CTAs in each direction.
        threads: Of each CTA.
        shared: Bytes of shared memory of each CTA.
        arch: Of the chip, 90 for sm_90; the one the PTX is for by default.
        schedule: A seed: CTAs advance in random order, and an access to global memory at a time, since it is all that
            one can see of another. The threads of an atomic instruction take turns in random order anyway.
        contract: Fuse multiplications and additions wherever ptxas may; by default nowhere.

    Returns:
        How many threads executed each operation.
    """
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else int(a) for a in arguments]
    values += [0] * (len(program.parameters) - len(values))
    names = (name for name, _ in program.parameters)
    of = Launch(
        program, dict(zip(names, values, strict=True)), grid, threads, shared, arch or program.target,
        Memory(tensors), random.Random(schedule), contract,
    )  # fmt: skip
    ctas = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    step, total = max(1, _LANES // threads), Counter[str]()
    for first in range(0, len(ctas), step):
        machine = Machine(of, ctas[first : first + step])
        machine.run(apart=schedule is not None)
        total.update(machine.executed)
    return total
