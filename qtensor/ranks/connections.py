"""The gloo connections of sessions on ranks: kept while a collective waits, and closed when none does.

The destructor of connections waits for their collectives, and so for ranks that may never come to them. A session that
has failed leaves its own here. On a rank that waits for nobody they are closed at once; those that wait for that rank
hear of it, and are closed when the next session is opened, or left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_kept: set[Any] = set()
_waits: dict[Any, Sequence[Any]] = {}  # the collectives of those that were left


def keep(gloo: Any) -> None:
    """A session is under way with these."""
    _kept.add(gloo)


def close(gloo: Any) -> None:
    """Nothing waits: they go with their last reference. May be repeated."""
    _kept.discard(gloo)


def leave(gloo: Any, works: Sequence[Any] | None) -> None:
    """The session has failed; works: collectives that may wait, None if that is not known. May be repeated."""
    if gloo in _kept and works is not None:
        _waits[gloo] = works
    close_those_left()


def close_those_left() -> None:
    for gloo, works in list(_waits.items()):
        if all(work.is_completed() for work in works):
            _kept.discard(gloo)
            _waits.pop(gloo, None)
