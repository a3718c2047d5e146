"""Bad input: an error that names the weight, and nothing half-armed. After each, the same model loads again.

It is one file because files, shapes, values and dtypes are refused by the same rules, and each asks for the next load.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qtensor import (
    IncompleteLoadError,
    LazyWeight,
    NonFiniteWeightError,
    QTensor,
    QTensorError,
    WeightDtypeError,
    WeightShapeError,
    fp8,
    fp8_per_block,
    fp8_per_tensor,
    online_quant,
)
from qtensor.sessions import registration
from support.loading import (
    FORMS,
    SCHEMES,
    TinyNet,
    armed,
    assert_equals_oracle,
    assert_is,
    assert_nothing_armed,
    assert_session_works,
    identities,
    lazy_names,
    weights_of,
)

State = dict[str, torch.Tensor]
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def state() -> State:
    return weights_of(TinyNet)


@contextmanager
def failing(
    error: type[BaseException] | tuple[type[BaseException], ...], match: str | None, form: str, scheme=fp8, **options
) -> Iterator[nn.Module]:
    """A load that has to fail with `error`; afterwards the process, and this very model, load again."""
    held: list[nn.Module] = []
    with pytest.raises(error, match=match), armed(form, scheme, **options) as (model, session):
        held += [model, session]
        yield model
    model, session = held
    assert_nothing_armed()
    assert session.report().state == "aborted"
    before = identities(model)
    assert_session_works(model, scheme)
    assert identities(model) == before


# Files --------------------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_the_loaders_own_error(form, keep, state, tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with failing(SafetensorError, None, form) as model:
        model.load_state_dict(load_file(path))


def test_a_truncated_torch_file_is_the_loaders_own_error(state, tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with failing((OSError, RuntimeError), None, "constructed") as model:
        model.load_state_dict(torch.load(path, weights_only=True))


def test_a_file_that_ends_between_two_shards_of_a_weight_names_what_is_missing(state, tmp_path) -> None:
    """The first half of `up` arrives, then the reader fails and a careless loader goes on."""
    with failing(IncompleteLoadError, r"up\.weight: 80 of 160 rows never written: rows 80:160", "constructed") as model:
        model.load_state_dict({k: v for k, v in state.items() if k != "up.weight"}, strict=False)
        model.up.weight.data[:80] = state["up.weight"][:80]
        with suppress(SafetensorError):
            (tmp_path / "rest.safetensors").write_bytes(b"no")
            load_file(tmp_path / "rest.safetensors")


# Shapes and names ---------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("name", ["up.weight", "norm.weight", "down.bias"])
def test_a_wrong_shape_is_refused_by_name(form, name, state) -> None:
    state[name] = torch.zeros(7, *state[name].shape[1:], dtype=torch.bfloat16)
    with failing(RuntimeError, rf"size mismatch for {name}", form) as model:
        model.load_state_dict(state)


@every_form
@pytest.mark.parametrize("name", ["up.weight", "norm.weight", "down.bias"])
def test_a_wrong_shape_in_a_users_loop_is_refused_by_name(form, name, state) -> None:
    with failing(WeightShapeError, rf"^{name}:.*\[7", form) as model:
        model.get_parameter(name).data.copy_(torch.zeros(7, *state[name].shape[1:]))


@every_form
def test_a_transposed_source_is_refused_by_name(form, state) -> None:
    with failing(WeightShapeError, r"^up\.weight: a source of shape \[48, 160\] does not fit", form) as model:
        model.up.weight.data.copy_(state["up.weight"].t())


@every_form
def test_a_missing_tensor_is_the_loaders_own_error_or_ours(form, state) -> None:
    del state["up.weight"]
    with failing(RuntimeError, r"Missing key.*up\.weight", form) as model:
        model.load_state_dict(state)
    with failing(IncompleteLoadError, r"up\.weight: 160 of 160 rows never written", form) as model:
        model.load_state_dict(state, strict=False)


@every_form
def test_every_missing_tensor_is_named(form, state) -> None:
    with failing(IncompleteLoadError, None, form) as model:
        model.load_state_dict({"up.weight": state["up.weight"]}, strict=False)
    with pytest.raises(IncompleteLoadError) as caught, armed(form) as (model, _):
        model.load_state_dict({"up.weight": state["up.weight"]}, strict=False)
    expected = set(state) - {"up.weight"}
    if form != "meta":
        expected -= {"steps"}  # a buffer with a value of its own is not a weight
    assert set(caught.value.missing) == expected
    for name in expected:
        assert name in str(caught.value)


@every_form
def test_an_extra_tensor_is_the_loaders_own_error(form, state) -> None:
    state["up.scale"] = torch.ones(1)
    with failing(RuntimeError, r"Unexpected key.*up\.scale", form) as model:
        model.load_state_dict(state)


# Values -------------------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_element_is_refused_by_name_and_index(form, scheme, value, state) -> None:
    state["down.weight"][31, 157] = value
    match = rf"down\.weight: {value} at index \[31, 157\] of \[48, 160\]"
    with failing(RuntimeError, match, form, scheme) as model:
        model.load_state_dict(state)
    with failing(NonFiniteWeightError, match, form, scheme) as model:
        model.down.weight.data.copy_(state["down.weight"])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_non_finite_element_is_found_in_any_slice(scheme, state) -> None:
    state["down.weight"][31, 157] = float("nan")
    for dim in (0, 1):
        with failing(NonFiniteWeightError, r"down\.weight: nan at index \[31, 157\]", "meta", scheme) as model:
            for a in range(0, state["down.weight"].shape[dim], 9):
                part = state["down.weight"].narrow(dim, a, min(9, state["down.weight"].shape[dim] - a))
                model.down.weight.data.narrow(dim, a, part.shape[dim]).copy_(part)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_loader_that_swallows_the_error_does_not_make_it_disappear(scheme, state) -> None:
    state["up.weight"][2, 5] = float("inf")
    with failing(NonFiniteWeightError, r"up\.weight: inf at index \[2, 5\]", "constructed", scheme) as model:
        for name, param in model.named_parameters():
            with suppress(Exception):
                param.data.copy_(state[name])


def test_a_loader_that_retries_with_good_values_is_forgiven(state) -> None:
    bad = state["up.weight"].clone()
    bad[2, 5] = float("nan")
    with armed("constructed") as (model, _):
        with suppress(NonFiniteWeightError):
            model.up.weight.data.copy_(bad)
        model.load_state_dict(state)
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)


def test_a_value_that_overflows_the_models_dtype_is_refused(state) -> None:
    full = state["up.weight"].float()
    full[3, 4] = 1e30  # not in fp16
    match = r"up\.weight: inf at index \[3, 4\]"
    with pytest.raises(NonFiniteWeightError, match=match), armed("meta", dtype=torch.float16) as (model, _):
        model.up.weight.data.copy_(full)
    assert_session_works()


def test_finite_values_whose_sum_overflows_are_taken(state) -> None:
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    state["up.weight"] = torch.full_like(state["up.weight"], 60000.0)
    with armed("meta", dtype=torch.float16) as (model, _):
        for name, param in model.state_dict(keep_vars=True).items():
            pieces = zip(param.data.split(16, -1), state[name].split(16, -1), strict=True) if param.dim() == 2 else ()
            for target, source in pieces or [(param.data, state[name])]:
                target.copy_(source)  # columns: what is staged is checked by its sum first
    assert_is(model.up.weight, state["up.weight"], fp8)


def test_non_finite_elements_may_be_kept(state) -> None:
    state["up.weight"][2, 5] = float("nan")
    with armed("constructed", on_nonfinite="keep") as (model, _):
        model.load_state_dict(state)
    assert model.up.weight.dequantize().isnan().sum() == 1
    assert model.up.weight.scale.isfinite().all()


def test_non_finite_values_in_weights_that_stay_plain_are_the_users_own(state) -> None:
    state["norm.weight"][3] = float("inf")
    with armed("constructed") as (model, _):
        model.load_state_dict(state)
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)


# Dtypes -------------------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "bool", "float8_e4m3fn", "complex64"])
def test_a_source_that_has_no_meaning_as_high_precision_values_is_refused(form, dtype, state) -> None:
    """transformers #48349: an already quantized checkpoint was cast, without its scales."""
    source = torch.ones(160, 48).to(getattr(torch, dtype))
    with failing(WeightDtypeError, rf"up\.weight: the source is torch\.{dtype}", form) as model:
        model.up.weight.data.copy_(source)


