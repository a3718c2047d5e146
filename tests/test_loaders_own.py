"""A user's own loop, however it writes, ends with the oracle's bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qtensor import QTensor, WeightShapeError
from support.loading import (
    FORMS,
    SCHEMES,
    Experts,
    TinyNet,
    armed,
    assert_equals_oracle,
    identities,
    weights_of,
)

State = dict[str, torch.Tensor]


@pytest.fixture
def state() -> State:
    return weights_of(TinyNet)


def rows(w: torch.Tensor, full: torch.Tensor) -> None:
    for i in torch.randperm(len(full)).tolist():
        w.data[i] = full[i]


def row_slices(w: torch.Tensor, full: torch.Tensor) -> None:
    for a in range(0, len(full), 7):
        w.data[a : a + 7].copy_(full[a : a + 7])


def narrow(w: torch.Tensor, full: torch.Tensor) -> None:
    for a in range(0, full.shape[1], 11):
        n = min(11, full.shape[1] - a)
        w.data.narrow(1, a, n).copy_(full.narrow(1, a, n))


def blocks(w: torch.Tensor, full: torch.Tensor) -> None:
    for rows_of_w, rows_of_full in zip(w.detach().split(50), full.split(50), strict=True):
        for a, b in zip(rows_of_w.chunk(3, dim=1), rows_of_full.chunk(3, dim=1), strict=True):
            a.copy_(b)


def transposed(w: torch.Tensor, full: torch.Tensor) -> None:
    w.data.t().copy_(full.t().contiguous())


def flat(w: torch.Tensor, full: torch.Tensor) -> None:
    for a in range(0, full.numel(), 1000):
        w.data.view(-1)[a : a + 1000] = full.view(-1)[a : a + 1000]


def stepped(w: torch.Tensor, full: torch.Tensor) -> None:
    for offset in range(3):
        w.data[offset::3, offset % 2 :: 2] = full[offset::3, offset % 2 :: 2]
        w.data[offset::3, (offset + 1) % 2 :: 2] = full[offset::3, (offset + 1) % 2 :: 2]


def foreach(w: torch.Tensor, full: torch.Tensor) -> None:
    torch._foreach_copy_(list(w.data.split(33)), list(full.split(33)))


def index_copy(w: torch.Tensor, full: torch.Tensor) -> None:
    order = torch.randperm(len(full))
    w.data.index_copy_(0, order, full[order])


def index_copy_columns(w: torch.Tensor, full: torch.Tensor) -> None:
    order = torch.randperm(full.shape[1])
    w.data.index_copy_(1, order, full[:, order])


def index_put(w: torch.Tensor, full: torch.Tensor) -> None:
    order = torch.randperm(len(full))
    w.data[order] = full[order]


def index_put_elements(w: torch.Tensor, full: torch.Tensor) -> None:
    at = torch.nonzero(torch.ones_like(full, dtype=torch.bool), as_tuple=True)
    w.data.index_put_(at, full[at])


def boolean_mask(w: torch.Tensor, full: torch.Tensor) -> None:
    mask = torch.rand(full.shape) < 0.5
    w.data[mask] = full[mask]
    w.data[~mask] = full[~mask]


def masked_scatter(w: torch.Tensor, full: torch.Tensor) -> None:
    mask = torch.rand(full.shape) < 0.5
    for m in (mask, ~mask):
        w.data.masked_scatter_(m, full[m])


def masked_rows(w: torch.Tensor, full: torch.Tensor) -> None:
    odd = torch.arange(len(full)) % 2 == 1
    w.data[odd] = full[odd]
    w.data[~odd] = full[~odd]


def scatter(w: torch.Tensor, full: torch.Tensor) -> None:
    columns = torch.argsort(torch.rand(full.shape), dim=1)
    w.data.scatter_(1, columns, full.gather(1, columns))


def fill_then_overwrite(w: torch.Tensor, full: torch.Tensor) -> None:
    """The last write wins, elements are never counted twice."""
    w.data.fill_(3.0)
    w.data.zero_()
    w.data[5:9] = 1.0
    w.data.copy_(full)


def stale_first(w: torch.Tensor, full: torch.Tensor) -> None:
    """field-bugs scenarios 2 and 3: a shard twice, and once more after the weight was complete."""
    w.data[:40] = full[:40] * 2
    w.data[:40] = full[:40]
    w.data[40:] = full[40:] * 3
    w.data[40:] = full[40:]


def read_modify_write(w: torch.Tensor, full: torch.Tensor) -> None:
    """field-bugs scenario 1: a composed loader reads back what it has just written."""
    w.data.copy_(full * 2)
    w.data.copy_(w.data / 2)


def add_up(w: torch.Tensor, full: torch.Tensor) -> None:
    w.data.zero_()
    w.data.add_(full)


def data_assignment(w: torch.Tensor, full: torch.Tensor) -> None:
    w.data = full.clone()


def set_assignment(w: torch.Tensor, full: torch.Tensor) -> None:
    with torch.no_grad():
        w.set_(full.clone())


def inference_mode(w: torch.Tensor, full: torch.Tensor) -> None:
    """field-bugs scenario 24, sglang #31263."""
    with torch.inference_mode():
        w[:20].copy_(full[:20])
        w.data[20:40] = full[20:40]
        w.narrow(0, 40, 60).copy_(full[40:100])
        w[100:] = full[100:].clone()


