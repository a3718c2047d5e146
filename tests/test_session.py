"""Sessions: what they select, what they refuse, what they report, and that they leave nothing behind."""

from __future__ import annotations

import gc
import json
import math
import threading
import warnings

import pytest
import torch
from torch import nn

from qtensor import (
    DEFAULT_IGNORE,
    LazyWeight,
    QTensor,
    QTensorError,
    fp8,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    online_quant,
    online_reload,
    quantize,
)
from qtensor.sessions.reload import Reload
from support.helpers import assert_no_hooks, assert_oracle, same_bytes


class Attn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(4, 8, 16))


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.shared_expert_gate = nn.Linear(16, 1, bias=False)
        self.experts = Experts()


class Net(nn.Module):
    """One of everything the default selection has an opinion about."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 16)
        self.position = nn.Parameter(torch.zeros(1, 8, 16))
        self.attn, self.mlp = Attn(), Moe()
        self.conv = nn.Conv1d(4, 4, 3)
        self.input_layernorm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 32, bias=False)


def quantized(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, QTensor)}


def loaded(scheme: object = fp8, form: str = "construct", **options: object) -> nn.Module:
    torch.manual_seed(0)
    state = Net().state_dict()
    if form == "construct":
        with online_quant(scheme, **options):
            model = Net()
            model.load_state_dict(state)
    else:
        model = Net()
        with online_quant(scheme, model, **options):
            model.load_state_dict(state)
    assert not any(isinstance(p, LazyWeight) for p in model.parameters())
    for name, p in model.named_parameters():
        if not isinstance(p, QTensor):
            assert type(p) is nn.Parameter
            assert torch.equal(p, state[name])
    return model


every_scheme = pytest.mark.parametrize("scheme", [fp8_per_channel, fp8_per_block, fp8_per_tensor], ids=str)
both_forms = pytest.mark.parametrize("form", ["construct", "model"])


@both_forms
def test_default_selects_linears_and_experts_and_nothing_delicate(form: str) -> None:
    assert quantized(loaded(form=form)) == {"attn.q_proj.weight", "attn.o_proj.weight", "mlp.experts.stack"}


@both_forms
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ignore": [*DEFAULT_IGNORE, "attn.q_proj"]}, {"attn.o_proj.weight", "mlp.experts.stack"}),
        ({"ignore": ["attn", "re:mlp.*", "lm_*"]}, set()),
        ({"ignore": ["attn.q_proj.weight", "mlp"]}, {"attn.o_proj.weight", "lm_head.weight"}),
        ({"targets": ["*.o_proj"]}, {"attn.o_proj.weight"}),
        ({"targets": ["lm_head"], "ignore": []}, {"lm_head.weight"}),
        ({"targets": {"attn": "fp8_per_block", r"re:mlp\.experts": fp8_per_tensor}}, None),
    ],
    ids=str,
)
def test_patterns_match_the_names_a_user_sees(form: str, options: dict, expected: set[str] | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = loaded(form=form, **options)
    if expected is None:
        assert model.attn.q_proj.weight.scheme == fp8_per_block
        expected = {"attn.q_proj.weight", "attn.o_proj.weight", "mlp.experts.stack"}
    assert quantized(model) == expected


def test_patterns_that_match_nothing_and_sessions_that_quantize_nothing_are_said() -> None:
    with pytest.warns(UserWarning, match="patterns that matched no weight: attn.k_proj"):
        loaded(ignore=[*DEFAULT_IGNORE, "attn.k_proj"])
    with pytest.warns(UserWarning, match="nothing was quantized"), online_quant(fp8):
        pass


@pytest.mark.parametrize(
    "options",
    [{"ignore": "lm_head"}, {"on_missing": "whatever"}, {"on_nonfinite": "zero"}, {"targets": ["re:("]}],
    ids=str,
)
def test_bad_options_are_refused_before_anything_is_armed(options: dict) -> None:
    with pytest.raises(Exception, match=r"list|on_missing|on_nonfinite|unterminated|missing \)"):
        online_quant(fp8, nn.Linear(4, 4), **options)
    assert_no_hooks()


def test_scheme_may_be_named() -> None:
    assert loaded("fp8_per_block").attn.q_proj.weight.scheme == fp8_per_block


# min_sqnr -------------------------------------------------------------------------------------------------------------


@every_scheme
def test_weights_below_min_sqnr_stay_in_high_precision_and_are_reported(scheme: object) -> None:
    torch.manual_seed(0)
    exact, noisy = torch.randn(64, 160).sign().bfloat16(), torch.randn(64, 160).bfloat16()
    with online_quant(scheme, min_sqnr=40) as session:
        model = nn.Sequential(nn.Linear(160, 64, bias=False), nn.Linear(160, 64, bias=False)).bfloat16()
        held = model[1].weight
        for r in range(0, 64, 16):
            model[0].weight.data[r : r + 16].copy_(exact[r : r + 16])
            model[1].weight.data[:, r : r + 16].copy_(noisy[:, r : r + 16])
        model[1].weight.data[:, 64:].copy_(noisy[:, 64:])
    report = session.report()
    assert_oracle(model[0].weight, exact, scheme)
    assert type(model[1].weight) is nn.Parameter
    assert model[1].weight is held
    assert torch.equal(held, noisy)
    assert [layer.sqnr for layer in report.layers] == [math.inf]
    assert report.passthrough_bytes == noisy.nbytes
    assert report.passthrough["1.weight"] == f"SQNR {sqnr(noisy, scheme):.1f} dB is below min_sqnr=40"
    assert json.loads(report.to_json())["layers"][0]["sqnr"] is None


def sqnr(w: torch.Tensor, scheme: object) -> float:
    x, noise = w.double(), w.double() - quantize(w, scheme).dequantize(torch.float32).double()
    return float(10 * torch.log10(x.square().sum() / noise.square().sum()))


# Life -----------------------------------------------------------------------------------------------------------------


def test_sessions_do_not_nest_and_do_not_repeat() -> None:
    with pytest.raises(QTensorError, match="do not nest"), online_quant(fp8), online_quant(fp8):
        pass
    assert_no_hooks()
    with online_quant(fp8) as session:
        layer = nn.Linear(4, 4, bias=False)
        layer.weight.data.fill_(1.0)
    with pytest.raises(QTensorError, match="this session is finished"), session:
        pass
    with pytest.raises(QTensorError, match="not open"):
        session.finish()
    with pytest.raises(QTensorError, match="weight is quantized already"):
        online_quant(fp8, layer)
    assert_no_hooks()


def test_a_model_is_armed_once() -> None:
    layer = nn.Linear(4, 4)
    session = online_quant(fp8, layer)
    with pytest.raises(QTensorError, match="armed by another session"):
        online_quant(fp8, layer)
    session.abort()
    session.abort()
    assert_no_hooks()
    with online_quant(fp8, layer):
        layer.load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
    assert_oracle(layer.weight, torch.eye(4), fp8)


def test_a_given_model_may_be_loaded_while_another_is_constructed() -> None:
    given = nn.Linear(4, 4, bias=False)
    with online_quant(fp8):
        with online_quant(fp8, given):
            given.weight.data.copy_(torch.eye(4))
        assert type(given.weight) is QTensor
        built = nn.Linear(4, 4, bias=False)
        assert isinstance(built.weight, LazyWeight)
        built.weight.data.copy_(torch.eye(4))
    assert_oracle(built.weight, torch.eye(4), fp8)


def test_finish_without_a_with_block() -> None:
    layer = nn.Linear(4, 4, bias=False)
    session = online_quant(fp8, layer)
    layer.weight.data.copy_(torch.eye(4))
    assert session.report().state == "open"
    report = session.finish()
    assert report is session.report()
    assert report.state == "finished"
    assert_no_hooks()


def test_one_garbage_collection_takes_a_session_that_an_error_holds() -> None:
    """The frames of a traceback hold what its caller had in hand: here the session that came after the error."""
    model = nn.Linear(32, 32, bias=False)
    with online_quant(fp8, model):
        model.weight.data.copy_(torch.randn(32, 32))

    def refit() -> None:
        with pytest.raises(RuntimeError), online_reload(model):
            model.load_state_dict({"weight": torch.full((32, 32), float("nan"))}, strict=False)
        session = online_reload(model)
        model.weight.data.copy_(torch.randn(32, 32))
        session.finish()

    def works() -> int:  # Not by weak references, which a collection clears first.
        return sum(type(o) is Reload for o in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = works()
        refit()
        assert works() == before + 2, "the traceback holds them no longer: make this test anew"
        gc.collect()
        assert works() == before
    finally:
        gc.enable()


def test_writes_after_the_end_reach_the_quantized_weight_or_are_refused() -> None:
    with online_quant(fp8_per_channel):
        layer = nn.Linear(4, 4, bias=False)
        alias = layer.weight.data
        layer.weight.data.copy_(torch.eye(4))
    assert torch.equal(alias.clone(), layer.weight.dequantize())
    with pytest.raises(QTensorError, match="the session has finished"):
        alias.copy_(torch.ones(4, 4))
    layer.weight.data[1:3].copy_(torch.ones(2, 4))
    assert same_bytes(layer.weight.qdata[1:3], quantize(torch.ones(2, 4), fp8).qdata)


def test_other_threads_construct_ordinary_modules() -> None:
    """Law 8 [huggingface/diffusers #4296]: a process-wide patch corrupted what other threads built."""
    built: list[nn.Module] = []
    with online_quant(fp8):
        thread = threading.Thread(target=lambda: built.append(nn.Linear(4, 4)))
        thread.start()
        thread.join()
        layer = nn.Linear(4, 4, bias=False)
        assert isinstance(layer.weight, LazyWeight)
        layer.weight.data.fill_(0.0)
    assert type(built[0].weight) is nn.Parameter


def test_parameter_attributes_follow_the_parameter() -> None:
    """Law 5 [#28425]: weight_loader and friends were gone after quantization."""
    for form in ("construct", "model"):
        layer = nn.Linear(4, 4) if form == "model" else None
        if layer is not None:
            layer.weight.weight_loader = layer.bias.weight_loader = len
        with online_quant(fp8, layer):
            if layer is None:
                layer = nn.Linear(4, 4)
                layer.weight.weight_loader = layer.bias.weight_loader = len
            layer.load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
        assert layer.weight.weight_loader is len
        assert layer.bias.weight_loader is len


# Report ---------------------------------------------------------------------------------------------------------------


def test_report_adds_up_and_reads_as_table_and_json() -> None:
    state = Net().state_dict()
    model = Net()
    with online_quant(fp8_per_block, model) as session:
        model.load_state_dict(state)
    report = session.report()
    held = [p for p in model.parameters() if isinstance(p, QTensor)]
    plain = [p for p in model.parameters() if not isinstance(p, QTensor)]
    assert report.quantized_bytes == sum(p.qdata.nbytes + p.scale.nbytes for p in held)
    assert report.passthrough_bytes == sum(p.nbytes for p in plain)
    data = json.loads(report.to_json())
    assert data["quantized_bytes"] == report.quantized_bytes
    assert {layer["name"] for layer in data["layers"]} == quantized(model)
    text = str(report)
    assert "attn.q_proj.weight" in text
    assert "3 weights quantized" in text
    assert report.seconds > 0


def test_progress_counts_weights(capsys: pytest.CaptureFixture[str]) -> None:
    layer = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with online_quant(fp8, layer, progress=True):
        for module in layer:
            module.weight.data.copy_(torch.eye(4))
    assert "2/2" in capsys.readouterr().err
    quiet = nn.Linear(4, 4, bias=False)
    with online_quant(fp8, quiet):
        quiet.weight.data.copy_(torch.eye(4))
    assert capsys.readouterr().err == ""


def test_arming_a_model_installs_nothing_process_wide_before_the_block() -> None:
    layer = nn.Linear(8, 8, bias=False)
    session = online_quant(fp8, layer)
    assert_no_hooks()
    layer.weight.data.copy_(torch.ones(8, 8))
    assert session.finish().state == "finished"
    assert isinstance(layer.weight, QTensor)
