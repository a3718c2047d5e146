"""Which code quantizes: the one place that knows the backends and picks among them.

torch  plain torch, on any device; the reference.          kernels/reference.py
numba  fused loops for CPUs, when numba is installed.      kernels/cpu/numba_backend.py
triton fused kernels for NVIDIA and AMD GPUs.              kernels/triton/

A CPU takes numba, or torch where numba is not installed; a GPU takes triton; any other device takes torch. An argument
`backend=`, or else the environment variable QTENSOR_KERNELS, overrides that. A backend that cannot serve the device is
an error that names the remedy: there is no silent second choice.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch

from qtensor.errors import QTensorError

NAMES = ("triton", "numba", "torch")
VARIABLE = "QTENSOR_KERNELS"
_MODULES = {"torch": ".reference", "numba": ".cpu.numba_backend", "triton": ".triton"}
_MIN_CAPABILITY = (8, 0)


class UnsupportedBackend(QTensorError):
    """The backend asked for, or the only one made for this device, cannot run here."""


class Choice(NamedTuple):
    """One row of `describe()`: what a device gets and why. `backend` is None when only an error remains."""

    device: str
    backend: str | None
    reason: str


def choose(device: torch.device, backend: str | None = None) -> ModuleType:
    """The module whose `quantize_into`, `dequantize` and `quantize_activation` serve tensors on `device`.

    Raises UnsupportedBackend when the backend named by `backend` or QTENSOR_KERNELS cannot serve the device, or when
    none is named and the device's own backend is missing.
    """
    return _choose(backend or os.environ.get(VARIABLE) or None, device.type, device.index)


def describe() -> list[Choice]:
    """What every device of this machine gets, and why: CPU first, then each GPU."""
    rows = [_describe(torch.device("cpu"))]
    rows += [_describe(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return rows


def _describe(device: torch.device) -> Choice:
    asked = os.environ.get(VARIABLE) or None
    label = str(device) if device.type == "cpu" else f"{device} {torch.cuda.get_device_name(device)}"
    try:
        name = _name(asked, device.type, device.index)
    except UnsupportedBackend as error:
        return Choice(label, None, str(error))
    if asked:
        return Choice(label, name, f"{VARIABLE}={asked}")
    if device.type == "cpu":
        reason = "numba is installed" if name == "numba" else "numba is not usable: " + str(_numba_problem())
    else:
        reason = "fused kernels for this device"
    return Choice(label, name, reason)


@functools.cache
def _choose(asked: str | None, device_type: str, index: int | None) -> ModuleType:
    return importlib.import_module(_MODULES[_name(asked, device_type, index)], __package__)


def _name(asked: str | None, device_type: str, index: int | None) -> str:
    if asked is not None and asked not in NAMES:
        raise UnsupportedBackend(f"unknown kernel backend {asked!r}; choose one of {', '.join(NAMES)}")
    if asked is None:
        if device_type == "cuda":
            asked = "triton"
        else:
            asked = "numba" if device_type == "cpu" and _numba_problem() is None else "torch"
    problem = _problem(asked, device_type, index)
    if problem is not None:
        remedy = "" if asked == "torch" else f"; {VARIABLE}=torch selects the slower plain-torch path"
        raise UnsupportedBackend(f"the {asked} kernels cannot serve {device_type} tensors: {problem}{remedy}")
    return asked


def _problem(name: str, device_type: str, index: int | None) -> str | None:
    """Why `name` cannot serve the device; None when it can."""
    if name == "torch":
        return None
    if name == "numba":
        return "they run on CPUs only" if device_type != "cpu" else _numba_problem()
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "they run on GPUs (on a CPU only in Triton's interpreter, TRITON_INTERPRET=1)"
    if device_type != "cuda":
        return "they are made for NVIDIA and AMD GPUs"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < _MIN_CAPABILITY:
        return "the GPU is older than compute capability {}.{}".format(*_MIN_CAPABILITY)
    return None


@functools.cache
def _numba_problem() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'qtensor-online[cpu]')"
    if importlib.util.find_spec(".cpu.numba_backend", __package__) is None:
        return "this build has no numba kernels"
    module = importlib.import_module(".cpu.numba_backend", __package__)
    return None if module.available() else "numba is installed but does not work here"
