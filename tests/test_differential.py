"""A lazy weight against a plain tensor: any program of views, writes and reads does the same to both, and the loaded
weight is `quantize(plain tensor)`, byte for byte. The programs and the comparison of each step: `fuzz_programs`."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtensor import (
    QTensorError,
    Session,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    mxfp8,
    online_quant,
    online_reload,
)
from support.fuzz_programs import DTYPES, SHAPES, Machine, Step, exact_values, programs, small_limits
from support.helpers import assert_oracle, holder
from support.programs import slices

SCHEMES = (fp8_per_channel, fp8_per_block, fp8_per_tensor, mxfp8)
"""Schemes that represent the values of `exact_values` exactly."""

pytestmark = pytest.mark.filterwarnings("ignore:Use of .* on expanded tensors is deprecated")
PROGRAMS = max(100, settings().max_examples)
program_search = settings(
    max_examples=PROGRAMS, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def deliver_again(machine: Machine, session: Session) -> None:
    """What a late write to a part of a unit re-opened has to come again (law 3); so has all after a refused write."""
    param = getattr(machine.module, machine.name)
    if machine.trouble:
        machine.written.fill_(True)
        param.data.copy_(machine.plain)
    for boxes in session.report().missing.values():
        for box in boxes:
            at = slices(box)
            param.data[at][machine.written[at]] = machine.plain[at][machine.written[at]]


@program_search
@given(programs, st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(SCHEMES), st.booleans())
def test_a_load_does_what_a_plain_tensor_does(
    program: list[Step], shape: tuple[int, ...], dtype: torch.dtype, scheme: Any, small: bool
) -> None:
    plain = torch.zeros(shape, dtype=dtype)
    module, name = holder(plain)
    machine = Machine(module, name, plain, torch.zeros(shape, dtype=torch.bool))
    with small_limits() if small else nullcontext(), online_quant(scheme, module, on_missing="zero") as session:
        machine.run(program)
        deliver_again(machine, session)
    assert_oracle(getattr(module, name), plain, scheme)


@pytest.mark.parametrize("mode", [{}, {"shadow": "host"}, {"atomic": False}], ids=["shadow", "undo", "per_weight"])
@program_search
@given(programs, st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(SCHEMES), st.booleans())
def test_a_reload_does_what_a_plain_tensor_does(
    mode: dict[str, Any], program: list[Step], shape: tuple[int, ...], dtype: torch.dtype, scheme: Any, small: bool
) -> None:
    """Every element has a value from the start, so nothing is ever missing."""
    plain = exact_values(shape, dtype, seed=1)
    module, name = holder(plain)
    with online_quant(scheme, module):
        getattr(module, name).data.copy_(plain)
    machine = Machine(module, name, plain, torch.ones(shape, dtype=torch.bool))
    with warnings.catch_warnings(), small_limits() if small else nullcontext():
        warnings.simplefilter("ignore", UserWarning)  # units that were written in part are merged with old values
        with online_reload(module, on_missing="keep", **mode):
            machine.run(program)
            if machine.trouble:
                getattr(module, name).data.copy_(plain)
    assert_oracle(getattr(module, name), plain, scheme)


N = (0, 1, 0, 0)
ONCE_DIFFERED = {
    "foreach arithmetic was an IndexError": [
        Step(0, (), "copy_", N, 3, False),
        Step(0, (), "foreach_neg_", N, 3, False),
    ],
    "index_copy_ took a negative index": [Step(0, (), "index_copy_", (0, 1, 2, 30), 3, False)],
    "index_copy_ cast its source": [Step(0, (), "index_copy_ wide", N, 3, False)],
    "as_strided left the weight": [Step(0, (("as_strided", (1, 1, 1, 31)),), "fill_", N, 3, False)],
    "an expanded view was not filled": [Step(0, (("expand", N),), "zero_", N, 3, False)],
    "zeros_like forgot the strides": [Step(0, (("mT", N),), "empty_like", N, 3, False)],
    "clone forgot the strides": [
        Step(0, (), "copy_", N, 3, False),
        Step(0, (("mT", N), ("clone", N)), "neg_", N, 3, False),
    ],
    "a refused write took back all before it": [
        Step(0, (), "copy_", N, 3, False),
        Step(0, (("expand", N),), "copy_", N, 4, False),
        Step(0, (), "clone", N, 3, False),
    ],
    "contiguous had strides of its own": [
        Step(0, (), "copy_", N, 3, False),
        Step(0, (("unfold", (0, 0, 1, 0)), ("contiguous", N)), "neg_", N, 3, False),
    ],
}


@pytest.mark.parametrize("program", ONCE_DIFFERED.values(), ids=ONCE_DIFFERED)
def test_programs_that_once_differed(program: list[Step]) -> None:
    plain = torch.zeros(5, 8)
    module, name = holder(plain)
    machine = Machine(module, name, plain, torch.zeros(5, 8, dtype=torch.bool))
    with online_quant(fp8_per_channel, module, on_missing="zero") as session:
        machine.run(program)
        deliver_again(machine, session)
    assert_oracle(getattr(module, name), plain, fp8_per_channel)


@pytest.mark.parametrize("change", ["t_", "unsqueeze_", "squeeze_"])
def test_a_handle_does_not_change_its_shape_in_place(change: str) -> None:
    """These were taken for arithmetic: the weight was read and written back, and nothing had another shape."""
    module, name = holder(torch.zeros(1, 8))
    with online_quant(fp8_per_channel, module, on_missing="zero"):
        weight = getattr(module, name).data
        with pytest.raises(QTensorError, match="in place"):
            weight.unsqueeze_(0) if change == "unsqueeze_" else getattr(weight, change)()
        assert weight.shape == (1, 8)
