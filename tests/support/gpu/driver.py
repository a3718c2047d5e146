"""A driver for Triton without a GPU: kernels are specialised and compiled for a chip as on that chip, and a launch on
tensors in CPU memory executes their PTX in machine.py. What is compiled for AMD's chips is launched to no effect.
Compilation ends with the assembly: neither ptxas nor AMD's linker is called."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from qtensor.kernels.triton import launch as geometry

from .machine import launch
from .ptx import Program

_STAGES = ("tests.support.gpu", "tests.support.gpu")
CHIPS = (80, 89, 90, 100)
Chip = int | str
"""90 is NVIDIA's sm_90, "gfx942" is AMD's."""


class Gpu(DriverBase):
    """launches: kernel, grid, and how many threads executed each operation. programs: by their assembly, every kernel
    that was launched. schedule, contract: see `machine.launch`."""

    def __init__(self, arch: Chip) -> None:
        self.arch, self.amd = arch, isinstance(arch, str)
        self.launches: list[tuple[Program, tuple[int, int, int], Counter[str]]] = []
        self.schedule: int | None = None
        self.contract = False
        self.programs: dict[bytes, Program] = {}
        self.utils, self.launcher_cls = self, self._launcher

    # What Triton asks of a driver

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", self.arch, 64) if self.amd else GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return int(str(self.arch).removeprefix("gfx"))  # Triton keeps what it has compiled by device.

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("there is no time here")

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared = {80: 163, 89: 99, "gfx942": 64, "gfx950": 160}.get(self.arch, 227)
        return {"max_shared_mem": shared << 10, "warpSize": 32, "multiprocessor_count": 132, "max_num_regs": 65536}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        if kernel not in self.programs:
            text = kernel.decode()
            self.programs[kernel] = Program(text, name, []) if self.amd else Program.parse(text)
        return None, self.programs[kernel], 0, 0, 1024  # No module: nothing to unload.

    def _launcher(self, source: Any, metadata: Any) -> Any:
        constants = [kind == "constexpr" for kind in source.signature.values()]

        def run(x: int, y: int, z: int, stream: Any, program: Program, *rest: Any) -> None:
            given = [a for a, constant in zip(rest[4:], constants, strict=True) if not constant]
            executed = Counter[str]()
            if isinstance(self.arch, int):
                executed = launch(
                    program, given, (x, y, z), threads=metadata.num_warps * 32, shared=metadata.shared, arch=self.arch,
                    schedule=self.schedule, contract=self.contract,
                )  # fmt: skip
            self.launches.append((program, (x, y, z), executed))

        return run


_gpus: dict[Chip, Gpu] = {}


def _inspect(*args: Any) -> Any:
    """Triton asks for a key first, and later for changes to the stages of a compilation."""
    if not args:
        return _STAGES
    _, stages, *_ = args
    stages["cubin" if "cubin" in stages else "hsaco"] = lambda assembly, metadata: assembly.encode()
    return None


@contextlib.contextmanager
def simulated_gpu(arch: Chip) -> Iterator[Gpu]:
    """Triton's kernels on CPU tensors run on this chip."""
    gpu = _gpus.setdefault(arch, Gpu(arch))
    gpu.launches.clear()
    gpu.schedule, gpu.contract = None, False
    before = triton.runtime.driver._active
    with pytest.MonkeyPatch.context() as patch:
        target = {"CAST": geometry.cast("hip" if gpu.amd else "cuda", arch), "FUSED": True}
        patch.setattr(geometry, "target", lambda device: target)
        patch.setattr(geometry, "warps", lambda threads: threads // (64 if gpu.amd else 32))
        patch.setattr(knobs.runtime, "add_stages_inspection_hook", _inspect)
        triton.runtime.driver.set_active(gpu)
        try:
            yield gpu
        finally:
            triton.runtime.driver.set_active(before)
