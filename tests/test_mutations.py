"""Do the tests notice? Each mutant breaks one rule on purpose; the probe that guards the rule must fail.

The probes are small deterministic loads that pass on the real code, checked first. It is one file because probes,
mutants and the table of who catches whom are read together.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qtensor import (
    IncompleteLoadError,
    QTensorError,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    online_quant,
    online_reload,
    quantize,
)
from qtensor.kernels import Audit
from qtensor.lazy import target as target_module
from qtensor.lazy.plain_store import PlainStore
from qtensor.lazy.quant_store import QuantStore
from qtensor.lazy.quantized_rows import QuantizedRows
from qtensor.lazy.staging import Staging
from qtensor.lazy.target import Beside, InPlace
from qtensor.lazy.units import LIVE, Units
from qtensor.lazy.weight import ArmedWeight
from qtensor.regions.coverage import Coverage
from qtensor.regions.views import whole
from qtensor.sessions import registration, transaction
from qtensor.sessions import reload as reload_module
from qtensor.sessions.model_transaction import ModelTransaction
from qtensor.sessions.snapshot import Snapshot
from qtensor.sessions.transaction import Transaction
from support.helpers import assert_oracle, copy_unit, same_bytes
from support.interrupts import InOperation, hooks_left

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


# Transactions and stores ----------------------------------------------------------------------------------------------

OLD, NEW, NEXT = FULL, FULL * 3, FULL * 5


class Pair(nn.Module):
    """Two quantized weights, one of them a stack, a bias and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(quantize(OLD, fp8_per_channel), requires_grad=False)
        self.stack = nn.Parameter(quantize(OLD.view(2, 128, 64), fp8_per_channel), requires_grad=False)
        self.bias = nn.Parameter(OLD[0].clone())
        self.register_buffer("steps", OLD[1].clone())

    def load(self, full: torch.Tensor) -> None:
        self.a.data.copy_(full)
        for e in range(2):
            self.stack.data[e].copy_(full.view(2, 128, 64)[e])
        self.bias.data.copy_(full[0])
        self.steps.copy_(full[1])

    def holds(self) -> list[bytes]:
        found = [part for param in (self.a, self.stack) for part in param.parts()]  # type: ignore[attr-defined]
        return [t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in (*found, self.bias, self.steps)]


def holding(full: torch.Tensor) -> list[bytes]:
    pair = Pair()
    pair.a, pair.stack = (nn.Parameter(quantize(w, fp8_per_channel), False) for w in (full, full.view(2, 128, 64)))
    pair.bias, pair.steps = nn.Parameter(full[0].clone()), full[1].clone()
    return pair.holds()


def interrupted_at_its_end(fails: bool, **options: Any) -> None:
    """An interrupt in each torch operation of the end: old or new as a whole, at once, and the next reload works."""
    old, new, following = holding(OLD), holding(NEW), holding(NEXT)
    for n in count(1):
        pair, mode = Pair(), InOperation(n, KeyboardInterrupt)
        session = online_reload(pair, **options)
        pair.load(NEW)
        end = session.abort if fails else session.finish
        with contextlib.suppress(KeyboardInterrupt), mode:
            end()
        assert session.report().state in ("finished", "aborted")
        assert pair.holds() == (new if session.report().state == "finished" else old)
        assert hooks_left() == []
        with online_reload(pair):
            pair.load(NEXT)
        assert pair.holds() == following
        if mode.seen < n:
            assert n > 3
            return


def an_interrupted_commit_is_completed() -> None:
    interrupted_at_its_end(False)


def an_interrupted_rollback_is_completed() -> None:
    interrupted_at_its_end(True, shadow="host")


