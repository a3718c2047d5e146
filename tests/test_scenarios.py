"""The scenarios an online quantizer must survive, each taken from bugs met in the field.

The issue numbers are vllm-project/vllm's unless another repository is named. Scenarios about reloading a live model
and about engines live with those features; loaders by name are in test_loaders*.py. It is one file because it is a
list: whoever meets a bug elsewhere looks here whether it was tried.
"""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from torch import nn

from qtensor import (
    IncompleteLoadError,
    LossyReadError,
    QTensor,
    WeightShapeError,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    online_quant,
    quantize,
)
from support.helpers import Experts, assert_no_hooks, assert_oracle, same_bytes

SCHEMES = (fp8_per_channel, fp8_per_block, fp8_per_tensor)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def randn(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * 0.02).bfloat16()


class Attention(nn.Module):
    """Fused qkv with a bias, as serving engines build it."""

    def __init__(self, hidden: int = 64, q: int = 96, kv: int = 32) -> None:
        super().__init__()
        self.sizes = (q, kv, kv)
        self.qkv = nn.Linear(hidden, q + 2 * kv, dtype=torch.bfloat16)

    def load(self, part: int, tensor: torch.Tensor, name: str = "weight") -> None:
        """vLLM's way: narrow the fused parameter to the shard, copy."""
        start = sum(self.sizes[:part])
        getattr(self.qkv, name).data.narrow(0, start, self.sizes[part]).copy_(tensor)


def fused(hidden: int = 64) -> list[torch.Tensor]:
    return [randn(96, hidden), randn(32, hidden), randn(32, hidden)]


class Mamba(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(8))
        self.D = nn.Parameter(torch.empty(8))
        self.dt_bias = nn.Parameter(torch.empty(8))
        self.proj = nn.Linear(8, 16, bias=False, dtype=torch.bfloat16)


def test_composed_loader_drops_nothing_and_reads_back_what_it_wrote() -> None:
    """1 [#44814]: a loader that copies twice completed the layer early and the next parameters were dropped."""
    a, d, dt, w = torch.rand(8), torch.randn(8), torch.randn(8), randn(16, 8)
    with online_quant(fp8_per_channel):
        m = Mamba()
        with torch.no_grad():
            m.A.copy_(a)
            assert torch.equal(m.A, a)
            m.A.copy_(-torch.exp(m.A))
            m.D.copy_(d)
            m.dt_bias.copy_(dt)
            m.proj.weight.copy_(w)
    assert torch.equal(m.A, -torch.exp(a))
    assert torch.equal(m.D, d)
    assert torch.equal(m.dt_bias, dt)
    assert_oracle(m.proj.weight, w, fp8_per_channel)


@every_scheme
def test_duplicate_shard_does_not_complete_the_weight(scheme: object) -> None:
    """2 [#40765]: the same shard twice made the element count reach the total."""
    parts = fused()
    with online_quant(scheme):
        m = Attention()
        m.qkv.bias.data.zero_()
        m.load(0, randn(96, 64))
        m.load(0, parts[0])
        m.load(1, parts[1])
        m.load(1, parts[1])
        assert not isinstance(m.qkv.weight, QTensor)
        m.load(2, parts[2])
        assert isinstance(m.qkv.weight, QTensor)
    assert_oracle(m.qkv.weight, torch.cat(parts), scheme)


@every_scheme
def test_late_duplicate_with_other_values_wins(scheme: object) -> None:
    """3 [#50564]: what arrived after completion was ignored, or mixed into finished bytes."""
    parts = fused()
    with online_quant(scheme):
        m = Attention()
        m.load(0, randn(96, 64))
        m.load(2, parts[2])
        m.load(1, parts[1])
        assert isinstance(m.qkv.weight, QTensor)
        m.load(0, parts[0])
        m.qkv.bias.data.zero_()
    assert_oracle(m.qkv.weight, torch.cat(parts), scheme)


def test_partial_rewrite_that_cannot_be_exact_is_an_error_naming_the_rest() -> None:
    """3: per_tensor, high-precision values gone: never bit-mixed; the rest is asked for by name."""
    parts = fused()
    with pytest.raises(IncompleteLoadError, match=r"qkv\.weight: 64 of 160 rows never written: rows 96:160") as error:  # noqa: SIM117
        with online_quant(fp8_per_tensor):
            m = Attention()
            for i in range(3):
                m.load(i, parts[i])
            m.qkv.bias.data.zero_()
            m.load(0, randn(96, 64))
            assert not isinstance(m.qkv.weight, QTensor)
    assert error.value.missing == {"qkv.weight": [((96, 160), (0, 64))]}


