"""PyTorch's own loaders and safetensors: each ends with the oracle's bytes."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Iterator

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from qtensor import (
    IncompleteLoadError,
    LazyWeight,
    QTensor,
    QTensorError,
    fp8,
    fp8_per_block,
    fp8_per_tensor,
    online_quant,
)
from support.loading import (
    FORMS,
    SCHEMES,
    TiedNet,
    TinyNet,
    armed,
    assert_equals_oracle,
    assert_is,
    identities,
    weights_of,
    write_sharded,
)

State = dict[str, torch.Tensor]


@pytest.fixture
def state() -> State:
    return weights_of(TinyNet)


@pytest.fixture
def swap_future_flag() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def scribble(state: State) -> None:
    """The loader's buffers are reused: whatever still looks at them sees NaN."""
    for tensor in state.values():
        tensor.fill_(float("nan"))


# load_state_dict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_load_state_dict_equals_the_oracle(form, scheme, state) -> None:
    source = copy.deepcopy(state)
    with armed(form, scheme) as (model, session):
        before = identities(model)
        model.load_state_dict(source)
        scribble(source)
        assert type(model.up.weight) is not LazyWeight, "a complete weight is quantized at once, not at finish"
    assert_equals_oracle(model, state, TinyNet.QUANTIZED, scheme)
    assert identities(model) == before
    report = session.report()
    assert report.state == "finished"
    assert report.missing == {}
    assert report.peak_staged_bytes == 0
    assert model(torch.arange(4)[None]).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_load_state_dict_assign_equals_the_oracle_and_borrows_nothing(form, state) -> None:
    """pytorch #102212: assign=True drops identities. A weight that is armed keeps its own."""
    source = copy.deepcopy(state)
    with armed(form) as (model, session):
        before = identities(model)
        model.load_state_dict(source, assign=True)
        for name, tensor in source.items():
            if name != "steps":  # buffers are not armed unless they are on meta: PyTorch's assign=True keeps the source
                tensor.fill_(float("nan"))
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)
    assert identities(model) == before
    assert session.report().peak_staged_bytes == 0


@pytest.mark.usefixtures("swap_future_flag")
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_load_state_dict_under_the_swap_future_flag_equals_the_oracle(form, assign, state) -> None:
    """field-bugs scenario 22 (pytorch #122803): swap_tensors gives the Parameter another tensor's content."""
    source = copy.deepcopy(state)
    with armed(form) as (model, _):
        before = identities(model)
        model.load_state_dict(source, assign=assign)
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)
    assert identities(model) == before


@pytest.mark.parametrize("form", FORMS)
def test_non_strict_load_with_a_missing_key_names_it(form, state) -> None:
    del state["down.weight"]
    with pytest.raises(IncompleteLoadError, match=r"down\.weight") as caught, armed(form) as (model, _):
        model.load_state_dict(state, strict=False)
    assert caught.value.missing == {"down.weight": [((0, 48), (0, 160))]}


@pytest.mark.parametrize("form", FORMS)
def test_non_strict_load_with_on_missing_zero_fills_it(form, state) -> None:
    partial = {k: v for k, v in state.items() if k != "down.weight"}
    with armed(form, on_missing="zero") as (model, session):
        model.load_state_dict(partial, strict=False)
    state["down.weight"].zero_()
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)
    assert session.report().untouched == ["down.weight"]
    assert torch.equal(model.down.weight.dequantize(), torch.zeros(48, 160, dtype=torch.bfloat16))


def test_tied_weights_load_once_and_stay_tied() -> None:
    """field-bugs scenario 11 (accelerate #3668)."""
    state = weights_of(TiedNet)
    for form in FORMS:
        for assign in (False, True):
            with armed(form, make=TiedNet) as (model, _):
                model.load_state_dict(state, assign=assign)
            assert model.lm_head.weight is model.embed.weight, (form, assign)
            assert_equals_oracle(model, state, TinyNet.QUANTIZED)


def test_a_quantized_tie_is_one_weight() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.b.weight = self.a.weight

    state = weights_of(Shared)
    for form in FORMS:
        with armed(form, make=Shared) as (model, session):
            model.load_state_dict(state)
        assert model.a.weight is model.b.weight
        assert_is(model.a.weight, state["a.weight"], fp8)
        assert [layer.name for layer in session.report().layers] == ["a.weight"]


