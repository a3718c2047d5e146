"""docs/examples/rl_refit.py as it stands: a trainer process, a served model, and a fresh engine to compare with."""

from __future__ import annotations

import sys

import pytest

from support.vllm.reloads import EXAMPLE, example


def test_a_refit_engine_is_a_fresh_engine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parent)  # Where the trainer's process finds what it runs.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # As importing the example does, unless an engine ran since.
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--rounds", "1"])
    example().main()
    said = capsys.readouterr().out
    assert "version 1: " in said
    assert "checksums equal; answers equal" in said