@pytest.mark.parametrize("order", ["interleaved", "bias first", "bias last"])
def test_bias_may_arrive_in_any_order(order: str) -> None:
    """4 [#49805, #41424, #39663]: a bias loaded early was overwritten, one loaded late was refused."""
    parts, biases = fused(), [randn(96), randn(32), randn(32)]
    weights = [(i, parts[i], "weight") for i in (1, 2, 0)]
    bias = [(i, biases[i], "bias") for i in (1, 2, 0)]
    interleaved = [x for pair in zip(weights, bias, strict=True) for x in pair]
    program = {"interleaved": interleaved, "bias first": bias + weights, "bias last": weights + bias}[order]
    finished = []
    with online_quant(fp8_per_block) as session:
        session.on_layer_quantized(lambda name, module: finished.append(name))
        m = Attention()
        for part, tensor, name in program:
            m.load(part, tensor, name)
    assert finished == ["qkv"]
    assert torch.equal(m.qkv.bias, torch.cat(biases))
    assert_oracle(m.qkv.weight, torch.cat(parts), fp8_per_block)


@every_scheme
def test_any_order_over_eight_layers(scheme: object) -> None:
    """5 [#48644]: shards out of order piled up whole layers of buffers."""
    random.seed(0)
    full = [torch.cat(fused()) for _ in range(8)]
    with online_quant(scheme) as session:
        model = nn.ModuleList(Attention() for _ in range(8))
        for m in model:
            m.qkv.bias.data.zero_()
        chunks = [(i, r) for i in range(8) for r in range(0, 160, 20)]
        for i, r in random.sample(chunks, len(chunks)):
            model[i].qkv.weight.data[r : r + 20].copy_(full[i][r : r + 20])
    for m, w in zip(model, full, strict=True):
        assert_oracle(m.qkv.weight, w, scheme)
    if scheme is fp8_per_channel:
        assert session.report().peak_staged_bytes == 0


@every_scheme
def test_nothing_borrowed_is_kept(scheme: object) -> None:
    """6 [#43163, NVIDIA-NeMo/RL #3545]: retained views of a reused buffer were overwritten before they were used."""
    parts = fused()
    alive = []
    with online_quant(scheme):
        m = Attention()
        m.qkv.bias.data.zero_()
        for i, part in enumerate(parts):
            source = part.clone()
            alive.append(weakref.ref(source.untyped_storage()))
            m.load(i, source)
            source.fill_(float("nan"))
            del source
            gc.collect()
            assert alive[-1]() is None
    assert_oracle(m.qkv.weight, torch.cat(parts), scheme)


@every_scheme
def test_ring_buffer_smaller_than_the_checkpoint(scheme: object) -> None:
    """7 [scitix/InstantTensor #9]: a ring that wraps only on large checkpoints."""
    full = randn(2560, 256)
    ring = torch.empty(128 << 10, dtype=torch.bfloat16)
    with online_quant(scheme):
        layer = nn.Linear(256, 2560, bias=False, dtype=torch.bfloat16)
        at = 0
        for r in range(0, 2560, 160):
            if at + 160 * 256 > ring.numel():
                at = 0
            view = ring[at : at + 160 * 256].view(160, 256)
            view.copy_(full[r : r + 160])
            layer.weight.data[r : r + 160].copy_(view)
            at += 160 * 256
    assert_oracle(layer.weight, full, scheme)


@every_scheme
def test_padding_is_zero_and_enters_no_scale(scheme: object) -> None:
    """8 [#50523, #54699]: padding relied on memory that happened to be zero."""
    logical = randn(45, 60)
    with online_quant(scheme, on_missing="zero") as session:
        layer = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
        layer.weight.data[:45, :60].copy_(logical)
    padded = torch.zeros(48, 64, dtype=torch.bfloat16)
    padded[:45, :60] = logical
    assert_oracle(layer.weight, padded, scheme)
    assert session.report().missing == {"weight": [((0, 45), (60, 64)), ((45, 48), (0, 64))]}


