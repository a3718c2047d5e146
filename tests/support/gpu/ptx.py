"""PTX, the assembly that Triton emits for NVIDIA GPUs, as text → `Program`. What executes it is machine.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


class Fault(Exception):
    """What the GPU would have trapped on, or what this interpreter does not know."""


@dataclass(frozen=True)
class Operand:
    """kind: register, special, immediate, address (name + value), vector (of `parts`) or symbol."""

    kind: str
    name: str = ""
    value: int = 0
    parts: tuple[Operand, ...] = ()
    negated: bool = False


@dataclass(frozen=True)
class Instruction:
    """guard: the predicate register it depends on, and whether it asks for its opposite."""

    op: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    text: str

    @property
    def type(self) -> str:
        return self.modifiers[-1] if self.modifiers else ""


@dataclass
class Program:
    """One kernel. widths: bits of each register, 1 for predicates. parameters: names and bits. contracted: what
    ptxas may make of the addition at that place, one instruction that rounds once."""

    text: str
    name: str
    parameters: list[tuple[str, int]]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    target: int = 0
    contracted: dict[int, Instruction] = field(default_factory=dict)

    @classmethod
    def parse(cls, ptx: str) -> Program:
        text = ptx
        ptx = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", ptx), flags=re.DOTALL)
        found = re.search(r"\.entry\s+(\w+)\s*\(([^)]*)\)", ptx)
        if found is None:
            raise Fault("no kernel in this PTX")
        declared = re.findall(r"\.param\s+\.[a-z](\d+)[^,]*?(\w+)\s*(?=,|$)", found.group(2).strip())
        program = cls(text, found.group(1), [(name, int(bits)) for bits, name in declared])
        program.target = int(re.search(r"\.target\s+sm_(\d+)", ptx).group(1))  # type: ignore[union-attr]
        for statement in _statements(ptx[ptx.index("{", found.end()) :]):
            program._add(statement)
        program._find_contractions()
        return program

    def _find_contractions(self) -> None:
        """ptxas may fuse a multiplication and an addition that ask for no rounding (mul.f32, not mul.rn.f32)."""
        products: dict[str, Instruction] = {}
        targets = set(self.labels.values())
        for at, i in enumerate(self.code):
            if at in targets or i.op == "bra":
                products.clear()
            if i.op in ("add", "sub") and i.modifiers == ("f32",):
                for place in (1, 2):
                    product = products.get(i.operands[place].name)
                    if product is not None:
                        signs = "++" if i.op == "add" else "+-" if place == 1 else "-+"  # of product and addend
                        operands = (i.operands[0], *product.operands[1:], i.operands[3 - place])
                        self.contracted[at] = Instruction("contract", (signs, "f32"), operands, i.guard, i.text)
                        break
            for written in i.operands[:1] if i.op not in ("st", "red", "bra") else ():
                for register in written.parts or (written,):
                    products = {
                        name: p for name, p in products.items()
                        if register.name != name and all(register.name != o.name for o in p.operands)
                    }  # fmt: skip
            if i.op == "mul" and i.modifiers == ("f32",) and i.guard is None:
                products[i.operands[0].name] = i

    def _add(self, statement: str) -> None:
        if statement.endswith(":"):
            self.labels[statement[:-1]] = len(self.code)
            return
        if statement.startswith(".reg"):
            _, kind, names = statement.split(None, 2)
            width = 1 if kind == ".pred" else int(kind[2:])
            for name in names.split(","):
                stem, _, count = name.strip().partition("<")
                members = [f"{stem}{i}" for i in range(int(count[:-1]))] if count else [stem]
                self.widths.update(dict.fromkeys(members, width))
            return
        if statement.startswith("."):
            return  # .pragma
        guard = re.match(r"@(!?)(%?\w+)\s+", statement)
        head, _, rest = statement[guard.end() if guard else 0 :].partition(" ")
        op, *modifiers = head.split(".")
        operands = tuple(self._operand(text.strip()) for text in _split(rest))
        where = (guard.group(2), bool(guard.group(1))) if guard else None
        self.code.append(Instruction(op, tuple(modifiers), operands, where, statement))

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Operand("vector", parts=tuple(self._operand(t.strip()) for t in _split(text[1:-1])))
        if text.startswith("["):
            name, _, offset = text[1:-1].partition("+")
            return Operand("address", name.strip(), int(offset or "0", 0))
        negated, text = text.startswith("!"), text.lstrip("!")
        if "|" in text:
            return Operand("vector", parts=tuple(self._operand(t.strip()) for t in text.split("|")))
        if text in self.widths:
            return Operand("register", text, negated=negated)
        if text.startswith("%"):
            return Operand("special", text[1:])
        if re.fullmatch(r"0[fFdD][0-9A-Fa-f]+", text):
            return Operand("immediate", value=int(text[2:], 16))
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            return Operand("immediate", value=int(text.rstrip("U"), 0))
        return Operand("symbol", text)


def _statements(body: str) -> Iterator[str]:
    """Statements without their semicolons, labels with their colons; braces of scopes are dropped."""
    body = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", body, flags=re.MULTILINE)
    at, depth = 0, 0
    while at < len(body):
        if found := re.compile(r"\s*([{}])").match(body, at):
            depth += 1 if found.group(1) == "{" else -1
            if depth == 0:
                return
        elif found := re.compile(r"\s*([$\w]+:)(?!:)").match(body, at):
            yield found.group(1)
        elif found := re.compile(r"\s*([^;]*);").match(body, at):
            yield " ".join(found.group(1).split())
        else:
            raise Fault(f"not understood: {body[at : at + 80]!r}")
        at = found.end()


def _split(text: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    return [part for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text) if part.strip()]
