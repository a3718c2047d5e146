"""Who is calling? Every look at the call stack, with the foreign function it recognises and why.

Some callers mean something else by an operation than its name says, and have no other way to tell.
"""

from __future__ import annotations

import sys

FSDP = "torch.distributed.fsdp"
_CALLERS = 4  # frames between an operation's handler and who called for it, at most


def asked_by_fsdp() -> bool:
    """Is FSDP calling the operation whose handler asks? What it does to pad a shard has a meaning of its own."""
    frame = sys._getframe(2)
    for _ in range(_CALLERS):
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").startswith(FSDP):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
