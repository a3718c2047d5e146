"""Refits as trainers do them: a part of a model, what has changed, low-rank updates, packed buffers, stacks in one
call, and the formats that they send."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtensor import (
    ConfigError,
    IncompleteLoadError,
    NonFiniteWeightError,
    QTensorError,
    Scheme,
    WeightShapeError,
    changed_weights,
    fp8,
    fp8_per_block,
    fp8_per_tensor,
    mxfp4,
    mxfp8,
    nvfp4,
    online_quant,
    online_reload,
    quantize,
    weight_checksums,
    write_low_rank,
)
from qtensor.lazy.weight import ArmedWeight
from support.growth import growth
from support.helpers import Experts, assert_oracle, copy_unit, holder, same_bytes
from support.refits import by_offsets, by_split, kernel_calls, packed

MODES: list[dict[str, Any]] = [{}, {"shadow": "host"}, {"atomic": False}]


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 24), "norm": nn.LayerNorm(24)}) for _ in "ab"
    ]
    return nn.ModuleDict({"layers": nn.ModuleList(layers)}).bfloat16()


def loaded(scheme: Scheme = fp8) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model, state = net(), net().state_dict()
    with online_quant(scheme, model):
        model.load_state_dict(state)
    return model, state


def trained(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor + torch.randn(tensor.shape).bfloat16() for name, tensor in state.items()}


def stack(scheme: Scheme, values: torch.Tensor) -> Any:
    model, name = holder(values)
    with online_quant(scheme, model):
        getattr(model, name).data.copy_(values)
    return model


# A part of a model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("only", [["layers.1"], ["*.up.weight", "layers.1"], ["re:.*norm"]])
def test_only_what_matches_is_reloaded_and_the_report_says_what_moved(only: list[str], mode: dict[str, Any]) -> None:
    model, state = loaded()
    before, new = weight_checksums(model), trained(state)
    chosen = [n for n in state if ("norm" in n if only[0][0] == "r" else "layers.1" in n or (only[1:] and "up.w" in n))]
    with online_reload(model, only=only, on_missing="error", **mode) as session:
        model.load_state_dict({name: new[name] for name in chosen}, strict=False)
    report = session.report()
    assert sorted(report.written) == sorted(chosen)
    assert sorted(report.untouched) == sorted(set(state) - set(chosen))
    after = weight_checksums(model)
    assert [name for name in state if after[name] != before[name]] == [n for n in state if n in chosen]
    for name in chosen:
        if name.endswith(("up.weight", "down.weight")):
            assert_oracle(model.get_parameter(name), new[name], fp8)


def test_what_only_matches_has_to_come_and_nothing_else() -> None:
    model, state = loaded()
    before, new = weight_checksums(model), trained(state)
    with (
        pytest.raises(IncompleteLoadError, match=r"^layers\.1\.up\.bias"),
        online_reload(model, only=["layers.1.up"], on_missing="error"),
    ):
        model.load_state_dict({"layers.1.up.weight": new["layers.1.up.weight"]}, strict=False)
    with (
        pytest.raises(RuntimeError, match=r"layers\.0\.up\.weight: written in a reload that is not for it"),
        online_reload(model, only=["layers.1.up"]),
    ):
        model.load_state_dict(new)
    session = online_reload(model, only=["layers.1.up"])
    with pytest.raises(QTensorError):
        model.layers[0]["down"].weight.data[:3].copy_(new["layers.0.down.weight"][:3])
    with pytest.raises(QTensorError, match="not for it"):  # swallowed, and raised at the end
        session.finish()
    assert weight_checksums(model) == before


@pytest.mark.parametrize("excluded", [True, False])
def test_a_swallowed_error_ends_a_reload_before_zeros_are_filled_in(excluded: bool) -> None:
    """With `atomic=False` what is filled in is live at once."""
    model, state = loaded()
    before = weight_checksums(model)
    session = online_reload(model, only=["layers.0"] if excluded else None, on_missing="zero", atomic=False)
    with pytest.raises(QTensorError):
        model.layers[1]["down"].weight.data.copy_(trained(state)["layers.1.down.weight"] * float("nan"))
    with pytest.raises(QTensorError, match="not for it" if excluded else "nan at"):
        session.finish()
    assert weight_checksums(model) == before


def test_a_pattern_that_matches_nothing_is_an_error_and_leaves_no_session() -> None:
    model, state = loaded()
    with pytest.raises(QTensorError, match=r"'layers\.7' of `only`"):
        online_reload(model, only=["layers.1", "layers.7"])
    with pytest.raises(ConfigError, match="only is a list"):
        online_reload(model, only="layers.1")
    with online_reload(model):
        model.load_state_dict(trained(state))


def test_a_trainer_sends_checksums_and_then_what_differs() -> None:
    model, state = loaded()
    new = dict(state)
    for name in ("layers.0.up.weight", "layers.1.norm.weight"):
        new[name] = state[name] * 2 + 1
    mine = weight_checksums({n: quantize(t, fp8) if t.dim() == 2 else t for n, t in new.items()})
    names = changed_weights(model, mine)
    assert names == ["layers.0.up.weight", "layers.1.norm.weight"]
    with online_reload(model, only=names, on_missing="error"):
        model.load_state_dict({name: new[name] for name in names}, strict=False)
    assert changed_weights(model, mine) == []
    with pytest.raises(QTensorError, match="no parameter other"):
        changed_weights(model, {"other": ""})


# Low-rank updates ----------------------------------------------------------------------------------------------------


def small(shape: tuple[int, ...], seed: int, bits: int = 3) -> torch.Tensor:
    """Numbers whose products and sums single floats hold exactly, so that the order of adding does not matter."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**bits), 2**bits, shape, generator=random).float() / 8


