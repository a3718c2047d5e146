"""While a session is open, transformers' table of quantizers leads to `checkpoint/transformers.py`.

This is apart from what it leads to because `import qtensor` needs this alone.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from ..sessions import registration

_originals: dict[str, Any] = {}


def install() -> None:
    """Let `_take_places` and `_give_back` run with the first session that opens and after the last."""
    registration.PATCHES.append((_take_places, _give_back))


def _take_places() -> None:
    """Take the places in transformers' table, if transformers is there."""
    if "transformers" not in sys.modules:
        return
    from transformers.quantizers import auto

    from ..sources.families import methods
    from .layouts import LAYOUTS
    from .transformers import choose

    table: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    for method in (*LAYOUTS, *methods()):
        if method in table and method not in _originals:
            _originals[method] = table[method]
            table[method] = functools.partial(choose, table[method])


def _give_back() -> None:
    if _originals:
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table

        table.update(_originals)
        _originals.clear()
