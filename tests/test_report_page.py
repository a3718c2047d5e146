"""The report as page and picture: it holds whatever is in a name, and works in a browser without a network."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qtensor import LayerReport, LoadReport, fp8, fp8_per_tensor, online_quant
from qtensor.text import printable

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">&<!--\u2028"


@pytest.fixture(scope="module")
def report() -> LoadReport:
    """A load with staging, two schemes, a weight left out, lossy reads and a gap that was filled."""
    shapes = [(256, 64)] * 11 + [(300, 128)]
    source = [torch.randn(shape) * 0.02 for shape in shapes]
    targets = {"10": fp8_per_tensor, "*": fp8}
    with online_quant(fp8, targets=targets, ignore=("11",), on_missing="zero", measure_sqnr=True) as session:
        model = nn.Sequential(*(nn.Linear(k, n, bias=False) for n, k in shapes))
        for i, (layer, x) in enumerate(zip(model, source, strict=True)):
            for row in range(0, len(x) - (10 if i == 3 else 0), 10):
                layer.weight.data[row : row + 10].copy_(x[row : row + 10])
        _ = model[0].weight[0] + 1
    return session.report()


def data_of(page: str) -> Any:
    return json.loads(re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)[1])


@given(st.text(st.characters(), max_size=30))
def test_no_name_can_become_markup(text: str) -> None:
    """Names come from checkpoints of strangers, and pages are opened with a click."""
    layer = LayerReport(text, "fp8", (2, 2), 4, 8, note=text)
    plain = LoadReport(layers=[LayerReport("name", "fp8", (2, 2), 4, 8)])
    page = LoadReport(layers=[layer], missing={text: [((0, 1), (0, 2))]}, warnings=[text], passthrough={text: text})
    found = page.to_html()
    assert data_of(found)["layers"][0]["name"] == printable(text)
    assert list(data_of(found)["passthrough"].items()) == [(printable(text), printable(text))]
    # The markup is that of a page of harmless names: the text adds no tag.
    assert len(re.findall(r"<[a-zA-Z/!]", found)) == len(re.findall(r"<[a-zA-Z/!]", plain.to_html()))
    found.encode("utf-8")


def test_page_refers_to_nothing_outside(report: LoadReport) -> None:
    page = report.to_html()
    assert "default-src 'none'" in html.unescape(page)
    addresses = set(re.findall(r"""(?:https?:)?//[^\s"'`]+\.[a-z]{2,}[^\s"'`]*""", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_page_carries_every_figure_of_the_report(report: LoadReport, tmp_path: Path) -> None:
    assert report.to_html(tmp_path / "report.html") == (tmp_path / "report.html").read_text(encoding="utf-8")
    data = data_of(report.to_html())
    expected = json.loads(report.to_json())
    assert {k: data[k] for k in expected if k != "layers"} == {k: v for k, v in expected.items() if k != "layers"}
    assert [{k: layer[k] for k in layer if k != "lossless"} for layer in data["layers"]] == expected["layers"]


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_writes_a_picture(report: LoadReport, tmp_path: Path, kind: str, measured: bool) -> None:
    pytest.importorskip("matplotlib")
    layers = report.layers if measured else [LayerReport("w", "fp8", (2, 2), 4, 8)]
    path = tmp_path / f"picture.{kind}"
    LoadReport(layers=layers, timeline=report.timeline).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    if kind == "svg":
        assert len(re.findall(r'id="axes_\d', path.read_text())) == (2 if measured else 1)


