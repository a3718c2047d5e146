"""Reload: new weights into a live quantized model, all or nothing, at the same addresses.

It is one file because its tests share the ways to reload (`MODES`) and the models that they are tried on.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_properties import slow_data
from torch import nn

from qtensor import (
    IncompleteLoadError,
    NonFiniteWeightError,
    QTensor,
    QTensorError,
    WeightShapeError,
    fp8_per_channel,
    fp8_per_tensor,
    online_quant,
    online_reload,
    quantize,
    weight_checksums,
)
from qtensor.lazy import target
from qtensor.lazy.quant_store import QuantStore
from qtensor.lazy.target import InPlace
from qtensor.tensor.rooms import room_for
from support.growth import growth
from support.helpers import assert_no_hooks, assert_oracle, copy_unit, holder, same_bytes
from support.loading import Experts, TinyNet, weights_of
from support.programs import SCHEMES, WRITERS, Case, cases, partitions, slices, write
from support.reloaded import MODES

ATOMIC = ["shadow", "undo"]
modes = pytest.mark.parametrize("mode", MODES)
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def quantized(make: Callable[[], nn.Module] = TinyNet, scheme: Any = fp8_per_channel, seed: int = 0) -> nn.Module:
    model = make().bfloat16()
    with online_quant(scheme, model):
        model.load_state_dict(weights_of(make, seed=seed))
    return model


def everything(model: nn.Module) -> dict[str, Any]:
    """All a reload must not touch by accident: objects, addresses, attributes, and every byte."""
    found: dict[str, Any] = {"checksums": weight_checksums(model)}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        parts = [tensor.qdata, tensor.scale] if isinstance(tensor, QTensor) else [tensor]
        own = {k: v for k, v in tensor.__dict__.items() if k not in ("qdata", "scale", "scheme")}
        found[name] = (id(tensor), type(tensor), [p.data_ptr() for p in parts], own)
    found["buffers"] = weight_checksums(dict(model.named_buffers()))
    return found


def assert_reloaded(model: nn.Module, weights: dict[str, torch.Tensor], scheme: Any) -> None:
    for name, param in model.named_parameters():
        if isinstance(param, QTensor):
            assert_oracle(param, weights[name], scheme)
        else:
            assert torch.equal(param, weights[name]), name


@modes
@schemes
def test_a_full_reload_equals_a_fresh_load_at_the_same_addresses(mode: str, scheme: Any) -> None:
    """Scenario 19."""
    model = quantized(scheme=scheme)
    before, new = everything(model), weights_of(TinyNet, seed=1)
    with online_reload(model, assert_identity=True, on_missing="error", **MODES[mode]) as session:
        model.load_state_dict(new)
    after = everything(model)
    assert_reloaded(model, new, scheme)
    assert {k: v for k, v in before.items() if k not in ("checksums", "buffers")} == {
        k: v for k, v in after.items() if k not in ("checksums", "buffers")
    }
    assert session.report().untouched == []
    assert session.report().state == "finished"


@modes
@slow_data
@given(st.data(), cases())
def test_any_loader_program_reloads_to_the_oracle(mode: str, data: st.DataObject, case: Case) -> None:
    model, name = holder(case.weight)
    with online_quant(case.scheme, model):
        getattr(model, name).data.copy_(torch.randn(case.weight.shape))
    program = data.draw(st.permutations(data.draw(partitions(tuple(case.weight.shape)))))
    with online_reload(model, on_missing="error", assert_identity=True, **MODES[mode]) as session:
        for box in program:
            write(getattr(model, name), box, case.weight, case.source_dtype, data.draw(st.sampled_from(WRITERS)))
    assert_oracle(getattr(model, name), case.weight, case.scheme)
    assert session._work._second_copies == session._work._memory.staged == 0


@modes
@slow_data
@given(st.data(), cases())
def test_a_partial_reload_requantizes_only_the_units_it_touches(mode: str, data: st.DataObject, case: Case) -> None:
    """[vLLM: a partial reload changed 98.7 % of the live bytes of k and v.] Units nobody wrote to keep their bytes;
    the rest of a unit written in part is quantized again from its dequantized values, and that is said."""
    model, name = holder(case.weight)
    with online_quant(case.scheme, model):
        getattr(model, name).data.copy_(torch.randn(case.weight.shape))
    param = getattr(model, name)
    expected, merged = param.clone(), param.dequantize().clone()
    boxes = data.draw(st.lists(st.sampled_from(data.draw(partitions(tuple(case.weight.shape)))), unique=True))
    touched = torch.zeros(case.weight.shape, dtype=torch.bool)
    for box in boxes:
        merged[slices(box)] = case.weight[slices(box)]
        touched[slices(box)] = True
    cut = False
    for e, first, last in units(case):
        rows = (e, slice(first, last)) if e is not None else (slice(first, last),)
        if touched[rows].any():
            cut |= not touched[rows].all()
            copy_unit(expected, quantize(merged, case.scheme), e, first, last)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with online_reload(model, **MODES[mode]):
            for box in boxes:
                write(param, box, case.weight, case.source_dtype, WRITERS[0])
    assert any("only a part" in str(w.message) for w in said) == cut
    assert all(map(same_bytes, param.parts(), expected.parts()))


def units(case: Case) -> Iterator[tuple[int | None, int, int]]:
    """The units of a weight: expert (None for a matrix), first row, last row."""
    *lead, rows, _ = case.weight.shape
    step = case.scheme.format.unit_rows(rows)  # type: ignore[attr-defined]
    for e in range(lead[0]) if lead else [None]:
        for first in range(0, rows, step):
            yield e, first, min(first + step, rows)


FAULTS: dict[str, Callable[[nn.Module, dict[str, torch.Tensor]], None]] = {}


def fault(run: Callable[[nn.Module, dict[str, torch.Tensor]], None]) -> Callable:
    FAULTS[run.__name__] = run
    return run


@fault
def loader_raises(model: nn.Module, new: dict[str, torch.Tensor]) -> None:
    model.load_state_dict({k: v for k, v in new.items() if k != "down.bias"}, strict=False)
    raise OSError("the network is gone")


@fault
def interrupted(model: nn.Module, new: dict[str, torch.Tensor]) -> None:
    model.up.weight.data[:77].copy_(new["up.weight"][:77])
    raise KeyboardInterrupt


@fault
def wrong_shape(model: nn.Module, new: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(new | {"down.weight": new["down.weight"][:-1]})


@fault
def not_a_number(model: nn.Module, new: dict[str, torch.Tensor]) -> None:
    bad = new["up.weight"].clone()
    bad[-1, -1] = float("nan")
    model.load_state_dict(new | {"up.weight": bad})


@fault
def replaced_by_another_shape(model: nn.Module, new: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(new)
    model.up._parameters["weight"] = nn.Parameter(torch.zeros(3, 3))


@fault
def attributes_and_buffers_changed(model: nn.Module, new: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(new)
    model.up.weight.marked = True  # type: ignore[assignment]
    model.steps = torch.tensor(9.0)
    raise RuntimeError


@fault
def swallowed(model: nn.Module, new: dict[str, torch.Tensor]) -> None:
    """A loader that hides the error does not make it disappear."""
    model.load_state_dict({k: v for k, v in new.items() if k != "up.weight"}, strict=False)
    bad = new["up.weight"].clone()
    bad[3, 3] = float("inf")
    with contextlib.suppress(ValueError):
        model.up.weight.data.copy_(bad)


@pytest.mark.parametrize("mode", ATOMIC)
@pytest.mark.parametrize("name", FAULTS)
@schemes
def test_any_exception_leaves_everything_as_it_was_and_the_next_reload_works(mode: str, name: str, scheme: Any) -> None:
    """Law 10, scenario 21. [vLLM: one mis-shaped tensor leaves the engine on meta tensors, and the next good reload
    fails with the old error.]"""
    model = quantized(scheme=scheme)
    ids = torch.arange(8)
    before, out, new = everything(model), model(ids), weights_of(TinyNet, seed=1)
    with pytest.raises((Exception, KeyboardInterrupt)), online_reload(model, **MODES[mode]) as session:
        FAULTS[name](model, new)
    assert everything(model) == before
    assert session.report().state == "aborted"
    assert torch.equal(model(ids), out)
    with online_reload(model, on_missing="error", **MODES[mode]):
        model.load_state_dict(new)
    assert_reloaded(model, new, scheme)


@pytest.mark.parametrize("mode", ATOMIC)
def test_missing_weights_abort_the_reload_and_are_named(mode: str) -> None:
    """Scenario 18."""
    model = quantized()
    before, new = everything(model), weights_of(TinyNet, seed=1)
    del new["down.weight"], new["norm.weight"]
    session = online_reload(model, on_missing="error", **MODES[mode])
    model.load_state_dict(new, strict=False)
    with pytest.raises(IncompleteLoadError, match=r"down\.weight: 48 of 48 rows never written") as caught:
        session.finish()
    assert set(caught.value.missing) == {"down.weight", "norm.weight"}
    assert everything(model) == before


def test_without_atomic_every_weight_is_all_old_or_all_new() -> None:
    model = quantized()
    before, new = weight_checksums(model), weights_of(TinyNet, seed=1)
    with pytest.raises(KeyError), online_reload(model, atomic=False):
        model.norm.weight.data.copy_(new["norm.weight"])
        model.down.weight.data.copy_(new["down.weight"])
        model.embed.weight.data[:5].copy_(new["embed.weight"][:5])
        model.up.weight.data[:77].copy_(new["up.weight"][:77])
        raise KeyError
    after = weight_checksums(model)
    assert {k for k in after if after[k] != before[k]} == {"norm.weight", "down.weight"}
    assert_oracle(model.down.weight, new["down.weight"], fp8_per_channel)


def test_without_atomic_an_expert_is_replaced_when_it_has_arrived() -> None:
    """A stack of experts never has more than the experts that are being written in memory twice."""
    model = quantized(Experts)
    new = weights_of(Experts, seed=1)["down_proj"]
    old = model.down_proj.dequantize()
    expert = model.down_proj.qdata[0].nbytes + model.down_proj.scale[0].nbytes
    with pytest.raises(KeyError), online_reload(model, atomic=False) as session:
        for e in (2, 0):
            model.down_proj.data[e].copy_(new[e])
        model.down_proj.data[1, :10].copy_(new[1, :10])
        raise KeyError
    expected = torch.stack([new[0], old[1], new[2]])
    assert torch.equal(model.down_proj.dequantize()[1], old[1])
    assert torch.equal(model.down_proj.dequantize()[0], quantize(expected, fp8_per_channel).dequantize()[0])
    assert session.report().peak_second_copy_bytes == expert


@pytest.mark.parametrize("stacked", [False, True])
def test_without_atomic_a_second_copy_goes_when_its_weight_is_replaced(
    stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the end of the session, when those of all weights would stand beside each other."""
    copies: list[weakref.ref[torch.Tensor]] = []

    def room(*args: Any, **options: Any) -> torch.Tensor:
        made = room_for(*args, **options)
        copies.append(weakref.ref(made))
        return made

    monkeypatch.setattr(target, "room_for", room)
    shape = (3, 8, 16) if stacked else (8, 16)
    model = nn.Module()
    model.weight = nn.Parameter(quantize(torch.randn(shape).bfloat16(), "fp8"), requires_grad=False)
    new = torch.randn(shape).bfloat16()
    with online_reload(model, atomic=False, progress=False):
        for e, matrix in enumerate(new if stacked else [new]):
            for start in (0, 4):
                own = model.weight.data[e] if stacked else model.weight.data
                own[start : start + 4].copy_(matrix[start : start + 4])
        assert copies
        assert not any(made() is not None for made in copies)
    assert same_bytes(model.weight, quantize(new, "fp8"))


