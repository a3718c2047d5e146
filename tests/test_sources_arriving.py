"""Weights that arrive quantized: whatever order, slices and repetitions their parts come in, the result is that of the
matrix decoded as a whole and quantized, byte for byte; or, where it is moved, the very numbers that the source has."""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import inf
from threading import Thread

import pytest
import torch
from torch import nn

from qtensor import (
    CheckpointError,
    LossySourceError,
    QTensorError,
    online_quant,
    online_reload,
)
from qtensor.schemes.scheme import SCHEMES
from support.arriving import NAMES, assert_arrived, expected_outcome, layer, named, outcome
from support.helpers import assert_oracle, same_bytes
from support.sources import FORMS, Tensors, source_of, whole


@pytest.mark.parametrize(("form", "scheme"), list(product(FORMS, NAMES)), ids=str)
def test_every_source_becomes_every_scheme(form: str, scheme: str) -> None:
    rows, cols = 224, 288
    parts = FORMS[form].parts(rows, cols)
    with online_quant(scheme) as session:
        model = nn.Sequential(layer(rows, cols))
        model.load_state_dict({f"0.{name}": tensor for name, tensor in named(parts).items()})
    became, report = expected_outcome(form, scheme), session.report().layers[0]
    assert report.source == f"{source_of(parts, shape=(rows, cols))}: {became}"
    assert (report.sqnr == inf) == (became == "lossless")
    assert_arrived(model[0].weight, parts, became)
    assert model[0].weight.scheme == SCHEMES[scheme]


@pytest.mark.parametrize(("form", "scheme"), list(product(FORMS, NAMES)), ids=str)
def test_a_lossy_pair_is_refused_where_loss_is(form: str, scheme: str) -> None:
    model = nn.Sequential(layer(224, 288))
    state = {f"0.{name}": tensor for name, tensor in named(FORMS[form].parts(224, 288)).items()}
    session = online_quant(scheme, model, strict_source="lossless")
    if expected_outcome(form, scheme) == "lossless":
        with session:
            model.load_state_dict(state)
    else:
        with pytest.raises(LossySourceError, match=r"^0\.weight: .* is not the same numbers in"), session:
            model.load_state_dict(state)


@pytest.mark.parametrize("order", ["values first", "scales first"])
def test_a_loader_that_assigns_parts_one_by_one(order: str) -> None:
    parts = FORMS["fp8 blocks"].parts(300, 256)
    with online_quant("fp8", source={}):
        model = layer(300, 256)
        for _ in range(2 if order == "values first" else 1):
            if order == "values first":
                model.weight.data[:130].copy_(parts["*"][:130])
                model.weight.data[130:].copy_(parts["*"][130:])
            model.weight_scale_inv = nn.Parameter(parts["*_scale_inv"])
            if order == "scales first":
                model.weight = nn.Parameter(parts["*"], requires_grad=False)
    assert sorted(model._parameters) == ["bias", "weight"]
    assert_arrived(model.weight, parts)


@pytest.mark.parametrize("told", [False, True])
def test_zero_points_that_come_after_another_weight_have_to_be_foretold(told: bool) -> None:
    """Until then a matrix is held; all of them to the end of a load would be a second model."""
    form = FORMS["int4 groups, zero points"]
    parts = form.parts(64, 256)
    refused = pytest.raises(CheckpointError, match=r"zero_point, of which .* came too late: hand it over with")
    with contextlib.nullcontext() if told else refused, online_quant("fp8", source=form.config if told else {}):
        model = nn.Sequential(layer(64, 256), layer(8, 8))
        for part in ["*_scale", "*_shape", "*_packed", "other", "*_zero_point"]:
            if part == "other":
                model[1].weight.data.copy_(torch.ones(8, 8))
            else:
                setattr(model[0], part.replace("*", "weight"), nn.Parameter(parts[part], requires_grad=False))
    if told:
        wanted = source_of(parts, dict(form.config))
        needed = {name: parts[name] for name, spec in wanted.parts((64, 256)).items() if spec.needed}
        assert_oracle(model[0].weight, wanted.decode(needed, (64, 256), torch.bfloat16), SCHEMES["fp8"])


