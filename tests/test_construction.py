"""While a model is made: constructors that read, transform and write their own weights, and memory without values."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, skip_init

from qtensor import IncompleteLoadError, LazyWeight, QTensor, fp8_per_channel, online_quant
from support.helpers import assert_oracle


def transformed(kind: Callable[[nn.Module], nn.Module], *layers: Callable[[], nn.Module]) -> type[nn.Module]:
    class Transformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(kind(layer()) for layer in layers)
            self.out = nn.Linear(8, 8)

    return Transformed


def linear() -> nn.Module:
    return nn.Linear(8, 8)


def conv() -> nn.Module:
    return nn.Conv1d(4, 8, 3)


class Reads(nn.Module):
    """What constructors in the wild do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8)
        self.padded = nn.Parameter(F.pad(self.embed.weight, (0, 0, 0, 2)))
        self.out = nn.Linear(8, 8)
        self.out.weight.data *= 0.5
        self.register_buffer("copy", self.out.weight.data.clone())
        self.part = nn.Parameter(self.out.weight[:2].detach().clone())
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.out.weight
        self.same = nn.Conv1d(8, 8, 1)
        self.same.weight.data.copy_(self.same.weight.flip(0))
        self.norm = nn.LayerNorm(8)
        self.norm.weight.data.mul_(2).add_(self.norm.bias)


