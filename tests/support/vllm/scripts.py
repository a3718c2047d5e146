"""Scripts for processes that have imported vLLM, which takes most of ten seconds, and nothing of qtensor."""

from __future__ import annotations

import os
import sys
import tempfile

from support.processes import in_forks

FRESH_VLLM = ("numpy", "torch", "vllm.config", "vllm.model_executor.model_loader")
"""What they have imported. vLLM loads its plugins later."""


def output_of(code: str) -> str:
    """What a script prints."""
    return str(in_forks(_run, [code], FRESH_VLLM)[0])


def _run(code: str) -> str:
    assert not any(name.partition(".")[0] == "qtensor" for name in sys.modules)
    with tempfile.TemporaryFile() as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        sys.stderr.flush()
        said.seek(0)
        return said.read().decode()
