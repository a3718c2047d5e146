"""Do the tests notice? Each mutant breaks one rule on purpose; the probe that guards the rule must fail.

The probes are small deterministic loads that pass on the real code, checked first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from qtensor import IncompleteLoadError, fp8_per_block, fp8_per_channel, fp8_per_tensor, online_quant, online_reload
from qtensor.lazy.quant_store import QuantStore
from qtensor.lazy.target import Beside, InPlace
from qtensor.lazy.weight import ArmedWeight
from qtensor.regions.coverage import Coverage
from support.helpers import assert_oracle

FULL = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


def load(scheme: object, *writes: tuple[slice, slice], full: torch.Tensor = FULL) -> None:
    with online_quant(scheme):
        layer = nn.Linear(64, 256, bias=False, dtype=torch.bfloat16)
        for where in writes:
            source = full[where].clone()
            layer.weight.data[where].copy_(source)
            source.fill_(float("nan"))
    assert_oracle(layer.weight, full, scheme)


EVERYTHING = slice(None)
TOP, BOTTOM = (slice(0, 128), EVERYTHING), (slice(128, 256), EVERYTHING)
LEFT, RIGHT = (EVERYTHING, slice(0, 32)), (EVERYTHING, slice(32, 64))
ODD_TOP, ODD_BOTTOM = (slice(0, 100), EVERYTHING), (slice(100, 256), EVERYTHING)


def duplicate_is_no_completion() -> None:
    with pytest.raises(IncompleteLoadError):
        load(fp8_per_channel, TOP, TOP)


def columns_complete_rows() -> None:
    load(fp8_per_channel, LEFT, RIGHT)


def odd_bands_complete_blocks() -> None:
    load(fp8_per_block, ODD_TOP, ODD_BOTTOM)


def halves_complete_a_tensor() -> None:
    load(fp8_per_tensor, TOP, BOTTOM)


def late_write_wins() -> None:
    with online_quant(fp8_per_channel):
        layer = nn.Linear(64, 256, bias=False, dtype=torch.bfloat16)
        layer.weight.data.copy_(FULL * 2)
        layer.weight.data.copy_(FULL)
    assert_oracle(layer.weight, FULL, fp8_per_channel)


def late_partial_write_reopens() -> None:
    """Columns of finished rows: the other columns must be asked for again."""
    with pytest.raises(IncompleteLoadError):
        load(fp8_per_channel, (EVERYTHING, EVERYTHING), LEFT)


def late_staged_write_is_quantized_again() -> None:
    with online_quant(fp8_per_tensor):
        layer = nn.Linear(64, 256, bias=False, dtype=torch.bfloat16)
        layer.weight.data[TOP].copy_(FULL[TOP] * 3)
        layer.weight.data[BOTTOM].copy_(FULL[BOTTOM])
        layer.weight.data[TOP].copy_(FULL[TOP])
    assert_oracle(layer.weight, FULL, fp8_per_tensor)


def unwritten_half_of_a_row_is_unreadable() -> None:
    with online_quant(fp8_per_channel, on_missing="zero"):
        layer = nn.Linear(64, 256, bias=False, dtype=torch.bfloat16)
        layer.weight.data[LEFT].copy_(FULL[LEFT])
        with pytest.raises(IncompleteLoadError):
            layer.weight.data[RIGHT].clone()


def overlap_is_counted_once() -> None:
    assert Coverage((4, 4)).add(((0, 2), (0, 4))) == 8
    c = Coverage((4, 4))
    c.add(((0, 2), (0, 4)))
    assert c.add(((1, 3), (0, 4))) == 4
    assert c.missing() == [((3, 4), (0, 4))]


def count_instead_of_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """The field's favourite bug: a sum of element counts."""

    def add_box(self: Coverage, box: tuple[tuple[int, int], ...]) -> int:
        newly = int(np.prod([b - a for a, b in box]))
        self.covered = min(self.covered + newly, self.numel)
        return newly

    monkeypatch.setattr(Coverage, "add_box", add_box)


def forget_to_cover_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Coverage.add_box
    monkeypatch.setattr(Coverage, "add_box", lambda self, box: 0 if self.overlaps(box) else original(self, box))


