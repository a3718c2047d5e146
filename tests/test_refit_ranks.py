"""docs/examples/rl_refit_ranks.py as it stands: two ranks train, two serve, one fails once, and both restart."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from support.processes import elsewhere

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "rl_refit_ranks.py"


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no distributed package")
def test_ranks_send_what_changed_survive_a_failure_and_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parent)  # Where the processes find what they run.
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, EXAMPLE.stem, module)
    spec.loader.exec_module(module)
    notes = module.run(rounds=3, start_method=elsewhere.get_start_method())
    for rank, (*versions, end, again) in notes.items():
        assert [note["version"] for note in versions] == [1, 2, 3]
        for note in versions:  # The one layer that was trained.
            layer = note["version"] % module.LAYERS
            assert note["names"] == [f"layers.{layer}.{name}.weight" for name in ("down", "up")]
            assert note["of"] == 2 * module.LAYERS + 2
        assert [len(note["failures"]) for note in versions] == [0, 1, 0]
        assert "the connection was lost" in versions[1]["failures"][0], rank
        assert again == end
        assert end["root"] == versions[-1]["root"]
    first, second = notes.values()
    assert "rank 3 failed" in first[1]["failures"][0]
    assert first[-1]["answers"] == second[-1]["answers"]
    assert versions[-1]["reward"] > versions[0]["reward"]
