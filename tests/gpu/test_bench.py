"""What the first person with a GPU runs: bench/kernel_speed.py --check-only, on a simulated one, and the report."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")


import triton
from triton.runtime.jit import JITFunction

from qtensor.kernels import FORMATS, Audit, Parts
from qtensor.kernels.triton import TRITON, per_channel
from support.gpu.driver import simulated_gpu
from support.processes import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
MODEL = ROOT / "bench/results/kernel_model.json"
MODELLED = {("fp8_per_channel", "quantize", 90), ("int4_per_group", "dequantize", 90)}
"""What continuous integration compiles."""
at_length = pytest.mark.skipif(not os.environ.get("QTENSOR_ENDURANCE"), reason="compiles 62 kernels: make endurance")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """The modules of bench/, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module
    for name in ("gpu", "kernel_speed", "gpu_first_run", "gpu_cache", "kernel_model"):
        sys.modules.pop(name, None)


def test_it_compiles_few_kernels(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
        failures = bench("kernel_speed").check(torch.device("cpu"), TRITON)
    assert {name for name in FORMATS if any(name in failure for failure in failures)} == set(FORMATS)
    assert 30 < len(compiled) < 70


@at_length
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_nothing_differs(bench: Any, arch: int) -> None:
    with simulated_gpu(arch):
        assert bench("kernel_speed").check(torch.device("cpu"), TRITON) == []


def test_what_is_compiled_ahead_of_time_is_found_later(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To machine code, in a cache that a second process would read."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cache, speed = bench("gpu_cache"), bench("kernel_speed")
    x, fmt = torch.zeros(48, 256, dtype=torch.bfloat16), FORMATS["fp8_per_channel"]
    monkeypatch.setattr(
        speed, "check", lambda _, fast: fast.quantize_into(x, Parts.of(x.shape, fmt), fmt, Audit(measure_sqnr=False))
    )
    assert cache.fill(90) == ["one_pass"]
    assert [path.suffix for path in tmp_path.rglob("one_pass.cubin")] == [".cubin"]
    kept = per_channel.one_pass.device_caches.pop(-90)
    assert cache.fill(90) == []
    assert list(per_channel.one_pass.device_caches.pop(-90)[0]) == list(kept[0])


def test_without_a_gpu_the_first_run_says_so(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["gpu_first_run.py"])
        bench("gpu_first_run").main()
    assert left.value.code == 2
    assert "no GPU found" in capsys.readouterr().err


def test_steps_of_the_first_run(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a CPU can do, which finds nothing wrong; and one that is wrong."""
    monkeypatch.setenv("QTENSOR_KERNELS", "torch")  # numba would compile for seconds.
    first, device = bench("gpu_first_run"), torch.device("cpu")
    results = {name: getattr(first, name)(device, 192) | {"seconds": 1.5} for name in ("upload", "products")}
    assert [result["failures"] for result in results.values()] == [[], []]
    quantize = first.quantize
    monkeypatch.setattr(first, "quantize", lambda weight, name: quantize(weight * 2, name))
    results["products"] = first.products(device, 192) | {"seconds": 1.5}
    assert len(results["products"]["failures"]) == 3 * len(FORMATS)
    text = first.report(results)
    assert "| upload | right | 1.5 |" in text
    assert f"| products | **{3 * len(FORMATS)} wrong** | 1.5 |" in text
    assert sum(limit for _, limit in first.STEPS.values()) < 600


@at_length
def test_a_step_that_crashes_is_a_line_of_the_report(bench: Any) -> None:
    result = bench("gpu_first_run").run("here", 60)
    assert "no GPU found" in result["failures"][0]


@pytest.mark.parametrize(
    ("name", "operation", "chip"),
    [
        pytest.param(name, operation, chip, marks=() if (name, operation, chip) in MODELLED else at_length)
        for name in FORMATS
        for operation in ("quantize", "dequantize")
        for chip in (80, 89, 90, 100)
    ],
)
def test_no_kernel_has_become_worse_on_paper(bench: Any, name: str, operation: str, chip: int) -> None:
    """Than bench/results/kernel_model.json says; `python bench/kernel_model.py --out` writes it."""
    model, committed = bench("kernel_model"), json.loads(MODEL.read_text())
    if triton.__version__ != committed["made"]["triton"]:
        pytest.skip(f"the table is of triton {committed['made']['triton']}")
    known = [model.Row(**r) for r in committed["rows"] if (r["operation"], r["chip"]) == (f"{operation} {name}", chip)]
    found = model.rows_of(name, chip, operation)
    assert [r.kernel for r in found] == [r.kernel for r in known]
    for now, before in zip(found, known, strict=True):
        assert now.share >= before.share - 0.01
        assert now.instructions <= before.instructions + 0.5


def test_the_page_has_the_model(bench: Any) -> None:
    model = bench("kernel_model")
    table = model.table([model.Row(**r) for r in json.loads(MODEL.read_text())["rows"]])
    assert table in (ROOT / "docs/kernels.md").read_text()