class OtherRanks:
    """A vote of which the outcome is known: another rank has failed, or all have succeeded before this one gives up."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def open(self) -> None:
        pass

    def settle(self) -> None:
        if self.fails:
            raise QTensorError("rank 1 failed")
        raise KeyboardInterrupt

    def fail(self, reason: str) -> bool:
        return self.fails


def voting(fails: bool) -> list[bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reload_module, "session_vote", lambda *args: OtherRanks(fails))
        pair = Pair()
        with pytest.raises(QTensorError if fails else KeyboardInterrupt), online_reload(pair):
            pair.load(NEW)
        return pair.holds()


def a_failed_vote_keeps_the_old() -> None:
    assert voting(fails=True) == holding(OLD)


def what_all_ranks_voted_for_is_done() -> None:
    assert voting(fails=False) == holding(NEW)


def an_incomplete_reload_keeps_the_old() -> None:
    pair = Pair()
    with pytest.raises(IncompleteLoadError), online_reload(pair, on_missing="error"):
        pair.a.data.copy_(NEW)
        pair.steps.copy_(NEW[1])
    assert pair.holds() == holding(OLD)


def a_warning_that_is_an_error_keeps_the_old() -> None:
    pair = Pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning), online_reload(pair):
            pair.a.data[:, :3].copy_(NEW[:, :3])
    assert pair.holds() == holding(OLD)


def a_write_after_the_seal_is_refused() -> None:
    pair = Pair()

    def too_late(*args: object, **kwargs: object) -> None:
        with pytest.raises(QTensorError, match="written while its session ends"):
            pair.a.data.copy_(NEXT)

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch, online_reload(pair):
        warnings.simplefilter("always")
        patch.setattr(warnings, "showwarning", too_late)
        pair.load(NEW)
        pair.a.data[:, :3].copy_(NEW[:, :3])


def an_abort_restores_buffers_and_plain_values() -> None:
    for shadow in ("device", "host"):
        pair = Pair()
        with contextlib.suppress(ZeroDivisionError), online_reload(pair, shadow=shadow):  # type: ignore[arg-type]
            pair.load(NEW)
            raise ZeroDivisionError
        assert pair.holds() == holding(OLD)
        assert hooks_left() == []


def scattered_rows_are_committed_and_no_others() -> None:
    pair, want = Pair(), quantize(OLD, fp8_per_channel)
    with online_reload(pair):
        for rows in (slice(3, 9), slice(100, 101)):
            pair.a.data[rows].copy_(NEW[rows])
            copy_unit(want, quantize(NEW, fp8_per_channel), None, rows.start, rows.stop)
    assert all(map(same_bytes, pair.a.parts(), want.parts()))  # type: ignore[attr-defined]


def half_a_bias_keeps_the_other_half() -> None:
    pair = Pair()
    with online_reload(pair):
        pair.bias.data[:32].copy_(NEW[0, :32])
    assert torch.equal(pair.bias, torch.cat([NEW[0, :32], OLD[0, 32:]]))


def a_write_cut_short_is_no_write() -> None:
    with online_quant(fp8_per_channel, on_missing="zero"):
        layer = nn.Linear(64, 256, bias=False, dtype=torch.bfloat16)
        layer.weight.data[TOP].copy_(FULL[TOP])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(QuantStore, "_receive", stop)
            with pytest.raises(KeyboardInterrupt):
                layer.weight.data[LEFT].copy_(FULL[LEFT])
        with pytest.raises(IncompleteLoadError):
            layer.weight.data[TOP].clone()
        layer.weight.data.copy_(FULL)
    assert_oracle(layer.weight, FULL, fp8_per_channel)


def a_reload_cut_short_goes_on_from_the_live_values() -> None:
    pair = Pair()
    with online_reload(pair):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Units, "mark", stop)
            with pytest.raises(KeyboardInterrupt):
                pair.a.data[TOP].copy_(NEXT[TOP])
        assert torch.equal(pair.a.data[TOP].clone(), quantize(OLD, fp8_per_channel).dequantize()[TOP])
        pair.load(NEW)
    assert pair.holds() == holding(NEW)


def stop(*args: object) -> None:
    raise KeyboardInterrupt


def second_copies_go_as_matrices_are_committed() -> None:
    pair = Pair()
    with online_reload(pair, atomic=False) as session:
        pair.load(NEW)
    assert session.report().peak_second_copy_bytes == sum(p.nbytes for p in pair.a.parts())  # type: ignore[attr-defined]


def a_rollback_after_a_commit_changes_nothing() -> None:
    live, coverage = quantize(OLD, fp8_per_channel), Coverage((256, 64))
    target: Any = partial(InPlace, on_bytes=lambda delta: None)
    store = QuantStore(
        live.scheme, live.dtype, live.device, coverage, Audit(), lambda delta: None, result=live, target=target
    )
    store.write(whole((256, 64)), NEW)
    store.commit()
    store.rollback()
    assert all(map(same_bytes, live.parts(), quantize(NEW, fp8_per_channel).parts()))


def finish_in_another_order(*steps: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A transaction of these steps; "decide" is the assignment after which there is no way back."""

    def finish(self: Any) -> None:
        try:
            for step in steps:
                if step == "decide":
                    self.state = "committing"
                else:
                    getattr(self, step)()
        except BaseException as error:
            self.abort(error)
            raise
        self.settle()
        self.tell()

    return lambda monkeypatch: monkeypatch.setattr(Transaction, "finish", finish)


