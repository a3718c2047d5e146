"""Memory over time and progress: bounded, and exact where it matters."""

import io
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from qtensor import (
    ProgressEvent,
    fp8,
    fp8_per_block,
    fp8_per_tensor,
    online_quant,
    quantize,
    quantize_checkpoint,
    verify_checkpoint,
)
from qtensor.kernels.audit import sqnr_db
from qtensor.report.timeline import MemoryTimeline
from support.helpers import assert_oracle

MB = 1 << 20


@given(
    st.lists(st.tuples(st.booleans(), st.integers(-20, 20)), max_size=300),
    st.integers(4, 40),
)
def test_peak_and_end_are_exact_and_points_are_bounded(events: list[tuple[bool, int]], bound: int) -> None:
    timeline = MemoryTimeline(bound)
    staged = peak = held = 0
    for staging, amount in events:
        if staging:
            amount = max(amount, -staged)
            timeline.stage(amount)
            staged += amount
            peak = max(peak, staged)
        else:
            timeline.hold(quantized=abs(amount))
            held += abs(amount)
    points = timeline.points()
    assert timeline.peak_staged == peak == max(p.staged_bytes for p in points)
    assert (points[-1].quantized_bytes, points[-1].staged_bytes) == (held, staged)
    assert len(points) <= bound + 2
    for attribute in ("seconds", "quantized_bytes"):
        values = [getattr(p, attribute) for p in points]
        assert values == sorted(values)


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.Linear(256, 300)).to(torch.bfloat16)


@pytest.mark.parametrize("scheme", [fp8, fp8_per_block, fp8_per_tensor], ids=str)
def test_a_reports_timeline_agrees_with_its_sums(scheme) -> None:
    source = build().state_dict()
    with online_quant(scheme) as session:
        model = build()
        for name, param in model.named_parameters():
            for row in range(0, len(param), 7):
                param.data[row : row + 7].copy_(source[name][row : row + 7])
    report = session.report()
    last = report.timeline[-1]
    assert (last.quantized_bytes, last.passthrough_bytes) == (report.quantized_bytes, report.passthrough_bytes)
    assert last.staged_bytes == 0
    assert max(p.staged_bytes for p in report.timeline) == report.peak_staged_bytes
    # What was counted weight by weight is what the final account finds in the model.
    counted = report.timeline[-2]
    assert counted.quantized_bytes == report.quantized_bytes
    assert counted.passthrough_bytes == report.passthrough_bytes
    assert all(0 <= layer.began <= layer.done <= report.seconds for layer in report.layers)


def test_sqnr_is_measured_without_staging_and_without_changing_a_byte() -> None:
    source = build().state_dict()
    with online_quant(fp8, measure_sqnr=True) as session:
        model = build()
        model.load_state_dict(source)
    report = session.report()
    assert report.peak_staged_bytes == 0
    for index, layer in zip((0, 2), report.layers, strict=True):
        x = source[f"{index}.weight"]
        expected = quantize(x, fp8)
        assert_oracle(model[index].weight, x, fp8)
        noise = (x.double() - expected.dequantize(torch.float32).double()).square().sum()
        assert layer.sqnr == pytest.approx((10 * torch.log10(x.double().square().sum() / noise)).item(), abs=1e-3)


def test_progress_tells_an_engine_every_weight() -> None:
    source, seen = build().state_dict(), []
    with online_quant(fp8, progress=seen.append) as session:
        model = build()
        model.load_state_dict(source)
    assert all(isinstance(event, ProgressEvent) for event in seen)
    assert [(e.done, e.total) for e in seen] == [(0, 1), (1, 1), (1, 2), (2, 2)]
    assert seen[-1].bytes == session.report().quantized_bytes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(None, True, True), (None, False, False), (False, True, False), (True, False, True)],
)
def test_a_bar_is_shown_on_a_terminal_or_when_asked_for(monkeypatch, progress, terminal, shown) -> None:
    pytest.importorskip("tqdm")
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    source = build().state_dict()
    with online_quant(fp8, progress=progress):
        model = build()
        model.load_state_dict(source)
    assert ("2/2" in out.getvalue()) == shown


def test_nothing_is_lost_of_zeros() -> None:
    with online_quant(fp8, measure_sqnr=True, progress=False) as session:
        layer = nn.Linear(64, 128, bias=False)
        layer.weight.data.copy_(torch.zeros(128, 64))
    assert session.report().layers[0].sqnr == math.inf
    assert sqnr_db(1.0, 0.01) == pytest.approx(20.0)


def test_files_tell_their_bytes(tmp_path) -> None:
    source, target = tmp_path / "source", tmp_path / "fp8"
    source.mkdir()
    save_file({"up.weight": torch.randn(128, 64), "norm.weight": torch.ones(64)}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    made: list[ProgressEvent] = []
    heard: list[tuple[int, int]] = []
    report = quantize_checkpoint(source, target, fp8, progress=made.append)
    quantize_checkpoint(source, tmp_path / "again", fp8, on_bytes=lambda *step: heard.append(step))
    total = report.source_bytes
    assert (made[-1].done, made[-1].total, made[-1].bytes, made[-1].unit) == (total, total, total, "byte")
    assert (sum(done for done, _ in heard), {of for _, of in heard}) == (total, {total})
    read: list[ProgressEvent] = []
    assert verify_checkpoint(target, progress=read.append) == []
    assert (read[-1].description, read[-1].done, read[-1].total) == ("verifying", *[report.written_bytes] * 2)
