"""What GPUs could reach with each kernel, on paper: from the machine code, without a GPU.

    python bench/kernel_model.py [--chips 80 89 90 100] [--searched | --recipes] [--out bench/results/kernel_model.json]

Kernels are compiled for a 4096 × 4096 weight in bf16, and their machine code is read: instructions for each element (a
second look for NaN left out), registers, and the bytes that a thread has asked for before it computes. From these and a
chip's data sheet follows how many programs an SM holds, how many bytes it has in flight, and two bounds on the share of
a copy's bandwidth: Little's law (bytes in flight = bandwidth × latency), and how many instructions an SM issues while
an element's bytes move. The model is the product of both. It knows no cache, no bank conflict and no scheduler: it
shows what holds a kernel back, and is no measurement.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_cache import Launch, compiling_for

from qtensor.kernels import FORMATS, RECIPES, SEARCHES, Audit, Parts, WeightFormat
from qtensor.schemes.scheme import as_scheme

SIZE = 4096


@dataclass(frozen=True)
class Chip:
    """From data sheets, but for the latency of memory under load, which is assumed. rate: bytes per second of a copy,
    taken as 92 % of the peak. clock in Hz."""

    name: str
    sms: int
    peak: float
    clock: float
    latency: float
    threads: int
    blocks: int
    shared: int

    @property
    def rate(self) -> float:
        return 0.92 * self.peak

    @property
    def in_flight(self) -> float:
        """Bytes that an SM must have asked for."""
        return self.rate * self.latency / self.sms


CHIPS = {
    80: Chip("A100 80 GB", 108, 2.04e12, 1.41e9, 600e-9, 2048, 32, 164 << 10),
    89: Chip("L40S", 142, 0.864e12, 2.52e9, 600e-9, 1536, 24, 100 << 10),
    90: Chip("H100 SXM", 132, 3.35e12, 1.75e9, 700e-9, 2048, 32, 228 << 10),
    100: Chip("B200", 148, 8.0e12, 1.85e9, 800e-9, 2048, 32, 228 << 10),
}
HALF_RATE = re.compile(
    r"(IADD3|LOP3|SHF|SEL|[IFV]I?SETP|I?MNMX|VIMNMX|PRMT|LEA|FSEL|PLOP3|F2FP|VIADD|I2FP|F2F|FMNMX|MUFU)\b"
)
"""Instructions that an SM issues half as often as it could."""


@dataclass
class Row:
    """One launch. share: of a copy's bandwidth, by the model. bytes: moved for each element."""

    operation: str
    kernel: str
    chip: int
    instructions: float
    registers: int
    threads: int
    programs: int
    in_flight_kib: float
    bytes: float
    share: float


