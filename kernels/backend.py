"""Which code quantizes: what a backend is, and the one place that knows them all and picks among them.

torch  plain torch, on any device; the reference.          kernels/reference.py
numba  fused loops for CPUs, when numba is installed.      kernels/cpu/numba_backend.py
triton fused kernels for NVIDIA and AMD GPUs.              kernels/triton/
traced operations a compiler can look into.                kernels/compiled.py

A CPU takes numba, or torch where numba is not installed; a GPU takes triton; any other device takes torch. An argument
`backend=`, or else the environment variable QTENSOR_KERNELS, overrides that. A backend that cannot serve the device is
an error that names the remedy: there is no silent second choice. Nobody chooses traced: it takes the calls that are
being recorded.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple, Protocol

import torch

from qtensor.errors import QTensorError

from . import compiled, reference
from .audit import Audit
from .cpu.compiling import Once
from .formats import WeightFormat
from .parts import Parts

NAMES = ("triton", "numba", "torch")
VARIABLE = "QTENSOR_KERNELS"
_MIN_CAPABILITY = (8, 0)


class Backend(Protocol):
    """Code for the arithmetic of quantized weights `[N, K]` and stacks of them `[E, N, K]`.

    All give the reference's bytes, and products within its rounding. A backend is a subclass of `reference.Torch`,
    which does what it has no code of its own for.

    Attributes:
        name: What `backend=` and QTENSOR_KERNELS call it.
        own: The operations it has code of its own for, for some formats at least; the others are the reference's.
    """

    name: str
    own: tuple[str, ...]

    def quantize_into(
        self, source: torch.Tensor, parts: Parts, fmt: WeightFormat, audit: Audit | None = None, origin: int = 0
    ) -> None:
        """Quantize `source` `[..., N, K]` (any strides) into `parts`, which may be views of a larger weight.

        The rows must be whole units of `fmt`: any rows per channel or group, a band that starts on a multiple of 128
        per block, the entire matrix per tensor and for nvfp4. `origin` is the flat index of `source[0]` in the weight,
        for error messages.
        """

    def dequantize(
        self, parts: Parts, fmt: WeightFormat, dtype: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values times their scales in fp32, rounded once to `dtype`: `[..., N, K]`.

        Where two elements share a byte, the last of an odd number of columns has a zero beside it, which `out` leaves
        off if it has one column less than there are elements.
        """

    def linear(
        self, x: torch.Tensor, parts: Parts, fmt: WeightFormat, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x `[M, K]` times the dequantized weight `[N, K]` transposed, plus bias `[N]`: `[M, N]` in x's dtype."""

    def experts(
        self,
        x: torch.Tensor,
        parts: Parts,
        fmt: WeightFormat,
        offsets: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Each row of x `[M, K]` times the matrix of its expert, transposed, plus bias `[E, N]`: `[M, N]`.

        Rows are sorted by expert: those of expert e end at `offsets[e]` (int `[E]`), where those of e + 1 begin, and
        the last offset is M. The convention of `torch.nn.functional.grouped_mm`.
        """

    def quantize_activation(self, x: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
        """x `[M, K]` → fp8 `[M, K]` and its scales: `[M, 1]`, `[M, ceil(K/128)]` or `[M, ceil(K/32)]` by the weight's
        format."""

    def compile(self, fmt: WeightFormat, dtype: torch.dtype) -> None:
        """Compile all that weights of this format and values of this dtype take, as far as it can be kept on disk for
        other processes."""


class UnsupportedBackend(QTensorError):
    """The backend asked for, or the only one made for this device, cannot run here."""


class Choice(NamedTuple):
    """One row of `describe()`: what a device gets and why. `backend` is None when only an error remains.

    `own` is the backend's: the operations that are not the reference's there.
    """

    device: str
    backend: str | None
    reason: str
    own: tuple[str, ...] = ()


def choose(device: torch.device, backend: str | None = None) -> Backend:
    """The backend that serves tensors on a device.

    Args:
        device: Of the tensors.
        backend: "triton", "numba" or "torch", instead of the device's own; QTENSOR_KERNELS does the same.

    Returns:
        The backend.

    Raises:
        UnsupportedBackend: The backend that is asked for cannot serve the device, or none is and the device's own is
            missing.
    """
    return _choose(backend or os.environ.get(VARIABLE) or None, device.type, device.index)


def serving(tensor: torch.Tensor, *others: torch.Tensor | None, backend: str | None = None) -> Backend:
    """The backend for a call with these tensors: as `choose`, unless the call is being recorded.

    Args:
        tensor: The one whose device decides.
        others: Further tensors of the call, or None.
        backend: As `choose` takes it.

    Returns:
        The backend, or one of plain torch operations that compilers see through.
    """
    if compiled.must_trace(tensor, *others):
        return compiled.TRACED
    return choose(tensor.device, backend)


def describe() -> list[Choice]:
    """What every device of this machine gets, and why: CPU first, then each GPU."""
    rows = [_describe(torch.device("cpu"))]
    rows += [_describe(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return rows


def _describe(device: torch.device) -> Choice:
    asked = os.environ.get(VARIABLE) or None
    label = str(device) if device.type == "cpu" else f"{device} {torch.cuda.get_device_name(device)}"
    try:
        backend = choose(device)
    except (UnsupportedBackend, ImportError) as error:
        return Choice(label, None, str(error))
    if asked:
        reason = f"{VARIABLE}={asked}"
    elif device.type == "cpu":
        reason = "numba is installed" if backend.name == "numba" else f"numba is not usable: {_numba_problem()}"
    else:
        reason = "fused kernels for this device"
    return Choice(label, backend.name, reason, backend.own)


@functools.cache
def _choose(asked: str | None, device_type: str, index: int | None) -> Backend:
    name = _name(asked, device_type, index)
    if name == "numba":
        return _numba()
    return _triton() if name == "triton" else reference.TORCH


@Once
def _numba() -> Backend:
    from .cpu.numba_backend import NUMBA

    return NUMBA


@Once
def _triton() -> Backend:
    from .triton import TRITON

    return TRITON


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
    if not _is_installed("triton"):
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
def multiplies_e4m3fn(device: torch.device) -> bool:
    """Whether the device has fp8 units for the bytes that are stored here.

    NVIDIA's from compute capability 8.9, AMD's from gfx950 and gfx12. gfx942 has units too, but multiplies the fnuz
    format, in which the same bytes are other numbers.
    """
    if device.type != "cuda":
        return False
    if torch.version.hip is not None:
        arch: str = torch.cuda.get_device_properties(device).gcnArchName
        return arch.startswith(("gfx950", "gfx12"))
    return torch.cuda.get_device_capability(device) >= (8, 9)


@Once
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def _numba_problem() -> str | None:
    if not _is_installed("numba"):
        return "numba is not installed (pip install 'qtensor-online[cpu]')"
    try:
        _numba()
    except ImportError:
        return "numba is installed but does not work here"
    return None
