"""Session: what a user holds of a load or a reload while it is open, and its report afterwards."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from ..errors import QTensorError
from ..report.report import LoadReport
from .model_transaction import ModelTransaction
from .options import SessionOptions

if TYPE_CHECKING:
    from ..schemes.plan import Plan


class Session:
    """One load or reload. `finish()` runs when the `with` block ends, `abort()` when it raises.

    A session that is dropped before either is aborted, with a ResourceWarning.
    """

    def __init__(self, work: ModelTransaction) -> None:
        self._work = work

    def __enter__(self) -> Self:
        if not self._work.undecided:
            raise QTensorError(f"this session is {self._work.state}; start a new one with {self._work.opener}(...)")
        self._work.enter()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is not None:
                self._work.abort(error)
            elif self._work.undecided:
                self.finish()
        except BaseException as late:
            # An interrupt found a gap: what is decided is gone through with.
            self._work.abort(late)
            raise

    @property
    def options(self) -> SessionOptions:
        """What it was asked for."""
        return self._work.options

    @property
    def plan(self) -> Plan | None:
        """What `fit=` chose for each weight, once the first is loaded; None without `fit`."""
        return self._work.plan

    def on_layer_quantized(self, hook: Callable[[str, nn.Module], None]) -> None:
        """Call `hook(name, module)` each time all weights of a module that are to be quantized are there.

        During a load, and a reload with `atomic=False`, that is in the midst of the loader's calls, and an error of the
        hook is raised there. An atomic reload calls when the new weights are in place: an error then is a warning in
        the report and the log.
        """
        self._work.layer_hooks.append(hook)

    def finish(self) -> LoadReport:
        """End the load: complete what `on_missing` allows, turn lazy weights into their final form, report.

        After an error the session is over, and the model can be armed again.

        Returns:
            The report.

        Raises:
            IncompleteLoadError: Weights and ranges are missing; the message has every one of them.
            QTensorError: What an unfinished weight met while loading, as it was raised there.
        """
        self._work.finish()
        return self._work.report()

    def abort(self) -> None:
        """Give up: staging and unfinished weights are freed, hooks removed. The model can be armed again."""
        self._work.abort()

    def report(self) -> LoadReport:
        """What has happened so far; after the end, the final account."""
        return self._work.report()

    def __del__(self) -> None:
        # Not from `__dict__`: a garbage collection would find a dictionary made here, which holds the session's work,
        # and leave both to the next one.
        work = getattr(self, "_work", None)
        if work is None or sys.is_finalizing() or not (work.unsettled or (work.undecided and work.begun)):
            return
        if work.undecided:
            warnings.warn(
                f"{work.opener}: the session was dropped without finish() or abort(); it is aborted, and the model is "
                "as an aborted session leaves it",
                ResourceWarning,
                stacklevel=2,
            )
        work.abort()
