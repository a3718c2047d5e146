"""Coverage and geometry against the plainest possible model: a boolean array and a strided index."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtensor import Coverage
from qtensor.regions.boxes import as_box, is_flat_run, split_run

shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(tuple(sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))) for n in shape)


def cut(box: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(*span) for span in box)


@given(st.data(), shapes)
def test_agrees_with_a_boolean_array_after_every_step(data: st.DataObject, shape: tuple[int, ...]) -> None:
    coverage, model = Coverage(shape), np.zeros(shape, bool)
    for action in data.draw(st.lists(st.sampled_from(["add", "run", "run", "discard", "mask"]), max_size=12)):
        box = data.draw(boxes(shape))
        if action == "add":
            assert coverage.add(box) == int((~model[cut(box)]).sum())
            model[cut(box)] = True
        elif action == "run" and model.size:
            start, stop = sorted(data.draw(st.lists(st.integers(0, model.size), min_size=2, max_size=2, unique=True)))
            assert coverage.add_run(start, stop) == int((~model.reshape(-1)[start:stop]).sum())
            model.reshape(-1)[start:stop] = True
        elif action == "discard":
            assert coverage.discard(box) == int(model[cut(box)].sum())
            model[cut(box)] = False
        else:
            mask = np.asarray(np.random.default_rng(data.draw(st.integers(0, 99))).random(shape) < 0.3)
            assert coverage.add_mask(mask) == int((mask & ~model).sum())
            model |= mask
        assert coverage.covered == model.sum()
        assert coverage.complete == bool(model.all())
        probe = data.draw(boxes(shape))
        assert coverage.covers(probe) == bool(model[cut(probe)].all())
        assert coverage.overlaps(probe) == bool(model[cut(probe)].any())
        assert np.array_equal(painted(shape, coverage.missing(probe)), within(~model, probe))
        assert np.array_equal(painted(shape, coverage.covered_boxes(probe)), within(model, probe))
    assert coverage.copy().missing() == coverage.missing()


def painted(shape: tuple[int, ...], found: list) -> np.ndarray:
    """The boxes as a boolean array; they must not overlap."""
    out = np.zeros(shape, bool)
    for box in found:
        assert not out[cut(box)].any()
        out[cut(box)] = True
    return out


def within(model: np.ndarray, box: tuple[tuple[int, int], ...]) -> np.ndarray:
    out = np.zeros_like(model)
    out[cut(box)] = model[cut(box)]
    return out


@given(st.data(), st.lists(st.integers(1, 6), min_size=2, max_size=3).map(tuple))
def test_full_rows_are_the_rows_with_every_element(data: st.DataObject, shape: tuple[int, ...]) -> None:
    coverage, model = Coverage(shape), np.zeros(shape, bool)
    for box in data.draw(st.lists(boxes(shape), max_size=8)):
        coverage.add(box)
        model[cut(box)] = True
    lead = tuple(data.draw(st.integers(0, n - 1)) for n in shape[:-2])
    start, stop = sorted((data.draw(st.integers(0, shape[-2])), data.draw(st.integers(0, shape[-2]))))
    rows = [i for a, b in coverage.full_rows(lead, start, stop) for i in range(a, b)]
    assert rows == [i for i in range(start, stop) if model[lead][i].all()]


@given(st.permutations(range(60)))
def test_the_grid_stays_small_when_shards_arrive_in_any_order(order: list[int]) -> None:
    coverage = Coverage((6000, 4))
    for i in order[:-1]:
        coverage.add(((100 * i, 100 * i + 100), (0, 4)))
    assert coverage._cells.size <= 200
    assert coverage.missing() == [((100 * order[-1], 100 * order[-1] + 100), (0, 4))]


@given(st.permutations(range(12)), st.integers(0, 11))
def test_whole_rows_in_any_order_are_no_boxes_until_something_else_comes(order: list[int], at: int) -> None:
    """As experts come, by name: 0, 1, 10, 11, 2."""
    coverage = Coverage((4, 3, 5))
    for i in order[:at]:
        assert coverage.add_run(5 * i, 5 * i + 5) == 5
    assert not coverage._runs
    assert not coverage._gridded
    assert coverage.add(((0, 4), (0, 3), (0, 5))) == 60 - 5 * at
    assert coverage.complete


@pytest.mark.parametrize("region", [[(0, 3)], [(0, 3), (0, 5)], [(-1, 2), (0, 4)], [(2, 9), (0, 4)]])
def test_regions_outside_of_the_shape_are_refused(region: list) -> None:
    with pytest.raises(ValueError, match=r"region|dimensions"):
        Coverage((4, 4)).add(region)


def test_slices_are_regions_too() -> None:
    coverage = Coverage((4, 4))
    assert coverage.add((slice(1, 3), slice(None))) == 8
    assert repr(coverage) == "Coverage([4, 4], 8 of 16 elements)"


@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
def test_view_geometry_finds_the_elements_of_any_view_chain(data: st.DataObject, shape: tuple[int, ...]) -> None:
    base = torch.arange(int(np.prod(shape))).reshape(shape)
    view = base
    steps = st.sampled_from(["narrow", "select", "mT", "flat", "unsqueeze", "stride"])
    for step in data.draw(st.lists(steps, max_size=4)):
        view = apply(data, view, step)
    found = as_box(shape, tuple(view.shape), view.stride(), view.storage_offset())
    if found is not None:
        part = base[cut(found.box)]
        dims = [d for d in found.order if d is not None]
        dims += [d for d in range(view.dim()) if d not in dims]
        assert torch.equal(view.permute(dims).reshape(part.shape), part)
    elif is_flat_run(tuple(view.shape), view.stride()):
        first = view.storage_offset()
        parts = [base[cut(box)].flatten() for box in split_run(shape, first, first + view.numel())]
        assert torch.equal(torch.cat(parts), view.flatten())


def apply(data: st.DataObject, view: torch.Tensor, step: str) -> torch.Tensor:
    if step == "unsqueeze":
        return view.unsqueeze(0)
    if view.dim() == 0:
        return view
    d = data.draw(st.integers(0, view.dim() - 1))
    if step == "narrow":
        start = data.draw(st.integers(0, view.shape[d] - 1))
        return view.narrow(d, start, data.draw(st.integers(1, view.shape[d] - start)))
    if step == "select":
        return view.select(d, data.draw(st.integers(0, view.shape[d] - 1)))
    if step == "stride":
        return view[(slice(None),) * d + (slice(None, None, 2),)]
    if step == "mT":
        return view.mT if view.dim() >= 2 else view
    return view.view(-1) if view.is_contiguous() else view
