"""A lazy weight against a plain tensor: any program of views, writes and reads does the same to both, and the loaded
weight is `quantize(plain tensor)`, byte for byte. The programs and the comparison of each step: `fuzz_programs`."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fuzz_programs import DTYPES, SHAPES, Machine, Step, exact_values, programs, small_limits
from helpers import assert_oracle, holder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import slices

from qtensor import Session, fp8_per_block, fp8_per_channel, fp8_per_tensor, mxfp8, online_quant, online_reload

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
