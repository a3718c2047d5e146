"""The oracle property: whatever the loader does, the result is `quantize(full_weight, scheme)`, bit for bit."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from qtensor import IncompleteLoadError, QTensor, fp8_per_block, fp8_per_channel, online_quant
from support.helpers import assert_no_hooks, assert_oracle, holder
from support.programs import (
    ROW_WISE,
    SCHEMES,
    WRITERS,
    Case,
    cases,
    largest_error,
    partitions,
    row_partitions,
    slices,
    write,
)

EVERYDAY = WRITERS[:5]
slow_data = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@slow_data
@given(st.data(), cases())
def test_any_partition_order_and_view_chain_equals_the_oracle(data: st.DataObject, case: Case) -> None:
    model, name = holder(case.weight)
    program = data.draw(st.permutations(data.draw(partitions(tuple(case.weight.shape)))))
    with online_quant(case.scheme, model):
        for box in program:
            write(getattr(model, name), box, case.weight, case.source_dtype, data.draw(st.sampled_from(WRITERS)))
    assert_oracle(getattr(model, name), case.weight, case.scheme)
    assert_no_hooks()


@slow_data
@given(st.data(), cases(schemes=ROW_WISE))
def test_row_wise_loads_stage_nothing_and_late_rows_win(data: st.DataObject, case: Case) -> None:
    """Law 3 and law 9: rows may be rewritten at any time, and nothing is ever staged."""
    model, name = holder(case.weight)
    shape = tuple(case.weight.shape)
    stale = torch.randn(shape).to(case.weight.dtype)
    boxes = data.draw(row_partitions(shape))
    with online_quant(case.scheme, model) as session:
        for box in data.draw(st.permutations(boxes)):
            write(getattr(model, name), box, stale, case.source_dtype, WRITERS[0])
        assert isinstance(getattr(model, name), QTensor)
        for box in data.draw(row_partitions(shape)):
            write(getattr(model, name), box, case.weight, case.source_dtype, data.draw(st.sampled_from(EVERYDAY[:2])))
    assert session.report().peak_staged_bytes == 0
    assert_oracle(getattr(model, name), case.weight, case.scheme)


@slow_data
@given(st.data(), cases(), st.integers(0, 2**31))
def test_scattered_writes_and_reads_agree_with_a_plain_tensor(data: st.DataObject, case: Case, seed: int) -> None:
    """Masks and steps that overlap, before and after the weight is complete; what they re-open is named, and what was
    never written is not read."""
    torch.manual_seed(seed)
    model, name = holder(case.weight)
    full = case.weight
    with online_quant(case.scheme, model) as session:
        seen = torch.zeros(full.shape, dtype=torch.bool)
        for density in data.draw(st.lists(st.sampled_from([0.01, 0.5, 1.0]), max_size=4)):
            mask = torch.rand(full.shape) < density
            getattr(model, name).data[mask] = full[mask]
            seen |= mask
            every, step = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([2, 3]))
            probe = (..., slice(None, None, every), slice(None, None, step))
            if seen[probe].all():
                scale = full.float().abs().max()
                error = (getattr(model, name).data[probe].clone().float() - full[probe].float()).abs().max()
                assert error <= largest_error(case.scheme) * scale + 2e-3
            else:
                with pytest.raises(IncompleteLoadError, match="never written"):
                    getattr(model, name).data[probe].clone()
        unwritten = torch.ones(full.shape, dtype=torch.bool)
        if not session.report().missing and seen.all():
            unwritten[...] = False
        getattr(model, name).data[unwritten] = full[unwritten]
    assert_oracle(getattr(model, name), full, case.scheme)


def test_a_mask_is_written_at_once() -> None:
    """Not run by run: in the time of some such writes to a plain tensor."""
    torch.manual_seed(0)
    full, plain = torch.randn(1024, 1024).bfloat16(), torch.empty(1024, 1024, dtype=torch.bfloat16)
    mask = torch.rand(full.shape) < 0.5
    parts = [(part, full[part]) for part in (mask, ~mask)]

    def seconds(target: torch.Tensor) -> float:
        began = time.perf_counter()
        for part, values in parts:
            target[part] = values
        return time.perf_counter() - began

    ordinary = min(seconds(plain) for _ in range(5))
    taken = []
    for _ in range(5):
        model, name = holder(full)
        with online_quant("fp8", model):
            taken.append(seconds(getattr(model, name).data))
        assert_oracle(getattr(model, name), full, fp8_per_channel)
    assert min(taken) < 20 * ordinary


@slow_data
@given(st.data(), cases())
def test_duplicates_and_stale_rewrites_are_exact_or_named(data: st.DataObject, case: Case) -> None:
    """A program of overlapping writes, old values first. What cannot be exact any more is reported as missing, and
    delivering just that makes the weight exact."""
    model, name = holder(case.weight)
    shape = tuple(case.weight.shape)
    stale = torch.randn(shape).to(case.weight.dtype)
    old = [(box, stale) for box in data.draw(partitions(shape))]
    new = [(box, case.weight) for box in data.draw(st.permutations(data.draw(partitions(shape))))]
    repeats = data.draw(st.lists(st.sampled_from(new), max_size=3))
    with online_quant(case.scheme, model) as session:
        for box, full in [*old[: data.draw(st.integers(0, len(old)))], *new, *repeats]:
            write(getattr(model, name), box, full, case.source_dtype, data.draw(st.sampled_from(EVERYDAY)))
        for boxes in session.report().missing.values():
            for box in boxes:
                write(getattr(model, name), box, case.weight, case.source_dtype, WRITERS[0])
    assert_oracle(getattr(model, name), case.weight, case.scheme)


@slow_data
@given(st.data(), cases())
def test_repeated_shards_in_a_row_are_exact(data: st.DataObject, case: Case) -> None:
    """Scenarios 2 and 3: a shard delivered again, also after it completed the weight, changes nothing."""
    model, name = holder(case.weight)
    boxes = data.draw(partitions(tuple(case.weight.shape), max_cuts=2))
    with online_quant(case.scheme, model):
        for box in boxes:
            for _ in range(2):
                write(getattr(model, name), box, case.weight, case.source_dtype, WRITERS[0])
    assert_oracle(getattr(model, name), case.weight, case.scheme)


@slow_data
@given(st.data(), cases())
def test_reads_tell_the_truth_at_every_step(data: st.DataObject, case: Case) -> None:
    """Law 4: a read returns what was written (exactly, or dequantized and counted), or raises; never `empty`."""
    model, name = holder(case.weight)
    written = torch.zeros(case.weight.shape, dtype=torch.bool)
    with online_quant(case.scheme, model, on_missing="zero") as session:
        for box in data.draw(st.permutations(data.draw(partitions(tuple(case.weight.shape))))):
            write(getattr(model, name), box, case.weight, case.source_dtype, WRITERS[0])
            written[slices(box)] = True
            probe = data.draw(partitions(tuple(case.weight.shape)))[0]
            before = session.report().lossy_reads
            if not written[slices(probe)].all():
                with pytest.raises(Exception, match="never written"):
                    getattr(model, name).data[slices(probe)].clone()
                continue
            got = getattr(model, name).data[slices(probe)].clone()
            want = case.weight[slices(probe)]
            assert torch.isfinite(got).all()
            if session.report().lossy_reads == before:
                assert torch.equal(got, want)
            else:
                scale = case.weight.float().abs().max()
                step = largest_error(case.scheme)
                assert (got.float() - want.float()).abs().max() <= step * scale + 2e-3


@slow_data
@given(cases(), st.integers(0, 1000))
def test_eight_threads_on_one_weight_equal_the_oracle(case: Case, seed: int) -> None:
    """Scenario 23: disjoint shards and shards of the same unit from many threads."""
    model, name = holder(case.weight)
    param = getattr(model, name)
    rows = case.weight.reshape(-1, case.weight.shape[-1])
    pieces = [(r, c) for r in range(0, len(rows), 7) for c in range(0, rows.shape[1], 19)]
    random.Random(seed).shuffle(pieces)
    failures: list[BaseException] = []

    def load(mine: list[tuple[int, int]]) -> None:
        try:
            for r, c in mine:
                param.data.view(rows.shape)[r : r + 7, c : c + 19].copy_(rows[r : r + 7, c : c + 19])
        except BaseException as error:
            failures.append(error)

    with online_quant(case.scheme, model):
        param = getattr(model, name)
        threads = [threading.Thread(target=load, args=(pieces[i::8],)) for i in range(8)]
        for t in threads:
            t.start()
        unrelated = nn.Linear(8, 8)
        for t in threads:
            t.join()
    assert not failures
    assert type(unrelated.weight) is nn.Parameter
    assert_oracle(getattr(model, name), case.weight, case.scheme)


@slow_data
@given(st.data(), cases(schemes=(*ROW_WISE, fp8_per_block)))
def test_staging_stays_within_incomplete_units(data: st.DataObject, case: Case) -> None:
    """Law 9: at any time staging is at most the incomplete units, rounded to staging groups, plus what is retained."""
    model, name = holder(case.weight)
    with online_quant(case.scheme, model) as session:
        for box in data.draw(st.permutations(data.draw(partitions(tuple(case.weight.shape))))):
            write(getattr(model, name), box, case.weight, case.source_dtype, WRITERS[0])
    assert session.report().peak_staged_bytes <= case.weight.nbytes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_construction_form_equals_the_oracle(scheme: object) -> None:
    torch.manual_seed(0)
    full = {"weight": torch.randn(300, 140).bfloat16(), "bias": torch.randn(300).bfloat16()}
    with online_quant(scheme):
        layer = nn.Linear(140, 300, dtype=torch.bfloat16)
        held = dict(layer.named_parameters())
        layer.load_state_dict(full)
    assert layer.weight is held["weight"]
    assert type(layer.bias) is nn.Parameter
    assert torch.equal(layer.bias, full["bias"])
    assert_oracle(layer.weight, full["weight"], scheme)