def test_an_integer_source_that_a_loader_swallows_still_fails(state) -> None:
    with failing(WeightDtypeError, r"up\.weight", "constructed") as model:
        model.load_state_dict({k: v for k, v in state.items() if k != "up.weight"}, strict=False)
        with suppress(WeightDtypeError):
            model.up.weight.data.copy_(torch.ones(160, 48, dtype=torch.int8))


@every_form
def test_a_float64_source_is_cast_to_the_models_dtype(form, state) -> None:
    wide = {k: v.double() for k, v in state.items()}
    with armed(form) as (model, _):
        model.load_state_dict(wide)
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("form", ["constructed", "meta"])
def test_a_weight_of_an_unsupported_dtype_is_left_alone_and_said_so(form, dtype) -> None:
    """Only bf16, fp16 and fp32 weights are candidates; with nothing else in the model a warning says so."""

    def make() -> nn.Module:
        with torch.no_grad():
            layer = nn.Linear(16, 16, bias=False, dtype=torch.float64)
            if dtype != torch.float64:
                layer.weight = nn.Parameter(torch.zeros(16, 16, device=layer.weight.device).to(dtype))
        return layer

    values = torch.ones(16, 16).to(dtype)
    with pytest.warns(UserWarning, match="nothing was quantized"), armed(form, make=make, dtype=None) as (model, _):
        model.weight.data.copy_(values)
    assert type(model.weight) is nn.Parameter
    assert torch.equal(model.weight.float(), values.float())
    assert_session_works()


