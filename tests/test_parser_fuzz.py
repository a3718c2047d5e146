"""Every parser of outside input refuses what it cannot use, and says so: the corpus that a coverage-guided search kept,
and random changes of it. How an input is judged: `fuzz_parsers`."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from support.fuzz_parsers import CORPUS, TARGETS, accepted, damaged, mutated

INPUTS = {target: sorted((CORPUS / target).iterdir()) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_the_kept_inputs_are_used_or_refused(target: str) -> None:
    for path in INPUTS[target]:
        accepted(target, path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_has_inputs_of_both_kinds(target: str) -> None:
    assert {accepted(target, path.read_bytes()) for path in INPUTS[target]} == {True, False}


@given(st.sampled_from(list(TARGETS)), st.data(), st.randoms(use_true_random=False), st.integers(1, 4))
def test_changed_inputs_are_used_or_refused(target: str, data: st.DataObject, random: Random, changes: int) -> None:
    content = data.draw(st.sampled_from(INPUTS[target])).read_bytes()
    for _ in range(changes):
        content = mutated(content, random)
    accepted(target, content)


@given(st.sampled_from(list(TARGETS)), st.data(), st.randoms(use_true_random=False))
def test_damaged_inputs_are_used_or_refused(target: str, data: st.DataObject, random: Random) -> None:
    accepted(target, damaged(data.draw(st.sampled_from(INPUTS[target])).read_bytes(), random))


@given(st.sampled_from(list(TARGETS)), st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
@example("config", b"[" * 100_000)
@example("config", b'{"ignore": [' + b"9" * 5000 + b"]}")
@example("config_json", b"[" * 100_000)
@example("index", b'{"weight_map": {"first.weight": "a.safetensors\\u0000"}}')
def test_any_bytes_are_used_or_refused(target: str, content: bytes) -> None:
    accepted(target, content)
