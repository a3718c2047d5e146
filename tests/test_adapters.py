"""Adapters that are made or loaded inside a block stay plain and trainable. A stand-in plays peft's part here, with its
module names and what its layers look like; tests/libraries has the library itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_callers import OWN, asked
from torch import nn

from qtensor import IncompleteLoadError, QTensor, callers, fp8, online_quant, online_reload, quantize
from support.loading import TinyNet, assert_equals_oracle, weights_of

LAYER = """
import copy
import torch
from torch import nn

class BaseTunerLayer: ...

class Linear(nn.Module, BaseTunerLayer):
    def __init__(self, base_layer, r):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.update_layer("default", r)

    def update_layer(self, name, r):
        out, into = self.base_layer.weight.shape
        self.lora_A[name] = nn.Linear(into, r, bias=False)
        self.lora_B[name] = nn.Linear(r, out, bias=False)
        nn.init.zeros_(self.lora_B[name].weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x.float())).to(x.dtype)

    def merge(self):
        delta = self.lora_B["default"].weight @ self.lora_A["default"].weight
        self.base_layer.weight.data += delta.to(self.base_layer.weight.dtype)

class LoraModel(nn.Module):
    def __init__(self, model, r=2):
        super().__init__()
        self.model = model
        for name in ("up", "down"):
            setattr(model, name, Linear(getattr(model, name), r))
        for name, param in model.named_parameters():
            param.requires_grad_("lora_" in name)

    def forward(self, ids):
        return self.model(ids)
"""
OTHER = """
import copy
from torch import nn

class ModulesToSaveWrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.update()

    def update(self):
        self.modules_to_save["default"] = copy.deepcopy(self.original_module)
        self.modules_to_save["default"].requires_grad_(True)
"""


def library(module: str, source: str) -> Any:
    scope: dict[str, Any] = {"__name__": module}
    exec(source, scope)
    return type("module", (), {k: v for k, v in scope.items() if isinstance(v, type)})


lora = library("peft.tuners.lora.layer", LAYER)
other = library("peft.utils.other", OTHER)
BASE = {"up.weight": "model.up.base_layer.weight", "down.weight": "model.down.base_layer.weight"}


def wrapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A base checkpoint, by the names that an adapted model has for it."""
    inner = {f"{layer}.{kind}": f"{layer}.base_layer.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")}
    return {f"model.{inner.get(name, name)}": values for name, values in state.items()}


def adapters(model: nn.Module) -> dict[str, Any]:
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return weights_of(TinyNet)


def loaded(state: dict[str, torch.Tensor], **options: Any) -> nn.Module:
    model = TinyNet().bfloat16()
    model.load_state_dict(state)
    return model


def assert_adapted(model: Any, state: dict[str, torch.Tensor]) -> None:
    assert len(adapters(model)) == 4
    for name, param in model.named_parameters():
        if "lora_" in name:
            assert type(param) is nn.Parameter
            assert (param.dtype, param.requires_grad) == (torch.float32, True)
        else:
            assert not param.requires_grad
    for name, inside in BASE.items():
        weight = model.get_parameter(inside)
        assert type(weight) is QTensor
        assert torch.equal(weight.dequantize(), quantize(state[name], fp8).dequantize())


def test_adapters_made_in_the_block_are_as_after_it(state: Any) -> None:
    with online_quant(fp8):
        model = loaded(state)
    torch.manual_seed(0)
    after = lora.LoraModel(model)
    with online_quant(fp8) as session:
        base = loaded(state)
        torch.manual_seed(0)
        inside = lora.LoraModel(base)
    assert_adapted(inside, state)
    for (name, a), b in zip(adapters(after).items(), adapters(inside).values(), strict=True):
        assert torch.equal(a, b), name
    report = session.report()
    assert {n for n, why in report.passthrough.items() if why == "part of an adapter"} == set(adapters(inside))
    ids = torch.arange(4)[None]
    inside(ids).sum().backward()
    assert all(p.grad is not None for p in adapters(inside).values())


def test_adapters_around_weights_that_come_later(state: Any) -> None:
    with online_quant(fp8):
        model = lora.LoraModel(TinyNet().bfloat16())
        assert model.load_state_dict(wrapped(state), strict=False).unexpected_keys == []
    assert_adapted(model, state)


def test_loaded_adapters_have_the_checkpoints_values_whoever_assigns_them(state: Any) -> None:
    values = {n: torch.randn_like(p) for n, p in adapters(lora.LoraModel(TinyNet())).items()}
    for assign in (False, True):
        with online_quant(fp8):
            model = lora.LoraModel(loaded(state))
            model.load_state_dict(values, strict=False, assign=assign)
        assert all(torch.equal(p, values[n]) for n, p in adapters(model).items())


def test_an_adapted_model_that_exists_is_armed_without_its_adapters(state: Any) -> None:
    model = lora.LoraModel(loaded(state))
    before = {n: (p, p.detach().clone()) for n, p in adapters(model).items()}
    with online_quant(fp8, model):
        model.load_state_dict(wrapped(state), strict=False)
    assert_adapted(model, state)
    assert all(p is before[n][0] and torch.equal(p, before[n][1]) for n, p in adapters(model).items())


