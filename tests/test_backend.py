"""Which backend serves which device, and that traced tensors never meet a kernel."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qtensor import kernels, quantize
from qtensor.kernels import (
    FORMATS,
    RECIPES,
    SEARCHES,
    Audit,
    Backend,
    NonFinite,
    Parts,
    UnsupportedBackend,
    WeightFormat,
    backend,
    choose,
)
from qtensor.kernels.compiled import TRACED
from qtensor.kernels.reference import TORCH
from qtensor.schemes.scheme import SCHEMES, as_scheme
from qtensor.tensor.ops_products import has_fp8_matmul
from support.kernel_contract import OPERATIONS, assert_gives_the_references_results, assert_has_the_operations

CPU = torch.device("cpu")
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def quantized(fmt: WeightFormat, shape: tuple[int, ...] = (130, 257)) -> Parts:
    source = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return quantize(source, SCHEMES[fmt.name]).parts()


def the(name: str) -> Backend:
    """The backend of this name, on a CPU; `triton` without its interpreter, thus for what runs no kernel."""
    if name == "traced":
        return TRACED
    if name == "triton":
        pytest.importorskip("triton", reason="the Triton kernels need triton")
        return importlib.import_module("qtensor.kernels.triton").TRITON
    if name == "numba":
        pytest.importorskip("numba", reason="the numba kernels need the optional extra 'cpu'")
    return choose(CPU, name)


@pytest.mark.parametrize("name", [*backend.NAMES, "traced"])
def test_every_backend_has_the_operations(name: str) -> None:
    assert len(OPERATIONS) == 5
    assert the(name).name == name
    assert_has_the_operations(the(name))


@formats
@pytest.mark.parametrize("name", ["numba", "traced"])  # triton: in tests/gpu/test_kernels.py
def test_every_backend_gives_the_references_results(name: str, fmt: WeightFormat) -> None:
    assert_gives_the_references_results(the(name), fmt)


@pytest.mark.parametrize("name", SEARCHES)
def test_numba_gives_the_references_results_with_searched_scales(name: str) -> None:
    assert_gives_the_references_results(the("numba"), SCHEMES[name].searched().format)


@pytest.mark.parametrize("name", [f"{name}:{tool}" for tool, own in RECIPES.items() for name in own if own[name]])
def test_numba_gives_the_references_results_by_recipe(name: str) -> None:
    assert_gives_the_references_results(the("numba"), as_scheme(name).format)


def test_argument_beats_variable_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(CPU, "torch") is TORCH
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert choose(CPU) is TORCH
    monkeypatch.setenv(backend.VARIABLE, "triton")
    assert choose(CPU, "torch") is TORCH
    with pytest.raises(UnsupportedBackend, match="cannot serve cpu"):
        choose(CPU)


@pytest.mark.parametrize(
    ("device", "name", "problem"),
    [
        ("cpu", "triton", "run on GPUs"),
        ("cuda:0", "numba", "CPUs only"),
        ("xpu:0", "triton", "NVIDIA and AMD"),
        ("cpu", "cutlass", "unknown kernel backend 'cutlass'"),
    ],
)
def test_unsupported_pairs_are_errors(device: str, name: str, problem: str) -> None:
    with pytest.raises(UnsupportedBackend, match=problem):
        choose(torch.device(device), name)


def test_a_gpu_without_triton_is_an_error_not_a_slow_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_is_installed", lambda name: name != "triton")
    with pytest.raises(UnsupportedBackend, match=r"triton is not installed; QTENSOR_KERNELS=torch"):
        backend._name(None, "cuda", 0)
    assert backend._name("torch", "cuda", 0) == "torch"


def test_an_old_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    with pytest.raises(UnsupportedBackend, match=r"older than compute capability 8\.0"):
        backend._name(None, "cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 0))
    assert backend._name(None, "cuda", 0) == "triton"


@pytest.mark.parametrize(
    ("chip", "multiplies"),
    [
        ((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True),
        ("gfx90a", False), ("gfx942:sramecc+:xnack-", False), ("gfx950", True), ("gfx1201", True),
    ],
)  # fmt: skip
def test_which_chips_multiply_the_stored_bytes(
    chip: str | tuple[int, int], multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AMD's report themselves as compute capability 9.0 and higher, whatever they multiply."""
    amd = isinstance(chip, str)
    monkeypatch.setattr(torch.version, "hip", "7.0" if amd else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4) if amd else chip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=chip))
    backend.multiplies_e4m3fn.cache_clear()
    weight = SimpleNamespace(scheme=SCHEMES["fp8_per_channel"], qdata=torch.empty(32, 32, device="meta"))
    x = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda", 0))
    assert has_fp8_matmul(x, weight) is multiplies  # type: ignore[arg-type]
    backend.multiplies_e4m3fn.cache_clear()


