"""Casts, moves and memory without values, while a model is loaded: the result is a plain model's, quantized at the end.

Random programs (`support.model_programs`) of a model's whole life run on a quantized model and on a plain one, on the
host alone and with a second device. `make endurance` runs thousands. It is one file because what follows are such
programs, too: those that once were wrong.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtensor import (
    LazyWeight,
    QTensor,
    QTensorError,
    WeightDtypeError,
    fp8,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    online_quant,
    online_reload,
    quantize,
)
from qtensor.lazy.lazy_tensor import LiveQTensor
from support import fake_device
from support.helpers import assert_oracle, same_bytes
from support.model_programs import CASTS, SCHEMES, Life, Model, Net, swapping

FULL = bool(os.environ.get("QTENSOR_ENDURANCE"))
HERE, THERE = (3000, 3000) if FULL else (50, 20)


@settings(max_examples=HERE)
@given(st.data(), st.sampled_from(SCHEMES), st.booleans())
def test_any_program_ends_as_the_plain_one_quantized(data: st.DataObject, scheme: Any, constructed: bool) -> None:
    Life(data.draw, scheme, None).run(constructed)


def state_of(model: Model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("cast", CASTS)
def test_the_phase_a_person_sees_stays(cast: str, swap: bool) -> None:
    state = state_of(Net())
    with online_quant(fp8_per_channel) as session, swapping(swap):
        model = Net()
        up, down, norm = model.up.weight, model.down.weight, model.norm.weight
        up.mine = model  # type: ignore[attr-defined]
        model.load_state_dict({n: v for n, v in state.items() if n != "down.weight"}, strict=False)
        model.down.weight.data[:4].copy_(state["down.weight"][:4])
        CASTS[cast](model)
        assert (model.up.weight is up, model.down.weight is down, model.norm.weight is norm) == (True, True, True)
        assert (type(up), type(down)) == (LiveQTensor, LazyWeight)
        assert up.mine is model  # type: ignore[attr-defined]
        assert repr(down) == (
            f"LazyWeight(down.weight: [8, 6], {down.dtype}, to fp8_per_channel, 24 of 48 elements written)"
        )
        assert session.report().untouched == []
        model.down.weight.data[4:].copy_(state["down.weight"][4:])
        assert type(down) is LiveQTensor
    assert type(up) is QTensor
    assert session.report().lossy_reads == 0


@pytest.mark.parametrize("swap", [False, True])
def test_a_finished_model_keeps_its_attributes_and_its_scheme(swap: bool) -> None:
    state = state_of(Net())
    with online_quant(fp8_per_channel):
        model = Net()
        model.load_state_dict(state)
    weight = model.up.weight
    weight.mine = model  # type: ignore[attr-defined]
    with swapping(swap):
        for cast in CASTS.values():
            cast(model)
            assert model.up.weight is weight
            assert weight.mine is model  # type: ignore[attr-defined]
        model.to_empty(device="cpu")
    assert type(weight) is QTensor
    assert weight.mine is model  # type: ignore[attr-defined]
    with online_reload(model):
        model.load_state_dict(state)
    assert_oracle(weight, state["up.weight"].bfloat16(), fp8_per_channel)
    assert model.to("meta").up.weight.qdata.is_meta


def test_values_that_are_staged_are_cast_exactly_others_keep_their_bytes() -> None:
    full = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    with online_quant(fp8_per_channel) as session:
        model = nn.Sequential(nn.Linear(6, 8, bias=False))
        weight = model[0].weight
        weight.data[:2].copy_(full[:2])  # quantized
        weight.data[2:4, :3].copy_(full[2:4, :3])  # half of it staged
        weight.data[4:6, :3].copy_(full[4:6, :3])  # all of it, quantized and retained
        weight.data[4:6, 3:].copy_(full[4:6, 3:])
        model.bfloat16()
        weight.data[2:4, 3:].copy_(full[2:4, 3:])
        weight.data[6:].copy_(full[6:])
        assert weight.data[2:].dtype == torch.bfloat16
    exact, early = quantize(full.bfloat16(), fp8_per_channel), quantize(full, fp8_per_channel)
    assert not torch.equal(early.scale[:2], exact.scale[:2])
    for got, one, other in zip(model[0].weight.parts(), early.parts(), exact.parts(), strict=True):
        assert same_bytes(got[:2], one[:2])
        assert same_bytes(got[2:], other[2:])
    (layer,) = session.report().layers
    assert layer.cast_from == "float32"
    assert layer.note == "cast to bfloat16 after it was quantized; the bytes are of its float32 values"
    assert layer.source_bytes == 8 * 6 * 2


def test_loading_again_after_a_late_cast_is_exact() -> None:
    full = torch.randn(8, 6)
    with online_quant(fp8_per_block) as session:
        model = nn.Sequential(nn.Linear(6, 8, bias=False))
        model.load_state_dict({"0.weight": full * 2})
        model.half()
        model.load_state_dict({"0.weight": full})
    assert_oracle(model[0].weight, full.half(), fp8_per_block)
    assert session.report().layers[0].cast_from == ""


def test_a_cast_that_rounds_nothing_is_no_late_cast() -> None:
    full = torch.randn(8, 6).bfloat16()
    with online_quant(fp8_per_tensor) as session:
        model = nn.Sequential(nn.Linear(6, 8, bias=False).bfloat16())
        model.load_state_dict({"0.weight": full})
        model.float()
    assert_oracle(model[0].weight, full.float(), fp8_per_tensor)
    assert session.report().layers[0].cast_from == ""


def test_a_dtype_that_cannot_be_quantized() -> None:
    """Before its first write a weight then stays as it is; later the cast is refused."""
    state = state_of(Net())
    with online_quant(fp8):
        model = Net().double()
        model.load_state_dict(state)
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert model.up.weight.dtype == torch.float64
    with online_quant(fp8):
        model = Net()
        model.load_state_dict(state)
        with pytest.raises(
            WeightDtypeError, match=r"^up\.weight: cannot become torch\.float64 while it is being quantized"
        ):
            model.up.double()


def test_in_inference_mode() -> None:
    state = state_of(Net())
    with online_quant(fp8_per_channel), torch.inference_mode():
        model = Net().half()
        model.load_state_dict(state)
        model.to(torch.float16).bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert type(model.up.weight) is QTensor
    assert torch.equal(model.norm.bias, state["norm.bias"].half().bfloat16())


def test_a_parameter_made_of_a_weight_is_that_weight() -> None:
    """`lm_head.weight = nn.Parameter(embed.weight)`, before and after the values are there."""
    full = torch.randn(8, 8)
    with online_quant(fp8_per_channel):
        model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
        model[1].weight = nn.Parameter(model[0].weight)
        model[0].weight.data.copy_(full)
        model[2].weight = nn.Parameter(model[0].weight, requires_grad=False)
    for layer in model:
        assert_oracle(layer.weight, full, fp8_per_channel)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cast_by_hand(when: str) -> None:
    """`for p in model.parameters(): p.data = p.data.to(dtype)` is one; of values that changed on the way, a load."""
    state = state_of(Net())
    with online_quant(fp8_per_channel) as session:
        model = Net()
        params = list(model.parameters())
        if when == "after":
            model.load_state_dict(state)
        for param in params:
            param.data = param.data.to(torch.bfloat16)
        if when == "before":
            model.load_state_dict(state)
        else:
            changed = model.down.weight.data.to(torch.float32)
            changed.mul_(2)
            model.down.weight.data = changed
    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
    for name, param in model.named_parameters():
        assert param.dtype == torch.bfloat16
        if not isinstance(param, QTensor):
            assert torch.equal(param, state[name].bfloat16())
    early = quantize(state["up.weight"], fp8_per_channel)
    exact = quantize(state["up.weight"].bfloat16(), fp8_per_channel)
    assert same_bytes(model.up.weight.scale, early.scale if when == "after" else exact.scale)
    assert session.report().layers[0].cast_from == ("float32" if when == "after" else "")
    if when == "after":
        doubled = quantize(state["down.weight"], fp8_per_channel).dequantize(torch.bfloat16).float() * 2
        assert_oracle(model.down.weight, doubled.bfloat16(), fp8_per_channel)


@settings(max_examples=THERE, deadline=None, derandomize=not FULL)  # no conftest.py reaches that process
@given(st.data(), st.sampled_from(SCHEMES), st.booleans())
def any_program_with_moves(there: torch.device, data: st.DataObject, scheme: Any, constructed: bool) -> None:
    Life(data.draw, scheme, there).run(constructed)


def moved() -> None:
    """In a process of its own: every weight is where the plain model's is."""
    there = fake_device.install()
    any_program_with_moves(there)
    for swap in (False, True):
        move_to(there, swap)
    far = quantize(torch.randn(8, 6), fp8_per_block).to(there)
    before = far.dequantize().cpu()
    with pytest.raises(QTensorError, match="memory of a tensor class that is not PyTorch's own"):
        far[:, 1:3].zero_()
    assert torch.equal(far.dequantize().cpu(), before)


