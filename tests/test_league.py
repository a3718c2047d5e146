"""The league table of bench/: what it makes of measurements, and that the page shows the last ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from qtensor.report.memory import Measurement

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def league() -> ModuleType:
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import league
    finally:
        sys.path[:] = before
    return league


def sample(seconds: float, peak: int, final: int, **result: object) -> Measurement:
    return Measurement(0, peak, final, 0, seconds + 0.5, {"seconds": seconds, **result})


def rows_of(league: ModuleType, **loads: tuple[float, int]) -> dict[str, dict]:
    """A row for each contender: name=(seconds, peak and final bytes)."""
    return {
        name.replace("_", "-"): league.summarize([sample(seconds, held, held, reload_seconds=1.0)])
        | {"versions": {}, "error": 0.1}
        for name, (seconds, held) in loads.items()
    }


def test_medians_and_spread(league):
    row = league.summarize([sample(3.0, 30, 10), sample(1.0, 10, 20), sample(2.0, 50, 30)])
    assert (row["seconds"], row["seconds_range"]) == (2.0, [1.0, 3.0])
    assert (row["peak_bytes"], row["peak_bytes_range"], row["stays_bytes"]) == (30, [10, 50], 20)
    assert "reload_seconds" not in row
    assert "reload_refused" not in row


def test_a_reload_that_raised_has_no_time(league):
    row = league.summarize([sample(1.0, 10, 10, reload_error="AttributeError")])
    assert row["reload_refused"] == "raises AttributeError"


@pytest.mark.parametrize("taken", [True, False])
def test_a_reload_that_left_the_old_answers_is_found_out(league, tmp_path, taken):
    torch.manual_seed(0)
    old, new = torch.randn(2, 23, 50).unbind()
    for folder, loaded, reloaded in (("right", old, new), ("theirs", old * 1.1, (new if taken else old) * 1.1)):
        (tmp_path / folder).mkdir()
        save_file({"logits": loaded.clone()}, tmp_path / folder / "loaded.safetensors")
        save_file({"logits": reloaded.clone()}, tmp_path / folder / "reloaded.safetensors")
    row = league.errors(tmp_path / "theirs", tmp_path / "right")
    assert row["error"] == pytest.approx(0.1, rel=1e-3)
    assert ("reload_refused" in row) is not taken


def test_ratios_are_to_bf16_of_the_same_engine(league):
    rows = rows_of(league, bf16=(2.0, 100), qtensor=(1.0, 50), vllm_bf16=(4.0, 100), vllm_qtensor=(1.0, 60))
    table = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in league.table(rows).splitlines()}
    assert table["transformers + qtensor"][3] == "0.50"
    assert table["vLLM + qtensor"][3] == "0.25"
    assert table["vLLM + qtensor"][5] == "0.60"


def test_goals_are_judged(league):
    rows = rows_of(league, bf16=(1.0, 100), qtensor=(1.4, 50), vllm_fp8=(2.0, 70), vllm_qtensor=(1.0, 80))
    answers = {
        line.split(" | ")[0].strip("| "): line.rstrip(" |").split()[-1] for line in league.goals(rows).split("\n")
    }
    assert answers["transformers + qtensor: the lowest peak of transformers"] == "yes"
    assert answers["transformers + qtensor: load ≤ 1.3 × transformers, bf16, copied into memory"] == "no"
    assert answers["vLLM + qtensor: the lowest peak of vLLM"] == "no"
    assert answers["vLLM + qtensor: load ≤ 0.7 × vLLM, fp8_per_channel"] == "yes"


def test_what_is_not_installed_is_named(league):
    contender = league.CONTENDERS["quanto"]
    for python in (None, sys.executable):  # no environment, and one without it
        row, found = league.found_packages(contender, python)
        if found is None:
            assert "not installed: " in league.table({"quanto": row})
            assert "optimum-quanto" in league.table({"quanto": row})
    assert league.found_packages(contender, None)[1] is None


def test_the_page_and_its_picture_are_of_the_last_results(league, tmp_path):
    results = json.loads((ROOT / "bench" / "results" / "league.json").read_text())
    assert league.page_text(results) in league.PAGE.read_text(), "run: python bench/league.py --render"
    assert "/" not in results["command"].replace("bench/league.py", "")
    league.draw(results["rows"], tmp_path / "drawn.svg")
    assert league.PICTURE.stat().st_size < 100_000
    for name, row in results["rows"].items():
        if "seconds" in row:
            assert league.CONTENDERS[name].label.replace("`", "") in league.PICTURE.read_text()


@pytest.mark.slow
def test_a_whole_run_of_two(league, tmp_path, monkeypatch):
    monkeypatch.setattr("load_memory.DATA", tmp_path)
    results = league.run(["bf16", "qtensor"], {"main": sys.executable}, size_mb=1, repeat=1)
    plain, ours = results["rows"]["bf16"], results["rows"]["qtensor"]
    assert plain["error"] < ours["error"] < 0.2
    for row in (plain, ours):
        assert row["seconds"] > 0
        assert row["reload_seconds"] > 0
        assert row["reload_error"] < 2 * row["error"]
        assert "reload_refused" not in row
        assert "failed" not in row
    assert results["checkpoint_bytes"] > 1e6