@settings(max_examples=25, deadline=None)
@given(
    scheme=st.sampled_from([fp8, fp8_per_block, fp8_per_tensor, mxfp8, mxfp4, nvfp4]),
    lead=st.sampled_from([(), (3,)]),
    rows=st.integers(1, 300),
    cols=st.sampled_from([1, 32, 70]),
    rank=st.integers(0, 5),
    mode=st.sampled_from(MODES),
    chunk=st.sampled_from([1, 4096, 2 << 20]),
)
def test_a_low_rank_update_is_the_updated_weight_quantized(
    scheme: Scheme, lead: tuple[int, ...], rows: int, cols: int, rank: int, mode: dict[str, Any], chunk: int
) -> None:
    base = small((*lead, rows, cols), 1).bfloat16()
    b, a = small((*lead, rows, rank), 2), small((*lead, rank, cols), 3).bfloat16()
    model = stack(scheme, base)
    param = next(model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtensor.lazy.low_rank._CHUNK_BYTES", chunk)
        with online_reload(model, on_missing="error", **mode):
            write_low_rank(param, base, b, a, scaling=0.5)
    assert_oracle(param, (base.float() + 0.5 * (b @ a.float())).bfloat16(), scheme)


def test_a_low_rank_update_forms_no_more_than_a_few_units_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(4096, 1024).bfloat16()
    model = stack(fp8, base)
    formed: list[int] = []
    write = ArmedWeight.write

    def counted(self: ArmedWeight, view: Any, source: torch.Tensor) -> None:
        formed.append(source.nbytes)
        write(self, view, source)

    monkeypatch.setattr(ArmedWeight, "write", counted)
    with online_reload(model) as session:
        write_low_rank(model.weight, base, torch.randn(4096, 8, requires_grad=True), torch.randn(8, 1024))
    assert sum(formed) == base.nbytes
    assert max(formed) <= 1 << 20
    assert session.report().peak_staged_bytes == 0


def test_a_low_rank_update_without_a_base_or_a_session_or_a_fit_is_refused_and_changes_nothing() -> None:
    model, state = loaded()
    before, name = weight_checksums(model), "layers.0.up.weight"
    weight, b, a = model.get_parameter(name), torch.ones(40, 2), torch.ones(2, 24)
    with pytest.raises(QTensorError, match="not being loaded"):
        write_low_rank(weight, state[name], b, a)
    for base, left, kind, why in (
        (None, b, QTensorError, "add up their errors"),
        (state[name], a, WeightShapeError, "fit"),
    ):
        with pytest.raises(kind, match=rf"{name}.*{why}"), online_reload(model):
            write_low_rank(weight, base, left, a)
    assert weight_checksums(model) == before


# Packed buffers and stacks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unpack", [by_offsets, by_split])
@pytest.mark.parametrize("scheme", [fp8, fp8_per_block, mxfp8])
@pytest.mark.parametrize("mode", MODES)
def test_kernels_read_a_trainers_bucket_where_it_lies(unpack: Any, scheme: Scheme, mode: dict[str, Any]) -> None:
    model, state = loaded(scheme)
    new = trained(state)
    bucket = packed(new)
    first, last = bucket.data_ptr(), bucket.data_ptr() + bucket.nbytes
    with kernel_calls() as sources, online_reload(model, on_missing="error", **mode) as session:
        params = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in unpack(bucket, new):
                params[name].copy_(tensor)
        bucket.fill_(0xFF)  # The trainer packs the next one into it.
    assert len(sources) == 4
    assert all(first <= source.data_ptr() < last for source in sources)
    assert session.report().peak_staged_bytes == 0
    for name in ("layers.0.up.weight", "layers.1.down.weight"):
        assert_oracle(model.get_parameter(name), new[name], scheme)


@pytest.mark.parametrize("scheme", [fp8, fp8_per_block, fp8_per_tensor, mxfp8, mxfp4, nvfp4])
@pytest.mark.parametrize("way", ["load", "reload", "undo"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_stack_in_one_call_is_one_call_of_the_kernel(scheme: Scheme, way: str, dtype: torch.dtype) -> None:
    values = torch.randn(5, 96, 64).to(dtype)
    model = Experts((5, 96, 64), torch.bfloat16)
    with kernel_calls() as sources:
        if way == "load":
            with online_quant(scheme, model):
                model.w.data.copy_(values)
    if way != "load":
        with online_quant(scheme, model):
            model.w.data.copy_(torch.randn(5, 96, 64))
        with kernel_calls() as sources, online_reload(model, shadow="device" if way == "reload" else "host") as session:
            model.w.data.copy_(values)
        assert session.report().peak_second_copy_bytes == model.w.nbytes
    assert [tuple(source.shape) for source in sources] == [(5, 96, 64)]
    assert_oracle(model.w, values.bfloat16(), scheme)


@settings(max_examples=25, deadline=None)
@given(
    scheme=st.sampled_from([fp8, fp8_per_block, fp8_per_tensor, nvfp4]),
    mode=st.sampled_from(MODES),
    first=st.integers(0, 4),
    count=st.integers(1, 5),
    earlier=st.sampled_from([None, 0, 3]),
    bad=st.booleans(),
)
def test_some_of_a_stacks_matrices_in_one_call(
    scheme: Scheme, mode: dict[str, Any], first: int, count: int, earlier: int | None, bad: bool
) -> None:
    """Whatever came before: the matrices that were written are new, the others have their bytes; NaN names its
    place."""
    old, new = torch.randn(5, 130, 32).bfloat16(), torch.randn(5, 130, 32).bfloat16()
    model = stack(scheme, old)
    run = slice(first, min(first + count, 5))
    expected = quantize(old, scheme)
    try:
        with online_reload(model, **mode):
            if earlier is not None:
                model.w.data[earlier].copy_(new[earlier])
                copy_unit(expected, quantize(new, scheme), earlier, 0, 130)
            source = new[run].clone()
            if bad:
                source[-1, 7, 3] = float("nan")
            model.w.data[run].copy_(source)
        assert not bad
        for e in range(run.start, run.stop):
            copy_unit(expected, quantize(new, scheme), e, 0, 130)
    except NonFiniteWeightError as error:
        assert bad
        assert f"[{run.stop - 1}, 7, 3]" in str(error)  # noqa: PT017
        if mode.get("atomic", True):
            expected = quantize(old, scheme)
        else:
            return
    assert all(map(same_bytes, model.w.parts(), expected.parts()))


def test_refits_of_every_kind_leave_nothing_behind() -> None:
    """500 of them in `make endurance`: whole, selective, in buckets, of what changed, low-rank; finished, failed and
    aborted ones."""
    model, state = loaded()
    new, calls, times = trained(state), 0, 500 if os.environ.get("QTENSOR_ENDURANCE") else 60
    bad = new | {"layers.1.down.weight": torch.full((24, 40), float("nan"))}
    b, a, name = torch.randn(40, 2), torch.randn(2, 24), "layers.0.up.weight"

    def refit(i: int) -> None:
        nonlocal calls
        calls += 1
        bucket = packed(new)
        with online_reload(model, only=["layers.1"] if i % 2 else None), torch.no_grad():
            for part, tensor in by_offsets(bucket, new):
                if "layers.1" in part or not i % 2:
                    model.get_parameter(part).copy_(tensor)
        before = weight_checksums(model)
        with pytest.raises(RuntimeError, match="nan at index"), online_reload(model):
            model.load_state_dict(bad)
        session = online_reload(model, only=[name])
        write_low_rank(model.get_parameter(name), state[name], b, a)
        session.abort() if i % 3 else session.finish()
        changed = changed_weights(model, before)
        assert changed == ([] if i % 3 else [name])
        if changed:
            with online_reload(model, only=changed, on_missing="error"):
                model.load_state_dict({part: new[part] for part in changed}, strict=False)
            assert changed_weights(model, before) == []

    tensors, grown = growth(refit, times)
    assert calls == times + 20
    assert tensors <= 0
    assert grown < 4 << 20 if times == 60 else grown < 256 << 10


# Formats -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode", MODES)
def test_high_precision_is_rounded_to_the_weights_dtype_first(dtype: torch.dtype, mode: dict[str, Any]) -> None:
    model, state = loaded()
    new = {name: torch.randn(tensor.shape).to(dtype) for name, tensor in state.items()}
    with online_reload(model, on_missing="error", **mode):
        model.load_state_dict(new)
    for name in ("layers.0.up.weight", "layers.1.down.weight"):
        assert_oracle(model.get_parameter(name), new[name].bfloat16(), fp8)


@pytest.mark.parametrize("scheme", [fp8, fp8_per_block, mxfp8, mxfp4])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_quantized_by_the_same_scheme_keeps_its_bytes(scheme: Scheme, mode: dict[str, Any]) -> None:
    """Scales that no quantizer would choose show that nothing was rounded a second time."""
    for shape in ((256, 64), (3, 256, 64)):
        sent = quantize(torch.randn(shape), scheme)
        sent.scale.copy_(quantize(torch.randn(shape) * 8, scheme).scale)
        model = stack(scheme, torch.randn(shape).bfloat16())
        param = next(model.parameters())
        with kernel_calls() as sources, online_reload(model, on_missing="error", **mode):
            if len(shape) == 2:
                param.data[:128].copy_(sent[:128])
                param.data[128:].copy_(sent[128:])
            else:
                param.data.copy_(sent)
        assert not sources
        assert all(map(same_bytes, param.parts(), sent.parts()))
