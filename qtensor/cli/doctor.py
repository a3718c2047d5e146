"""`qtensor doctor`: versions, devices, which kernels serve them, and whether their bytes are right."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from typing import Any

import torch
from torch import nn

from .. import kernels
from ..kernels.cpu import compiling
from ..report.progress import Progress
from ..schemes.scheme import SCHEMES, Scheme
from ..sessions.online import online_quant
from ..tensor.qtensor import QTensor, empty

PACKAGES = ("torch", "triton", "numba", "numpy", "safetensors", "transformers", "accelerate", "torchao", "tqdm")


def examine() -> dict[str, Any]:
    """All findings, ready for JSON. `ok` is False if a device has no kernels or its bytes differ from the oracle's.

    On a terminal a bar shows the progress: the first time, the kernels are compiled.
    """
    choices = kernels.describe()
    pairs = [(device, scheme) for device in _devices() for scheme in dict.fromkeys(SCHEMES.values())]
    checks = []
    with Progress(description="checking", total=len(pairs), unit="check") as progress:
        for device, scheme in pairs:
            checks.append({"device": device, "scheme": str(scheme), "problem": _problem(device, scheme)})
            progress.advance()
    return {
        "qtensor": _version("qtensor-online"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": [_device(name) for name in _devices()],
        "kernels": [choice._asdict() for choice in choices],
        "checks": checks,
        "ok": all(choice.backend for choice in choices) and not any(check["problem"] for check in checks),
    }


def compile_loops(schemes: list[Scheme]) -> dict[str, Any]:
    """Compile what CPU weights of these schemes take, into the cache that later processes read. Ready for JSON; `ok` is
    False where nothing could be kept for them."""
    choice, started = kernels.describe()[0], time.perf_counter()
    pairs = [(scheme.format, dtype) for scheme in schemes for dtype in kernels.SOURCE_DTYPES]
    if choice.backend is None:
        pairs = []
    with Progress(description="compiling", total=len(pairs), unit="format") as progress:
        for fmt, dtype in pairs:
            kernels.choose(torch.device("cpu")).compile(fmt, dtype)
            progress.advance()
    return {
        "backend": choice.backend,
        "reason": choice.reason,
        "schemes": [str(scheme) for scheme in schemes],
        "seconds": time.perf_counter() - started,
        "not_kept": compiling.not_kept,
        "ok": choice.backend == "numba" and not compiling.not_kept,
    }


def describe_compiled(done: dict[str, Any]) -> str:
    """What `compile_loops` did, for a person."""
    if done["backend"] != "numba":
        return f"Nothing to compile: CPU weights are served by {done['backend']} ({done['reason']})."
    if done["not_kept"]:
        reason = next(iter(done["not_kept"].values()))
        return f"Compiled, but {len(done['not_kept'])} loops could not be kept for other processes: {reason}"
    return f"The CPU loops of {', '.join(done['schemes'])} are compiled; that took {done['seconds']:.1f} s."


def describe(findings: dict[str, Any]) -> str:
    """The findings for a person."""
    installed = {k: v or "not installed" for k, v in findings["packages"].items()}
    rows = [("qtensor", findings["qtensor"]), ("python", f"{findings['python']} on {findings['platform']}")]
    rows += list(installed.items())
    lines = [f"{name:<13} {value}" for name, value in rows]
    lines += ["", "Devices"]
    lines += [f"  {d['device']:<11} {d['name']}; {d['note']}" for d in findings["devices"]]
    lines += ["", "Kernels"]
    lines += [f"  {_kernels(k)}" for k in findings["kernels"]]
    lines += ["", "Self-check: a weight quantized while it is written equals the reference quantizer, byte for byte"]
    lines += [f"  {c['device']:<11} {c['scheme']:<16} {c['problem'] or 'ok'}" for c in findings["checks"]]
    lines += ["", "All well." if findings["ok"] else "Something is wrong: see above."]
    return "\n".join(lines)


def _kernels(choice: dict[str, Any]) -> str:
    label = f"{choice['device']:<11} {choice['backend'] or 'none'}: {choice['reason']}"
    return f"{label}; its own are {', '.join(choice['own'])}" if choice["own"] else label


def _devices() -> list[str]:
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def _device(name: str) -> dict[str, Any]:
    if name == "cpu":
        note = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        return {"device": name, "name": platform.processor() or platform.machine(), "note": note}
    properties = torch.cuda.get_device_properties(name)
    note = f"compute capability {properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
    return {"device": name, "name": properties.name, "note": note}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _problem(device: str, scheme: Scheme) -> str | None:
    """Fill a small weight in odd slices on the device and compare with the plain-torch reference. None if equal."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 200, dtype=torch.float32, device="cpu", generator=generator).to(torch.bfloat16)
    expected = empty(weight.shape, scheme, weight.dtype, "cpu")
    try:
        qdata, scale, fmt = expected.qdata, expected.scale, scheme.format
        kernels.quantize_into(weight, qdata, scale, fmt, global_scale=expected.global_scale, backend="torch")
        layer = nn.Linear(200, 300, bias=False, dtype=torch.bfloat16, device=device)
        with online_quant(scheme, layer, progress=False):
            for start in range(0, 300, 70):
                layer.weight.data[start : start + 70].copy_(weight[start : start + 70])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found: Any = layer.weight
    if not isinstance(found, QTensor):
        return "the weight was not quantized"
    names = ("quantized values", "scales", "global scale")
    for name, ours, wanted in zip(names, found.parts(), expected.parts(), strict=False):
        if not torch.equal(ours.cpu().view(torch.uint8), wanted.view(torch.uint8)):
            return f"{name} differ from the reference"
    return None