def test_expert_slot_that_nobody_writes_is_named() -> None:
    """9 [#37322, #37334]: redundant expert slots were quantized from uninitialised memory."""
    with pytest.raises(IncompleteLoadError, match=r"w: 512 of 2560 elements never written: \[4:5, 0:32, 0:16\]"):  # noqa: SIM117
        with online_quant(fp8_per_channel):
            m = Experts((5, 32, 16), torch.bfloat16)
            for global_id in range(8):
                local = {0: 0, 2: 1, 4: 2, 6: 3}.get(global_id)
                if local is not None:
                    m.w.data[local].copy_(randn(32, 16))
    with online_quant(fp8_per_tensor, on_missing="zero"):
        m = Experts((5, 32, 16), torch.bfloat16)
        m.w.data[:4].copy_(full := randn(4, 32, 16))
    assert torch.isfinite(m.w.scale).all()
    assert_oracle(m.w, torch.cat((full, torch.zeros(1, 32, 16).bfloat16())), fp8_per_tensor)


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16, bias=False)
        self.conv1d = nn.Conv1d(4, 4, 3, bias=False)
        self.register_buffer("expert_map", torch.arange(4, dtype=torch.int32))
        self.register_buffer("root_size", torch.tensor(0.0188), persistent=False)
        self.register_buffer("conv_weights", self.conv1d.weight.view(4, 12), persistent=False)


@pytest.mark.parametrize("form", ["construct", "model"])
def test_buffers_keep_value_dtype_and_storage(form: str) -> None:
    """10 and 12 [#37334, #44371, #42481]: runtime buffers were reset, or stopped aliasing the weight they view."""
    weight, conv = torch.randn(16, 16), torch.randn(4, 4, 3)
    if form == "construct":
        with online_quant(fp8_per_channel):
            m = WithBuffers()
            before = {n: b for n, b in m.named_buffers() if n != "conv_weights"}
            m.load_state_dict({"fc.weight": weight, "conv1d.weight": conv, "expert_map": torch.arange(4)})
    else:
        m = WithBuffers()
        before = dict(m.named_buffers())
        with online_quant(fp8_per_channel, m):
            m.load_state_dict({"fc.weight": weight, "conv1d.weight": conv, "expert_map": torch.arange(4)})
    for name, buffer in before.items():
        assert dict(m.named_buffers())[name] is buffer
    assert m.expert_map.dtype == torch.int32
    assert m.root_size.item() == pytest.approx(0.0188)
    assert m.conv_weights.data_ptr() == m.conv1d.weight.data_ptr()
    assert torch.equal(m.conv_weights, conv.view(4, 12))
    assert_oracle(m.fc.weight, weight, fp8_per_channel)


