"""Fresh processes for the tests. Importing vLLM takes most of ten seconds, so one process does it and the others are
its forks: they have vLLM, and nothing of qtensor."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any
from unittest import mock

_IMPORTED = ["numpy", "torch", "vllm.config", "vllm.model_executor.model_loader"]


@functools.cache
def _with_vllm_imported() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    # Neither the plugin nor, in this folder, what transformers would take for a package called kernels.
    with mock.patch.dict(os.environ, VLLM_PLUGINS="", PYTHONSAFEPATH="1", PYTHONPATH=""):
        forkserver.ensure_running()
    return context


def in_fresh_processes(function: Callable[[Any], Any], arguments: Iterable[Any]) -> list[Any]:
    """What function returns for each argument, in a process of its own."""
    with ProcessPoolExecutor(2, mp_context=_with_vllm_imported(), max_tasks_per_child=1) as pool:
        return list(pool.map(function, arguments))


def output_of(code: str) -> str:
    """What a script prints, in a process of its own."""
    return str(in_fresh_processes(_run, [code])[0])


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