def instructions_of(cubin: bytes) -> tuple[list[str], dict[str, int], int]:
    """The machine code, where its labels are, and registers per thread."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def ask(tool: Any, flag: str) -> str:
            return subprocess.run([tool.path, flag, str(path)], capture_output=True, text=True, check=True).stdout

        usage = ask(knobs.nvidia.cuobjdump, "--dump-resource-usage")
        text = ask(knobs.nvidia.nvdisasm, "-c")
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_?\w+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction.group(1))
    return code, labels, int(found.group(1))


def usual(code: list[str], labels: dict[str, int]) -> list[str]:
    """The instructions that a tile without NaN and infinity executes; those of a loop once.

    What it does not: the second look, a loop that neither stores nor loads 16 bytes, with the branch around it; blocks
    of arithmetic alone that a branch goes around, which bring such values into range; and what comes after the end.
    """
    cold = [False] * len(code)
    wide = [bool(re.search(r"STG|LDG\S*\.128", line)) for line in code]
    targets = [labels.get(m.group(1), -1) if (m := re.search(r"BRA\b.*?`\((\.L\w+)\)", line)) else -1 for line in code]
    for i, target in enumerate(targets):
        if 0 <= target <= i and not any(wide[target : i + 1]):
            cold[target : i + 1] = [True] * (i + 1 - target)
    touches = [bool(re.search(r"LD|ST|BAR|SHFL|ATOM|RED|EXIT|BRA", line)) for line in code]
    for i, target in enumerate(targets):
        if target <= i + 1 or any(wide[i + 1 : target]):
            continue
        if any(cold[i + 1 : target]) or not any(touches[i + 1 : target]):
            cold[i + 1 : target] = [True] * (target - i - 1)
    last = max(i for i, line in enumerate(code) if "EXIT" in line)
    return [line for line, skipped in zip(code[: last + 1], cold, strict=False) if not skipped]


def row(operation: str, launch: Launch, chip: int, read: float, written: float) -> Row:
    about = CHIPS[chip]
    code, labels, registers = instructions_of(launch.cubin)
    hot = usual(code, labels)
    widths = [int(m.group(1)) // 8 for line in hot if (m := re.search(r"LDG\S*\.(64|128)\b", line))]
    loaded = sum(widths) or sum(2 if ".U16" in line else 4 for line in hot if "LDG" in line)
    elements = loaded / read
    allocated = -(-registers // 8) * 8 * launch.threads
    programs = min(about.blocks, about.threads // launch.threads, 65536 // allocated)
    programs = min(programs, about.shared // max(1, launch.shared + 1024))
    in_flight = programs * launch.threads * loaded
    half = sum(bool(HALF_RATE.search(line)) for line in hot)
    per_second = about.sms * 128 * about.clock
    computing = max(len(hot), 2 * half) / elements / per_second
    moving = (read + written) / about.rate
    share = min(1.0, in_flight / about.in_flight) * moving / max(moving, computing)
    return Row(
        operation, launch.name, chip, round(len(hot) / elements, 1), registers, launch.threads, programs,
        round(in_flight / 1024, 1), read + written, round(share, 3),
    )  # fmt: skip


def launches_of(fmt: WeightFormat, chip: int, operation: str, size: int = SIZE) -> list[Launch]:
    from qtensor.kernels.triton import TRITON

    x, parts = torch.empty(size, size, dtype=torch.bfloat16), Parts.of((size, size), fmt)
    with compiling_for(chip) as seen:
        if operation == "quantize":
            TRITON.quantize_into(x, parts, fmt, Audit())
        else:
            TRITON.dequantize(parts, fmt, torch.bfloat16, x)
    return seen.launches


def rows_of(name: str, chip: int, operation: str) -> list[Row]:
    """A row for each launch of an operation on a format."""
    fmt, found = as_scheme(name).format, []
    stored = 1 / fmt.per_byte
    for launch in launches_of(fmt, chip, operation):
        if operation == "quantize":
            read, written = 2.0, 0.0 if "amax" in launch.name else stored
        else:
            read, written = stored, 2.0
        found.append(row(f"{operation} {name}", launch, chip, read, written))
    return found


def share(rows: list[Row]) -> float:
    """Of an operation: the time of a copy that moves as many bytes, by its launches' time."""
    return sum(r.bytes for r in rows) / sum(r.bytes / r.share for r in rows)


def table(rows: list[Row]) -> str:
    """A line for each launch on H100, and the share of the operation on every chip."""
    chips = sorted({r.chip for r in rows})
    head = [
        "operation",
        "kernel",
        "instructions",
        "registers",
        "warps / SM",
        "KiB in flight",
        *(f"sm_{c}" for c in chips),
    ]
    lines = [f"| {' | '.join(head)} |", "| --- | --- " + "| ---: " * (len(head) - 2) + "|"]
    for r in (r for r in rows if r.chip == (90 if 90 in chips else chips[0])):
        same = [[o for o in rows if o.operation == r.operation and o.chip == c] for c in chips]
        cells = [r.operation, f"`{r.kernel}`", f"{r.instructions:.1f}", str(r.registers)]
        cells += [str(r.programs * r.threads // 32), f"{r.in_flight_kib:.0f}"]
        lines.append(f"| {' | '.join([*cells, *(f'{100 * share(s):.0f} %' for s in same)])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chips", type=int, nargs="+", default=list(CHIPS))
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--searched", action="store_true", help="only what quantizes with searched scales")
    only.add_argument("--recipes", action="store_true", help="only what quantizes by other tools' recipes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names, operations = list(FORMATS), ["quantize", "dequantize"]
    if args.searched or args.recipes:
        by_recipe = [f"{name}:{tool}" for tool, formats in RECIPES.items() for name, own in formats.items() if own]
        names, operations = by_recipe if args.recipes else [f"{name}:searched" for name in SEARCHES], ["quantize"]
    rows = [
        found
        for operation in operations
        for name in names
        for chip in args.chips
        for found in rows_of(name, chip, operation)
    ]
    print(table(rows))
    if args.out:
        import triton

        about = {"triton": triton.__version__, "shape": [SIZE, SIZE], "dtype": "bfloat16"}
        args.out.write_text(json.dumps({"made": about, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
