"""What has to be done whole although an exception may come at any moment: Ctrl-C, a timer, a signal's handler."""

from __future__ import annotations

from collections.abc import Callable

from .errors import QTensorError

MOST_TRIES = 100


def in_spite_of_interrupts(action: Callable[[], object]) -> None:
    """Do what may be done again from the start, until it is through. An interrupt is raised then."""
    late: BaseException | None = None
    for _ in range(MOST_TRIES):
        try:
            action()
            break
        except BaseException as error:
            late = error
    else:
        raise QTensorError(
            f"{MOST_TRIES} tries failed, and the model is left between old and new: {late}. Load it anew."
        ) from late
    if late is not None:
        raise late
