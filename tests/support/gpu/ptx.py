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
    """One kernel. widths: bits of each register, 1 for predicates. parameters: names and bits."""

    text: str
    name: str
    parameters: list[tuple[str, int]]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    target: int = 0

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
        return program

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
        if text in self.widths or "|" in text:
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
