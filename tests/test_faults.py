"""Every fault at every entry point: what is raised, and what is left. docs/reliability.md has the table.

An entry point is a way weights come in or go out. After each fault nothing may be armed in the process, no thread, open
file or shared memory may be left, a reload's old values stand bit for bit (law 10), and the entry point then works.
QTENSOR_WRITE_TABLE=1 writes the table anew.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_reload import assert_reloaded, everything, quantized
from torch import nn

from qtensor import QTensorError, fp8, online_quant, online_reload, save_checkpoint
from qtensor.checkpoint import problems, quantize_checkpoint
from support import faults
from support.faults import FILE, Patch, at_write
from support.loading import TinyNet, assert_equals_oracle, assert_nothing_armed, weights_of
from support.processes import elsewhere

OBSERVED: dict[tuple[str, str], str] = {}

# Entry points -------------------------------------------------------------------------------------------------------


class Load:
    """Into a model that has values of its own, with `online_quant`."""

    victim = "up.weight"

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, TinyNet().bfloat16()

    def store(self, state: dict[str, torch.Tensor]) -> None:
        save_file(state, self.folder / FILE)

    def expected(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / FILE)

    def run(self) -> None:
        with online_quant(fp8, self.model):
            self.load()

    def load(self) -> None:
        self.model.load_state_dict(load_file(self.folder / FILE))

    def assert_as_before(self) -> str:
        """Weights to be quantized had been given up for the load; nothing half-loaded may be read from them."""
        for name, param in self.model.named_parameters():
            if type(param) is nn.Parameter:
                assert torch.isfinite(param).all()
                assert name not in TinyNet.QUANTIZED
            else:
                with pytest.raises(QTensorError):
                    param.clone()
        return "loadable again"

    def repair(self, state: dict[str, torch.Tensor]) -> None:
        self.store(state)

    def assert_done(self) -> None:
        assert_equals_oracle(self.model, self.expected(), TinyNet.QUANTIZED)


class Slices(Load):
    def load(self) -> None:
        """Row by row where a tensor has rows, as a tensor-parallel loader reads its part."""
        params = self.model.state_dict(keep_vars=True)
        with safe_open(self.folder / FILE, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if params[name].dim() != 2:
                    params[name].data.copy_(file.get_tensor(name))
                    continue
                part, half = file.get_slice(name), params[name].shape[0] // 2
                params[name].data[:half] = part[:half]
                params[name].data[half:] = part[half:]


class Distributed(Load):
    def store(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state
        dcp.save({"model": state}, checkpoint_id=self.folder, no_dist=True)

    def expected(self) -> dict[str, torch.Tensor]:
        return self.state

    def load(self) -> None:
        dcp.load({"model": self.model.state_dict()}, checkpoint_id=self.folder, no_dist=True)


class Reload(Load):
    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, quantized(seed=5)
        self.before = everything(self.model)

    def run(self) -> None:
        with online_reload(self.model):
            self.load()

    def assert_as_before(self) -> str:
        assert everything(self.model) == self.before
        return "old values"

    def assert_done(self) -> None:
        assert_reloaded(self.model, self.expected(), fp8)


class Quantize(Load):
    """File to file: `qtensor quantize`."""

    def store(self, state: dict[str, torch.Tensor]) -> None:
        super().store(state)
        (self.folder / "config.json").write_text(json.dumps({"model_type": "test"}))
        self.target = self.folder.parent / "target"

    def run(self) -> None:
        quantize_checkpoint(self.folder, self.target, fp8)

    def repair(self, state: dict[str, torch.Tensor]) -> None:
        """What was converted of another source is not continued; the error says to remove it."""
        self.store(state)
        shutil.rmtree(self.target.with_name("target.partial"), ignore_errors=True)

    def assert_as_before(self) -> str:
        assert not self.target.exists()
        return "no target"

    def assert_done(self) -> None:
        assert problems(self.target) == []


class Save(Quantize):
    def store(self, state: dict[str, torch.Tensor]) -> None:
        super().store(state)
        self.model = quantized()

    def run(self) -> None:
        save_checkpoint(self.model, self.target)


ENTRY_POINTS: dict[str, type[Load]] = {
    "load_state_dict": Load,
    "safetensors slices": Slices,
    "DCP": Distributed,
    "online_reload": Reload,
    "qtensor quantize": Quantize,
    "save_checkpoint": Save,
}
READERS = [name for name, entry in ENTRY_POINTS.items() if entry is not Save]
FROM_SAFETENSORS = [name for name in READERS if name != "DCP"]
TENSORS = ["load_state_dict", "safetensors slices", "DCP", "online_reload"]

# Faults -------------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[list[str], Callable[[Load, Patch], None]]] = {}


def fault(name: str, entries: list[str]) -> Callable:
    def register(arm: Callable[[Load, Patch], None]) -> Callable[[Load, Patch], None]:
        FAULTS[name] = entries, arm
        return arm

    return register


fault("file cut in half", READERS)(faults.cut)
fault("bits flipped in the header", FROM_SAFETENSORS)(faults.flip_header)
fault("bits flipped to NaN", FROM_SAFETENSORS)(faults.flip_to_nan)
fault("lowest bit of a value flipped", FROM_SAFETENSORS)(faults.flip_lowest_bit)
fault("EIO in a copy", TENSORS)(faults.eio_at(3))
fault("Ctrl-C at the 2nd write", TENSORS)(faults.interrupt_at(2))
fault("Ctrl-C at the last write", TENSORS)(faults.interrupt_at(5))
fault("memory runs out in a kernel", [*TENSORS, "qtensor quantize"])(faults.no_memory_in_a_kernel)
fault("memory runs out for the result", TENSORS)(faults.no_memory_for_the_result)


@fault("no space on the disk", ["qtensor quantize", "save_checkpoint"])
def _disk(entry: Load, patch: Patch) -> None:
    """A file may grow to 8 KB; the kernel refuses more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    entry.cleanup = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))  # type: ignore[attr-defined]


