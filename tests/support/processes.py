"""Processes of tests are forks of one that has imported what they need: a life takes tenths of a second, not seconds.

`elsewhere` starts those that use qtensor; `in_forks` runs functions in processes that have nothing of it yet.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
elsewhere = multiprocessing.get_context("forkserver")
# Of a process's servers there is one. What is not installed is left out.
elsewhere.set_forkserver_preload(
    [
        "pytest",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.run",
        "torch.distributed.tensor.parallel",
        "transformers.models.llama.modeling_llama",
        "huggingface_hub",
        "qtensor.checkpoint",
    ]
)
_forks = multiprocessing.get_context("fork")


def in_forks(function: Callable[[Any], Any], arguments: Iterable[Any], imported: tuple[str, ...]) -> list[Any]:
    """What function returns for each argument, each time in a process of its own that has imported no more than that
    and the function's module."""
    return _server(imported).submit(each_alone, _forks, function, list(arguments)).result()


@functools.cache
def _server(imported: tuple[str, ...]) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _import, (imported,))


def _import(modules: tuple[str, ...]) -> None:
    with without_this_folder():
        for module in modules:
            importlib.import_module(module)
    gc.freeze()  # Nor do the forks' collections walk it.


@contextlib.contextmanager
def without_this_folder() -> Iterator[None]:
    """Else others would take a folder of this repository for the package that has its name (kernels)."""
    whole = list(sys.path)
    sys.path[:] = [entry for entry in whole if Path(entry).resolve() != ROOT]
    try:
        yield
    finally:
        sys.path[:] = whole


def each_alone(context: BaseContext, function: Callable[[Any], Any], arguments: Iterable[Any]) -> list[Any]:
    """What function returns for each argument, each time in a process of its own, one after the other."""
    results = []
    for argument in arguments:
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(writer, function, argument))
        process.start()
        writer.close()
        try:
            results.append(reader.recv())
        except EOFError:
            process.join()
            raise RuntimeError(f"{function.__name__}({argument!r}) ended with {process.exitcode}") from None
        process.join()
    return results


def _send(writer: Connection, function: Callable[[Any], Any], argument: Any) -> None:
    writer.send(function(argument))