def test_a_meta_source_is_refused_by_name(state) -> None:
    with failing(QTensorError, r"up\.weight: the source is on the meta device", "constructed") as model:
        model.up.weight.data.copy_(torch.empty(160, 48, device="meta"))


# Memory and interruption --------------------------------------------------------------------------------------------


def test_a_weight_larger_than_memory_is_the_allocators_error() -> None:
    with torch.device("meta"):
        model = nn.Linear(1 << 24, 1 << 24, bias=False, dtype=torch.bfloat16)  # 256 TiB as fp8
    with pytest.raises(RuntimeError, match=r"(?i)alloc|memory"), online_quant(fp8, model):
        model.weight.data[0].copy_(torch.ones(1 << 24, dtype=torch.bfloat16))
    assert_session_works()


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("scheme", [fp8, fp8_per_tensor], ids=str)
@every_form
def test_an_exception_in_the_block_leaves_nothing_armed(form, scheme, stop, state) -> None:
    """field-bugs scenario 21 (#57854): some weights complete, one half staged, the rest untouched."""
    with failing(stop, None, form, scheme) as model:
        model.down.weight.data.copy_(state["down.weight"])
        model.up.weight.data[:, :24] = state["up.weight"][:, :24]
        assert isinstance(model.down.weight, QTensor)
        raise stop("enough")


def test_an_exception_keeps_no_staging_alive_through_its_traceback(state) -> None:
    """modelexpress #731: a retry held two models, one of them by the traceback of the first."""
    error = None
    try:
        with armed("constructed", fp8_per_tensor) as (model, session):
            model.up.weight.data[:80] = state["up.weight"][:80]
            assert session._work._memory.staged > 0
            raise ValueError("enough")
    except ValueError as caught:
        error = caught
    assert error is not None
    assert session._work._memory.staged == 0
    assert session.report().peak_staged_bytes > 0
    assert all(weight.store is None for weight in session._work._weights if weight.scheme is not None)


def test_reading_a_weight_of_an_aborted_session_says_so(state) -> None:
    with pytest.raises(ValueError, match="enough"), armed("constructed") as (model, _):
        model.up.weight.data[:80] = state["up.weight"][:80]
        raise ValueError("enough")
    with pytest.raises(QTensorError, match=r"up\.weight: its load was aborted"):
        model.up.weight.sum()
    with pytest.raises(QTensorError, match=r"up\.weight: its load was aborted"):
        model.up.weight.data.copy_(state["up.weight"])
    with pytest.raises(QTensorError, match=r"weight: its load was aborted"):
        model(torch.arange(3)[None])


def test_an_error_while_arming_leaves_nothing_armed(state) -> None:
    with armed("constructed") as (model, _):
        model.load_state_dict(state)
    with pytest.raises(QTensorError, match=r"up\.weight is quantized already"):
        online_quant(fp8, model)
    assert_nothing_armed()
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)
    with pytest.raises(ValueError, match="unknown scheme"):
        online_quant("fp7")
    with pytest.raises(ValueError, match="on_missing"):
        online_quant(fp8, on_missing="ignore")
    assert_session_works()


