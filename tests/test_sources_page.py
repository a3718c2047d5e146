"""docs/sources.md's table of every source in every scheme: what it says is moved is, and what is lost is as much."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import source_pairs
from source_formats import ENCODERS
from test_sources_lossless import PROVED

from qtensor.schemes.scheme import SCHEMES
from support.sources import FORMS, source_of

PAGE = (Path(__file__).parents[1] / "docs" / "sources.md").read_text()
ABOUT = 0.2
"""dB: another torch may draw, or round, other numbers."""


def table() -> dict[str, list[str]]:
    lines = iter(PAGE.splitlines())
    head = next(line for line in lines if line.startswith("| source | itself | "))
    assert cells(head)[2:] == list(source_pairs.SCHEMES)
    next(lines)
    found = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, *rest = cells(line)
        found[name] = rest
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_cell_is_what_the_bench_finds() -> None:
    told, found = table(), source_pairs.rows()
    assert list(told) == list(found)
    for name, wanted in found.items():
        for ours, theirs in zip(told[name], wanted, strict=True):
            marks = [ours.count("*"), theirs.count("*")]
            assert marks[0] == marks[1], (name, ours, theirs)
            if theirs.strip("*"):
                assert float(ours.strip("*")) == pytest.approx(float(theirs.strip("*")), abs=ABOUT), name


def test_every_scheme_and_every_family_has_its_place() -> None:
    assert set(source_pairs.SCHEMES) == {scheme.name for scheme in SCHEMES.values()}
    weight = source_pairs.weight().float()
    shown = {type(source_of(encode(weight))) for encode in ENCODERS.values()}
    assert {type(source_of(form.parts(256, 256))) for form in FORMS.values()} <= shown


def test_what_is_called_lossless_is_proved_for_all_codes_and_scales() -> None:
    bold = {
        (name, scheme)
        for name, row in table().items()
        for scheme, cell in zip(source_pairs.SCHEMES, row[1:], strict=True)
        if cell.startswith("**")
    }
    few_bits = {("int4 per channel", s) for s in ("int8_per_channel", "fp8_per_channel", "int4_per_group")}
    in_nvfp4 = {("mxfp4", "nvfp4"), ("mxfp4 of gpt-oss", "nvfp4")}
    assert bold <= PROVED.keys() | few_bits | in_nvfp4
    assert len(bold) > 25
