"""The Python of docs/vllm.md runs as typed, on a tiny checkpoint and with engines that fit a test."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import vllm

from support.vllm.checkpoints import checkpoint
from support.vllm.engines import engine

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"


def test_python_of_the_page_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "path/to/a/bf16").mkdir(parents=True)
    (tmp_path / "path/to/a/bf16/checkpoint").symlink_to(checkpoint("llama"))
    reports = []

    def small(path: str, quantization: str | None = None, **options: Any) -> None:
        with engine(Path(path), quantization, **options) as llm:
            reports.extend(llm.collective_rpc("qtensor_report"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm, "LLM", small)
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), namespace)
    names = [{layer["name"] for layer in report["layers"]} for report in reports]
    assert len(reports) == 3
    assert names[1] == {name for name in names[0] if "down_proj" not in name}
    assert {layer["scheme"] for layer in reports[2]["layers"]} == {"fp8_per_block"}
