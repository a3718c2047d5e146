"""ReloadedWeight: a weight that takes new values while the model computes with the ones it has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, cast

import torch

from ..errors import QTensorError
from ..kernels import Audit
from ..regions.views import View
from ..tensor.qtensor import QTensor
from .initial import Fill
from .plain_store import PlainStore
from .quant_store import QuantStore
from .target import SHADOWS, ShadowKind
from .weight import ArmedWeight


class ReloadedWeight(ArmedWeight):
    """An armed weight whose storage exists, and stays where it is."""

    in_place = True
    store: QuantStore | PlainStore

    def open_on(
        self,
        live: torch.Tensor,
        on_second_copy: Callable[[int], None],
        shadow: ShadowKind = "device",
        early: bool = False,
    ) -> None:
        """Take new values for `live`, a QTensor or a tensor in high precision, from now on.

        shadow: where the second copy is. early: commit each matrix when all of it has arrived, so that no more than the
        matrices being written have a second copy; otherwise `commit` is the session's.
        """
        # A view that a loader takes is a view of contiguous memory; live memory may be laid out otherwise.
        kind = SHADOWS[shadow if isinstance(live, QTensor) or live.is_contiguous() else "device"]
        matrices = live.shape[0] if isinstance(live, QTensor) and live.dim() == 3 else None
        target: Any = partial(kind, on_bytes=on_second_copy, early=early, matrices=matrices)
        if isinstance(live, QTensor):
            self.scheme, audit = live.scheme, Audit(self.host.refuse_nonfinite)
            self.store = QuantStore(
                live.scheme,
                live.dtype,
                live.device,
                self.coverage,
                audit,
                self.host.staged,
                bool(self.shared),
                live,
                target,
            )
        else:
            self.scheme = None
            self.store = PlainStore(live, self.coverage, target=target)

    def _refuse(self) -> None:
        super()._refuse()
        if self.excluded:
            self.fail(
                QTensorError(
                    f"{self.name}: written in a reload that is not for it (`only`). Nothing of the reload is taken; "
                    "leave the weight out of the update, or add it to `only`."
                )
            )

    def live_values(self, view: View) -> torch.Tensor:
        with self.lock:
            values = self.store.values().contiguous()
        return values.as_strided(view.size, view.stride, values.storage_offset() + view.offset)

    def complete_shared(self, touched: bool) -> None:
        """No rank writes any more. If one has written, what this one did not write keeps its values and is quantized
        again, with scales that all agree on; otherwise all of it stays as it is."""
        with self.lock:
            store = cast(QuantStore, self.store)
            if not touched:
                self.shared = False
                store.stream()
            elif not self.coverage.complete:
                if self.error is not None:
                    raise self.error
                store.stage_missing()
                self.settle()

    def initialize(self, view: View, fill: Fill, replaces: bool = False) -> None:
        """An initialiser that runs on a finished model means what it does."""
        values = self.read(view).clone()
        fill(values)
        self.write(view, values)

    def discard(self) -> None:
        """Give up what is not live yet: the session was aborted. May be repeated."""
        with self.lock:
            if self.store is not None:  # an interrupt may have come before `open_on`
                self.store.rollback()

    def clone(self, memo: dict[int, Any]) -> NoReturn:
        raise QTensorError("a model whose weights are being reloaded cannot be deep-copied; finish the reload first")