def no_grad_without_data(w: torch.Tensor, full: torch.Tensor) -> None:
    with torch.no_grad():
        w[::2].copy_(full[::2])
        w[1::2] = full[1::2]


def out_argument(w: torch.Tensor, full: torch.Tensor) -> None:
    with torch.no_grad():
        torch.mul(full, 1.0, out=w.data)


LOOPS: list[Callable[[torch.Tensor, torch.Tensor], None]] = [
    rows, row_slices, narrow, blocks, transposed, flat, stepped, foreach, index_copy, index_copy_columns, index_put,
    index_put_elements, boolean_mask, masked_scatter, masked_rows, scatter, fill_then_overwrite, stale_first,
    read_modify_write, add_up, data_assignment, set_assignment, inference_mode, no_grad_without_data, out_argument,
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)
def test_a_users_own_loop_equals_the_oracle(loop, scheme, state) -> None:
    torch.manual_seed(1)
    rest = {k: v for k, v in state.items() if k != "up.weight"}
    with armed("constructed", scheme) as (model, _):
        before = identities(model)
        model.load_state_dict(rest, strict=False)
        source = state["up.weight"].clone()
        loop(model.up.weight, source)
        source.fill_(float("nan"))
    assert_equals_oracle(model, state, TinyNet.QUANTIZED, scheme)
    assert identities(model) == before


def test_a_broadcast_copy_fills_every_row(state) -> None:
    """field-bugs scenario 17 (vime #133)."""
    with armed("constructed") as (model, _):
        model.load_state_dict(state)
        model.up.weight.data.copy_(state["up.weight"][0])
        model.down.weight.data[:, :5] = torch.arange(48.0)[:, None]
        model.down.weight.data[:, 5:] = torch.arange(48.0)[:, None]
    state["up.weight"] = state["up.weight"][:1].repeat(160, 1)
    state["down.weight"] = torch.arange(48.0)[:, None].repeat(1, 160).bfloat16()
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)


@pytest.mark.parametrize("write", [
    lambda w: w.data.copy_(torch.ones(7, 48)),
    lambda w: w.data.narrow(0, 0, 4).copy_(torch.ones(5, 48)),
    lambda w: w.data.__setitem__(slice(0, 4), torch.ones(4, 47)),
    lambda w: setattr(w, "data", torch.ones(48, 160)),
    lambda w: w.data.set_(torch.ones(48, 160, dtype=torch.bfloat16)),
    lambda w: torch._foreach_copy_([w.data[:4]], [torch.ones(3, 48)]),
], ids=["copy", "narrow", "setitem", "data", "set", "foreach"])  # fmt: skip
def test_a_source_that_does_not_fit_is_refused_by_name(write, state) -> None:
    """field-bugs scenario 17: CopyCounter's assert named nothing (vime #133)."""
    with pytest.raises(WeightShapeError, match=r"up\.weight"), armed("constructed") as (model, _):
        write(model.up.weight)


