"""Garbage collections of a load: they look at what the load made, and not at all that was there before it.

vLLM's loader collects garbage twice, to let go of what was used while weights were read and processed. Each time Python
walks over all objects of all modules, of which hardly one is garbage: a third of a second, twice. From the moment a
model's weights are loaded to the end of its load these are frozen (`gc.freeze`), as vLLM itself freezes them once the
engine runs. What was garbage before is freed by the next full collection after it, as vLLM's memory profile makes one.
"""

from __future__ import annotations

import gc

_frozen = False


def leave_out_what_is_there() -> None:
    """Until `take_in_again`. Nothing happens in a process that has frozen objects of its own."""
    global _frozen
    if not _frozen and not gc.get_freeze_count():
        _frozen = True
        gc.freeze()


def take_in_again() -> None:
    """Safe to call any number of times; what somebody else has frozen stays so."""
    global _frozen
    if _frozen:
        _frozen = False
        gc.unfreeze()