def test_threads_that_take_turns_with_weights_do_not_wait_for_each_other() -> None:
    """Whoever goes on to another weight lets go of the one before, which another thread may be writing."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    each = [FORMS["fp8 channel"].parts(8, 8, seed) for seed in range(2)]
    with online_quant("fp8", source={}) as session:
        model = nn.Sequential(*(layer(8, 8) for _ in each))
        collectors = [session._work.incoming.of(linear.weight._armed) for linear in model]

        def send(first: int) -> None:
            for turn in range(400):
                i, row = (first + turn) % 2, turn % 7
                collectors[i].write("*", each[i]["*"][row : row + 1], ((row, row + 1), (0, 8)), (8, 8))

        for collector, parts in zip(collectors, each, strict=True):
            collector.write("*_scale", parts["*_scale"])
        threads = [Thread(target=send, args=(first,), daemon=True) for first in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        sys.setswitchinterval(interval)
        assert not any(thread.is_alive() for thread in threads)
        for collector, parts in zip(collectors, each, strict=True):
            collector.write("*", parts["*"])
    for linear, parts in zip(model, each, strict=True):
        assert_arrived(linear.weight, parts, "lossless")


def test_a_loader_that_registers_buffers() -> None:
    parts = FORMS["mxfp4"].parts(300, 256)
    with online_quant("fp8"):
        model = layer(300, 256)
        model.register_buffer("running_mean", torch.ones(3))
        for name, tensor in named(parts).items():
            model.register_buffer(name, tensor)
    assert list(model._buffers) == ["running_mean"]
    assert_arrived(model.weight, parts)


def test_a_state_dict_in_several_files() -> None:
    parts = named(FORMS["fp8 blocks"].parts(300, 256))
    with online_quant("fp8") as session:
        model = layer(300, 256)
        for name in ("weight", "weight_scale_inv"):
            model.load_state_dict({name: parts[name]}, strict=False)
    assert_arrived(model.weight, FORMS["fp8 blocks"].parts(300, 256))
    assert session.report().peak_staged_bytes == 300 * 256


def test_values_meet_their_scales_and_nothing_is_held() -> None:
    """Law 9."""
    parts = FORMS["fp8 blocks"].parts(512, 256)
    with online_quant("fp8", source={}) as session:
        model = layer(512, 256)
        model.weight_scale_inv = nn.Parameter(parts["*_scale_inv"])
        for start in range(0, 512, 128):
            model.weight.data[start : start + 128].copy_(parts["*"][start : start + 128])
    assert session.report().peak_staged_bytes == parts["*_scale_inv"].nbytes


def test_experts_that_are_stored_the_other_way_round() -> None:
    """gpt-oss: `[E, N, K / 32, 16]` on disk is `[E, K, N]` in the model."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(3, 64, 96, dtype=torch.bfloat16))

    each = [FORMS["mxfp4 blocks"].parts(96, 64, seed) for seed in range(3)]
    state = {name.replace("*", "gate_up_proj"): torch.stack([parts[name] for parts in each]) for name in each[0]}
    with online_quant("fp8", targets=["gate_up_proj"]):
        model = Experts()
        model.load_state_dict(state)
    full = torch.stack([whole(parts, torch.bfloat16, (96, 64)).T for parts in each])
    assert_oracle(model.gate_up_proj, full, SCHEMES["fp8"])


def fault(what: str) -> tuple[Tensors, str]:
    parts = named(FORMS["fp8 blocks"].parts(300, 256))
    if what == "no scale":
        del parts["weight_scale_inv"]
        return parts, "weight: the source is torch.float8_e4m3fn, which has no meaning"
    if what == "no values":
        del parts["weight"]
        return parts, r"weight: weight_scale_inv \(float32 \[3, 2\]\) arrived"
    if what == "another shape":
        parts["weight_scale_inv"] = parts["weight_scale_inv"][:2]
        return parts, r"weight: its scales are \[2, 2\]"
    if what == "another matrix":
        parts["weight"], parts["weight_scale_inv"] = parts["weight"][:256], parts["weight_scale_inv"][:2]
        return parts, r"weight: weight is float8_e4m3fn \[256, 256\]; of a weight \[300, 256\]"
    if what == "NaN":
        parts["weight"].view(torch.uint8)[7, 9] = 0x7F
        return parts, r"weight: nan at index \[7, 9\]"
    parts["weight_scale_inv"][1, 1] = float("nan")
    return parts, r"weight: its scale \[1, 1\] is nan"


