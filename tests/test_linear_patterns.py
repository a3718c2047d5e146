"""Patterns from a checkpoint: what is accepted says what `re` says, after bounded work, whatever it is; the rest is
refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qtensor import CheckpointError, fp8, inspect_checkpoint, quantize
from qtensor.checkpoint import targets as targets_module
from qtensor.checkpoint.reading import NAME_LENGTH
from qtensor.checkpoint.targets import PATTERNS, Targets
from qtensor.schemes import linear
from qtensor.schemes.linear import LENGTH, STATES, LinearRegex

ATOMS = st.sampled_from([*"abAB_ .-", r"\n", "é", "[ab]", "[^a]", r"\w", r"\d", r"\s", r"\W", "[a-c_]", ""])
PLACES = st.sampled_from(["^", "$", r"\b", r"\B", r"\A", r"\Z"])
GROUPS = ("(?:{})", "({})", "(?i:{})", "(?s:{})", "(?m:{})", "(?a:{})")
REPEATS = ("*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?", "+?", "??")


def larger(smaller: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.lists(smaller, max_size=4).map("".join),
        st.lists(smaller, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.builds(str.format, st.sampled_from(GROUPS), smaller),
        st.builds("(?:{}){}".format, smaller, st.sampled_from(REPEATS)),
    )


REGEXES = st.builds(
    str.__add__, st.sampled_from(["", "(?i)", "(?s)", "(?m)"]), st.recursive(ATOMS | PLACES, larger, max_leaves=8)
)
EXPLODING = (
    "(a+)+$",
    "(a|a)*$",
    "(a*)*$",
    "(a|b|ab)*c",
    ".*" * 20 + "x",
    "(?:a?){30}a{30}$",
    r"(\w+\.)*\w+$",
    "(.*)*!x",
)


@given(REGEXES, st.lists(st.text("abAB_.- \né", max_size=8), max_size=4))
@example("a$", ["a\n", "a\n\n", "a"])
@example("(?m)a$\n^b", ["a\nb"])
def test_it_says_what_re_says(pattern: str, texts: list[str]) -> None:
    ours, theirs = LinearRegex(pattern), re.compile(pattern)
    for text in texts:
        assert ours.match(text) == bool(theirs.match(text)), text


@given(
    REGEXES | st.text(r"ab.*+?{}[](|)\123,^$", max_size=30) | st.sampled_from(EXPLODING),
    st.text("ab.!\n", max_size=3).map(lambda text: (text or "a") * (NAME_LENGTH // max(1, len(text))) + "!"),
)
@example("(" * 500 + ")" * 500, "a")  # Python refuses some depth, or not.
def test_whatever_is_accepted_does_bounded_work(pattern: str, name: str) -> None:
    try:
        regex = LinearRegex(pattern)
    except ValueError:
        return
    regex.match(name)
    assert regex.work <= STATES * (len(name) + 1)


@pytest.mark.parametrize("pattern", EXPLODING)
def test_what_explodes_in_re_takes_a_few_steps(pattern: str) -> None:
    regex = LinearRegex(pattern)
    assert not regex.match("a" * 511 + "!")
    assert regex.work < 10_000


def test_steps_are_forgotten_when_they_are_many(monkeypatch) -> None:
    monkeypatch.setattr(linear, "_KEPT", 3)
    regex = LinearRegex(r".*\bx\d$")
    assert [regex.match(f"layers.{i}.x{i % 7}") for i in range(50)] == [True] * 50
    assert len(regex._places) <= 4


REFUSED = {
    r"(a)\1": "backtracking .groupref",
    "(?=a)": "backtracking .assert",
    "(?!a)": "backtracking .assert not",
    "(?<!a)b": "backtracking .assert not",
    "(?>a)": "backtracking .atomic group",
    "a*+": "backtracking .possessive repeat",
    "(": "no regular expression: missing",
    "(?:a{60}){60}": "more than 2048 states",
    "(?:){0,1000000000}": "more than 2048 states",
    "a" * (LENGTH + 1): "has 1025 characters",
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_the_rest_is_refused_with_the_reason(pattern: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[pattern]):
        LinearRegex(pattern)


# In config.json -------------------------------------------------------------------------------------------------------


def quantized(folder: Path, targets: object, name: str = "up") -> Path:
    weight = quantize(torch.ones(4, 8, dtype=torch.bfloat16), fp8)
    folder.mkdir(exist_ok=True)
    save_file({f"{name}.weight": weight.qdata, f"{name}.weight_scale": weight.scale}, folder / "model.safetensors")
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}
    groups = {"group_0": {"targets": targets, "weights": weights, "input_activations": None}}
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


@pytest.mark.parametrize("targets", [["Linear"], ["up"], "up,down", ["re:u.$"], ["u?"], ["re:(a+)+$", "up"]])
def test_targets_of_every_kind_are_found(targets, tmp_path) -> None:
    assert [w.name for w in inspect_checkpoint(quantized(tmp_path, targets)).quantized] == ["up.weight"]


def test_an_exploding_pattern_is_done_with_at_once(tmp_path) -> None:
    name = "a" * (NAME_LENGTH - len(".weight_scale") - 1) + "!"
    with pytest.raises(CheckpointError, match=r"config\.json does not say how a+! is quantized"):
        inspect_checkpoint(quantized(tmp_path, ["re:(a+)+$"], name))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([r"re:(.*)\1"], r"group_0\.targets: 're:\(\.\*\)\\\\1' is not used: it needs backtracking"),
        (["re:("], r"group_0\.targets: 're:\(' is not used: it is no regular expression"),
        ([f"*{i}" for i in range(PATTERNS + 1)], r"group_0\.targets: at most 256 patterns"),
        (["*" * (LENGTH + 1)], r"group_0\.targets: at most .* of 1024 characters"),
        ([1], r"group_0\.targets is a list of patterns, not \[1\]"),
        ({"a": 1}, r"group_0\.targets is a list of patterns, not \{'a': 1\}"),
    ],
)
def test_targets_that_cannot_be_used_are_refused_by_name(targets, message, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        inspect_checkpoint(quantized(tmp_path, targets))


def test_the_expressions_of_a_checkpoint_have_a_budget(monkeypatch) -> None:
    """Each name is of another character, so that no step is known: a thousand states for each."""
    monkeypatch.setattr(targets_module, "WORK", 100_000)
    targets = Targets("group_0.targets", [f"re:{'.*' * 500}{i}" for i in range(3)], only=False)
    with pytest.raises(CheckpointError, match=r"config\.json: group_0\.targets: its regular expressions take too long"):
        for i in range(10_000):
            targets.select(chr(1000 + i) * 5)
    assert sum(regex.work for regex in targets._regexes) < 200_000