def test_cpu_works_without_numba() -> None:
    code = "import sys; sys.modules['numba'] = None; import qtensor.kernels as k; print(k.describe()[0].backend)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch"


def test_describe_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    row = kernels.describe()[0]
    assert row.device == "cpu"
    assert row.backend in ("numba", "torch")
    assert "numba" in row.reason
    assert row.own == choose(CPU).own
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert kernels.describe()[0] == ("cpu", "torch", "QTENSOR_KERNELS=torch", OPERATIONS)
    monkeypatch.setenv(backend.VARIABLE, "triton")
    row = kernels.describe()[0]
    assert row.backend is None
    assert row.own == ()
    assert "GPUs" in row.reason


@formats
@pytest.mark.parametrize("shape", [(130, 257), (2, 130, 129)])
def test_dequantize_traces(fmt: WeightFormat, shape: tuple[int, ...]) -> None:
    parts = quantized(fmt, shape)

    def dequantize(*tensors: torch.Tensor) -> torch.Tensor:
        parts = Parts(*tensors)
        # An odd number of columns has a zero beside it where two elements share a byte.
        values = kernels.dequantize(parts.qdata, parts.scale, fmt, torch.bfloat16, None, parts.global_scale)
        return values[..., : shape[-1]]

    torch.compiler.reset()
    traced = torch.compile(dequantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(*parts), dequantize(*parts))
    with FakeTensorMode() as mode:
        fake = dequantize(*(mode.from_tensor(part) for part in parts))
    assert fake.shape == shape
    meta = dequantize(*(part.to("meta") for part in parts))
    assert meta.is_meta
    assert meta.shape == shape


@formats
def test_activation_traces(fmt: WeightFormat) -> None:
    x = torch.randn(5, 257, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    torch.compiler.reset()  # Each format is another program of this one function, and so many are allowed.
    traced = torch.compile(lambda x: kernels.quantize_activation(x, fmt), fullgraph=True, backend="aot_eager")
    for a, b in zip(traced(x), kernels.quantize_activation(x, fmt), strict=True):
        assert torch.equal(a.float(), b.float())


def test_audit_on_the_host() -> None:
    source = torch.ones(2, 3, dtype=torch.bfloat16)
    qdata, scale = torch.empty(2, 3, dtype=torch.float8_e4m3fn), torch.empty(2, 1)
    audit = Audit(measure_sqnr=True)
    kernels.quantize_into(source, qdata, scale, kernels.FP8_PER_CHANNEL, audit)
    kernels.quantize_into(source, qdata, scale, kernels.FP8_PER_CHANNEL, audit)
    assert audit.signal == pytest.approx(12)
    assert audit.noise == pytest.approx(0, abs=1e-9)
    audit.verify()
    source[1, 1] = float("inf")
    with pytest.raises(NonFinite) as refused:
        kernels.quantize_into(source, qdata, scale, kernels.FP8_PER_CHANNEL, audit, origin=60)
    assert refused.value.index == 64
