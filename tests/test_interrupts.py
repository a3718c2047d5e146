"""Whatever stops a load or a reload, and when: the model is old or new as a whole, and the next load works.

It is one file because every test in it is one subject of `support.interrupts`, interrupted in another way.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from qtensor import QTensorError, WeightShapeError, fp8_per_channel, online_quant, online_reload, quantize
from qtensor.interrupts import without_grad
from support.first_use import LOOPS, timer
from support.interrupts import (
    KINDS,
    NEW,
    NEXT,
    OLD,
    STATES,
    TARGETS,
    AtLine,
    Net,
    ThenAtLine,
    at_every_line,
    held,
    hooks_left,
    in_every_operation,
    load,
    loaded,
    random_moments,
    twice,
)
from support.processes import elsewhere

ENDURANCE = bool(os.environ.get("QTENSOR_ENDURANCE"))
ENDS = ("sessions/transaction.py", "sessions/session.py", "sessions/reload.py", "sessions/snapshot.py")


def isolated(search: Callable[..., list[str]], *args: Any) -> list[str]:
    """In a process of its own: what a stopped library leaves behind (a lock, a setting) must not reach other tests."""
    with ProcessPoolExecutor(1, mp_context=elsewhere) as pool:
        return pool.submit(search, *args).result()


@pytest.mark.parametrize("seed", range(10 if ENDURANCE else 1))
def test_an_exception_at_a_random_moment(seed: int) -> None:
    """10,000 in `make endurance`, a thousand from each seed."""
    assert isolated(random_moments, 1000 if ENDURANCE else 500, seed) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_in_every_torch_operation(kind: str) -> None:
    assert in_every_operation(kind, KeyboardInterrupt) == []


@pytest.mark.parametrize("kind", ["load", "reload", "abort of a reload in place, host"])
def test_an_interrupt_at_every_line_of_the_end(kind: str) -> None:
    """Of all sessions, weights and ranks in `make endurance`, where a lock is left held: a tracer, unlike a signal, can
    come between a `with` block and its end."""
    if ENDURANCE:
        assert isolated(at_every_line, kind, KeyboardInterrupt, bool) == []
    else:
        assert at_every_line(kind, KeyboardInterrupt, lambda line: line.startswith(ENDS)) == []


# What a block may raise after the commit ------------------------------------------------------------------------------


def test_warnings_as_errors_keep_the_old_weights() -> None:
    net = loaded(OLD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="only a part"), online_reload(net):
            net.down.weight.data[:3].copy_(NEW["down.weight"][:3])
    assert held(net) == STATES["old"]
    assert hooks_left() == []


def test_a_hook_that_raises_after_the_commit_is_a_warning_of_the_report(caplog: pytest.LogCaptureFixture) -> None:
    net = loaded(OLD)

    def hook(name: str, module: nn.Module) -> None:
        assert held(net) == STATES["new"]
        raise ValueError(name)

    with online_reload(net) as session:
        session.on_layer_quantized(hook)
        load(net, NEW)
    assert held(net) == STATES["new"]
    found = [w for w in session.report().warnings if "on_layer_quantized" in w]
    assert len(found) == 4
    assert "down: the reload is finished" in caplog.text


# Buffers and Parameters that are no plain memory ----------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_sparse_and_expanded_tensors_are_reported_and_restored(fails: bool) -> None:
    net = loaded(OLD)
    sparse, wide = torch.eye(4).to_sparse(), torch.zeros(1).expand(5)
    net.register_buffer("sparse", sparse.clone())
    net.register_buffer("stretched", wide)
    net.bias = nn.Parameter(torch.ones(1).expand(6))
    with suppress(ZeroDivisionError), online_reload(net) as session:
        load(net, NEW)
        net.sparse.copy_(2 * sparse)  # type: ignore[operator]
        if fails:
            raise ZeroDivisionError
    assert torch.equal(net.sparse.to_dense(), torch.eye(4) * (1 if fails else 2))  # type: ignore[operator]
    assert session.report().state == ("aborted" if fails else "finished")
    del net.sparse, net.stretched, net.bias
    assert held(net) == STATES["old" if fails else "new"]


# Errors that a loader swallows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
def test_an_error_that_a_loader_swallows_is_raised_at_the_end_unless_it_writes_again(again: bool) -> None:
    net = Net()

    def session() -> None:
        with online_quant(TARGETS, net):
            load(net, NEW)
            with suppress(WeightShapeError):
                net.up.weight.data[2:4].copy_(torch.zeros(7))
            if again:
                net.up.weight.data[2:4].copy_(NEW["up.weight"][2:4])

    if again:
        session()
        assert held(net) == STATES["new"]
    else:
        with pytest.raises(WeightShapeError, match=r"up\.weight: a source of shape \[7\] does not fit"):
            session()


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("reloads", [False, True])
def test_a_write_that_was_cut_short_and_swallowed_is_no_write(name: str, reloads: bool) -> None:
    """A loader with a timeout goes on with the next tensor as if nothing had happened. At every line of the write."""
    ours = name.replace("head", "up")

    def stopped_at(line: str, n: int) -> Counter[str]:
        net = loaded(OLD) if reloads else Net()
        session = online_reload(net) if reloads else online_quant(TARGETS, net)
        load(net, NEW)
        weight = net.get_parameter(name).data
        with suppress(TimeoutError), AtLine(line, n, TimeoutError) as tracer:
            weight.copy_(NEXT[ours])
        try:
            session.finish()
        except QTensorError as error:
            refused.append(str(error))
            assert not reloads or held(net) == STATES["old"]
        else:  # It was stopped before the write began, or when it was through.
            assert held(net)[ours] in (STATES["new"][ours], STATES["next"][ours])
        return tracer.seen

    refused: list[str] = []
    for line, times in stopped_at("", -1).items():
        for n in {1, times}:
            stopped_at(line, n)
    assert any("a write to it was cut short by TimeoutError" in message for message in refused)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.w13 = nn.Parameter(torch.zeros(3, 8, 16))


@pytest.mark.parametrize(("rows", "nth"), [(4, 2), (8, 1)], ids=["one by one", "together"])
def test_a_write_that_was_cut_short_is_no_write_even_if_a_second_interrupt_cuts_short_its_end(
    rows: int, nth: int
) -> None:
    """Half the rows of three experts, of which one or two were written when the first came: at lines that each of them
    runs, and then at every line that is run because of it. All rows of three experts, in one call, likewise."""
    old, new = (torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    new[:, rows:] = old[:, rows:]
    whole = [quantize(values, fp8_per_channel).qdata.view(torch.uint8) for values in (old, new)]
    refused = 0

    def stopped_at(line: str, later: str) -> ThenAtLine:
        nonlocal refused
        net = Experts()
        session = online_quant({"experts.w13": fp8_per_channel}, net)
        net.experts.w13.data.copy_(old)
        with suppress(TimeoutError), ThenAtLine(line, nth, TimeoutError, later) as tracer:
            net.experts.w13.data[:, :rows].copy_(new[:, :rows])
        try:
            session.finish()
        except QTensorError as error:
            refused += "a write to it was cut short by" in str(error)
        else:
            held = net.experts.w13.qdata.view(torch.uint8)  # type: ignore[union-attr]
            assert any(torch.equal(held, values) for values in whole), (line, later)
        return tracer

    lines = [line for line, times in stopped_at("", "").seen.items() if times >= nth]
    for line in lines[:: 1 if ENDURANCE else 8]:
        for later in stopped_at(line, "").after:
            stopped_at(line, later)
    assert refused > 20


@pytest.mark.parametrize("kind", KINDS if ENDURANCE else ["reload in place, host"])
def test_an_interrupt_at_every_line_that_is_run_because_of_another(kind: str) -> None:
    """The first comes at some lines of a write, of the end, and of the commit; at many more in `make endurance`."""
    if ENDURANCE:
        assert isolated(twice, kind, KeyboardInterrupt, 20, 1) == []
    else:
        assert twice(kind, KeyboardInterrupt, 400, 6) == []


# Threads --------------------------------------------------------------------------------------------------------------


def test_a_write_of_another_thread_while_the_session_ends_is_an_error_or_taken() -> None:
    for _ in range(20):
        net, problems, done = loaded(OLD), [], threading.Event()

        def writer(net: Net = net, problems: list = problems, done: threading.Event = done) -> None:
            weight = net.down.weight
            written = weight.data
            while not done.is_set():
                try:
                    written.copy_(NEXT["down.weight"])
                except QTensorError as error:
                    problems.append(str(error))
                    return

        with online_reload(net):
            load(net, NEW)
            thread = threading.Thread(target=writer)
            thread.start()
        done.set()
        thread.join()
        assert held(net)["down.weight"] in (STATES["new"]["down.weight"], STATES["next"]["down.weight"])
        assert all("ends" in p or "finished" in p for p in problems), problems


def test_a_block_that_is_left_in_another_thread_than_it_was_entered_in() -> None:
    net = Net()
    block = online_quant(fp8_per_channel)
    with block:
        pass
    entered = online_quant(fp8_per_channel)
    entered.__enter__()

    def leave() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entered.__exit__(None, None, None)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert hooks_left() == []
    with online_quant(TARGETS, net):
        load(net, NEW)
    assert held(net) == STATES["new"]
    with online_quant(fp8_per_channel) as session:
        made = nn.Linear(4, 4, bias=False)
        made.weight.data.copy_(torch.ones(4, 4))
    assert session.report().layers


# Sessions that nobody ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", ["load", "reload"])
def test_a_session_that_is_dropped_is_aborted_with_a_warning(opened: str) -> None:
    net = loaded(OLD) if opened == "reload" else Net()
    session = online_reload(net) if opened == "reload" else online_quant(TARGETS, net)
    load(net, NEW)
    with pytest.warns(ResourceWarning, match="dropped without finish"):
        del session
    assert hooks_left() == []
    if opened == "reload":
        assert held(net) == STATES["old"]
        with online_reload(net):
            load(net, NEW)
    else:
        with online_quant(TARGETS, net):
            load(net, NEW)
    assert held(net) == STATES["new"]


def test_parameters_exchanged_during_a_reload_are_taken_as_new_values() -> None:
    net = loaded(OLD)
    before = {name: id(param) for name, param in net.named_parameters()}
    with online_reload(net, assert_identity=True):
        load(net, OLD)
        for name in ("down.weight", "up.bias"):
            torch.utils.swap_tensors(net.get_parameter(name), nn.Parameter(NEW[name].clone(), requires_grad=False))
    assert {name: id(param) for name, param in net.named_parameters()} == before
    found = held(net)
    changed = ("down.weight", "up.bias")
    assert found == {name: STATES["new" if name in changed else "old"][name] for name in found}


# Gradients ------------------------------------------------------------------------------------------------------------


def with_no_grad(action: Callable[[], object]) -> None:
    with torch.no_grad():
        action()


def leaks(run: Callable[[Callable[[], object]], object], tries: int) -> int:
    """How often a timer's exception left gradients off."""
    found = 0
    for i in range(tries):
        with suppress(KeyboardInterrupt), timer(2e-5 + 1e-7 * (i % 997), KeyboardInterrupt):
            for _ in range(LOOPS):
                run(torch.is_grad_enabled)
        found += not torch.is_grad_enabled()
        torch.set_grad_enabled(True)
    return found


def test_no_interrupt_leaves_gradients_off() -> None:
    """As it does to PyTorch's own guard, which shows that this test would notice."""
    assert leaks(without_grad, 500) == 0
    assert leaks(with_no_grad, 500) > 0


def test_without_grad_is_off_inside_and_as_before_outside() -> None:
    assert without_grad(torch.is_grad_enabled) is False
    assert torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError):
        without_grad(lambda: 1 / 0)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        without_grad(torch.is_grad_enabled)
        assert not torch.is_grad_enabled()