def mutant(name: str, change: Callable[[pytest.MonkeyPatch], object]) -> Callable[[pytest.MonkeyPatch], object]:
    change.__name__ = name
    return change


def give_up_what_was_voted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reload_module.Reload.withdraw
    monkeypatch.setattr(reload_module.Reload, "withdraw", lambda self, error: original(self, error) or True)


def try_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transaction, "in_spite_of_interrupts", lambda action: action())


def commit_what_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload_module.Reload, "roll_back", lambda self: self.commit())


def forget_the_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshot, "restore", lambda self: None)


def leave_the_hooks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    uninstall, sessions = registration.uninstall, []
    monkeypatch.setattr(registration, "uninstall", sessions.append)
    return lambda: [uninstall(session) for session in sessions] and None


def warn_after_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    warn, tell = ModelTransaction._warn, reload_module.Reload.tell
    monkeypatch.setattr(ModelTransaction, "_warn", lambda self: None)
    monkeypatch.setattr(reload_module.Reload, "tell", lambda self: (warn(self), tell(self)))


def seal_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ArmedWeight, "seal", lambda self: None)


def drop_a_journal_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix of those that were saved is not put back."""
    original = InPlace.rollback

    def rollback(self: InPlace) -> None:
        if len(self._copies) > 1:
            self._copies.popitem()
        original(self)

    monkeypatch.setattr(InPlace, "rollback", rollback)


def save_after_the_first_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = InPlace.new, set()

    def new(self: InPlace, e: int) -> Any:
        if (id(self), e) in seen:
            return original(self, e)
        seen.add((id(self), e))
        return self.live(e)

    monkeypatch.setattr(InPlace, "new", new)


def keep_the_undo_after_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a rollback restores once more."""
    monkeypatch.setattr(InPlace, "end", lambda self, e: None)


def publish_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    original = QuantizedRows.publish

    def publish(self: QuantizedRows, e: int) -> None:
        self.target.end(e)
        original(self, e)

    monkeypatch.setattr(QuantizedRows, "publish", publish)


def call_it_live_before_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Units.runs

    def publish(self: QuantizedRows, e: int) -> None:
        runs = list(original(self._units, e, 0, self._units.n, LIVE))
        self._units.state[e] |= LIVE
        for start, stop, live in runs:
            if not live:
                self.target.publish(e, lambda parts, a=start, b=stop: parts.rows(a, b, self._format))  # type: ignore[misc]
        self.target.end(e)

    monkeypatch.setattr(QuantizedRows, "publish", publish)


def publish_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    original, flags = Units.runs, LIVE

    def runs(self: Units, e: int, start: int, stop: int, flag: int) -> Any:
        found = list(original(self, e, start, stop, flag))
        return found[:2] if flag == flags and stop - start == self.n else found

    monkeypatch.setattr(Units, "runs", runs)


def publish_untouched_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(self: QuantizedRows, e: int) -> None:
        self.target.publish(e, lambda parts: parts)
        self.target.end(e)

    monkeypatch.setattr(QuantizedRows, "publish", publish)


def publish_no_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    original = target_module._copy
    monkeypatch.setattr(target_module, "_copy", lambda sources, targets: original(sources[:1], targets[:1]))


