"""bench/kernels.py --check-only on a simulated GPU: what the first person with a real one runs."""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from qtensor.kernels import FORMATS
from qtensor.kernels.triton import TRITON
from support.gpu.driver import simulated_gpu
from support.processes import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
at_length = pytest.mark.skipif(not os.environ.get("QTENSOR_ENDURANCE"), reason="compiles 60 kernels: make endurance")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "bench/kernels.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("gpu", None)
    return module


def test_it_compiles_fewer_than_60_kernels(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes through every format. Nothing is compiled or launched here, so no values are what they should be."""
    compiled: list[str] = []

    def count(kernel: Any, key: Any, signature: Any, device: int, *_: Any) -> Any:
        compiled.append(kernel.__name__)
        nothing = SimpleNamespace(launch_metadata=lambda *_: None, run=lambda *_: None, function=0, packed_metadata=0)
        kernel.device_caches[device][0][key] = nothing
        return nothing

    monkeypatch.setattr(JITFunction, "_do_compile", count)
    with simulated_gpu(89) as gpu:
        monkeypatch.setattr(gpu, "arch", 1089)  # A device of its own: what others compiled does not count.
        monkeypatch.setattr(gpu, "get_current_target", lambda: SimpleNamespace(backend="cuda", arch=89, warp_size=32))
        failures = bench.check(torch.device("cpu"), TRITON)
    assert {name for name in FORMATS if any(name in failure for failure in failures)} == set(FORMATS)
    assert 30 < len(compiled) < 60


@at_length
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_nothing_differs(bench: ModuleType, arch: int) -> None:
    with simulated_gpu(arch):
        assert bench.check(torch.device("cpu"), TRITON) == []
