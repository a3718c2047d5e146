"""Rows that are decoded a few at a time, as they are quantized: the bytes of the whole matrix decoded, then quantized;
and where one scale is for all of a matrix, no matrix in high precision."""

from __future__ import annotations

from math import inf, prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtensor import NonFiniteWeightError, online_quant
from qtensor.kernels import Audit, Parts, choose
from qtensor.lazy.quant_store import QuantStore
from qtensor.schemes.scheme import SCHEMES
from qtensor.sources import holding, rooms, undecoded
from qtensor.sources.source import Source
from support.arriving import NAMES, assert_arrived, layer, named, outcome, slow_data
from support.helpers import same_bytes
from support.sources import FORMS, source_of

ROWS = 300
"""Three chunks: of 128 rows, the fewest there are."""


@pytest.fixture
def smallest_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (holding, undecoded):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1)


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that were decoded together, each time."""
    found: list[int] = []
    plain = rooms.decoded

    def decoded(source: Source, parts: Any, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        found.append(shape[0])
        return plain(source, parts, shape, dtype)

    monkeypatch.setattr(rooms, "decoded", decoded)
    return found


@pytest.mark.parametrize("form", sorted(FORMS))
def test_chunks_give_the_bytes_of_the_whole(form: str, smallest_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ROWS if FORMS[form].rows == 1 else 384
    parts, counts = FORMS[form].parts(rows, 256), count_rows(monkeypatch)
    quick = source_of(parts, dict(FORMS[form].config or {})).quick
    for scheme in NAMES:
        counts.clear()
        model = layer(rows, 256)
        with online_quant(scheme, model, source=FORMS[form].config) as session:
            model.load_state_dict(named(parts))
        assert_arrived(model.weight, parts, outcome(session))
        if outcome(session) == "requantized":
            assert sum(counts) % rows == 0
            assert max(counts) == (128 if quick or scheme not in ("nvfp4", "fp8_per_tensor") else rows)


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "fp8_per_tensor", "fp8_per_block"])
def test_a_value_that_is_no_number_is_named_and_the_matrix_may_come_again(scheme: str, smallest_chunks: None) -> None:
    parts = FORMS["fp8 blocks"].parts(ROWS, 256)
    broken = {name: tensor.clone() for name, tensor in parts.items()}
    broken["*"].view(torch.uint8)[299, 7] = 0xFF
    model = layer(ROWS, 256)
    with online_quant(scheme, model):
        with pytest.raises(NonFiniteWeightError, match=r"weight: .*\[299, 7\]"):
            model.load_state_dict(named(broken))
        model.load_state_dict(named(parts))
    assert_arrived(model.weight, parts, "lossless" if scheme == "fp8_per_block" else "requantized")
    model = layer(ROWS, 256)
    with online_quant(scheme, model, on_nonfinite="keep"):
        model.load_state_dict(named(broken))
    assert model.weight.dequantize()[:299].isfinite().all()


@slow_data
@given(st.data(), st.sampled_from(sorted(FORMS)), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_the_largest_magnitude_is_that_of_what_is_decoded(data: st.DataObject, form: str, dtype: torch.dtype) -> None:
    multiple, even = FORMS[form].multiple, FORMS[form].rows
    rows, cols = even * data.draw(st.integers(1, 300 // even)), multiple * data.draw(st.integers(1, 300 // multiple))
    parts = FORMS[form].parts(rows, cols, data.draw(st.integers(0, 99)))
    source = source_of(parts)
    if "*" in parts and parts["*"].dtype == torch.float8_e4m3fn:
        kind = data.draw(st.sampled_from(["plain", "nan", "overflow", "zero"]))
        scale = next(name for name in parts if "scale" in name)
        if kind == "nan":
            parts["*"].view(torch.uint8)[data.draw(st.integers(0, rows - 1)), 0] = data.draw(
                st.sampled_from([0x7F, 0xFF])
            )
        elif kind == "overflow" and parts[scale].dtype == torch.float32:
            parts[scale].reshape(-1)[0] = 3e38
        elif kind == "zero":
            parts["*"].view(torch.uint8).bitwise_and_(0x80)
    needed = {name: parts[name] for name, spec in source.parts((rows, cols)).items() if spec.needed}
    found = source.decode(needed, (rows, cols), dtype).abs().float().max().item()
    amax = source.amax(needed, (rows, cols), dtype)
    if amax is not None:
        assert amax == found
    if found == inf:
        assert amax is None


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8_per_tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_by_a_known_amax_have_the_bytes_of_the_whole(scheme: str, dtype: torch.dtype) -> None:
    """For every backend that a CPU has."""
    fmt, cpu = SCHEMES[scheme].format, torch.device("cpu")
    weight = torch.randn(ROWS, 250, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[299, 3] = -5.0
    for name in ("torch", "numba"):
        kernels: Any = choose(cpu, name)
        for audit in (Audit(), Audit(measure_sqnr=True), Audit(refuse_nonfinite=False)):
            wanted, made = (Parts.of((ROWS, 250), fmt, cpu) for _ in range(2))
            kernels.quantize_into(weight, wanted, fmt, Audit(audit.refuse_nonfinite, audit.measure_sqnr))
            amax = torch.zeros(1)
            for start in range(0, ROWS, 100):
                kernels.raise_amax(weight[start : start + 100], amax, fmt, audit, 0)
            for start in range(0, ROWS, 100):
                rows = slice(start, start + 100)
                kernels.quantize_rows(weight[rows], made.rows(rows.start, rows.stop, fmt), fmt, amax, audit, 0)
            for ours, theirs in zip(made, wanted, strict=True):
                assert ours is None or same_bytes(ours, theirs)


def test_what_has_one_scale_is_never_held_in_high_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """By either door, from scales and codes that come in any order, in slices."""
    written: list[int] = []
    write = QuantStore.write
    monkeypatch.setattr(QuantStore, "write", lambda s, v, t: (written.append(prod(v.size)), write(s, v, t))[1])
    for form in ("fp8 blocks", "mxfp8", "nvfp4"):
        parts = FORMS[form].parts(ROWS, 256)
        model = layer(ROWS, 256)
        with online_quant("fp8_per_tensor", model) as session:
            incoming: Any = session._work.incoming.of(model.weight._armed)
            for name, part in reversed(parts.items()):
                for start in range(0, len(part), 64):
                    box = ((start, min(start + 64, len(part))), *((0, n) for n in part.shape[1:]))
                    incoming.write(name, part[start : start + 64], box, tuple(part.shape))
        assert_arrived(model.weight, parts)
        assert session.report().peak_staged_bytes <= sum(t.nbytes for t in parts.values())
    assert not written