@pytest.mark.parametrize("form", ["construct", "model"])
def test_parameter_under_two_modules_is_loaded_and_quantized_once(form: str) -> None:
    """11 [#38746, huggingface/accelerate #3668]: a shared parameter was counted, and materialised, twice."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 24, bias=False)
            self.b = nn.Linear(16, 24, bias=False)
            self.b.weight = self.a.weight
            self.embed = nn.Embedding(32, 16)
            self.lm_head = nn.Linear(16, 32, bias=False)
            self.lm_head.weight = self.embed.weight

    full, table = torch.randn(24, 16), torch.randn(32, 16)
    state = {"a.weight": full, "b.weight": full, "embed.weight": table, "lm_head.weight": table}
    if form == "construct":
        with online_quant(fp8_per_channel) as session:
            m = Tied()
            m.load_state_dict(state)
    else:
        m = Tied()
        with online_quant(fp8_per_channel, m) as session:
            m.load_state_dict(state)
    assert m.a.weight is m.b.weight
    assert m.embed.weight is m.lm_head.weight
    assert [layer.name for layer in session.report().layers] == ["a.weight"]
    assert_oracle(m.a.weight, full, fp8_per_channel)
    assert torch.equal(m.embed.weight, table)


@every_scheme
@pytest.mark.parametrize("rank", [0, 1])
def test_tensor_parallel_slices_with_an_empty_last_shard(scheme: object, rank: int) -> None:
    """13 [#30900, #36621]: a loader that narrows the source first, and a rank whose shard is empty."""
    full, width = randn(96, 64), 48
    with online_quant(scheme):
        layer = nn.Linear(64, width, bias=False, dtype=torch.bfloat16)
        layer.weight.data.narrow(0, 0, width).copy_(full.narrow(0, rank * width, width))
        layer.weight.data.narrow(0, width, 0).copy_(full.narrow(0, 96, 0))
    assert_oracle(layer.weight, full[rank * width : (rank + 1) * width], scheme)


def test_missing_half_of_a_fused_weight_is_reported_by_row_and_name() -> None:
    """14 [#41022, #53192]: a fused weight with one shard missing was quantized all the same."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Linear(16, 64, bias=False)

    with pytest.raises(IncompleteLoadError) as error, online_quant(fp8_per_channel):
        m = Gated()
        m.gate_up_proj.weight.data[:32].copy_(torch.randn(32, 16))
    assert str(error.value) == (
        "gate_up_proj.weight: 32 of 64 rows never written: rows 32:64 (the checkpoint may lack 'up_proj'). "
        'Pass on_missing="zero" to fill them, "init" for layers that are meant to be new (a classifier head).'
    )


@every_scheme
def test_fused_shards_of_very_different_magnitude(scheme: object) -> None:
    """14: rows keep their own scales per channel; per tensor the fused matrix shares one, as vLLM does."""
    parts = fused()
    parts[1] *= 100
    with online_quant(scheme):
        m = Attention()
        m.qkv.bias.data.zero_()
        for i in (2, 0, 1):
            m.load(i, parts[i])
    assert_oracle(m.qkv.weight, torch.cat(parts), scheme)


@every_scheme
@pytest.mark.parametrize("gated", [True, False])
def test_experts_projection_by_projection(scheme: object, gated: bool) -> None:
    """15 [sgl-project/sglang #36733, #51125]: w1 and w3 of each expert in any order, and ungated experts."""
    e, inter, hidden = 4, 24, 40
    full = randn(e, 2 * inter if gated else inter, hidden)
    with online_quant(scheme):
        m = Experts(tuple(full.shape), torch.bfloat16)
        jobs = [(i, h) for i in range(e) for h in range(2 if gated else 1)]
        random.Random(3).shuffle(jobs)
        for i, half in jobs:
            m.w.data[i].narrow(0, half * inter, inter).copy_(full[i, half * inter : (half + 1) * inter])
    assert_oracle(m.w, full, scheme)


@pytest.mark.parametrize("width", [64, 192])
def test_block_quantization_of_widths_that_are_no_multiple_of_128(width: int) -> None:
    """16 [#44763, #52997]: odd shard widths failed in the middle of a load. Edge blocks are padded."""
    full = randn(width, width)
    with online_quant(fp8_per_block):
        layer = nn.Linear(width, width, bias=False, dtype=torch.bfloat16)
        for r in range(0, width, 32):
            layer.weight.data[r : r + 32].copy_(full[r : r + 32])
    assert layer.weight.scale.shape == (-(-width // 128), -(-width // 128))
    assert_oracle(layer.weight, full, fp8_per_block)


def test_scalars_fills_and_broadcasts_count_and_misfits_are_named() -> None:
    """17 [#38995, vllm-project/vime #133]: scalars escaped the counter; a bad shape raised without a name."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.empty(()))
            self.gain = nn.Parameter(torch.empty(1))
            self.a, self.b, self.c = (nn.Linear(4, 6, bias=False) for _ in range(3))

    full = torch.randn(6, 4)
    with online_quant(fp8_per_channel):
        m = Scaled()
        m.scale.data.fill_(2.5)
        m.gain.data.copy_(torch.tensor(3.0))
        with torch.no_grad():
            m.a.weight[...] = full
        m.b.weight.data.copy_(full[0])
        m.c.weight.data.fill_(0.5)
        with pytest.raises(WeightShapeError, match=r"a\.weight: a source of shape \[5, 4\] does not fit .*\[6, 4\]"):
            m.a.weight.data.copy_(torch.randn(5, 4))
        with pytest.raises(WeightShapeError, match=r"b\.weight: .* shape \[3\] does not fit into \[2:4, 0:4\]"):
            m.b.weight.data[2:4].copy_(torch.randn(3))
        # What could not be written is written again: until then the session does not forget the error.
        m.a.weight.data.copy_(full)
        m.b.weight.data[2:4].copy_(full[0])
    assert m.scale.item() == 2.5
    assert m.gain.item() == 3.0
    assert_oracle(m.a.weight, full, fp8_per_channel)
    assert_oracle(m.b.weight, full[0].expand(6, 4), fp8_per_channel)
    assert_oracle(m.c.weight, torch.full((6, 4), 0.5), fp8_per_channel)


def test_missing_weight_is_an_error_that_lists_every_name() -> None:
    """18 [#45835, sgl-project/sglang #16235]: a weight the checkpoint lacks served garbage without a word."""
    with pytest.raises(IncompleteLoadError) as error, online_quant(fp8_per_channel):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 8, bias=False))
        model.load_state_dict({"0.weight": torch.randn(4, 4), "0.bias": torch.randn(4)}, strict=False)
    assert set(error.value.missing) == {"1.weight", "1.bias", "2.weight"}
    assert error.value.missing["2.weight"] == [((0, 8), (0, 4))]
    assert_no_hooks()


@pytest.mark.parametrize("inference", [False, True])
def test_every_holder_of_the_parameter_sees_the_quantized_weight(inference: bool) -> None:
    """24 [#31914, pytorch/torchdistx #11, sglang #31263]: held references kept the bf16 weights alive."""
    full = randn(64, 32)
    with online_quant(fp8_per_tensor) as session:
        layer = nn.Linear(32, 64, bias=False).to(torch.bfloat16)
        held, captured = dict(layer.named_parameters()), layer.weight
        with torch.inference_mode(inference):
            for r in range(0, 64, 16):
                held["weight"].data[r : r + 16].copy_(full[r : r + 16])
        assert isinstance(captured, QTensor)
    assert captured is layer.weight is held["weight"]
    assert_oracle(captured, full, fp8_per_tensor)
    assert session.report().peak_staged_bytes == full.nbytes
    gc.collect()
    assert session._work._memory.staged == 0


def test_half_before_loading_is_honoured() -> None:
    """24 [pytorch/torchdistx #12]: `.to(dtype)` on a module whose weights do not exist yet."""
    full = torch.randn(8, 4)
    with online_quant(fp8_per_channel):
        layer = nn.Linear(4, 8).half()
        assert layer.weight.dtype == torch.float16
        layer.load_state_dict({"weight": full, "bias": full[:, 0]})
    assert layer.bias.dtype == torch.float16
    assert_oracle(layer.weight, full.half(), fp8_per_channel)


@every_scheme
def test_already_quantized_values_are_taken_unchanged(scheme: object) -> None:
    """25 [#55198, #41174]: loaders that carry post-quantization tensors."""
    ready = quantize(randn(40, 24), scheme)
    with online_quant(scheme):
        layer = nn.Linear(24, 40, bias=False, dtype=torch.bfloat16)
        layer.weight.data.copy_(ready)
    assert same_bytes(layer.weight.qdata, ready.qdata)
    assert same_bytes(layer.weight.scale, ready.scale)


def test_dummy_load_and_ignored_layers_end_with_valid_tensors() -> None:
    """25 [#38478, vllm-project/vllm-omni #2920]: no load at all, and layers that must stay as they are."""
    with online_quant(fp8_per_channel, on_missing="init", ignore=["head"]) as session:
        model = nn.Sequential()
        model.body, model.head = nn.Linear(16, 32), nn.Linear(32, 4)
    report = session.report()
    assert type(model.body.weight) is QTensor
    assert type(model.head.weight) is nn.Parameter
    assert model.body.weight.dequantize().std() > 0.05
    assert model.head.weight.std() > 0.05
    assert report.quantized_bytes == 16 * 32 + 4 * 32
    assert report.passthrough_bytes == 4 * (32 + 32 * 4 + 4)
    assert set(report.untouched) == {"body.weight", "body.bias", "head.weight", "head.bias"}


def test_reading_back_quantized_rows_is_counted_or_refused() -> None:
    """Law 4: a lossy read is the loader's to know about."""
    full = randn(8, 16)
    with online_quant(fp8_per_channel) as session:
        layer = nn.Linear(16, 8, bias=False, dtype=torch.bfloat16)
        layer.weight.data[:4].copy_(full[:4])
        back = layer.weight.data[:4].clone()
        assert session.report().lossy_reads == 1
        assert torch.equal(back, quantize(full[:4], fp8_per_channel).dequantize())
        with pytest.raises(IncompleteLoadError, match="4 of 8 rows never written: rows 4:8"):
            layer.weight.data.clone()
        layer.weight.data.copy_(full)
    with pytest.raises(LossyReadError, match=r"^weight: "), online_quant(fp8_per_channel, strict_reads=True):
        layer = nn.Linear(16, 8, bias=False, dtype=torch.bfloat16)
        layer.weight.data.copy_(full)
        layer.weight.data.clone()
    assert_no_hooks()


@every_scheme
def test_keep_fills_what_was_not_loaded_with_the_models_own_values(scheme: object) -> None:
    """25: a model that has values, a checkpoint that has only some of them, down to parts of rows."""
    old, new = randn(140, 48), randn(140, 48)
    layer = nn.Linear(48, 140, bias=False, dtype=torch.bfloat16)
    layer.weight.data.copy_(old)
    with online_quant(scheme, layer, on_missing="keep") as session:
        layer.weight.data[10:60, :20].copy_(new[10:60, :20])
    old[10:60, :20] = new[10:60, :20]
    assert_oracle(layer.weight, old, scheme)
    assert "weight" in session.report().missing
    assert session.report().untouched == []


def test_keep_has_nothing_to_keep_in_a_model_that_is_being_constructed() -> None:
    with pytest.raises(IncompleteLoadError, match='on_missing="keep" has nothing to fill them with'):  # noqa: SIM117
        with online_quant(fp8_per_channel, on_missing="keep"):
            _model = nn.Linear(4, 4, bias=False)