def test_copies_that_peft_trains_are_plain_wherever_it_makes_them(state: Any) -> None:
    wanted = quantize(state["up.weight"], fp8).dequantize()
    with online_quant(fp8):
        model = loaded(state)
        model.up = other.ModulesToSaveWrapper(model.up)
    with online_quant(fp8):
        later = loaded(state)
    later.up = other.ModulesToSaveWrapper(later.up)
    for found in (model, later):
        trained, kept = found.up.modules_to_save["default"], found.up.original_module
        assert type(kept.weight) is QTensor
        assert type(trained.weight) is nn.Parameter
        assert (trained.weight.dtype, trained.weight.requires_grad) == (torch.bfloat16, True)
        assert torch.equal(trained.weight, wanted)
        assert torch.equal(trained.bias, state["up.bias"])
    assert type(copy.deepcopy(later.up.original_module).weight) is QTensor


def test_a_merge_is_the_quantized_sum(state: Any) -> None:
    with online_quant(fp8):
        model = lora.LoraModel(loaded(state))
    layer: Any = model.model.up
    nn.init.normal_(layer.lora_B["default"].weight)
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    wanted = quantize(layer.base_layer.weight.dequantize() + delta.detach().bfloat16(), fp8)
    layer.merge()
    assert torch.equal(layer.base_layer.weight.dequantize(), wanted.dequantize())


def test_a_reload_of_the_base_leaves_the_adapters(state: Any) -> None:
    with online_quant(fp8):
        model = lora.LoraModel(loaded(state))
    before = {n: p.detach().clone() for n, p in adapters(model).items()}
    with online_reload(model):
        model.get_parameter(BASE["up.weight"]).data.copy_(state["up.weight"] * 2)
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in adapters(model).items())
    assert torch.equal(
        model.get_parameter(BASE["up.weight"]).dequantize(), quantize(state["up.weight"] * 2, fp8).dequantize()
    )


class OfItsOwn(nn.Module):
    """As litgpt and others write adapters: in the model's own classes, told by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.lora_A, self.lora_B = nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.zeros(8, 2))
        self.adapter_wte = nn.Embedding(3, 8)
        self.head = nn.Linear(8, 2)


def test_parameters_named_like_adapters_need_no_checkpoint() -> None:
    state = OfItsOwn().state_dict()
    base = {n: t for n, t in state.items() if "lora" not in n and "adapter" not in n}
    with online_quant(fp8) as session:
        model = OfItsOwn()
        model.load_state_dict(base, strict=False)
    assert torch.equal(model.lora_A, torch.ones(2, 8))
    assert all(p.requires_grad for p in (model.lora_A, model.lora_B, model.adapter_wte.weight))
    assert model.adapter_wte.weight.std() > 0.1
    assert type(model.linear.weight) is QTensor
    assert session.report().passthrough["adapter_wte.weight"] == "part of an adapter; keeps its initial values"
    with pytest.raises(IncompleteLoadError, match=r"head\.weight"), online_quant(fp8):
        other = OfItsOwn()
        other.load_state_dict({n: t for n, t in base.items() if "head" not in n}, strict=False)


class LayersOfItsOwn(nn.Module):
    """As torchtune writes them: the adapter's matrices are linear layers, nothing but their names says whose."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.lora_a, self.lora_b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        nn.init.zeros_(self.lora_b.weight)


@pytest.mark.parametrize("given", [False, True], ids=["made inside", "a model that exists"])
@pytest.mark.parametrize("saved", [False, True], ids=["new", "loaded"])
def test_layers_named_like_adapters_are_adapters(given: bool, saved: bool) -> None:
    state = nn.ModuleDict({"layer": LayersOfItsOwn()}).state_dict()
    model = nn.ModuleDict({"layer": LayersOfItsOwn()}) if given else None
    with online_quant(fp8, model) as session:
        model = model or nn.ModuleDict({"layer": LayersOfItsOwn()})
        model.load_state_dict({n: t for n, t in state.items() if saved or "lora" not in n}, strict=False)
    found = model["layer"]
    assert type(found.linear.weight) is QTensor
    assert type(found.lora_a.weight) is type(found.lora_b.weight) is nn.Parameter
    assert found.lora_a.weight.requires_grad
    assert found.lora_a.weight.std() > 0.1
    assert not found.lora_b.weight.any()
    assert not saved or torch.equal(found.lora_a.weight, state["layer.lora_a.weight"])
    assert session.report().passthrough["layer.lora_a.weight"].startswith("part of an adapter")
    found.lora_b(found.lora_a(found.linear(torch.ones(2, 8)))).sum().backward()
    assert found.lora_b.weight.grad.any()


def test_a_wrapper_that_is_let_go_takes_no_weight_along(state: Any) -> None:
    with online_quant(fp8) as session:
        model = loaded(state)
        nn.ModuleList([model])  # as transformers' load_adapter does with peft
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)
    assert len(session.report().layers) == 2


def test_peft_is_told_from_what_peft_calls() -> None:
    builds, copies = callers.builds_adapter, callers.copies_to_train
    assert asked(builds, *OWN, "torch.nn.modules.linear", "peft.tuners.lora.layer", "user")
    assert asked(
        builds, *OWN, "torch.nn.modules.module", "accelerate.big_modeling", "torch.nn", "peft.tuners.ia3.layer"
    )
    assert not asked(builds, *OWN, "torch.nn.modules.linear", "transformers.models.llama", "peft.auto", "user")
    assert not asked(builds, *OWN, "torch.nn.modules.linear", "peft_of_a_user")
    assert asked(copies, *OWN, "torch.nn.parameter", *["copy"] * 9, "peft.utils.other")
    assert not asked(copies, *OWN, *["copy"] * 9, "user", "peft.utils.other")
