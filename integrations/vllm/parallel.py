"""Tensor parallelism: the scales that this rank's part of a layer shares with the parts of other ranks.

A row of a row-parallel layer, and a whole per-tensor matrix, is spread over the ranks, and so is what its scale is made
of. The ranks agree on those scales while they load (see `qtensor.ranks.sharding`), so that the parts are those of the
unsharded quantized layer.
"""

from __future__ import annotations

from qtensor.kernels import WeightFormat
from qtensor.lazy.weight import ArmedWeight
from qtensor.ranks.sharding import Agreement, refuse_split_group, refuse_split_search
from qtensor.ranks.vote import describe
from qtensor.sessions.host import LoadHost
from qtensor.sessions.transaction import State

from . import compat
from .layers import Slot

TIMEOUT_SECONDS = 600.0


def split_axes(rows: bool, columns: bool) -> frozenset[int]:
    """Which dimensions of a matrix, 0 for rows and 1 for columns, are split over the ranks."""
    return frozenset(axis for axis, split in enumerate((rows, columns)) if split)


def shares_scales(fmt: WeightFormat, axes: frozenset[int]) -> bool:
    """Whether a scale of this format spans ranks."""
    return bool(axes) if fmt.needs_whole_matrix else fmt.granularity == "channel" and 1 in axes


class RankHost(LoadHost):
    """A load, or reload, whose ranks agree on the scales they share. slots: every armed weight's place."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: dict[ArmedWeight, Slot] = {}
        self.agreement: Agreement | None = None

    def share(self, weight: ArmedWeight, slot: Slot) -> None:
        """Note whether a weight's scales span ranks. Raises QTensorError if its columns are split inside a group."""
        group, fmt = compat.tensor_parallel_group(), weight.scheme.format
        cols, width = weight.shape[-1], fmt.block[1]
        if 1 in slot.split and fmt.granularity == "group" and cols % width:
            refuse_split_group(slot.full_name, "a rank's", cols, len(weight.shape) - 1, width, fmt)
        if group is None or not shares_scales(fmt, slot.split):
            return
        if fmt.search is not None and fmt.granularity == "channel":
            refuse_split_search(slot.full_name, fmt)
        weight.shared = True
        if self.agreement is None:
            self.agreement = Agreement(group, TIMEOUT_SECONDS)
        self.agreement.open()

    def touch(self, weight: ArmedWeight) -> None:
        if self.agreement is not None:
            self.agreement.advance()
        super().touch(weight)

    def submit(self, weight: ArmedWeight) -> None:
        assert self.agreement is not None
        self.agreement.submit(self.slots[weight].full_name, weight)

    def agree(self) -> None:
        """Wait until all ranks have their weights, and quantize those they share."""
        if self.agreement is not None:
            self.agreement.finish()
            for weight in self.slots:
                weight.verify()

    def vote(self) -> None:
        """Wait until all ranks have succeeded. Raises QTensorError naming the rank that has not."""
        if self.agreement is not None:
            self.agreement.settle()

    def withdraw(self, error: BaseException | None) -> bool:
        """This rank gives up: so do the others. False if all have voted already."""
        if self.agreement is None:
            return True
        return self.agreement.fail(describe(error) if error is not None else "its load was given up")

    def close(self, state: State) -> None:
        """What ranks have between them ends."""
        if self.agreement is not None and state == "finished":
            self.agreement.close()
        elif self.agreement is not None:
            self.agreement.leave()