def test_an_error_while_a_module_is_constructed_leaves_nothing_armed() -> None:
    class Broken(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            raise OSError("no config")

    with pytest.raises(OSError, match="no config"), online_quant(fp8):
        Broken()
    assert_session_works()


def test_a_thread_that_fails_does_not_disturb_the_session(state) -> None:
    failures: list[BaseException] = []

    def bad(model: nn.Module) -> None:
        try:
            model.up.weight.data.copy_(torch.ones(3, 3))
        except WeightShapeError as error:
            failures.append(error)

    with armed("constructed") as (model, _):
        threads = [threading.Thread(target=bad, args=(model,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        model.load_state_dict(state)
    assert len(failures) == 4
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)


# Sessions -----------------------------------------------------------------------------------------------------------


def test_sessions_do_not_nest(state) -> None:
    with online_quant(fp8):
        with pytest.raises(QTensorError, match="do not nest"), online_quant(fp8_per_block):
            pass
        model = TinyNet().bfloat16()
        model.load_state_dict(state)
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)
    assert_nothing_armed()


def test_a_model_that_is_armed_cannot_be_armed_again(state) -> None:
    with torch.device("meta"):
        model = TinyNet().bfloat16()
    with online_quant(fp8, model):
        with pytest.raises(QTensorError, match=r"armed by another session that is still open"):
            online_quant(fp8_per_block, model)
        assert len(registration._open) == 1
        model.load_state_dict(state)
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)


def test_two_sessions_on_two_models_may_overlap(state) -> None:
    twin = {k: v * 2 for k, v in state.items()}
    a, b = TinyNet().bfloat16(), TinyNet().bfloat16()
    first, second = online_quant(fp8, a), online_quant(fp8_per_tensor, b)
    a.load_state_dict(state)
    b.load_state_dict(twin)
    first.finish()
    second.finish()
    assert_equals_oracle(a, state, TinyNet.QUANTIZED, fp8)
    assert_equals_oracle(b, twin, TinyNet.QUANTIZED, fp8_per_tensor)


@pytest.mark.parametrize("end", ["finished", "aborted"])
def test_a_session_that_ended_cannot_be_entered_again(end, state) -> None:
    session = online_quant(fp8)
    if end == "finished":
        with session:
            model = TinyNet().bfloat16()
            model.load_state_dict(state)
    else:
        with pytest.raises(ValueError, match="enough"), session:
            raise ValueError("enough")
    with pytest.raises(QTensorError, match=f"this session is {end}"), session:
        pass
    with pytest.raises(QTensorError, match=f"this session is {end}"):
        session.finish()
    session.abort()
    assert session.report().state == end
    assert_nothing_armed()


def test_finish_and_abort_may_be_called_by_hand(state) -> None:
    model = TinyNet().bfloat16()
    session = online_quant(fp8, model)
    model.load_state_dict(state)
    report = session.finish()
    assert report is session.report()
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)
    other = TinyNet().bfloat16()
    online_quant(fp8, other).abort()
    assert_session_works(other)
    with online_quant(fp8, copy.deepcopy(TinyNet().bfloat16())) as session:
        session.abort()
    assert session.report().state == "aborted"


def test_an_aborted_sessions_report_tells_how_far_it_came(state) -> None:
    with pytest.raises(ValueError, match="enough"), armed("constructed") as (model, session):
        model.down.weight.data.copy_(state["down.weight"])
        model.up.weight.data[:80] = state["up.weight"][:80]
        raise ValueError("enough")
    report = session.report()
    assert report.state == "aborted"
    assert "down.weight" in {layer.name for layer in report.layers}
    assert "down.weight" not in report.missing
    assert report.missing["up.weight"] == [((80, 160), (0, 48))]
    assert "embed.weight" in report.untouched
    assert "session aborted" in str(report)
    assert '"state": "aborted"' in report.to_json()


def test_what_was_lazy_when_the_session_failed_is_lazy_no_more_after_the_next(state) -> None:
    with pytest.raises(IncompleteLoadError), armed("constructed") as (model, _):
        model.up.weight.data[:80] = state["up.weight"][:80]
    assert lazy_names(model)
    assert all(isinstance(model.get_parameter(name), LazyWeight) for name in lazy_names(model))
    with online_quant(fp8_per_block, model):
        model.load_state_dict(state)
    assert lazy_names(model) == []
    assert_is(model.up.weight, state["up.weight"], fp8_per_block)


def test_a_model_with_values_of_its_own_gets_them_back_if_its_load_fails(state) -> None:
    """Weights that stay plain keep what was loaded or what they had; those to be quantized were given up."""
    model = TinyNet().bfloat16()
    norm = model.norm.weight.detach().clone()
    with pytest.raises(ValueError, match="enough"), online_quant(fp8, model):
        raise ValueError("enough")
    assert type(model.norm.weight) is nn.Parameter
    assert torch.equal(model.norm.weight, norm)
    assert_session_works(model)