@fault("fork at the 2nd write", TENSORS)
def _fork(entry: Load, patch: Patch) -> None:
    """The child goes away with the session open; the parent goes on."""

    def fork() -> None:
        child = os.fork()
        if not child:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    at_write(2, fork)(entry, patch)


@fault("spawn at the 2nd write", TENSORS)
def _spawn(entry: Load, patch: Patch) -> None:
    def spawn() -> None:
        child = multiprocessing.get_context("spawn").Process(target=os.getpid)
        child.start()
        child.join()
        assert child.exitcode == 0

    at_write(2, spawn)(entry, patch)


def killed(kind: str, folder: Path) -> None:
    """In a process of its own: load, and be killed at the third write."""
    torch.set_num_threads(1)
    entry = ENTRY_POINTS[kind](folder)
    with pytest.MonkeyPatch.context() as patch:
        at_write(3, lambda: os.kill(os.getpid(), signal.SIGKILL))(entry, patch)
        entry.run()


@fault("kill -9 at the 3rd write", TENSORS)
def _kill(entry: Load, patch: Patch) -> None:
    def run() -> None:
        kind = next(name for name, made in ENTRY_POINTS.items() if made is type(entry))
        process = elsewhere.Process(target=killed, args=(kind, entry.folder))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        raise ProcessLookupError

    entry.run = run  # type: ignore[method-assign]


DAMAGE = {"file cut in half", "bits flipped in the header", "bits flipped to NaN"}
"""Faults that have to be repaired before the next attempt."""

# The test -----------------------------------------------------------------------------------------------------------


def left_behind() -> dict[str, Any]:
    """What a fault might leave in the process or the machine."""
    return {
        "threads": {t.name for t in threading.enumerate()},
        "shared memory": {p for p in os.listdir("/dev/shm") if str(os.getpid()) in p},
        "files": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_file(fd)),
    }


def _is_file(fd: str) -> bool:
    path = Path(f"/proc/self/fd/{fd}")
    return path.is_symlink() and os.readlink(path).startswith("/tmp")


CASES = [(fault, entry) for fault, (entries, _) in FAULTS.items() for entry in entries]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{entry}-{fault}" for fault, entry in CASES])
def test_a_fault_leaves_nothing_half_done(name: str, kind: str, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "source").mkdir()
    entry = ENTRY_POINTS[kind](tmp_path / "source")
    state = weights_of(TinyNet, seed=2)
    entry.store(state)
    before = left_behind()
    error: BaseException | None = None
    with monkeypatch.context() as patch:
        FAULTS[name][1](entry, patch)
        try:
            entry.run()
        except BaseException as raised:  # DCP's own exception is not an Exception
            error = raised.with_traceback(None)
        finally:
            getattr(entry, "cleanup", lambda: None)()
            vars(entry).pop("run", None)
    assert_nothing_armed()
    assert left_behind() == before
    if error is None:
        entry.assert_done()
        OBSERVED[name, kind] = "succeeds"
        return
    if isinstance(error, ProcessLookupError):
        OBSERVED[name, kind] = "process gone, files whole"
    else:
        OBSERVED[name, kind] = f"`{type(error).__name__}`, {entry.assert_as_before()}"
    if name in DAMAGE:
        entry.repair(state)
    entry.run()
    entry.assert_done()


def test_the_page_says_what_was_observed() -> None:
    if len(OBSERVED) < len(CASES):
        pytest.skip("only some of the faults were tried in this run")
    rows = [[name, *(OBSERVED.get((name, entry), "–") for entry in ENTRY_POINTS)] for name in FAULTS]
    faults.Page("observed").check([["fault", *ENTRY_POINTS], *rows])
