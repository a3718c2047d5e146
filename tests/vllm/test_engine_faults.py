"""Faults while vLLM loads and reloads: what is raised, and what is left. docs/reliability.md has the table.

The faults are those of tests/test_faults.py. After one at the load nothing is armed in the process, and the next engine
has the oracle's bytes; after one at a reload the engine has every byte it had, and takes the next reload.
QTENSOR_WRITE_TABLE=1 writes the table anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm import LLM

from support import faults
from support.loading import assert_nothing_armed
from support.vllm.checkpoints import checkpoint, tensors_of
from support.vllm.engines import engine
from support.vllm.oracle import mistakes
from support.vllm.reloads import LAYER, addresses, other, reload, runtime, state

FAULTS: dict[str, faults.Fault] = {
    "file cut in half": faults.cut,
    "bits flipped in the header": faults.flip_header,
    "bits flipped to NaN": faults.flip_to_nan,
    "EIO in a copy": faults.eio_at(5),
    "Ctrl-C at the 2nd write": faults.interrupt_at(2),
    "memory runs out in a kernel": faults.no_memory_in_a_kernel,
    "memory runs out for the result": faults.no_memory_for_the_result,
}
ENTRY_POINTS = ("LLM(...)", "reload_weights")
OBSERVED: dict[tuple[str, str], str] = {}
every_fault = pytest.mark.parametrize("fault", FAULTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of checkpoint B, to be damaged."""
    return shutil.copytree(other("llama"), tmp_path / "checkpoint")


def under(fault: str, folder: Path, patch: faults.Patch) -> None:
    entry = SimpleNamespace(folder=folder, victim=f"{LAYER}mlp.down_proj.weight")
    FAULTS[fault](entry, patch)


class TestLoad:
    @every_fault
    def test_a_fault_ends_the_load(self, fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        error: BaseException | None = None
        with monkeypatch.context() as patch:
            under(fault, folder, patch)
            try:
                with engine(folder, "qtensor"):
                    pass
            except BaseException as raised:
                error = raised.with_traceback(None)
        assert error is not None, "it loaded"
        assert_nothing_armed()
        OBSERVED[fault, ENTRY_POINTS[0]] = f"`{type(error).__name__}`, next load whole"

    def test_the_next_load_is_whole(self) -> None:
        with engine(checkpoint("llama"), "qtensor") as llm:
            assert mistakes(tensors_of(checkpoint("llama")), runtime(llm), "fp8_per_channel") == []


@pytest.fixture(scope="class")
def served() -> Iterator[LLM]:
    with engine(checkpoint("llama"), "qtensor", enable_prefix_caching=False) as llm:
        yield llm


class TestReload:
    @every_fault
    def test_a_fault_leaves_the_old_values(
        self, served: LLM, fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = state(served)
        error: BaseException | None = None
        with monkeypatch.context() as patch:
            under(fault, folder, patch)
            try:
                reload(served, folder)
            except BaseException as raised:
                error = raised.with_traceback(None)
        assert error is not None, "it reloaded"
        assert state(served) == before
        assert_nothing_armed()
        OBSERVED[fault, ENTRY_POINTS[1]] = f"`{type(error).__name__}`, old values"

    def test_the_next_reload_is_whole(self, served: LLM) -> None:
        places = addresses(served)
        reload(served, other("llama"))
        assert mistakes(tensors_of(other("llama")), runtime(served), "fp8_per_channel") == []
        assert addresses(served) == places


def test_the_page_says_what_was_observed() -> None:
    if len(OBSERVED) < len(FAULTS) * len(ENTRY_POINTS):
        pytest.skip("only some of the faults were tried in this run")
    rows = [[fault, *(OBSERVED[fault, entry] for entry in ENTRY_POINTS)] for fault in FAULTS]
    faults.Page("observed in vLLM").check([["fault", *ENTRY_POINTS], *rows])