def move_to(there: torch.device, swap: bool) -> None:
    state = state_of(Net())
    moves: dict[str, Callable[[Model], Any]] = {
        "to": lambda m: m.to(there),
        "to with dtype": lambda m: m.to(there, torch.bfloat16),
        "there and back": lambda m: m.to(there).to("cpu"),
    }
    for move in moves.values():
        for when in ("before", "during", "after"):
            plain = Net()
            plain.load_state_dict(state)
            move(plain)
            with online_quant(fp8_per_channel), swapping(swap):
                model = Net()
                if when == "before":
                    move(model)
                elif when == "during":
                    model.down.load_state_dict({"weight": state["down.weight"]})
                    model.up.weight.data[:, :3].copy_(state["up.weight"][:, :3])
                    move(model)
                    model.up.weight.data[:, 3:].copy_(state["up.weight"][:, 3:])
                model.load_state_dict(state)
                if when == "after":
                    move(model)
            for name, param in model.named_parameters():
                want = plain.get_parameter(name)
                assert (param.device, param.dtype) == (want.device, want.dtype), (name, when)
                if not isinstance(param, QTensor):
                    assert torch.equal(param.cpu(), want.cpu())
                elif when == "before":
                    assert same_bytes(param.qdata.cpu(), quantize(want.cpu(), fp8_per_channel).qdata)
    with online_quant(fp8_per_channel):
        model = Net()
        model.to_empty(device=there)
        model.load_state_dict(state)
    assert {p.device for p in model.parameters()} == {there}


