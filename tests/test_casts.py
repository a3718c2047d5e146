"""Casts, moves and memory without values, while a model is loaded: the result is a plain model's, quantized at the end.

Random programs of loads, casts, moves, to_empty, reset_parameters and deep copies run on a model inside the block, and
on a plain one. Every parameter then has the plain one's dtype, device and values; the bytes of a quantized weight are
those of `quantize(plain weight)`, or (and the report says so) of the values before a cast that came too late.
It is one file because all in it is one machine: the programs, and those that once were wrong.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtensor import (
    IncompleteLoadError,
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

Model = nn.Module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 6)
        self.down = nn.Linear(6, 8, bias=False)


CASTS: dict[str, Callable[[Model], Any]] = {
    "cpu": lambda m: m.cpu(),
    "to cpu": lambda m: m.to("cpu"),
    "float": lambda m: m.float(),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "device and dtype": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
}
MODULES = ("", "up", "down", "norm")


@contextlib.contextmanager
def swapping(on: bool) -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(on)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class Plain:
    """The plain model, and of each parameter: what was written, and what its units held before each late cast."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.covered = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
        self.older: dict[tuple[str, int], list[torch.Tensor]] = {}

    def write(self, name: str, where: tuple[slice, ...], value: torch.Tensor) -> None:
        self.model.get_parameter(name).data[where].copy_(value)
        self.covered[name][where] = True
        for row in range(*where[0].indices(len(self.covered[name]))):
            self.older.pop((name, row), None)

    def vacate(self, module: str) -> None:
        for name in self.below(module):
            self.covered[name].zero_()
            self.older = {key: old for key, old in self.older.items() if key[0] != name}

    def cast(self, module: str, cast: Callable[[Model], Any]) -> None:
        for name in self.below(module):
            for row, values in enumerate(self.model.get_parameter(name).data):
                if bool(self.covered[name][row].all()):
                    self.older.setdefault((name, row), []).append(values.clone())
        cast(self.model.get_submodule(module))

    def below(self, module: str) -> list[str]:
        return [name for name in self.covered if name.startswith(f"{module}." if module else "")]

    def missing(self) -> set[str]:
        return {name for name, covered in self.covered.items() if not bool(covered.all())}


def unit_is_one_of(got: QTensor, row: slice, candidates: list[torch.Tensor]) -> int | None:
    """Which of some values these rows of a weight were quantized from."""
    scheme = got.scheme
    for i, values in enumerate(candidates):
        want = quantize(values, scheme)
        ours = (got.qdata[row], got.scale[scheme.format.scale_rows(row.start, row.stop)])
        if all(same_bytes(a, b) for a, b in zip(ours, want.parts(), strict=False)):
            return i
    return None


def assert_as_plain(model: Model, plain: Plain, late: set[str]) -> None:
    """late: the weights that were cast when they were quantized, as the report has it."""
    assert [n for n, _ in model.named_parameters()] == list(plain.covered)
    for name, param in model.named_parameters():
        want = plain.model.get_parameter(name)
        assert (param.dtype, param.device, param.shape) == (want.dtype, want.device, want.shape)
        if not isinstance(param, QTensor):
            assert type(param) is nn.Parameter
            assert torch.equal(param, want)
            continue
        height, inexact = param.scheme.format.unit_rows(len(want)), False
        for first in range(0, len(want), height):
            rows = range(first, min(first + height, len(want)))
            older = [plain.older.get((name, row), []) for row in rows]
            dtypes = [values.dtype for values in older[0]]
            before = [
                torch.stack([old[i] for old in older]) for i in range(len(dtypes)) if all(len(o) > i for o in older)
            ]
            found = unit_is_one_of(param, slice(rows.start, rows.stop), [want.data[rows.start : rows.stop], *before])
            assert found is not None, (name, first)
            inexact |= found > 0
        assert not inexact or name in late


