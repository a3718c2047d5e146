"""LazyWeight as a tensor: what it answers, what it refuses, how it copies, and forward passes before the load ends."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qtensor import (
    IncompleteLoadError,
    LazyWeight,
    QTensor,
    QTensorError,
    WeightDtypeError,
    WeightShapeError,
    fp8_per_channel,
    fp8_per_tensor,
    online_quant,
    quantize,
)
from qtensor.lazy.lazy_tensor import OPS
from support.helpers import assert_oracle

FULL = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).bfloat16()


def linear() -> nn.Linear:
    return nn.Linear(8, 12, bias=False, dtype=torch.bfloat16)


def test_shows_its_name_target_and_coverage() -> None:
    with online_quant(fp8_per_channel):
        model = nn.Sequential(linear())
        assert isinstance(model[0].weight, nn.Parameter)
        model[0].weight.data[:3].copy_(FULL[:3])
        model[0].weight.data[3:6, :4].copy_(FULL[3:6, :4])
        assert repr(model[0].weight) == (
            "LazyWeight(0.weight: [12, 8], torch.bfloat16, to fp8_per_channel, 36 of 96 elements written)"
        )
        assert "view [2, 8] of [12, 8]" in repr(model[0].weight[:2])
        assert "Linear" in repr(model)
        model[0].weight.data.copy_(FULL)


def test_looks_like_the_tensor_it_will_stand_for() -> None:
    with online_quant(fp8_per_channel, on_missing="zero"):
        w = linear().weight
        assert (w.dtype, w.device.type, tuple(w.shape), w.stride()) == (torch.bfloat16, "cpu", (12, 8), (8, 1))
        assert w.numel() == 96
        assert not w.is_meta
        assert type(w.to("meta")) is torch.Tensor
        for like in (torch.empty_like(w), torch.zeros_like(w, dtype=torch.float32), w.new_empty(3)):
            assert type(like) is torch.Tensor


def test_cannot_be_pickled_or_saved_half_loaded() -> None:
    with online_quant(fp8_per_channel, on_missing="zero"):
        model = nn.Sequential(linear())
        for save in (pickle.dumps, lambda m: torch.save(m.state_dict(), io.BytesIO())):
            with pytest.raises(QTensorError, match=r"^0\.weight is still being loaded"):
                save(model)


def test_deepcopy_is_an_independent_weight_in_the_same_state() -> None:
    other = torch.randn(12, 8).bfloat16()
    with online_quant(fp8_per_tensor):
        model = nn.ModuleList([linear()])
        model[0].weight.data[:6].copy_(FULL[:6])
        model.append(copy.deepcopy(model[0]))
        model[0].weight.data[6:].copy_(FULL[6:])
        assert isinstance(model[1].weight, LazyWeight)
        model[1].weight.data[6:].copy_(other[6:])
    assert_oracle(model[0].weight, FULL, fp8_per_tensor)
    assert_oracle(model[1].weight, torch.cat((FULL[:6], other[6:])), fp8_per_tensor)


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda w: w.view(torch.int16), QTensorError),
        (lambda w: w.data.resize_(4, 4), WeightShapeError),
        (lambda w: setattr(w, "data", torch.zeros(3, 3)), WeightShapeError),
        (lambda w: w.data.copy_(torch.ones(12, 8, dtype=torch.int32)), WeightDtypeError),
        (lambda w: w.data.copy_(torch.ones(12, 8).to(torch.float8_e4m3fn)), WeightDtypeError),
        (lambda w: w.data.copy_(torch.empty(12, 8, device="meta")), QTensorError),
        (lambda w: w.data + 1, IncompleteLoadError),
        (lambda w: w.numpy(), IncompleteLoadError),
    ],
)
def test_what_has_no_answer_is_refused_by_name(act: Callable, error: type[Exception]) -> None:
    with online_quant(fp8_per_channel, on_missing="zero"):
        model = nn.Sequential(linear())
        with pytest.raises(error, match=r"^0\.weight"):
            act(model[0].weight)
        model[0].weight.data.copy_(FULL)
    assert_oracle(model[0].weight, FULL, fp8_per_channel)


def test_arithmetic_in_place_reads_and_writes() -> None:
    """A loader that post-processes what it staged: exact, because staged values are high precision."""
    with online_quant(fp8_per_tensor):
        layer = linear()
        with torch.no_grad():
            layer.weight[:6].copy_(FULL[:6])
            layer.weight[:6].mul_(2).add_(1)
            torch.sub(FULL[6:], 1, out=layer.weight[6:])
    assert_oracle(layer.weight, torch.cat((FULL[:6] * 2 + 1, FULL[6:] - 1)), fp8_per_tensor)


def test_initialisers_run_after_construction_change_nothing() -> None:
    with online_quant(fp8_per_channel):
        layer = linear()
        layer.weight.data.copy_(FULL)
        state = layer.weight.qdata.clone()
        for init in (nn.init.eye_, nn.init.trunc_normal_, nn.init.zeros_, nn.init.xavier_normal_):
            init(layer.weight)
        layer.reset_parameters()
        assert torch.equal(layer.weight.qdata.view(torch.uint8), state.view(torch.uint8))
    assert_oracle(layer.weight, FULL, fp8_per_channel)


def test_forward_works_before_the_session_ends() -> None:
    x = torch.randn(3, 8).bfloat16()
    with online_quant(fp8_per_channel) as session:
        model = nn.Sequential(linear(), nn.LayerNorm(12, dtype=torch.bfloat16))
        model.load_state_dict({"0.weight": FULL, "1.weight": torch.ones(12), "1.bias": torch.zeros(12)})
        assert isinstance(model[0].weight, QTensor)
        inside = model(x)
        assert session.report().lossy_reads == 0
    assert torch.equal(inside, model(x))
    assert torch.equal(inside, model[1](F.linear(x, quantize(FULL, fp8_per_channel))))


def test_operations_are_classified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    op = torch.ops.aten.unfold.default
    asked, classify = [], OPS.otherwise
    monkeypatch.delitem(OPS._handlers, op, raising=False)
    monkeypatch.setattr(OPS, "otherwise", lambda op: [asked.append(op), classify(op)][1])
    for _ in range(2):
        with online_quant(fp8_per_channel, on_missing="zero"):
            linear().weight.unfold(0, 2, 1)
    assert asked == [op]
