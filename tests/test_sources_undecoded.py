"""Whole quantized weights, handed to loaders that take tensors: each view of one is that view of its values."""

from __future__ import annotations

import contextlib
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qtensor import LossySourceError, QTensorError, online_quant, quantize
from qtensor.sources.undecoded import QuantizedMatrix, Undecoded
from support.arriving import NAMES, slow_data
from support.helpers import assert_oracle
from support.sources import FORMS, Tensors, source_of, whole


def matrix(parts: Tensors, shape: tuple[int, int]) -> QuantizedMatrix:
    return QuantizedMatrix(source_of(parts), parts, shape)


def undecoded(parts: Tensors, shape: tuple[int, int]) -> Undecoded:
    return Undecoded.of([matrix(parts, shape)], torch.bfloat16, stacked=False)


def sizes(data: st.DataObject, form: str, most: int = 400) -> tuple[int, int]:
    multiple, even = FORMS[form].multiple, FORMS[form].rows
    return even * data.draw(st.integers(1, most // even)), multiple * data.draw(st.integers(1, most // multiple))


@slow_data
@given(st.data(), st.sampled_from(sorted(FORMS)))
def test_any_views_are_views_of_its_values(data: st.DataObject, form: str) -> None:
    shape = sizes(data, form, 160)
    parts = FORMS[form].parts(*shape)
    view, values = undecoded(parts, shape), whole(parts, torch.bfloat16, shape)
    for _ in range(data.draw(st.integers(0, 4))):
        dim = data.draw(st.integers(0, values.dim() - 1))
        start = data.draw(st.integers(0, max(values.shape[dim] - 1, 0)))
        length = data.draw(st.integers(0, values.shape[dim] - start))
        step = data.draw(st.sampled_from(["narrow", "t", "unsqueeze", "contiguous", "chunk", "every other", "flatten"]))

        def take(t: Any, step: str = step, dim: int = dim, start: int = start, length: int = length) -> Any:
            if step == "narrow":
                return t.narrow(dim, start, length)
            if step == "chunk":
                return t.chunk(2, dim)[0]
            if step == "every other":
                return t[::2]
            if step == "contiguous":
                return t.contiguous()
            return {"t": lambda: t.mT if t.dim() > 1 else t, "unsqueeze": lambda: t.unsqueeze(dim)}.get(
                step, lambda: t.flatten()
            )()

        view, values = take(view), take(values)
    assert view.shape == values.shape
    plain = torch.zeros_like(values)
    plain.copy_(view)
    for found in (plain, view.clone()):
        assert torch.equal(found.view(torch.int16), values.view(torch.int16))


def became(weight: Any, values: torch.Tensor, told: str) -> None:
    """Rows are those of the values quantized; or, where they were moved, the very values."""
    expected = quantize(values, weight.scheme).dequantize()
    rows = (weight.dequantize() == expected).all(-1)
    if told != "requantized" or weight.scheme.format.granularity == "block":
        rows |= torch.isclose(weight.dequantize().float(), values.float(), rtol=2**-7, atol=0).all(-1)
    assert rows.all()
    if told == "lossless":
        assert torch.equal(weight.dequantize(), values)
    elif told == "requantized" and weight.scheme.format.granularity != "block":
        assert_oracle(weight, values, weight.scheme)


@slow_data
@given(st.data(), st.sampled_from(sorted(FORMS)), st.sampled_from(NAMES))
def test_a_shard_of_fused_weights_is_that_of_their_values(data: st.DataObject, form: str, scheme: str) -> None:
    """As vLLM's loaders fill one rank's part of a fused weight: rows, or columns, of several."""
    rows, cols = sizes(data, form)
    count, ranks, rank = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2)), data.draw(st.integers(0, 1))
    dim = data.draw(st.integers(0, 1))
    each = [FORMS[form].parts(rows, cols, seed) for seed in range(count)]
    cut = [whole(parts, torch.bfloat16, (rows, cols)).chunk(ranks, dim)[rank % ranks :][:1] for parts in each]
    values = torch.cat([shard for found in cut for shard in found]) if all(cut) else torch.empty(0)
    if not values.numel():
        return
    session = online_quant(scheme)
    with session:
        model = nn.Linear(values.shape[1], len(values), bias=False, dtype=torch.bfloat16)
        for at in data.draw(st.permutations(range(count))):
            shard = undecoded(each[at], (rows, cols)).chunk(ranks, dim)[rank % ranks]
            model.weight.data.narrow(0, at * len(shard), len(shard)).copy_(shard)
    report = session.report().layers[0]
    source, _, told = report.source.rpartition(": ")
    assert source == str(source_of(each[0], shape=(rows, cols)))
    assert (report.sqnr == inf) == (told == "lossless")
    became(model.weight, values, told)


LOSSLESS = [
    ("fp8 blocks", "fp8_per_block"),
    ("fp8 ue8m0 blocks", "mxfp8"),
    ("mxfp4", "mxfp4"),
    ("mxfp4", "mxfp8"),
    ("int4 channel", "int8_per_channel"),
]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("form", "scheme"), LOSSLESS, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_takes_its_part_of_values_and_scales_as_they_are(
    form: str, scheme: str, dim: int, stacked: bool
) -> None:
    """Rows or columns that are whole groups; of a stack, too."""
    each = [FORMS[form].parts(256, 512, seed) for seed in range(3 if stacked else 1)]
    made = Undecoded.of([matrix(parts, (256, 512)) for parts in each], torch.bfloat16, stacked)
    values = torch.stack([whole(parts, torch.bfloat16, (256, 512)) for parts in each])
    shards, expected = [t.chunk(2, t.dim() - 2 + dim)[1] for t in (made, values if stacked else values[0])]

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(expected.shape, dtype=torch.bfloat16))

    with online_quant(scheme, targets=["weight"]) as session:
        model = Experts()
        model.weight.data.copy_(shards)
    assert session.report().layers[0].source.endswith(": lossless")
    assert session.report().peak_staged_bytes == 0
    assert torch.equal(model.weight.dequantize(), expected)


@pytest.mark.parametrize(("form", "scheme"), [("fp8 blocks", "mxfp4"), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp8")])
def test_loss_is_refused_by_name_where_it_is_not_allowed(form: str, scheme: str) -> None:
    refused = pytest.raises(LossySourceError, match=r"^weight: .* cannot be moved as it is .* in (mxfp4|nvfp4),")
    with contextlib.nullcontext() if form == "mxfp4" else refused, online_quant(scheme, strict_source="lossless"):
        model = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
        model.weight.data.copy_(undecoded(FORMS[form].parts(128, 256), (128, 256)))


def test_it_is_not_changed_in_place() -> None:
    view = undecoded(FORMS["mxfp4"].parts(32, 64), (32, 64))
    with pytest.raises(QTensorError, match=r"would change Undecoded\(\[32, 64\], .*, mxfp4\)"):
        view.zero_()
    assert view.clone().zero_().sum() == 0
