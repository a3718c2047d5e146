"""The Python of docs/adapters.md runs as typed, with peft."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_docs import ROOT, blocks


def test_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for _, source in blocks(ROOT / "docs" / "adapters.md", "python"):
        exec(source, namespace)