@pytest.mark.parametrize("scheme", ["fp8", "fp8_per_block"])
@pytest.mark.parametrize(
    "what", ["no scale", "no values", "another shape", "another matrix", "NaN", "a scale that is NaN"]
)
def test_what_means_nothing_is_refused_by_name_and_the_model_loads_again(what: str, scheme: str) -> None:
    state, says = fault(what)
    model = layer(300, 256)
    with pytest.raises(QTensorError, match=rf"^{says}"), online_quant(scheme, model):
        model.load_state_dict(state, strict=False)
    good = FORMS["fp8 blocks"].parts(300, 256)
    with online_quant(scheme, model) as session:
        model.load_state_dict(named(good))
    assert_arrived(model.weight, good, outcome(session))


def test_an_unknown_tensor_beside_a_weight_is_still_unexpected() -> None:
    model = layer(128, 64)
    with pytest.raises(RuntimeError, match="weight_zero_something"), online_quant("fp8", model):
        model.load_state_dict({"weight": torch.randn(128, 64), "weight_zero_something": torch.ones(1)})


@pytest.mark.parametrize("scheme", ["fp8", "fp8_per_block", "nvfp4"])
@pytest.mark.parametrize("atomic", [True, False])
def test_a_reload_takes_parts_too(scheme: str, atomic: bool) -> None:
    """A trainer that sends fp8 blocks; and one that leaves out a scale changes nothing."""
    old, new = (named(FORMS["fp8 blocks"].parts(300, 256, seed)) for seed in (1, 2))
    with online_quant(scheme):
        model = nn.Sequential(layer(300, 256))
        model.load_state_dict({f"0.{name}": t for name, t in old.items()})
    before, weight = [part.clone() for part in model[0].weight.parts()], model[0].weight
    with pytest.raises(QTensorError, match=r"^0\.weight"), online_reload(model, atomic=atomic):
        model.load_state_dict({"0.weight": new["weight"]}, strict=False)
    assert all(same_bytes(a, b) for a, b in zip(before, model[0].weight.parts(), strict=True))
    with online_reload(model, atomic=atomic) as session:
        model.load_state_dict({f"0.{name}": t for name, t in new.items()})
    assert model[0].weight is weight
    assert_arrived(weight, FORMS["fp8 blocks"].parts(300, 256, 2), outcome(session))


def test_parts_may_come_from_several_threads() -> None:
    each = [FORMS["fp8 blocks"].parts(300, 256, seed) for seed in range(6)]
    with online_quant("fp8") as session:
        model = nn.Sequential(*(layer(300, 256) for _ in each))
        incoming = session._work.incoming
        jobs = [(i, name) for i in range(len(each)) for name in each[i]]
        with ThreadPoolExecutor(4) as pool:

            def send(job: tuple[int, str]) -> None:
                i, name = job
                incoming.of(model[i].weight._armed).write(name, each[i][name])

            list(pool.map(send, jobs))
    for i, parts in enumerate(each):
        assert_arrived(model[i].weight, parts)


def test_pytorchs_own_function_is_back_when_the_session_is_over() -> None:
    before = nn.Module._load_from_state_dict
    for _ in range(2):
        with online_quant("fp8"):
            model = layer(8, 8)
            model.load_state_dict({"weight": torch.ones(8, 8)})
            assert nn.Module._load_from_state_dict is not before
        assert nn.Module._load_from_state_dict is before


def test_the_loss_of_a_second_quantization_is_measured_against_the_source() -> None:
    parts = FORMS["fp8 blocks"].parts(256, 256)
    with online_quant("mxfp4", measure_sqnr=True) as session:
        model = layer(256, 256)
        model.load_state_dict(named(parts))
    values, error = whole(parts, torch.bfloat16, (256, 256)).double(), model.weight.dequantize().double()
    expected = 10 * torch.log10(values.square().sum() / (values - error).square().sum())
    assert session.report().layers[0].sqnr == pytest.approx(float(expected), abs=0.1)