def test_a_checkpoint_in_another_dtype_is_cast_to_the_models(state) -> None:
    """The logical dtype is the model's; its values are rounded to it before quantizing, as a plain load would."""
    for source, target in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float16),
    ):
        given = {k: v.to(source) for k, v in weights_of(TinyNet, torch.float32).items()}
        with armed("constructed", dtype=target) as (model, _):
            model.load_state_dict(given)
        assert_equals_oracle(model, {k: v.to(target) for k, v in given.items()}, TinyNet.QUANTIZED)


@pytest.mark.filterwarnings("ignore:.*which is a no-op")
def test_a_model_on_meta_outside_any_session_is_not_a_silent_no_op(state) -> None:
    """field-bugs scenario 22 (pytorch #106042): copy_ into a plain meta parameter does nothing."""
    with torch.device("meta"):
        model = TinyNet().bfloat16()
    with pytest.warns(UserWarning, match="nothing was quantized"), online_quant(fp8):
        model.load_state_dict(state)


def test_what_is_still_on_meta_at_the_end_is_named(state) -> None:
    with torch.device("meta"):
        model = TinyNet().bfloat16()
        model.register_buffer("inv_freq", torch.ones(4), persistent=False)
    with pytest.raises(QTensorError, match="inv_freq"), online_quant(fp8, model):
        model.load_state_dict(state)


def test_retyping_the_lazy_module_changes_what_it_becomes() -> None:
    """torchdistx #11: `.to()` and `.half()` before the load must be honoured."""
    full = weights_of(TinyNet, torch.float32)
    for form in FORMS:
        for change, dtype in (
            (lambda m: m.half(), torch.float16),
            (lambda m: m.to(torch.bfloat16), torch.bfloat16),
            (lambda m: m.bfloat16().float(), torch.float32),
        ):
            with armed(form, dtype=torch.float32) as (model, _):
                change(model)
                assert model.up.weight.dtype == dtype
                model.load_state_dict(full)
            assert_equals_oracle(model, {k: v.to(dtype) for k, v in full.items()}, TinyNet.QUANTIZED)


def test_a_session_kept_for_its_report_keeps_no_model_alive(state) -> None:
    for form in FORMS:
        with armed(form) as (model, session):
            model.load_state_dict(state)
        alive = weakref.ref(model), weakref.ref(model.up.weight.qdata), weakref.ref(model.norm.weight)
        del model
        gc.collect()
        assert [ref() for ref in alive] == [None] * 3, form
        assert len(session.report().layers) == 2


def test_everyone_who_holds_a_parameter_sees_the_quantized_weight(state) -> None:
    """field-bugs scenario 24."""
    for form in FORMS:
        with armed(form) as (model, _):
            held, captured = dict(model.named_parameters()), model.up.weight
            model.load_state_dict(state)
        assert held["up.weight"] is captured is model.up.weight
        assert_is(captured, state["up.weight"], fp8, "captured")


# torch.load ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_mapped_torch_load_equals_the_oracle_and_keeps_no_view_of_the_file(form, assign, state, tmp_path) -> None:
    torch.save(state, tmp_path / "model.pt")
    with armed(form) as (model, _):
        mapped = torch.load(tmp_path / "model.pt", mmap=True, weights_only=True)
        model.load_state_dict(mapped, assign=assign)
        storages = {t.untyped_storage().data_ptr() for t in mapped.values()}
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)
    for name, param in model.named_parameters():
        held = [param.qdata, param.scale] if isinstance(param, QTensor) else [param]
        assert not {t.untyped_storage().data_ptr() for t in held} & storages, f"{name} looks into the file"


# safetensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_safetensors_load_file_equals_the_oracle(form, state, tmp_path) -> None:
    save_file(state, tmp_path / "model.safetensors")
    with armed(form) as (model, _):
        model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [TinyNet, TiedNet])