def every_row_is_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantize whatever rows arrive, whole units or not."""

    def write(self: QuantStore, e: int, rows: tuple[int, int], cols: tuple[int, int], source: torch.Tensor) -> None:
        if cols == (0, self._k):
            self._quantize_source(e, *rows, source)
        else:
            self._stage(e, rows, cols, source)

    monkeypatch.setattr(QuantStore, "_write_matrix", write)


def staged_units_never_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantStore, "_settle", lambda *args: None)


def settle_before_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    original = QuantStore._open_units

    def open_units(self: QuantStore, e: int, start: int, stop: int, staged: torch.Tensor) -> None:
        original(self, e, start, stop, staged)
        self._units.received[e] = self._k

    monkeypatch.setattr(QuantStore, "_open_units", open_units)
    monkeypatch.setattr(Coverage, "full_rows", lambda self, lead, start, stop: [(start, stop)])


def ignore_late_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ArmedWeight.write
    monkeypatch.setattr(ArmedWeight, "write", lambda self, v, s: None if self.settled else original(self, v, s))


def reopened_units_keep_their_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coverage, "discard", lambda self, region: 0)


def borrow_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a view of the loader's tensor until the unit is complete."""
    original = QuantStore._settle
    late: list[tuple[torch.Tensor, torch.Tensor]] = []

    def stage(self: QuantStore, e: int, rows: tuple[int, int], cols: tuple[int, int], source: torch.Tensor) -> None:
        first, last = rows[0] // self._unit * self._unit, min(-(-rows[1] // self._unit) * self._unit, self._n)
        for start, stop, staged in self._staging.opened(e, first, last):
            self._open_units(e, start, stop, staged)
            a, b = max(start, rows[0]), min(stop, rows[1])
            late.append((staged[a - start : b - start, slice(*cols)], source[a - rows[0] : b - rows[0]]))
        self.coverage.add_box(self._units.box(e, rows, cols))
        if self.coverage.complete:
            for target, borrowed in late:
                target.copy_(borrowed)
            original(self, e, 0, self._n)

    monkeypatch.setattr(QuantStore, "_stage", stage)


# Reloads -------------------------------------------------------------------------------------------------------------


def reload(atomic: bool, shadow: str = "device", *, fails: bool = False) -> None:
    """New values in two halves over a loaded weight; with `fails`, an exception after the first and a half."""
    layer = nn.Linear(64, 256, bias=False, dtype=torch.bfloat16)
    with online_quant(fp8_per_channel, layer):
        layer.weight.data.copy_(FULL)
    try:
        with online_reload(layer, atomic=atomic, shadow=shadow):  # type: ignore[arg-type]
            layer.weight.data[TOP].copy_(FULL[TOP] * 3)
            torch.testing.assert_close(layer.weight.data[TOP].clone(), FULL[TOP] * 3, rtol=0.07, atol=0.05)
            layer.weight.data[(slice(128, 200), EVERYTHING)].copy_(FULL[128:200] * 3)
            if fails:
                raise KeyError
            layer.weight.data[BOTTOM].copy_(FULL[BOTTOM] * 3)
    except KeyError:
        pass
    assert_oracle(layer.weight, FULL if fails else FULL * 3, fp8_per_channel)


def reload_commits_at_the_end() -> None:
    reload(atomic=True)


def reload_commits_a_whole_weight() -> None:
    reload(atomic=False)


def aborted_shadow_changes_nothing() -> None:
    reload(atomic=True, fails=True)


def aborted_undo_restores() -> None:
    reload(atomic=True, shadow="host", fails=True)


def aborted_half_weight_is_old() -> None:
    reload(atomic=False, fails=True)


def publish_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Beside, "publish", lambda *args: None)


def write_in_place_without_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InPlace, "rollback", lambda self: None)


def commit_before_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantStore, "_commit_complete", lambda self: QuantStore.commit(self))
    monkeypatch.setattr(Beside, "early", property(lambda self: True, lambda self, value: None), raising=False)


def read_the_live_values_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Beside, "latest", lambda self, e: self.live(e))


Probe = Callable[[], None]
PROBES: list[Probe] = [
    duplicate_is_no_completion,
    columns_complete_rows,
    odd_bands_complete_blocks,
    halves_complete_a_tensor,
    late_write_wins,
    late_partial_write_reopens,
    late_staged_write_is_quantized_again,
    unwritten_half_of_a_row_is_unreadable,
    overlap_is_counted_once,
    reload_commits_at_the_end,
    reload_commits_a_whole_weight,
    aborted_shadow_changes_nothing,
    aborted_undo_restores,
    aborted_half_weight_is_old,
]
MUTANTS = [
    (count_instead_of_cover, duplicate_is_no_completion),
    (count_instead_of_cover, overlap_is_counted_once),
    (forget_to_cover_overlaps, overlap_is_counted_once),
    (every_row_is_a_unit, odd_bands_complete_blocks),
    (every_row_is_a_unit, halves_complete_a_tensor),
    (staged_units_never_settle, columns_complete_rows),
    (settle_before_complete, unwritten_half_of_a_row_is_unreadable),
    (ignore_late_writes, late_write_wins),
    (ignore_late_writes, late_staged_write_is_quantized_again),
    (reopened_units_keep_their_coverage, late_partial_write_reopens),
    (borrow_the_source, columns_complete_rows),
    (borrow_the_source, halves_complete_a_tensor),
    (publish_nothing, reload_commits_at_the_end),
    (publish_nothing, reload_commits_a_whole_weight),
    (write_in_place_without_undo, aborted_undo_restores),
    (commit_before_complete, aborted_half_weight_is_old),
    (commit_before_complete, aborted_shadow_changes_nothing),
    (read_the_live_values_back, reload_commits_at_the_end),
]


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: p.__name__)
def test_probe_passes_on_the_real_code(probe: Probe) -> None:
    probe()


@pytest.mark.parametrize(("mutant", "probe"), MUTANTS, ids=lambda f: f.__name__)
def test_mutant_is_caught(mutant: Callable, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    caught = False
    try:
        probe()
    except (Exception, pytest.fail.Exception):
        caught = True
    assert caught, f"{probe.__name__} did not notice {mutant.__name__}"