# In a browser ---------------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive a browser")
    path = os.environ.get("QTENSOR_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed, and QTENSOR_BROWSER is not set")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page in a browser that has no network, and what it complained about."""

    def __init__(self, browser: Any, path: Path, theme: str = "light", width: int = 1200) -> None:
        self.context = browser.new_context(
            color_scheme=theme, viewport={"width": width, "height": 850}, offline=True, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda r: self.complaints.append(r.url) if not r.url.startswith("file:") else None)
        self.page.goto(path.as_uri())

    def column(self, number: int) -> list[str]:
        return self.page.locator(f"#table tbody td:nth-child({number})").all_text_contents()

    def sort(self, title: str) -> None:
        self.page.get_by_role("button", name=title, exact=True).click()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.context.close()
        assert kind or not self.complaints, self.complaints


@pytest.fixture(scope="module")
def file(report: LoadReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.to_html(path)
    return path


def test_table_sorts(browser: Any, file: Path, report: LoadReport) -> None:
    with Opened(browser, file) as opened:
        assert opened.column(1) == [layer.name for layer in report.layers]
        opened.sort("SQNR dB")
        shown = [float(text) for text in opened.column(6)]
        assert shown == sorted(shown)
        opened.sort("SQNR dB")
        assert [float(text) for text in opened.column(6)] == sorted(shown, reverse=True)
        assert opened.page.locator("th[aria-sort=descending]").text_content() == "SQNR dB"
        opened.sort("Weight")
        assert opened.column(1) == [f"{i}.weight" for i in range(11)]  # by number: 2 before 10


def test_table_filters(browser: Any, file: Path, report: LoadReport) -> None:
    with Opened(browser, file) as opened:
        opened.page.get_by_label("Filter the weights").fill("1")
        chosen = [layer for layer in report.layers if "1" in layer.name]
        assert opened.column(1) == [layer.name for layer in chosen]
        total = sum(layer.bytes for layer in chosen)
        assert opened.page.locator("#shown").text_content() == f"{len(chosen)} of 11 weights, {total:,} bytes"
        opened.page.get_by_label("Scheme", exact=True).select_option("fp8_per_tensor")
        assert opened.column(1) == ["10.weight"]
        opened.page.get_by_label("Filter the weights").fill("no such weight")
        assert opened.column(1) == []


def test_what_was_unusual_is_told(browser: Any, file: Path) -> None:
    with Opened(browser, file) as opened:
        told = opened.page.locator("#problem-list").inner_text()
        assert "3.weight: never written: [250:256, 0:64]" in told
        assert "0.weight: 1 read of elements that were quantized already" in told
        opened.page.locator("#plain summary").click()
        assert opened.page.locator("#plain-list li").all_text_contents() == ["11.weight"]
        opened.page.locator("#memory-chart svg").hover()
        assert re.match(r".*: quantized .*B, left as they are .*B, staging", opened.page.inner_text("#memory-readout"))


@pytest.mark.parametrize("width", [1200, 375])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_and_a_phone(browser: Any, file: Path, tmp_path: Path, theme: str, width: int) -> None:
    with Opened(browser, file, theme, width) as opened:
        dark = "Math.max(...getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)) < 60"
        assert opened.page.evaluate(dark) == (theme == "dark")
        assert opened.page.evaluate("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
        assert len(opened.page.screenshot(path=tmp_path / "page.png", full_page=True)) > 20_000
        other = {"light": "dark", "dark": "light"}[theme]
        for _ in range(3):  # auto, light, dark
            opened.page.locator("#theme").click()
            if opened.page.locator("#theme").text_content() == f"Theme: {other}":
                assert opened.page.evaluate(dark) == (theme != "dark")


@pytest.mark.parametrize("layers", [[], [LayerReport(HOSTILE, HOSTILE, (2, 2), 4, 8, sqnr=float("inf"), note=HOSTILE)]])
def test_empty_and_hostile_reports_show(browser: Any, tmp_path: Path, layers: list[LayerReport]) -> None:
    names = [layer.name for layer in layers]
    report = LoadReport(
        layers=layers, missing={name: [((0, 1), (0, 2))] for name in names}, passthrough=dict.fromkeys(names, HOSTILE)
    )
    report.to_html(tmp_path / "report.html")
    with Opened(browser, tmp_path / "report.html") as opened:
        assert opened.column(1) == [printable(name) for name in names]
        assert opened.page.title().startswith("qtensor load report")
        assert opened.page.locator("img").count() == 0


@pytest.mark.parametrize("sqnr", [float("inf"), float("-inf"), float("nan"), 31.5])
def test_a_figure_that_is_not_finite_is_valid_json(sqnr: float) -> None:
    report = LoadReport(layers=[LayerReport("up", "fp8", (2, 2), 4, 8, sqnr=sqnr)])
    shown = json.loads(report.to_json(), parse_constant=pytest.fail)["layers"][0]["sqnr"]
    assert shown == (31.5 if sqnr == 31.5 else None)
    assert data_of(report.to_html())["layers"][0]["lossless"] == (sqnr == float("inf"))
