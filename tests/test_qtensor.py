"""QTensor stands for its weight: products, slices, copies, state dicts, files, torch.compile."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qtensor import (
    NonFiniteWeightError,
    QTensor,
    QTensorError,
    Scheme,
    WeightDtypeError,
    WeightShapeError,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    quantize,
)
from qtensor.kernels import FP8_PER_CHANNEL
from qtensor.tensor.ops_products import scaled_mm
from support.helpers import same_bytes
from support.programs import PLAIN

every_scheme = pytest.mark.parametrize("scheme", PLAIN, ids=str)
SHAPES = [(256, 384), (200, 130)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)


def weight_only(q: QTensor) -> QTensor:
    return QTensor(q.qdata, q.scale, q.scheme.weight_only(), q.dtype, global_scale=q.global_scale, cols=q.cols)


def close(got: torch.Tensor, want: torch.Tensor, share: float) -> bool:
    return bool((got - want).abs().max() <= share * want.abs().max())


# Formulas, spelled out independently of the kernels ------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [fp8_per_tensor, fp8_per_channel, fp8_per_block], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_follow_the_published_formulas(scheme: object, dtype: torch.dtype) -> None:
    w = weight(200, 130, dtype=dtype)
    w[3] = 0
    x = w.float()
    if scheme is fp8_per_tensor:
        scale = (x.abs().max() / torch.tensor(448.0)).reshape(1)
        q = x * (1 / scale)
    elif scheme is fp8_per_channel:
        scale = (x.abs().amax(1, keepdim=True) / torch.tensor(448.0)).clamp_min(1 / (448 * 512))
        q = x / scale
    else:
        padded = F.pad(x, (0, 126, 0, 56)).view(2, 128, 2, 128)
        scale = padded.abs().amax((1, 3)).clamp_min(1e-4) / torch.tensor(448.0)
        q = (padded * (1 / scale)[:, None, :, None]).reshape(256, 256)[:200, :130]
    result = quantize(w, scheme)
    assert same_bytes(result.scale, scale)
    assert same_bytes(result.qdata, q.clamp(-448, 448).to(torch.float8_e4m3fn))


@every_scheme
def test_zero_weight_has_a_finite_scale_and_zero_data(scheme: object) -> None:
    q = quantize(torch.zeros(130, 5), scheme)
    assert all(part.float().isfinite().all() for part in q.parts())
    assert torch.equal(q.dequantize(), torch.zeros(130, 5))


@every_scheme
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_is_refused_by_index_or_kept_on_request(scheme: object, bad: float) -> None:
    w = weight(2, 140, 130)
    w[1, 137, 129] = bad
    with pytest.raises(NonFiniteWeightError, match=r"at index \[1, 137, 129\] of \[2, 140, 130\]"):
        quantize(w, scheme)
    kept = quantize(w, scheme, on_nonfinite="keep")
    assert all(part.float().isfinite().all() for part in kept.parts()[1:])
    value = kept.dequantize()[1, 137, 129]
    if bad == bad:
        assert torch.sign(value) == torch.sign(torch.tensor(bad))
    else:
        assert torch.isnan(value) if scheme.format.keeps_nan else value == 0


def test_quantize_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(WeightShapeError):
        quantize(torch.randn(4), fp8_per_channel)
    with pytest.raises(WeightDtypeError):
        quantize(torch.ones(4, 4, dtype=torch.int8), fp8_per_channel)
    with pytest.raises(ValueError, match="unknown scheme 'fp7'"):
        quantize(torch.randn(4, 4), "fp7")


# Products -------------------------------------------------------------------------------------------------------------


@every_scheme
@every_shape
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_products_equal_those_of_the_dequantized_weight(scheme, shape, mode) -> None:
    q = quantize(weight(*shape), scheme)
    w, only = q.dequantize(), weight_only(q)
    x, bias = torch.randn(3, 5, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16()
    with mode():
        assert close(F.linear(x, only, bias), F.linear(x, w, bias), 0.01)
        assert close(F.linear(x, q, bias), F.linear(x, w, bias), 0.06)
        assert close(x @ only.t(), F.linear(x, w), 0.01)
        assert close(torch.addmm(bias, x[0], only.t()), F.linear(x[0], w, bias), 0.01)
        assert close(x[0].new_ones(4, shape[0]) @ only, x[0].new_ones(4, shape[0]) @ w, 0.01)


@every_scheme
def test_gradients_reach_the_input(scheme) -> None:
    q = quantize(weight(64, 32), scheme)
    x = torch.randn(4, 32).bfloat16().requires_grad_()
    reference = x.detach().clone().requires_grad_()
    F.linear(x, weight_only(q)).sum().backward()
    F.linear(reference, q.dequantize()).sum().backward()
    assert close(x.grad, reference.grad, 0.01)


def test_activations_are_quantized_per_token() -> None:
    """Each token to fp8 with its own scale where "dynamic" says so; the default keeps x on a device without fp8."""
    q = quantize(torch.eye(16, dtype=torch.bfloat16), Scheme(FP8_PER_CHANNEL, "dynamic"))
    x = torch.randn(3, 16).bfloat16() * torch.tensor([[1.0], [100.0], [0.01]]).bfloat16()
    rounded = quantize(x, fp8_per_channel).dequantize()
    assert close(F.linear(x, q), rounded, 0.005)
    for scheme in (fp8_per_channel, fp8_per_channel.weight_only()):
        assert torch.equal(F.linear(x, QTensor(q.qdata, q.scale, scheme)), x)


@every_scheme
@pytest.mark.parametrize("grad", [False, True])
def test_grouped_products_multiply_by_the_experts_of_their_rows(scheme, grad: bool) -> None:
    """What transformers calls; rows beyond the last offset belong to nobody."""
    only = weight_only(quantize(weight(3, 64, 32), scheme))
    x, offsets = torch.randn(9, 32).bfloat16(), torch.tensor([2, 2, 8], dtype=torch.int32)
    x.requires_grad_(grad)
    got = torch.nn.functional.grouped_mm(x, only.mT, offs=offsets)
    want = torch.nn.functional.grouped_mm(x, only.dequantize().mT, offs=offsets)
    assert close(got[:8], want[:8], 0.01)
    if grad:
        got[:8].float().sum().backward()
        assert x.grad is not None
        assert x.grad[:8].isfinite().all()


@pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU"),
    reason="this PyTorch (2.11) has no scaled_mm on a CPU",
)
@pytest.mark.parametrize("scheme", [fp8_per_channel, fp8_per_tensor], ids=str)
def test_fp8_matmul_path_agrees_with_the_dequantized_one(scheme) -> None:
    """The product GPUs use, on the CPU, where torch emulates it."""
    q = quantize(weight(64, 32), scheme)
    x, bias = torch.randn(8, 32).bfloat16(), torch.randn(64).bfloat16()
    assert close(scaled_mm(x, q, bias), F.linear(x, q, bias), 0.01)


@every_scheme
def test_embedding_and_experts(scheme) -> None:
    q = quantize(weight(300, 130), scheme)
    rows = torch.tensor([[0, 5, 299], [130, 5, 1]])
    assert torch.equal(F.embedding(rows, q), F.embedding(rows, q.dequantize()))
    stack = quantize(weight(4, 150, 140), scheme)
    full = stack.dequantize()
    x = torch.randn(4, 2, 140).bfloat16()
    only = weight_only(stack)
    assert close(torch.bmm(x, only.transpose(1, 2)), torch.bmm(x, full.transpose(1, 2)), 0.01)
    for e in range(4):
        assert isinstance(stack[e], QTensor)
        assert same_bytes(stack[e].qdata, quantize(weight(4, 150, 140)[e], scheme).qdata)
    picked = stack[torch.tensor([2, 0, 2])]
    assert isinstance(picked, QTensor)
    assert torch.equal(picked.dequantize(), full[[2, 0, 2]])
    assert torch.equal(torch.stack([e.dequantize() for e in stack.unbind(0)]), full)


# Slices and writes ----------------------------------------------------------------------------------------------------


@functools.cache
def quantized(shape: tuple[int, ...], scheme) -> tuple[QTensor, torch.Tensor]:
    q = quantize(weight(*shape), scheme)
    return q, q.dequantize()


@every_scheme
@given(st.data())
def test_any_slice_reads_as_the_slice_of_the_dequantized_weight(scheme, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(300, 260), (3, 140, 260)]))
    q, full = quantized(shape, scheme)
    if data.draw(st.booleans()):
        q, full = q.transpose(-1, -2), full.transpose(-1, -2)
    for _ in range(data.draw(st.integers(1, 3))):
        d = data.draw(st.integers(0, full.dim() - 1))
        edges = sorted({0, full.shape[d], *(e for e in (128, 100, 1) if e < full.shape[d])})
        start, stop = sorted((data.draw(st.sampled_from(edges)), data.draw(st.sampled_from(edges))))
        where = (slice(None),) * d + (slice(start, stop, data.draw(st.sampled_from([1, 2]))),)
        q, full = q[where], full[where]
    got = q.dequantize() if isinstance(q, QTensor) else q
    assert torch.equal(got, full)


@every_scheme
def test_copy_requantizes_in_place(scheme) -> None:
    q = quantize(weight(256, 130), scheme)
    addresses = q.qdata.data_ptr(), q.scale.data_ptr()
    new = weight(256, 130) * 3
    q.copy_(new)
    assert same_bytes(q.qdata, quantize(new, scheme).qdata)
    q.t().copy_(weight(256, 130).t())
    assert same_bytes(q.qdata, quantize(weight(256, 130), scheme).qdata)
    q.fill_(0.5)
    assert torch.equal(q.dequantize(), torch.full((256, 130), 0.5).bfloat16())
    assert (q.qdata.data_ptr(), q.scale.data_ptr()) == addresses
    with pytest.raises(WeightShapeError):
        q.copy_(torch.randn(256, 131))
    with pytest.raises(WeightDtypeError):
        q.copy_(torch.ones(256, 130, dtype=torch.int64))
    with pytest.raises(NonFiniteWeightError):
        q.copy_(torch.full((256, 130), float("nan")))


def test_slices_of_whole_units_are_written_alone() -> None:
    new = weight(128, 256) * 2
    for scheme in (fp8_per_channel, fp8_per_block):
        q = quantize(weight(256, 256), scheme)
        q[128:].copy_(new)
        assert torch.equal(q.dequantize()[128:], quantize(new, scheme).dequantize())


def test_initialisation_in_place_is_refused() -> None:
    """6.5: it must not scramble finished weights (huggingface/transformers #39366)."""
    q = quantize(weight(8, 8), fp8_per_channel)
    before = q.dequantize()

    def _init_weights() -> None:
        q.mul_(2)

    for mutate in (lambda: q.normal_(), _init_weights, lambda: nn.init.kaiming_uniform_(q), lambda: q.relu_()):
        with pytest.raises(QTensorError, match="in place"):
            mutate()
    assert torch.equal(q.dequantize(), before)


# Copies, files, modules -----------------------------------------------------------------------------------------------


@every_scheme
def test_survives_copies_and_files(scheme) -> None:
    param = nn.Parameter(quantize(weight(140, 129), scheme), requires_grad=False)
    file = io.BytesIO()
    torch.save({"w": param}, file)
    file.seek(0)
    for twin in (copy.deepcopy(param), param.clone(), param.detach(), torch.load(file, weights_only=True)["w"]):
        assert type(twin) is QTensor
        assert twin.scheme == scheme
        assert len(twin.parts()) == len(param.parts())
        assert all(map(same_bytes, twin.parts(), param.parts()))
        assert twin.shape == param.shape
    assert isinstance(copy.deepcopy(param), nn.Parameter)
    assert param.half().dtype == torch.float16
    assert param.to("cpu").nbytes == sum(part.numel() * part.itemsize for part in param.parts())


@every_scheme
def test_state_dict_round_trip(scheme) -> None:
    source = nn.Linear(130, 140, dtype=torch.bfloat16)
    source.weight = nn.Parameter(quantize(weight(140, 130), scheme), requires_grad=False)
    quantized, plain, assigned = (copy.deepcopy(source), *(nn.Linear(130, 140, dtype=torch.bfloat16) for _ in range(2)))
    quantized.weight.zero_()
    quantized.load_state_dict(source.state_dict())
    plain.load_state_dict(source.state_dict())
    assigned.load_state_dict(source.state_dict(), assign=True)
    assert same_bytes(quantized.weight.qdata, source.weight.qdata)
    assert torch.equal(plain.weight, source.weight.dequantize())
    assert same_bytes(assigned.weight.qdata, source.weight.qdata)
    moved = source.to(torch.float16)
    assert type(moved.weight) is QTensor
    assert moved.weight.dtype == torch.float16


@every_scheme
@every_shape
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(scheme, shape, backend: str) -> None:
    layer = nn.Linear(shape[1], shape[0], dtype=torch.bfloat16)
    layer.weight = nn.Parameter(quantize(weight(*shape), scheme), requires_grad=False)
    x = torch.randn(3, shape[1]).bfloat16()
    torch._dynamo.reset()
    with torch.no_grad():
        assert close(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x), 0.01)


def test_shows_what_it_is_and_gives_its_values() -> None:
    q = quantize(torch.tensor([[1.0, 2.0], [0.5, -4.0]]), fp8_per_channel)
    assert repr(q) == "QTensor([2, 2], torch.float32, scheme=fp8_per_channel, device=cpu)"
    assert q.tolist() == q.dequantize().tolist()
    assert q.numpy().shape == (2, 2)
    assert torch.empty_like(q).dtype == torch.float32
    assert type(torch.zeros_like(q)) is torch.Tensor