def begin_the_copy_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(self: PlainStore) -> None:
        self.target.new(0)[0].zero_()

    monkeypatch.setattr(PlainStore, "_begin", begin)


def free_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def free(self: Staging, e: int, start: int, stop: int) -> None:
        for key, rows in list(self.groups.items()):
            rows.zero_()  # memory that is freed and given out again may hold the same values
            self._free(key)

    monkeypatch.setattr(Staging, "free_unused", free)


def forget_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Units, "reset", lambda self: None)


def forget_what_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Units, "reset", lambda self: self.state.fill(0))


def hold_second_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Beside, "end", lambda self, e: None)


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
    an_interrupted_commit_is_completed,
    an_interrupted_rollback_is_completed,
    a_failed_vote_keeps_the_old,
    what_all_ranks_voted_for_is_done,
    an_incomplete_reload_keeps_the_old,
    a_warning_that_is_an_error_keeps_the_old,
    a_write_after_the_seal_is_refused,
    an_abort_restores_buffers_and_plain_values,
    scattered_rows_are_committed_and_no_others,
    half_a_bias_keeps_the_other_half,
    a_write_cut_short_is_no_write,
    a_reload_cut_short_goes_on_from_the_live_values,
    second_copies_go_as_matrices_are_committed,
    a_rollback_after_a_commit_changes_nothing,
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
    (
        mutant("commit_before_the_vote", finish_in_another_order("prepare", "decide", "vote")),
        a_failed_vote_keeps_the_old,
    ),
    (mutant("do_not_vote", finish_in_another_order("prepare", "decide")), a_failed_vote_keeps_the_old),
    (mutant("decide_first", finish_in_another_order("decide", "prepare", "vote")), an_incomplete_reload_keeps_the_old),
    (
        mutant("decide_after_the_commit", finish_in_another_order("prepare", "vote", "commit", "decide")),
        an_interrupted_commit_is_completed,
    ),
    (mutant("check_nothing", finish_in_another_order("vote", "decide")), an_incomplete_reload_keeps_the_old),
    (give_up_what_was_voted_for, what_all_ranks_voted_for_is_done),
    (try_once, an_interrupted_commit_is_completed),
    (try_once, an_interrupted_rollback_is_completed),
    (commit_what_is_aborted, an_abort_restores_buffers_and_plain_values),
    (forget_the_snapshot, an_abort_restores_buffers_and_plain_values),
    (leave_the_hooks, an_abort_restores_buffers_and_plain_values),
    (warn_after_the_commit, a_warning_that_is_an_error_keeps_the_old),
    (seal_nothing, a_write_after_the_seal_is_refused),
    (drop_a_journal_entry, an_interrupted_rollback_is_completed),
    (save_after_the_first_unit, aborted_undo_restores),
    (keep_the_undo_after_the_commit, a_rollback_after_a_commit_changes_nothing),
    (publish_after_the_end, reload_commits_at_the_end),
    (call_it_live_before_it_is, an_interrupted_commit_is_completed),
    (publish_one_run, scattered_rows_are_committed_and_no_others),
    (publish_untouched_rows, scattered_rows_are_committed_and_no_others),
    (publish_no_scales, reload_commits_at_the_end),
    (begin_the_copy_empty, half_a_bias_keeps_the_other_half),
    (free_what_waits, odd_bands_complete_blocks),
    (forget_no_state, a_write_cut_short_is_no_write),
    (forget_what_is_live, a_reload_cut_short_goes_on_from_the_live_values),
    (hold_second_copies, second_copies_go_as_matrices_are_committed),
]


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: p.__name__)
def test_probe_passes_on_the_real_code(probe: Probe) -> None:
    probe()


@pytest.mark.parametrize(("mutant", "probe"), MUTANTS, ids=lambda f: f.__name__)
def test_mutant_is_caught(mutant: Callable, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    clean_up = mutant(monkeypatch)
    caught = False
    try:
        probe()
    except (Exception, pytest.fail.Exception):
        caught = True
    if clean_up is not None:
        clean_up()
    assert caught, f"{probe.__name__} did not notice {mutant.__name__}"
