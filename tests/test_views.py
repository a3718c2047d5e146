"""Views of finished quantized weights: whatever is written through one arrives in the weight, or raises."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtensor import (
    NonFiniteWeightError,
    QTensor,
    QTensorError,
    Scheme,
    fp8_per_block,
    fp8_per_channel,
    online_quant,
    online_reload,
    quantize,
)
from qtensor.lazy.lazy_tensor import LiveQTensor
from qtensor.schemes.scheme import SCHEMES
from support.helpers import assert_oracle, holder, same_bytes

NAMES = sorted({scheme.name for scheme in SCHEMES.values()})


def views_of(draw: Any, t: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A view operation that a tensor of this geometry takes."""
    dims = t.dim()
    dim = draw(st.integers(-dims, dims - 1))
    n = t.shape[dim]
    start, stop = sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))
    step, other = draw(st.integers(1, 3)), draw(st.integers(0, dims - 1))
    at = draw(st.integers(0, n - 1)) if n else 0
    lead = (slice(None),) * (dim % dims)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "slice": lambda t: t[(*lead, slice(start, stop))],
        "steps": lambda t: t[(*lead, slice(start, stop, step))],
        "narrow": lambda t: t.narrow(dim, start, stop - start),
        "transpose": lambda t: t.transpose(dim, other),
        "flatten": lambda t: t.view(-1) if t.is_contiguous() else t,
        "unsqueeze": lambda t: t.unsqueeze(dim),
        "none": lambda t: t[None],
        "detach": lambda t: t.detach(),
        "data": lambda t: t.data,
        "permute": lambda t: t.permute(*reversed(range(t.dim()))),
        "chunk": lambda t: t.chunk(2, dim)[0],
        "split": lambda t: t.split(max(1, n // 3), dim)[-1],
        "diagonal": lambda t: t.diagonal() if t.dim() > 1 else t,
        "view_as": lambda t: t.view_as(t),
    }
    if n:
        ways |= {
            "select": lambda t: t.select(dim, at),
            "index": lambda t: t[(*lead, at)],
            "unbind": lambda t: t.unbind(dim)[at],
        }
    if dims < 2:
        del ways["transpose"], ways["permute"], ways["diagonal"]
    return ways[draw(st.sampled_from(sorted(ways)))]


def writes_of(draw: Any, t: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """An operation that writes to a tensor of this geometry."""
    torch.manual_seed(draw(st.integers(0, 99)))
    values, number = torch.randn(t.shape).to(t.dtype), float(draw(st.integers(-3, 3)))
    mask, rows = torch.rand(t.shape) < 0.5, torch.randperm(t.shape[0])[: max(1, t.shape[0] // 2)] if t.dim() else None
    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "copy_": lambda t: t.copy_(values),
        "fill_": lambda t: t.fill_(number),
        "zero_": lambda t: t.zero_(),
        "add_": lambda t: t.add_(values, alpha=0.5),
        "sub_": lambda t: t.sub_(values),
        "mul_": lambda t: t.mul_(number),
        "div_": lambda t: t.div_(values.abs() + 1),
        "neg_": lambda t: t.neg_(),
        "clamp_": lambda t: t.clamp_(-0.5, 0.5),
        "relu_": lambda t: torch.relu_(t),
        "lerp_": lambda t: t.lerp_(values, 0.25),
        "addcmul_": lambda t: t.addcmul_(values, values),
        "masked_fill_": lambda t: t.masked_fill_(mask, number),
        "masked_scatter_": lambda t: t.masked_scatter_(mask, values),
        "set item": lambda t: t.__setitem__(..., values),
        "set by mask": lambda t: t.__setitem__(mask, number),
        "out=": lambda t: torch.mul(values, 2, out=t),
        "foreach": lambda t: torch._foreach_mul_([t], number),
        "foreach copy": lambda t: torch._foreach_copy_([t], [values]),
        "where out": lambda t: torch.where(mask, values, values + 1, out=t),
        "set_": lambda t: t.set_(values),  # type: ignore[arg-type]
        "squeeze_": lambda t: t.squeeze_(),
        "init": lambda t: torch.nn.init.constant_(t, number),
    }
    if t.dim():
        ways |= {
            "index_copy_": lambda t: t.index_copy_(0, rows, values[rows]),
            "index_add_": lambda t: t.index_add_(0, rows, values[rows]),
            "index_fill_": lambda t: t.index_fill_(0, rows, number),
            "set items": lambda t: t.__setitem__(rows, values[rows]),
            "scatter_": lambda t: t.scatter_(0, torch.zeros(t.shape, dtype=torch.int64), values),
            "cumsum_": lambda t: t.cumsum_(0),
            "iadd": lambda t: t.__setitem__(0, t[0] + 1),
        }
    if t.dim() == 2:
        ways["addmm_"] = lambda t: t.addmm_(torch.ones(t.shape[0], 2, dtype=t.dtype), values[:1].repeat(2, 1))
    return ways[draw(st.sampled_from(sorted(ways)))]


def in_units(w: QTensor, values: torch.Tensor) -> list[torch.Tensor]:
    """Values of a weight's shape, cut into what shares a scale, as far as rows and matrices go."""
    height = w.scheme.format.unit_rows(w.shape[-2])
    return [rows for matrix in values.view(-1, *w.shape[-2:]) for rows in matrix.split(height)]


@settings(max_examples=3000 if os.environ.get("QTENSOR_ENDURANCE") else 60)
@given(data=st.data(), name=st.sampled_from(NAMES), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_a_write_through_any_view_arrives_or_raises(data: st.DataObject, name: str, dtype: torch.dtype) -> None:
    shape = data.draw(st.sampled_from([(130, 70), (6, 40), (3, 5, 34), (1, 1), (2, 130, 36)]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    weight = quantize(torch.randn(shape).to(dtype), name)
    plain, before = weight.dequantize(), weight.dequantize()
    ours: torch.Tensor = weight
    theirs = plain
    for _ in range(data.draw(st.integers(1, 3))):
        if not theirs.dim():
            break
        take = views_of(data.draw, theirs)
        ours, theirs = take(ours), take(theirs)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    values = ours.dequantize() if isinstance(ours, QTensor) else ours
    assert np.array_equal(values.float().numpy(), theirs.float().numpy())
    write = writes_of(data.draw, theirs)
    with torch.no_grad():
        try:
            write(theirs)
        except (RuntimeError, IndexError):
            with pytest.raises((RuntimeError, IndexError, QTensorError)):
                write(ours)
            assert torch.equal(weight.dequantize(), before)
            return
        try:
            write(ours)
        except QTensorError:
            assert torch.equal(weight.dequantize(), before)
            return
    want, got = quantize(plain, name).dequantize(), weight.dequantize()
    for now, exact, old, wanted in zip(*(in_units(weight, v) for v in (got, want, before, plain)), strict=True):
        assert torch.equal(now, exact) or (torch.equal(wanted, old) and torch.equal(now, old))


def part() -> tuple[QTensor, torch.Tensor]:
    """A weight, and a part of it that no scale group ends with."""
    weight = quantize(torch.randn(6, 40, generator=torch.Generator().manual_seed(1)), "mxfp8")
    return weight, weight[:, 3:7]


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda t: pickle.loads(pickle.dumps(t)),
        lambda t: torch.load(save(t)),
        lambda t: torch.from_numpy(t.numpy()),
        lambda t: torch.tensor(t.tolist()),
        lambda t: torch.from_dlpack(t),
        lambda t: t.clone(),
        lambda t: t + 0,
    ],
)
def test_a_part_is_read_as_the_plain_tensor_it_is(copied: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight, view = part()
    found = copied(view)
    assert type(found) is torch.Tensor
    assert torch.equal(found, weight.dequantize()[:, 3:7])
    assert repr(view) == repr(found)


def save(t: torch.Tensor) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    return file


def test_values_that_no_scale_can_hold_leave_the_weight_as_it_was() -> None:
    weight, view = part()
    before = weight.dequantize()
    with pytest.raises(NonFiniteWeightError):
        view.fill_(float("inf"))
    assert torch.equal(weight.dequantize(), before)


def test_what_cannot_be_brought_to_the_weight_is_refused() -> None:
    weight, view = part()
    for write in (lambda: view.t_(), lambda: view.resize_(2, 2), lambda: torch._foreach_add_([view, view], 1.0)):
        with pytest.raises(QTensorError, match=r"on a part \[6, 4\] of a quantized weight \[6, 40\]"):
            write()
    with pytest.raises(QTensorError, match="would modify a quantized weight"):
        torch.add(torch.ones(6, 40), 1, out=weight)


def test_one_after_another() -> None:
    """A part that was written shows what the weight then holds, and can be written again."""
    weight, view = part()
    view.fill_(0.3)
    assert torch.equal(view, weight.dequantize()[:, 3:7])
    plain = weight.dequantize()
    plain[:, 3:7].add_(1)
    view.add_(1)
    assert all(same_bytes(a, b) for a, b in zip(weight.parts(), quantize(plain, "mxfp8").parts(), strict=True))


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("shape", [(40, 64), (2, 40, 64)])
def test_the_transpose_of_a_weight_that_is_loaded_is_written_as_the_weight_is(
    atomic: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    first, second, x = torch.randn(shape), torch.randn(shape), torch.randn(*shape[:-2], 3, shape[-1])
    model, name = holder(first)
    weight = model.get_parameter(name)
    with online_quant(fp8_per_block, model, targets=["*"]):
        weight.data.copy_(second)
        weight.mT.copy_(first.mT)
        assert type(weight) is LiveQTensor
        assert torch.equal(weight.data.clone(), quantize(first, fp8_per_block).dequantize())
    assert_oracle(weight, first, fp8_per_block)
    before, product = weight.dequantize(), x @ weight.mT
    with contextlib.suppress(KeyError), online_reload(model, atomic=atomic):
        weight.mT[..., :8].copy_(second.mT[..., :8])
        assert torch.equal(x @ weight.mT, product)
        assert torch.equal(weight.mT[..., 0].clone(), before.mT[..., 0]), "the model's values, until the end"
        raise KeyError
    assert torch.equal(weight.dequantize(), before)
    with online_reload(model, atomic=atomic):
        weight.mT.copy_(second.mT)
    assert_oracle(weight, second, fp8_per_block)


def test_a_parameter_made_of_a_part_has_values_of_its_own() -> None:
    weight, view = part()
    before, param = weight.dequantize(), nn.Parameter(view)
    assert torch.equal(param, view)
    param.square().sum().backward()
    torch.optim.SGD([param], lr=0.1).step()
    assert torch.equal(weight.dequantize(), before)
    assert torch.allclose(param, before[:, 3:7] * 0.8)


def test_a_model_computes_in_a_session_as_it_does_after_it() -> None:
    """A linear layer's product has its bias first, which is lazy, too."""
    torch.manual_seed(0)
    x, scheme = torch.randn(3, 64), Scheme(fp8_per_channel.format, "dynamic")
    state = nn.Linear(64, 48).state_dict()
    with online_quant(scheme):
        model = nn.Linear(64, 48)
        model.load_state_dict(state)
        loading = model(x)
    with online_reload(model):
        model.weight.data[:, :8].zero_()
        reloading = model(x)
        model.load_state_dict(state)
    assert torch.equal(loading, model(x))
    assert torch.equal(reloading, model(x))


@pytest.mark.parametrize("index", [[0, 2], torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_matrices_of_a_stack_by_index(index: Any) -> None:
    """What an index selects is a copy, also of whole matrices."""
    weight, values = quantize(torch.randn(3, 5, 34), "fp8_per_tensor"), torch.randn(2, 5, 34)
    plain = weight.dequantize()
    for t in (weight, plain):
        t[index] = values
    assert torch.equal(weight.dequantize(), quantize(plain, "fp8_per_tensor").dequantize())
