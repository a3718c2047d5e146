"""Fills Triton's cache with the kernels that a first run on a GPU needs, on a machine without one.

    python bench/gpu_cache.py [--chips 80 89 90 100] [--folder ~/.triton/cache]

Triton finds what it has compiled by the source, the arguments' types, the chip and its own version. So a cache that was
filled here saves a GPU those minutes, as long as triton and qtensor are the same there: copy the folder, or name it by
TRITON_CACHE_DIR. Kernels are those of `kernel_speed.py --check-only`; they are compiled to machine code and not run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CHIPS = (80, 89, 90, 100)


@dataclass
class Launch:
    """A kernel that would have been launched: its machine code, how many threads and bytes of shared memory a program
    has, and how many programs there are."""

    name: str
    cubin: bytes
    threads: int
    shared: int
    programs: int


@dataclass
class Seen:
    """compiled: the names of kernels that were not in the cache. launches: in order."""

    compiled: list[str] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)


@contextlib.contextmanager
def compiling_for(chip: int) -> Iterator[Seen]:
    """Triton compiles for this chip, and launches are noted and do nothing."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    from qtensor.kernels.triton import launch

    seen = Seen()

    class Chip(DriverBase):
        def __init__(self) -> None:
            self.utils = SimpleNamespace(
                load_binary=lambda name, cubin, *_: (None, (name, cubin), 0, 0, 1024),
                get_device_properties=lambda _: {"max_shared_mem": 99 << 10, "max_num_regs": 65536, "warpSize": 32},
            )
            self.launcher_cls = self.launcher

        def launcher(self, _: Any, metadata: Any) -> Any:
            def run(x: int, y: int, z: int, stream: int, function: tuple[str, bytes], *_: Any) -> None:
                seen.launches.append(Launch(*function, metadata.num_warps * 32, metadata.shared, x * y * z))

            return run

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", chip, 32)

        def get_current_device(self) -> int:
            return -chip  # What other chips have compiled is kept by device.

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> Any:
            raise NotImplementedError("nothing runs here")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing runs here")

    def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            seen.compiled.append(src.fn.__name__)

    listener, target, driver = knobs.compilation.listener, launch.target, triton.runtime.driver._active
    launch.target = lambda _: {"CAST": launch.cast("cuda", chip), "FUSED": True}  # type: ignore[assignment]
    knobs.compilation.listener = note
    triton.runtime.driver.set_active(Chip())
    try:
        yield seen
    finally:
        triton.runtime.driver.set_active(driver)
        knobs.compilation.listener, launch.target = listener, target


def fill(chip: int) -> list[str]:
    """Compile for one chip what is not in the cache: the names of the kernels."""
    import kernel_speed
    import torch

    from qtensor.kernels.triton import TRITON

    with compiling_for(chip) as seen:
        kernel_speed.check(torch.device("cpu"), TRITON)  # Nothing is computed, so it has nothing to say.
    return seen.compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chips", type=int, nargs="+", default=CHIPS)
    parser.add_argument("--folder", type=Path, help="by default, Triton's own cache")
    args = parser.parse_args()
    if args.folder:
        os.environ["TRITON_CACHE_DIR"] = str(args.folder)
    for chip in args.chips:
        start = time.perf_counter()
        compiled = fill(chip)
        print(f"sm_{chip}: {len(compiled)} kernels compiled in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