def test_the_model_computes_with_the_old_weights_until_the_commit() -> None:
    model = quantized()
    ids, new = torch.arange(8), weights_of(TinyNet, seed=1)
    out = model(ids)
    with online_reload(model):
        for name, tensor in new.items():
            model.load_state_dict({name: tensor}, strict=False)
            assert torch.equal(model(ids), out), name
    assert not torch.equal(model(ids), out)
    assert torch.equal(model(ids), quantized(seed=1)(ids))


def test_a_loader_reads_back_what_it_wrote() -> None:
    model, new = quantized(), weights_of(TinyNet, seed=1)
    with online_reload(model) as session:
        view = model.norm.weight.data
        view.copy_(new["norm.weight"])
        assert torch.equal(view.clone(), new["norm.weight"])
        assert torch.equal(model.up.weight.data[3:5].clone(), model.up.weight.dequantize()[3:5])
        assert session.report().lossy_reads == 1
        session.abort()


@modes
def test_chunks_in_any_order_from_any_thread(mode: str) -> None:
    """Scenario 20: three chunks that each cover parts of several layers; a layer in none of them is unchanged."""
    model, new = quantized(), weights_of(TinyNet, seed=1)
    kept = weight_checksums(model)["lm_head.weight"]
    session = online_reload(model, **MODES[mode])
    with pytest.raises(QTensorError, match="another session that is still open"):
        online_reload(model)

    def chunk(part: int) -> None:
        for name in ("up.weight", "down.weight", "up.bias", "down.bias"):
            rows = new[name].shape[0]
            where = slice(rows * part // 3, rows * (part + 1) // 3)
            getattr(model, name.split(".")[0])._parameters[name.split(".")[1]].data[where].copy_(new[name][where])

    threads = [threading.Thread(target=chunk, args=(part,)) for part in (2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = session.finish()
    for name in ("up", "down"):
        assert_oracle(getattr(model, name).weight, new[f"{name}.weight"], fp8_per_channel)
        assert torch.equal(getattr(model, name).bias, new[f"{name}.bias"])
    assert weight_checksums(model)["lm_head.weight"] == kept
    assert {"lm_head.weight", "embed.weight", "norm.weight", "norm.bias"} == set(report.untouched)
    with pytest.raises(QTensorError, match="finished"):
        session.finish()


def test_ties_and_aliases_survive() -> None:
    model = TinyNet().bfloat16()
    model.other = model.up
    with online_quant(fp8_per_channel, model):
        model.load_state_dict(weights_of(TinyNet), strict=False)
    captured = dict(model.named_parameters())
    model.register_buffer("view", model.norm.weight.detach()[:4])
    new = weights_of(TinyNet, seed=1)
    with online_reload(model, assert_identity=True):
        for name, param in captured.items():
            param.data.copy_(new[name])
    assert model.other.weight is model.up.weight is captured["up.weight"]
    assert torch.equal(model.view, new["norm.weight"][:4])
    assert_reloaded(model, new, fp8_per_channel)


def test_assigned_parameters_become_values_of_the_old_ones() -> None:
    model, new = quantized(), weights_of(TinyNet, seed=1)
    weight, bias = model.up.weight, model.up.bias
    with online_reload(model, assert_identity=True):
        model.up.weight = nn.Parameter(new["up.weight"])
        model.up._parameters["bias"] = nn.Parameter(new["up.bias"])  # as accelerate does
        model.load_state_dict({"down.weight": new["down.weight"]}, strict=False, assign=True)
    assert model.up.weight is weight
    assert model.up.bias is bias
    assert torch.equal(bias, new["up.bias"])
    assert_oracle(weight, new["up.weight"], fp8_per_channel)
    assert_oracle(model.down.weight, new["down.weight"], fp8_per_channel)


def test_a_weight_that_cannot_be_watched_is_restored_too() -> None:
    """Where PyTorch refuses to swap a Parameter (C++ holds a weak reference), a loader writes to it directly."""
    model, new = quantized(), weights_of(TinyNet, seed=1)
    held = torch._C._WeakTensorRef(model.norm.weight)
    before = weight_checksums(model)
    with pytest.raises(KeyError), online_reload(model):
        model.load_state_dict(new)
        raise KeyError
    assert weight_checksums(model) == before
    with online_reload(model):
        model.load_state_dict(new)
    assert not held.expired()
    assert_reloaded(model, new, fp8_per_channel)


def test_layer_hooks_run_for_the_layers_that_changed_and_see_new_weights() -> None:
    model, new = quantized(), weights_of(TinyNet, seed=1)
    seen: dict[str, bool] = {}
    with online_reload(model) as session:
        session.on_layer_quantized(
            lambda name, m: seen.update({name: same_bytes(m.weight.qdata, quantize(new["up.weight"], "fp8").qdata)})
        )
        model.up.weight.data.copy_(new["up.weight"])
        assert seen == {}
    assert seen == {"up": True}


def test_models_from_a_saved_file_or_quantized_offline_reload_too(tmp_path: Any) -> None:
    model, new = quantized(), weights_of(TinyNet, seed=1)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    other = TinyNet().bfloat16()
    other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True), assign=True)
    offline = TinyNet().bfloat16()
    for layer in (offline.up, offline.down):
        layer.weight = nn.Parameter(quantize(layer.weight, fp8_per_channel), requires_grad=False)
    for reloaded in (other, offline):
        with online_reload(reloaded, on_missing="error"):
            reloaded.load_state_dict(new)
        assert_reloaded(reloaded, new, fp8_per_channel)


def test_what_cannot_be_reloaded_is_refused_before_anything_changes() -> None:
    with pytest.raises(QTensorError, match="no weight of this model is quantized"):
        online_reload(nn.Linear(4, 4))
    model = quantized()
    with pytest.raises(ValueError, match="on_missing is one of 'error', 'zero', 'keep', not 'init'"):
        online_reload(model, on_missing="init")
    with pytest.raises(ValueError, match="shadow is one of 'device', 'host', not 'disk'"):
        online_reload(model, shadow="disk")  # type: ignore[arg-type]
    model.up.weight = nn.Parameter(model.up.weight.t(), requires_grad=False)
    with pytest.raises(QTensorError, match=r"up\.weight is a view"):
        online_reload(model)
    assert_no_hooks()


def test_an_interrupt_during_the_commit_is_raised_when_everything_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    model, new = quantized(), weights_of(TinyNet, seed=1)
    commit, calls = QuantStore.commit, []

    def interrupted_commit(self: QuantStore) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt
        commit(self)

    monkeypatch.setattr(QuantStore, "commit", interrupted_commit)
    with pytest.raises(KeyboardInterrupt), online_reload(model):
        model.load_state_dict(new)
    assert_reloaded(model, new, fp8_per_channel)


def test_an_interrupt_during_the_rollback_is_raised_when_everything_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    model, new = quantized(), weights_of(TinyNet, seed=1)
    before, rollback, calls = everything(model), InPlace.rollback, []

    def interrupted_rollback(self: InPlace) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rollback(self)

    monkeypatch.setattr(InPlace, "rollback", interrupted_rollback)
    with pytest.raises(KeyboardInterrupt), online_reload(model, shadow="host"):
        model.load_state_dict(new)
        raise ValueError
    assert len(calls) > 1
    assert everything(model) == before


@modes
@pytest.mark.parametrize("fails", [False, True])
@slow_data
@given(st.data())
def test_plain_parameters_of_any_memory_layout_are_reloaded_in_place(
    mode: str, fails: bool, data: st.DataObject
) -> None:
    """Dimensions in any order in memory, with gaps between elements, from an offset on."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    order = data.draw(st.permutations(range(len(shape))))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
    strides, step = [0] * len(shape), data.draw(st.integers(1, 2))
    for d in order:
        strides[d], step = step, step * (shape[d] + data.draw(st.integers(0, 2)))
    offset = data.draw(st.integers(0, 3))
    memory = torch.arange(offset + step + 8).to(dtype)
    model, new = quantized(), -torch.arange(1, prod(shape) + 1).view(shape).to(dtype)
    model.odd = nn.Parameter(memory.as_strided(shape, strides, offset))
    before = memory.clone()
    with contextlib.suppress(ZeroDivisionError), online_reload(model, **MODES[mode]):  # type: ignore[arg-type]
        model.odd.data[:1].copy_(new[:1])
        model.odd.data[1:].copy_(new[1:])
        if fails:
            raise ZeroDivisionError
    expected = before.clone()
    if mode == "per_weight" or not fails:
        expected.as_strided(shape, strides, offset).copy_(new)
    assert torch.equal(memory, expected)
    assert model.odd.stride() == tuple(strides)


def test_assert_identity_names_what_is_not_the_same() -> None:
    model, new = quantized(), weights_of(TinyNet, seed=1)
    before = everything(model)
    with pytest.raises(QTensorError, match=r"assert_identity: up\.weight has other attributes now"):  # noqa: SIM117
        with online_reload(model, assert_identity=True):
            model.load_state_dict(new)
            model.up.weight.marked = True  # type: ignore[assignment]
    assert everything(model) == before


@modes
def test_whoever_holds_the_addresses_computes_with_the_new_weights(mode: str) -> None:
    """What a captured CUDA graph relies on, without a GPU: raw memory taken before the reload holds the new values."""
    model, new = quantized(), weights_of(TinyNet, seed=1)
    held = {}
    for name, param in model.named_parameters():
        for i, part in enumerate(param.parts() if isinstance(param, QTensor) else [param]):
            held[name, i] = (ctypes.c_uint8 * part.nbytes).from_address(part.data_ptr())
    with online_reload(model, on_missing="error", **MODES[mode]):
        model.load_state_dict(new)
    fresh = dict(quantized(seed=1).named_parameters())
    for (name, i), memory in held.items():
        param = fresh[name]
        part = (param.parts() if isinstance(param, QTensor) else [param.detach()])[i]
        assert bytes(memory) == part.contiguous().view(torch.uint8).numpy().tobytes(), name


def test_a_finished_weight_that_meets_an_invalid_rewrite_is_unwritten_again() -> None:
    """A source found to be invalid half-way through a weight that was complete must not leave a mixture behind."""
    full = torch.randn(40, 32).bfloat16()
    bad = full * 2
    bad[20, 5] = float("nan")
    layer = nn.Linear(32, 40, bias=False, dtype=torch.bfloat16)
    with pytest.raises(NonFiniteWeightError, match=r"index \[20, 5\]"), online_quant(fp8_per_tensor, layer) as session:
        layer.weight.data.copy_(full)
        with contextlib.suppress(ValueError):
            layer.weight.data.copy_(bad)
        assert session.report().missing


def test_a_mis_shaped_tensor_names_the_weight() -> None:
    model = quantized()
    with pytest.raises(WeightShapeError, match=r"up\.weight.*\[3, 3\]"), online_reload(model):
        model.up.weight = nn.Parameter(torch.zeros(3, 3))


def test_checksums_are_sha256_of_values_and_scales() -> None:
    model = quantized()
    w = model.up.weight
    expected = hashlib.sha256(w.qdata.view(torch.uint8).numpy().tobytes() + w.scale.numpy().tobytes()).hexdigest()
    sums = weight_checksums(model)
    assert sums["up.weight"] == expected
    trainer = {"up.weight": quantize(weights_of(TinyNet)["up.weight"], fp8_per_channel)}
    assert weight_checksums(trainer) == {"up.weight": expected}
    assert sums.keys() == dict(model.named_parameters()).keys()


@modes
def test_two_hundred_reloads_leave_nothing_behind(mode: str) -> None:
    """Addresses, objects, live tensors and anonymous memory after 200 reloads are those after the first few."""
    model = quantized()
    versions = [weights_of(TinyNet, seed=s) for s in range(3)]
    addresses = [p.qdata.data_ptr() for p in model.parameters() if isinstance(p, QTensor)]

    def reload(i: int) -> None:
        with online_reload(model, on_missing="error", **MODES[mode]):
            model.load_state_dict(versions[i % 3])

    tensors, resident = growth(reload, 200)
    assert tensors <= 0
    assert resident < 256 << 10
    assert addresses == [p.qdata.data_ptr() for p in model.parameters() if isinstance(p, QTensor)]
    assert_reloaded(model, versions[199 % 3], fp8_per_channel)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@modes
def test_a_cuda_graph_captured_before_a_reload_computes_with_the_new_weights(mode: str) -> None:
    model = quantized().cuda()
    ids = torch.arange(8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        model(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = model(ids)
    new = weights_of(TinyNet, seed=1)
    with online_reload(model, on_missing="error", assert_identity=True, **MODES[mode]):
        model.load_state_dict(new)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, model(ids))
