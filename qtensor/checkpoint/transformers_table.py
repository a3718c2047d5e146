"""While a session is open, transformers' table of quantizers leads to `checkpoint/transformers.py`.

This is apart from what it leads to because `import qtensor` needs this alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from ..kernels.cpu.compiling import Once
from ..sessions import registration

_originals: dict[str, Any] = {}


def install() -> None:
    """Let `_take_places` and `_give_back` run with the first session that opens and after the last."""
    registration.PATCHES.append((_take_places, _give_back))


@Once
def _imported() -> tuple[dict[str, Any], Callable[..., Any], tuple[str, ...]]:
    """transformers' table, what is put there, and where: imported where no interrupt comes."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table

    from ..sources.families import methods
    from .layouts import LAYOUTS
    from .transformers import choose

    return table, choose, (*LAYOUTS, *methods())


def _take_places() -> None:
    """Take the places in transformers' table, if transformers is there."""
    if "transformers" not in sys.modules:
        return
    table, choose, methods = _imported()
    for method in methods:
        if method in table and method not in _originals:
            _originals[method] = table[method]
            table[method] = functools.partial(choose, table[method])


def _give_back() -> None:
    if _originals:
        table, _, _ = _imported()
        table.update(_originals)
        _originals.clear()