MODELS = {
    "weight_norm": transformed(parametrizations.weight_norm, linear, conv),
    "weight_norm of old": transformed(nn.utils.weight_norm, linear, conv),
    "spectral_norm": transformed(parametrizations.spectral_norm, linear, conv),
    "spectral_norm of old": transformed(nn.utils.spectral_norm, linear, conv),
    "orthogonal": transformed(parametrizations.orthogonal, linear),
    "reads": Reads,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", MODELS)
def test_constructors_may_transform_their_weights(kind: str, device: str) -> None:
    if (kind, device) == ("orthogonal", "meta"):
        pytest.skip("PyTorch itself cannot make it there")
    plain = MODELS[kind]()
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    with online_quant(fp8_per_channel):
        with torch.device(device):
            model = MODELS[kind]()
        if device == "meta":
            model.to_empty(device="cpu")
        model.load_state_dict(state)
    assert list(model.state_dict()) == list(state)
    assert_oracle(model.out.weight, state["out.weight"], fp8_per_channel)
    for name, value in model.state_dict().items():
        if not isinstance(value, QTensor):
            assert torch.equal(value, state[name]), name
    with pytest.raises(IncompleteLoadError), online_quant(fp8_per_channel):  # none of it counts as loaded
        model = MODELS[kind]()


class Views(nn.Module):
    """Parameters and buffers that are parts of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.q = nn.Parameter(self.qkv.weight[:8])
        self.turned = nn.Parameter(self.qkv.weight.t())
        self.register_buffer("first", self.out.weight.data[0])


def test_parameters_and_buffers_that_are_parts_of_a_weight() -> None:
    state = {name: value.clone() for name, value in Views().state_dict().items()}
    with online_quant(fp8_per_channel):
        model = Views()
        model.load_state_dict(state)
    assert_oracle(model.out.weight, state["out.weight"], fp8_per_channel)
    assert torch.equal(model.first, model.out.weight.dequantize()[0])
    for name in ("q", "turned", "qkv.weight"):  # tied to what does not qualify
        assert torch.equal(model.get_parameter(name), state[name])
    assert model.q.data_ptr() == model.turned.data_ptr() == model.qkv.weight.data_ptr()


def test_what_a_constructor_drops_need_not_be_loaded() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
            nn.Linear(8, 8)
            del self.body[1]
            self.head = nn.Linear(8, 3)
            self.head = nn.Identity()

    state = {name: value.clone() for name, value in Drops().state_dict().items()}
    with online_quant(fp8_per_channel):
        model = Drops()
        model.load_state_dict(state)
    assert_oracle(model.body[0].weight, state["body.0.weight"], fp8_per_channel)


def test_a_module_that_is_dropped_is_gone_at_once() -> None:
    """As in a plain model, without a collection of garbage; what its Parameters still take stays in high precision."""
    gc.collect()
    gc.disable()
    try:
        with online_quant(fp8_per_channel):
            dropped, kept = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), nn.Linear(8, 8)
            weight = dropped[0].weight
            assert repr(weight).startswith("LazyWeight(0.weight:")
            gone = [weakref.ref(module) for module in dropped.modules()]
            del dropped
            assert [module() for module in gone] == [None] * 3
            kept.load_state_dict({"weight": torch.ones(8, 8), "bias": torch.ones(8)})
            weight.data.fill_(2)
            assert "not quantized, 64 of 64 elements written" in repr(weight)
    finally:
        gc.enable()
    assert type(kept.weight) is QTensor
    assert torch.equal(weight, torch.full((8, 8), 2.0))


def test_what_a_constructor_reads_is_what_its_initialisers_left() -> None:
    seen: dict[str, Any] = {}

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 64)
            seen["max"] = self.up.weight.abs().max().item()
            seen["again"] = torch.equal(self.up.weight.data.clone(), self.up.weight.data.clone())
            nn.init.constant_(self.up.weight, 2)
            self.up.weight.data[3:].zero_()
            seen["sum"] = self.up.weight.sum().item()

    with online_quant(fp8_per_channel, on_missing="init"):
        model = Looks()
        with pytest.raises(IncompleteLoadError, match="read before it was written"):
            _ = model.up.weight + 1  # not a constructor: a loader that reads is told
    assert 0.2 < seen["max"] <= 0.25  # kaiming_uniform_ of 16 inputs
    assert seen["again"]
    assert seen["sum"] == 3 * 16 * 2
    assert model.up.weight.dequantize().sum() == 3 * 16 * 2


def test_weights_that_never_qualify_are_ordinary_tensors() -> None:
    with online_quant(fp8_per_channel):
        layer = nn.Conv1d(4, 8, 3)
        values = layer.weight.detach().clone()
        assert torch.equal(layer.weight, values)
        with torch.no_grad():
            layer.weight.mul_(2)
            assert torch.equal(layer.weight, values * 2)
        layer.load_state_dict({"weight": values, "bias": torch.zeros(8)})
    assert torch.equal(layer.weight, values)
    with pytest.raises(IncompleteLoadError, match=r"2 weights are incomplete"), online_quant(fp8_per_channel):
        layer = nn.Conv1d(4, 8, 3)
        with torch.no_grad():
            layer.weight.mul_(2)
            layer.bias += 1


def test_a_model_on_meta_sees_itself_there_while_it_is_made() -> None:
    devices: list[str] = []

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)
            devices.extend((self.up.weight.device.type, self.up.weight.new_empty(1).device.type))
            devices.append((self.up.weight * 2).device.type)
            assert self.up.weight.is_meta

    with online_quant(fp8_per_channel, on_missing="zero"), torch.device("meta"):
        model = Looks()
        assert model.up.weight.device.type == "cpu"  # where a loader will find it
    assert devices == ["meta"] * 3


STEPS = {
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "to meta": lambda m: m.to("meta"),
    "reset": lambda m: m.reset_parameters(),
    "empty_like": lambda m: setattr(m, "weight", nn.Parameter(torch.empty_like(m.weight))),
    "new_empty": lambda m: setattr(m.weight, "data", m.weight.new_empty(m.weight.shape)),
    "out of sight": lambda m: m._parameters.update(weight=nn.Parameter(torch.empty_like(m.weight))),
    "empty at another dtype": lambda m: setattr(m.weight, "data", torch.empty_like(m.weight, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("step", sorted(STEPS))
def test_memory_without_values_is_not_a_load(step: str, loaded: bool) -> None:
    state = nn.Linear(8, 8).state_dict()
    with pytest.raises(IncompleteLoadError) as error, online_quant(fp8_per_channel):
        model = nn.Linear(8, 8)
        if loaded and step != "reset":
            model.load_state_dict(state)
        STEPS[step](model)
        model.load_state_dict({"bias": state["bias"]}, strict=False)
    assert list(error.value.missing) == ["weight"]
    with online_quant(fp8_per_channel):
        model = nn.Linear(8, 8)
        STEPS[step](model)
        model.weight.data.copy_(state["weight"])
        model.bias.data.copy_(state["bias"])
    assert_oracle(model.weight, state["weight"], fp8_per_channel)


def test_memory_that_a_loader_fills_and_then_gives_is_a_load() -> None:
    state = nn.Linear(8, 8).state_dict()
    with online_quant(fp8_per_channel):
        model = nn.Linear(8, 8)
        for name, value in state.items():
            buffer = nn.Parameter(torch.empty_like(getattr(model, name)))
            buffer.data.copy_(value)
            setattr(model, name, buffer)
    assert_oracle(model.weight, state["weight"], fp8_per_channel)


@pytest.mark.parametrize("order", ["load", "reset load", "empty load", "empty reset load", "empty reset"])
@pytest.mark.parametrize("given", [False, True])
def test_meta_then_memory_then_values(order: str, given: bool) -> None:
    """Lightning, FSDP and torchtitan: made on meta, to_empty, reset_parameters, load."""
    state = nn.Linear(8, 8).state_dict()
    with torch.device("meta"):
        model = nn.Linear(8, 8)
    with online_quant(fp8_per_channel, model if given else None, on_missing="init"):
        if not given:
            model = skip_init(nn.Linear, 8, 8) if order.startswith("empty") else nn.Linear(8, 8, device="meta")
            assert isinstance(model.weight, LazyWeight)
        for step in order.split():
            if step == "load":
                model.load_state_dict(state)
            else:
                STEPS[{"empty": "to_empty"}.get(step, step)](model)
    if "load" in order:
        assert_oracle(model.weight, state["weight"], fp8_per_channel)
    else:
        assert 0 < model.weight.dequantize().abs().max() < 0.36


def test_what_the_initialisers_left_goes_with_the_memory() -> None:
    with pytest.raises(IncompleteLoadError) as error, online_quant(fp8_per_channel, on_missing="init"):
        model = nn.Linear(8, 8)
        model.reset_parameters()
        model.to_empty(device="cpu")
    assert set(error.value.missing) == {"weight", "bias"}


def test_values_that_a_constructor_gives_without_an_initialiser_are_its_initial_values() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.full((8,), 0.5)), nn.Parameter(torch.zeros(8))
            self.linear = nn.Linear(8, 8)
            self.linear.weight = nn.Parameter(torch.eye(8))

    with online_quant(fp8_per_channel, on_missing="init"):
        model = Scaled()
    assert torch.equal(model.scale, torch.full((8,), 0.5))
    assert not model.shift.any()
    assert torch.equal(model.linear.weight.dequantize(), torch.eye(8))
    with pytest.raises(IncompleteLoadError) as error, online_quant(fp8_per_channel):
        model = Scaled()
    assert {"scale", "shift"} < set(error.value.missing)


def test_a_copy_whose_original_is_gone_and_that_is_wrapped_anew() -> None:
    """As `copy.deepcopy(model).to(device)` is: no hook tells of the copy, and its Parameters are other objects."""
    state = nn.Linear(8, 8).state_dict()
    with online_quant(fp8_per_channel):
        model = copy.deepcopy(nn.Linear(8, 8))
        model.weight = nn.Parameter(model.weight)
        model.load_state_dict(state)
    assert_oracle(model.weight, state["weight"], fp8_per_channel)


def test_a_copy_and_not_its_original_that_is_gone() -> None:
    """What the original was given, and what it lacks, goes with it."""
    state = nn.Linear(8, 8).state_dict()
    with online_quant(fp8_per_channel):
        model = nn.Linear(8, 8)
        model.weight.data[:3].copy_(state["weight"][:3])
        model.bias.data[:3].copy_(state["bias"][:3])
        model = copy.deepcopy(model)
        model.weight.data[3:].copy_(state["weight"][3:])
        model.bias.data[3:].copy_(state["bias"][3:])
    assert_oracle(model.weight, state["weight"], fp8_per_channel)
    assert torch.equal(model.bias, state["bias"])


def test_a_copy_of_a_loaded_weight_that_is_loaded_in_pieces() -> None:
    """Columns at a time: its rows open again, as those of the original would."""
    first, second = torch.randn(8, 8), torch.cat([torch.randn(8, 4) / 8, torch.randn(8, 4) * 8], 1)
    with online_quant(fp8_per_channel) as session:
        model = nn.Linear(8, 8, bias=False)
        model.weight.data.copy_(first)
        twin = copy.deepcopy(model)
        twin.weight.data[:, :4].copy_(second[:, :4])
        twin.weight.data[:, 4:].copy_(second[:, 4:])
    assert_oracle(model.weight, first, fp8_per_channel)
    assert_oracle(twin.weight, second, fp8_per_channel)
    assert len(session.report().layers) == 2


def test_what_a_copy_lacks_is_missed_unless_nobody_writes_to_it() -> None:
    with pytest.raises(IncompleteLoadError) as error, online_quant(fp8_per_channel):
        model = nn.Sequential(nn.Linear(8, 8))
        model.load_state_dict({"0.weight": torch.randn(8, 8), "0.bias": torch.randn(8)})
        copy.deepcopy(model)
        spare = copy.deepcopy(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
        model = copy.deepcopy(spare)
        model[1].bias.data.zero_()
    assert set(error.value.missing) == {"0.weight", "0.bias", "1.weight"}
