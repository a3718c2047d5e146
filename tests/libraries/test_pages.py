"""The Python of pages that need these libraries runs as typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_docs import ROOT, blocks


@pytest.mark.parametrize("page", ["adapters.md", "diffusers.md"])
def test_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for _, source in blocks(ROOT / "docs" / page, "python"):
        exec(source, namespace)