def test_safetensors_load_model_equals_the_oracle(form, make, tmp_path) -> None:
    """load_model finds ties by storage address; save_model has written one name of each tie."""
    state = weights_of(make)
    source = make().bfloat16()
    source.load_state_dict(state)
    save_model(source, str(tmp_path / "model.safetensors"))
    with armed(form, make=make) as (model, _):
        missing, unexpected = load_model(model, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    assert_equals_oracle(model, state, make.QUANTIZED)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_safetensors_slices_equal_the_oracle(dim, scheme, state, tmp_path) -> None:
    """A tensor-parallel loader: `get_slice` in uneven chunks, written into narrow views. Columns never complete a row
    before the last chunk, so they are staged; rows of a per-channel weight are not."""
    save_file(state, tmp_path / "model.safetensors")
    with armed("meta", scheme) as (model, session), safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name, param in model.state_dict().items():
            if param.dim() != 2:
                param.copy_(file.get_tensor(name))
                continue
            part, n = file.get_slice(name), param.shape[dim]
            for a in range(0, n, 13):
                b = min(a + 13, n)
                param.narrow(dim, a, b - a).copy_(part[a:b] if dim == 0 else part[:, a:b])
    assert_equals_oracle(model, state, TinyNet.QUANTIZED, scheme)
    staged = session.report().peak_staged_bytes
    if scheme is fp8 and dim == 0:
        assert staged == 0
    else:
        assert 0 < staged <= state["up.weight"].nbytes, "one weight at a time"


@pytest.mark.parametrize("form", FORMS)
def test_a_sharded_index_checkpoint_equals_the_oracle(form, state, tmp_path) -> None:
    write_sharded(state, tmp_path)
    with armed(form) as (model, session):
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        for shard in sorted(set(index["weight_map"].values())):
            model.load_state_dict(load_file(tmp_path / shard), strict=False)
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)
    assert session.report().peak_staged_bytes == 0


# Modules that do more than hold a weight ----------------------------------------------------------------------------


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=3, enable_nested_tensor=False)


@pytest.mark.parametrize("form", FORMS)
def test_a_transformer_encoder_that_deepcopies_its_layers_equals_the_oracle(form) -> None:
    """pytorch #65051: lazy parameters break deepcopy. The encoder builds one layer and copies it."""
    state = weights_of(encoder)
    quantized = [n for n in state if "linear" in n and n.endswith("weight")]
    with armed(form, make=encoder) as (model, _):
        model.load_state_dict(state)
    assert len(quantized) == 6
    quantized += [n for n in state if n.endswith("out_proj.weight")]
    assert_equals_oracle(model, state, quantized)
    reference = encoder().bfloat16().train()
    reference.load_state_dict(state)
    x = torch.randn(64, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    model.eval(), reference.eval()
    got, want = model(x), reference(x)
    assert torch.cosine_similarity(got.float().flatten(), want.float().flatten(), dim=0) > 0.99


def test_a_prototype_layer_that_was_only_copied_is_not_missing() -> None:
    """The example in PyTorch's documentation: the layer stays in a variable, its copies are the model."""
    state = weights_of(encoder)
    with online_quant(fp8):
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dtype=torch.bfloat16)
        model = nn.TransformerEncoder(layer, num_layers=3, enable_nested_tensor=False)
        model.load_state_dict(state)
    assert_is(model.layers[2].linear1.weight, state["layers.2.linear1.weight"], fp8)
    with pytest.raises(QTensorError, match=r"linear1\.weight.*finished"):
        layer.linear1.weight.sum()


@pytest.mark.parametrize("form", FORMS)
def test_multihead_attention_keeps_its_plain_in_proj(form) -> None:
    def make() -> nn.Module:
        return nn.MultiheadAttention(32, 4, batch_first=True)

    state = weights_of(make)
    with armed(form, make=make) as (model, _):
        model.load_state_dict(state)
    assert_equals_oracle(model, state, ["out_proj.weight"])
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    assert model(x, x, x)[0].isfinite().all()


def test_deepcopies_made_while_loading_are_independent(state) -> None:
    with armed("constructed") as (model, _):
        other = copy.deepcopy(model)
        assert type(other.up.weight) is LazyWeight
        model.load_state_dict(state)
        twin = {k: v * 2 for k, v in state.items()}
        other.load_state_dict(twin)
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)
    assert_equals_oracle(other, twin, TinyNet.QUANTIZED)


def test_each_name_can_have_its_own_scheme(state) -> None:
    targets = {"up": fp8_per_block, "down": fp8_per_tensor, "lm_head": "fp8"}
    with armed("meta", targets=targets, ignore=()) as (model, _):
        model.load_state_dict(state)
    assert_is(model.up.weight, state["up.weight"], fp8_per_block)
    assert_is(model.down.weight, state["down.weight"], fp8_per_tensor)
    assert_is(model.lm_head.weight, state["lm_head.weight"], fp8)
