"""The first run on a GPU: correctness, then benchmarks, and a report to send us. `make gpu-first-run` calls it.

    python bench/gpu_first_run.py [--minutes 10] [--out gpu-first-run.md]

Nothing of this has run on a GPU before; docs/gpu.md says what was done instead. Each step is a process of its own, so
that one which crashes or hangs is a line of the report. Needs a GPU, and 3 GiB of its memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import torch
from torch import nn

from qtensor import online_quant, quantize
from qtensor.kernels import FORMATS, choose, describe
from qtensor.schemes.scheme import SCHEMES

Result = dict[str, Any]
"""failures: what is wrong, a line for each. Whatever else a step has to say is shown as it is."""


def here(device: torch.device, size: int) -> Result:
    """Chip, driver, versions, and which kernels qtensor takes."""
    return {"failures": [], "machine": gpu.machine(), "backends": [str(choice) for choice in describe()]}


def kernels(device: torch.device, size: int) -> Result:
    """Every kernel against the CPU reference, byte for byte: bench/kernel_speed.py --check-only."""
    import kernel_speed as bench

    return {"failures": bench.check(device)}


def upload(device: torch.device, size: int) -> Result:
    """Weights that are written from CPU memory, on two streams in turn, against the same weights quantized there."""
    failures, rates = [], {}
    sources = [torch.randn(size, size, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(4)]
    for name in ("fp8_per_channel", "fp8_per_block", "fp8_per_tensor", "nvfp4"):
        streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []
        with online_quant(SCHEMES[name]):
            layers = [nn.Linear(size, size, bias=False, dtype=torch.bfloat16, device=device) for _ in sources]
            start = time.perf_counter()
            for n, (layer, source) in enumerate(zip(layers, sources, strict=True)):
                with torch.cuda.stream(streams[n % 2] if streams else None):
                    layer.weight.data.copy_(source)
            if streams:
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
        rates[name] = round(sum(s.nbytes for s in sources) / seconds / 1e9, 2)
        for n, (layer, source) in enumerate(zip(layers, sources, strict=True)):
            expected = quantize(source.to(device), name)
            pairs = zip(layer.weight.parts(), expected.parts(), strict=True)
            if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs):
                failures.append(f"{name}: weight {n} differs from the one that was quantized in one piece")
    return {"failures": failures, "GB/s of bf16, bytes checked": rates}


def products(device: torch.device, size: int) -> Result:
    """nn.functional.linear of every scheme, 0, 1, 17 and 100 rows: finite, shaped, and near the unquantized product."""
    failures, errors = [], {}
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    for name, fmt in FORMATS.items():
        quantized = quantize(weight, name)
        for rows in (0, 1, 17, 100):
            x = torch.randn(rows, size, generator=torch.Generator().manual_seed(rows)).bfloat16().to(device)
            found, exact = nn.functional.linear(x, quantized), nn.functional.linear(x.float(), weight.float())
            if found.shape != exact.shape or not found.isfinite().all():
                failures.append(f"{name}, {rows} rows: shape {tuple(found.shape)}, or not finite")
                continue
            if rows:
                errors[f"{name}, {rows} rows"] = round(float((found.float() - exact).norm() / exact.norm()), 4)
                if errors[f"{name}, {rows} rows"] > (0.2 if fmt.per_byte == 2 else 0.06):
                    failures.append(f"{name}, {rows} rows: relative error {errors[f'{name}, {rows} rows']}")
    return {"failures": failures, "relative error": errors, "backend": choose(device).name}


def timings(device: torch.device, size: int) -> Result:
    """bench/kernel_speed.py --quick: each kernel beside a copy and torch.compile."""
    import kernel_speed as bench

    bandwidth = bench.copy_bandwidth(device, quick=True)
    rows = bench.measure(device, bandwidth, quick=True)
    return {
        "failures": [],
        "copy GB/s": round(bandwidth / 1e9),
        "table": gpu.table(rows),
        "goals": bench.goals_met(rows),
    }


def load(device: torch.device, size: int) -> Result:
    """bench/load_gpu.py: peak memory and time of a load beside bf16's."""
    command = [sys.executable, str(Path(__file__).with_name("load_gpu.py")), "--scale", "0.05", "--no-save"]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"failures": [] if done.returncode == 0 else [done.stderr[-2000:]], "table": done.stdout}


STEPS: dict[str, tuple[Callable[[torch.device, int], Result], int]] = {
    "here": (here, 60),
    "kernels": (kernels, 200),
    "upload": (upload, 60),
    "products": (products, 60),
    "timings": (timings, 100),
    "load": (load, 100),
}
"""What is run, and for how many seconds at most."""


def run(name: str, seconds: float) -> Result:
    """One step in a process of its own."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        try:
            done = subprocess.run(
                [sys.executable, __file__, "--step", name, "--out", str(out)],
                capture_output=True, text=True, timeout=max(1.0, seconds),
            )  # fmt: skip
            result: Result = json.loads(out.read_text()) if out.exists() else {"failures": [done.stderr[-4000:]]}
        except subprocess.TimeoutExpired:
            result = {"failures": [f"not done after {seconds:.0f} s"]}
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def report(results: dict[str, Result]) -> str:
    """As markdown: a line for each step, then all that they have to say."""
    lines = ["# qtensor's first run on a GPU", "", "| step | outcome | seconds |", "| --- | --- | ---: |"]
    for name, result in results.items():
        wrong = len(result["failures"])
        lines.append(f"| {name} | {f'**{wrong} wrong**' if wrong else 'right'} | {result['seconds']} |")
    for name, result in results.items():
        lines += ["", f"## {name}", "", (STEPS[name][0].__doc__ or "").strip(), ""]
        lines += [f"- {failure}" for failure in result["failures"]]
        for key, value in result.items():
            if key not in ("failures", "seconds"):
                text = value if isinstance(value, str) else json.dumps(value, indent=1)
                lines += ["", f"{key}:", "", "```", text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="for all of it")
    parser.add_argument("--out", type=Path, default=Path("gpu-first-run.md"), help="where the report goes")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = gpu.require_gpu()
    if options.step:
        options.out.write_text(json.dumps(STEPS[options.step][0](device, 8192)))
        return 0
    end = time.monotonic() + 60 * options.minutes
    results: dict[str, Result] = {}
    for name, (_, limit) in STEPS.items():
        print(f"{name}: {(STEPS[name][0].__doc__ or '').splitlines()[0]}", flush=True)
        results[name] = run(name, min(limit, end - time.monotonic()))
        print("   " + ("; ".join(results[name]["failures"])[:300] or "right"), flush=True)
    options.out.write_text(report(results))
    print(f'The report is in {options.out}. Please send it: the issue template is called "A first run on a GPU".')
    return int(any(result["failures"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