def test_assigning_a_parameter_is_a_load(state) -> None:
    for form in FORMS:
        with armed(form) as (model, session):
            before = identities(model)
            for name, tensor in state.items():
                module, _, leaf = name.rpartition(".")
                owner = model.get_submodule(module)
                setattr(owner, leaf, tensor.clone() if leaf == "steps" else nn.Parameter(tensor.clone()))
        assert_equals_oracle(model, state, TinyNet.QUANTIZED)
        assert identities(model) == before
        assert session.report().peak_staged_bytes == 0


def test_parameters_put_into_the_modules_dictionary_stream(state) -> None:
    """As accelerate's device_map and diffusers do, whether the model is armed or constructed, and after a copy."""
    for form in FORMS:
        with armed(form) as (model, session):
            before = identities(model)
            for name, tensor in state.items():
                module, _, leaf = name.rpartition(".")
                holder = model.get_submodule(module)
                if leaf == "steps":
                    holder._buffers[leaf] = tensor.clone()
                    continue
                param = nn.Parameter(tensor.clone())
                holder._parameters[leaf] = param
                param.data.fill_(float("nan"))
            assert isinstance(model.up.weight, QTensor), "it is quantized where it is assigned"
            twin = copy.deepcopy(model)
        for found in (model, twin):
            assert_equals_oracle(found, state, TinyNet.QUANTIZED)
            assert {type(module._parameters) for module in found.modules()} == {dict}
        assert identities(model) == before
        assert {layer.note for layer in session.report().layers} == {""}
        assert session.report().peak_staged_bytes == 0


def test_an_aborted_session_leaves_ordinary_dictionaries(state) -> None:
    with pytest.raises(KeyError), armed("real") as (model, _):
        raise KeyError
    assert {type(module._parameters) for module in model.modules()} == {dict}


def test_a_parameter_put_where_no_hook_sees_it_is_quantized_at_the_end_and_noted(state) -> None:
    for form in FORMS:
        with armed(form) as (model, session):
            model.load_state_dict(state)
            dict.update(model.up._parameters, weight=nn.Parameter(state["up.weight"] * 2))
        state_now = state | {"up.weight": state["up.weight"] * 2}
        assert_equals_oracle(model, state_now, TinyNet.QUANTIZED)
        notes = {layer.name: layer.note for layer in session.report().layers}
        assert notes == {"up.weight": "assigned out of sight; quantized at finish", "down.weight": ""}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("order", ["whole", "experts", "w1_w3_out_of_order", "columns"])
@pytest.mark.parametrize("form", FORMS)
def test_fused_experts_equal_the_oracle_in_any_order(form, order, scheme) -> None:
    """field-bugs scenario 15."""
    state = weights_of(Experts)
    with armed(form, scheme, make=Experts) as (model, _):
        down, gate_up = model.down_proj, model.gate_up_proj
        half = gate_up.shape[1] // 2
        if order == "whole":
            gate_up.data.copy_(state["gate_up_proj"])
            down.data = state["down_proj"].clone()
        elif order == "columns":
            for a in range(0, 40, 16):
                down.data[..., a : a + 16] = state["down_proj"][..., a : a + 16]
            for e in range(3):
                gate_up.data[e].t().copy_(state["gate_up_proj"][e].t())
        else:
            parts = [(e, a) for e in range(3) for a in (0, half)]
            if order == "w1_w3_out_of_order":
                parts = [(e, a) for a in (half, 0) for e in (2, 0, 1)]
            for e, a in parts:
                gate_up.data[e].narrow(0, a, half).copy_(state["gate_up_proj"][e, a : a + half])
                down.data[e].copy_(state["down_proj"][e])
    assert_equals_oracle(model, state, Experts.QUANTIZED, scheme)