def test_another_device() -> None:
    process = multiprocessing.get_context("spawn").Process(target=moved)
    process.start()
    process.join(60 + THERE)
    assert process.exitcode == 0


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_cast_during_a_reload(when: str, atomic: bool, swap: bool) -> None:
    old, new = state_of(Net()), state_of(Net())
    with online_quant(fp8_per_channel):
        model = Net()
        model.load_state_dict(old)
    params = dict(model.named_parameters())
    with online_reload(model, atomic=atomic) as session, swapping(swap):
        if when == "before":
            model.half()
        elif when == "during":
            model.up.weight.data[:, :3].copy_(new["up.weight"][:, :3])
            model.norm.weight.data[:3].copy_(new["norm.weight"][:3])
            model.half()
            model.up.weight.data[:, 3:].copy_(new["up.weight"][:, 3:])
            model.norm.weight.data[3:].copy_(new["norm.weight"][3:])
        model.load_state_dict(new)
        if when == "after":
            model.half()
        assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert all(p is params[n] for n, p in model.named_parameters())
    layers = {layer.name: layer for layer in session.report().layers}
    for name, param in model.named_parameters():
        assert param.dtype == torch.float16
        if not isinstance(param, QTensor):
            assert type(param) is nn.Parameter
            assert torch.equal(param, new[name].half())
        elif when == "after":
            assert layers[name].cast_from == "float32"
        else:
            assert_oracle(param, new[name].half(), fp8_per_channel)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("shadow", ["device", "host"])
def test_a_reload_that_fails_takes_its_casts_back(shadow: Any, swap: bool) -> None:
    old = state_of(Net())
    with online_quant(fp8_per_channel):
        model = Net()
        model.load_state_dict(old)
    model.up.weight.mine = 3  # type: ignore[attr-defined]
    before = {
        n: (p, p.data_ptr() if not isinstance(p, QTensor) else p.qdata.data_ptr()) for n, p in model.named_parameters()
    }

    def program() -> None:
        with online_reload(model, shadow=shadow), swapping(swap):
            model.norm.weight.data[:3].zero_()
            model.up.weight.data.zero_()
            model.half()
            model.norm.weight.data[3:].zero_()
            model.down.weight.data.zero_()
            model.bfloat16().half()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program()
    for name, param in model.named_parameters():
        same, address = before[name]
        assert param is same
        assert (param.qdata if isinstance(param, QTensor) else param).data_ptr() == address
        if isinstance(param, QTensor):
            assert_oracle(param, old[name], fp8_per_channel)
        else:
            assert torch.equal(param, old[name])
    assert model.up.weight.mine == 3  # type: ignore[attr-defined]


def test_a_reload_moves_nothing() -> None:
    old = state_of(Net())
    with online_quant(fp8_per_channel):
        model = Net()
        model.load_state_dict(old)
    with online_reload(model):
        with pytest.raises(QTensorError, match=r"norm.weight: .* being reloaded cannot be moved to meta"):
            model.to("meta")
        model.to_empty(device="cpu")  # what is in use stays until there are other values
    assert_oracle(model.up.weight, old["up.weight"], fp8_per_channel)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_weight_that_was_moved_to_meta_says_so_until_it_has_values(loaded: bool, swap: bool) -> None:
    """As a plain one does, to everyone."""
    state = state_of(Net())
    plain = Net()
    with online_quant(fp8_per_channel), swapping(swap):
        model = Net()
        if loaded:
            model.load_state_dict(state)
        for m in (model, plain):
            m.to("meta")
        for name, param in model.named_parameters():
            assert (param.device, param.is_meta) == (plain.get_parameter(name).device, True)
            assert param.data[1:].device.type == param.half().device.type == (param + 1).device.type == "meta"
        model.up.to_empty(device="cpu")
        assert {p.device.type for p in model.up.parameters()} == {"cpu"}
        model.load_state_dict(state, assign=True)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert_oracle(model.up.weight, state["up.weight"], fp8_per_channel)
    model.to("meta")
    assert all(p.is_meta and p.device.type == "meta" for p in model.parameters())
