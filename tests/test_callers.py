"""Who is calling? What each question recognises, from how far away, and what it does not take for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qtensor import callers, fp8_per_channel, online_quant

OWN = ["qtensor.lazy.ops", "qtensor.lazy.lazy_tensor"] * 3


def asked(question: Callable[[], Any], *modules: str | None, function: str = "function") -> Any:
    """The answer to a question that is asked in the first of `modules`, which is called from the next, and so on."""
    call = question
    for module in modules:
        scope: dict[str, Any] = {"__name__": module, "call": call}
        exec(f"def {function}(): return call()", scope)
        call = scope[function]
    return call()


@pytest.mark.parametrize(
    ("question", "module"),
    [
        (callers.copied_by_init, "torch.nn.init"),
        (callers.initialising, "torch.nn.init"),
        (callers.initialising, "transformers.initialization"),
        (callers.distributing, "torch.distributed.tensor.placement_types"),
        (callers.keys_a_program, "torch._inductor.codecache"),
        (callers.asked_by_fsdp, "torch.distributed.fsdp._fully_shard._fsdp_param"),
    ],
)
def test_a_foreign_module_is_recognised(question: Callable[[], bool], module: str) -> None:
    assert asked(question, *OWN, module)
    assert asked(question, *OWN, "user", None, module)
    assert not asked(question, *OWN, "user", "torch")
    assert not asked(question, *OWN, *["user"] * 50, module)
    assert not asked(question, *OWN, *["qtensor_of_a_user"] * 50, module)


def test_a_method_asks_for_its_caller_alone() -> None:
    assert asked(callers.called_by_init, OWN[0], "torch.nn.init")
    assert not asked(callers.called_by_init, OWN[0], "user", "torch.nn.init")


@pytest.mark.parametrize("function", ["reset_parameters", "_init_weights"])
def test_initialisers_are_known_by_name(function: str) -> None:
    assert asked(callers.initialising, "user", function=function)
    assert not asked(callers.initialising, "user", function="load_weights")


def test_transformers_puts_placeholders() -> None:
    function = "_move_missing_keys_from_meta_to_device"
    assert asked(callers.puts_placeholder, "transformers.modeling_utils", function=function)
    assert not asked(callers.puts_placeholder, "transformers.modeling_utils")


class Inner(nn.Module):
    def __init__(self, ask: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.answer = self.far_away(ask, 100)

    def far_away(self, ask: Callable[[nn.Module], Any], calls: int) -> Any:
        return self.far_away(ask, calls - 1) if calls else ask(self)


class Outer(nn.Module):
    def __init__(self, ask: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.inner = Inner(lambda inner: ask(inner, self))


class Other:
    def __init__(self, ask: Callable[[], Any]) -> None:
        self.answer = ask()


def test_a_module_is_under_construction_while_its_init_runs() -> None:
    outer = Outer(lambda inner, outer: (callers.is_constructing(inner), callers.is_constructing(outer)))
    assert outer.inner.answer == (True, True)
    assert not callers.is_constructing(outer)
    assert not Inner(lambda inner: callers.is_constructing(outer)).answer


def test_the_outermost_module_under_construction() -> None:
    outer = Outer(lambda inner, outer: callers.outermost_under_construction() is outer)
    assert Other(lambda: outer.inner.answer).answer is True
    assert Other(callers.outermost_under_construction).answer is None


def test_a_modules_own_init_initialises_and_that_of_other_objects_does_not() -> None:
    class Near(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answer = callers.initialising()

    assert Near().answer
    assert not Other(callers.initialising).answer


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("modes", [0, 1, 2])
def test_copies_of_torch_nn_init_are_no_load_under_dispatch_modes(modes: int) -> None:
    with online_quant(fp8_per_channel, on_missing="init") as session:
        layer = nn.Linear(8, 16, bias=False)
        _under(modes, lambda: nn.init.orthogonal_(layer.weight))
        assert layer.weight._armed.coverage.covered == 0
        _under(modes, lambda: layer.weight.data.copy_(torch.ones(16, 8)))
        assert layer.weight._armed.coverage.complete
    assert session.report().layers


def _under(modes: int, call: Callable[[], Any]) -> None:
    if not modes:
        call()
        return
    with Watching():
        _under(modes - 1, call)