def pieces(draw: Any, covered: torch.Tensor) -> list[tuple[slice, ...]]:
    """What to write next. A part of a unit that is quantized already re-opens all of it: then it is all, in pieces."""
    every = tuple(slice(0, n) for n in covered.shape)
    first = draw(st.integers(0, covered.shape[-1] - 1))
    if bool(covered.any()):
        return [(*every[:-1], slice(first, None)), (*every[:-1], slice(0, first))]
    rows = draw(st.integers(1, len(covered)))
    return [(slice(0, rows), *every[1:-1], slice(first, None))[-covered.dim() :]]


LOADING = ("write", "write", "load", "cast", "cast", "empty", "meta", "reset", "copy")
RELOADING = ("write", "load", "cast")


def step(draw: Any, model: Model, plain: Plain, values: torch.Generator, kinds: tuple[str, ...] = LOADING) -> Model:
    """One step of a program, on both models."""
    kind = draw(st.sampled_from(kinds))
    module = draw(st.sampled_from(MODULES))
    if kind == "write":
        name = draw(st.sampled_from(sorted(plain.covered)))
        for where in pieces(draw, plain.covered[name]):
            value = torch.randn(plain.covered[name][where].shape, generator=values)
            plain.write(name, where, value)
            model.get_parameter(name).data[where].copy_(value)
    elif kind == "load":
        state = {n: torch.randn(plain.covered[n].shape, generator=values) for n in plain.below(module)}
        for name, value in state.items():
            plain.write(name, tuple(slice(0, n) for n in value.shape), value)
        with swapping(draw(st.booleans())):
            model.load_state_dict(state, strict=False)
    elif kind == "cast":
        cast = CASTS[draw(st.sampled_from(sorted(CASTS)))]
        plain.cast(module, cast)
        with swapping(draw(st.booleans())):
            cast(model.get_submodule(module))
    elif kind in ("empty", "meta"):
        plain.vacate(module)
        for m in (plain.model.get_submodule(module), model.get_submodule(module)):
            if kind == "meta":
                m.to("meta")
            m.to_empty(device="cpu")
    elif kind == "reset":
        # Of a weight that is loaded an initialiser changes nothing; a plain model has other values then.
        if not any(bool(plain.covered[name].any()) for name in plain.below(module)):
            for m in model.get_submodule(module).modules():
                if hasattr(m, "reset_parameters"):
                    m.reset_parameters()
    elif kind == "copy":
        return copy.deepcopy(model)
    return model


@settings(max_examples=60)
@given(st.data(), st.sampled_from((fp8_per_channel, fp8_per_tensor, fp8_per_block)), st.booleans())
def test_any_program_ends_as_the_plain_one_quantized(data: st.DataObject, scheme: Any, constructed: bool) -> None:
    plain, values = Plain(Net()), torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    outside = None if constructed else copy.deepcopy(plain.model)
    is_copy = False
    session = online_quant(scheme) if outside is None else online_quant(scheme, outside)
    with contextlib.suppress(IncompleteLoadError), session:
        model = outside if outside is not None else Net()
        for _ in range(data.draw(st.integers(1, 8))):
            copied = step(data.draw, model, plain, values)
            if copied is not model:
                if outside is not None:
                    break  # The session is of the model it was given.
                model, is_copy = copied, True
    report = session.report()
    if missing := plain.missing():
        if is_copy:
            return  # Nobody knows of a copy that no model holds, until it is complete.
        assert report.state == "aborted"
        assert set(report.missing) == missing
        return
    assert report.state == "finished"
    late = set(plain.covered) if is_copy else {layer.name for layer in report.layers if layer.cast_from}
    assert_as_plain(model, plain, late)
    for cast in data.draw(st.lists(st.sampled_from(sorted(CASTS)), max_size=2)):
        plain.cast("", CASTS[cast])
        CASTS[cast](model)
        late = set(plain.covered)
    with online_reload(model, atomic=data.draw(st.booleans())) as reload:
        for _ in range(data.draw(st.integers(0, 4))):
            step(data.draw, model, plain, values, RELOADING)
    late |= {layer.name for layer in reload.report().layers if layer.cast_from}
    assert_as_plain(model, plain, late)


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


def moved() -> None:
    """In a process of its own: every weight is where the plain model's is."""
    there = fake_device.install()
    for swap in (False, True):
        move_to(there, swap)


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
    process.join(120)
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
