"""Families of sources: bit for bit what their owners decode (tests/support/golden_sources.py made the file with them);
refused, by name, where parts mean nothing."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qtensor.checkpoint.requantizing import weights_in
from qtensor.sources.families import recognise
from qtensor.sources.source import Source, Unusable
from support.sources import FORMS, Tensors, specs_of

FILE = Path(__file__).parent / "golden" / "sources.safetensors"


def load() -> dict[str, tuple[Tensors, torch.Tensor, dict[str, Any]]]:
    with safe_open(FILE, "pt") as file:
        configs = json.loads(file.metadata()["configs"])
        held = {case: {} for case in configs}
        for key in file.keys():  # noqa: SIM118
            case, _, name = key.partition("/")
            held[case][name] = file.get_tensor(key)
    return {case: (parts, parts.pop("decoded"), configs[case]) for case, parts in held.items()}


GOLDEN = load()


def source_with(parts: Tensors, config: dict[str, Any]) -> Source:
    found = recognise(specs_of(parts), config)
    assert found is not None
    return found


def checked(parts: Tensors, config: dict[str, Any], shape: tuple[int, int]) -> tuple[Source, Tensors]:
    source = source_with(parts, config)
    specs = source.parts(shape)
    assert all(specs[name].fits(spec) for name, spec in specs_of(parts).items())
    needed = {name: tensor for name, tensor in parts.items() if specs[name].needed}
    source.check(needed, shape)
    return source, needed


@pytest.mark.parametrize("case", GOLDEN)
def test_decoded_as_the_owner_decodes(case: str) -> None:
    parts, decoded, config = GOLDEN[case]
    source, needed = checked(parts, config, tuple(decoded.shape))
    assert torch.equal(source.decode(needed, tuple(decoded.shape), decoded.dtype), decoded)


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("gptq4", {"g_idx": torch.full((256,), 8, dtype=torch.int32)}, r"g_idx\[0\] is 8, and there are 8 groups"),
        ("gptq4", {"scales": torch.full((8, 32), torch.inf).half()}, r"scale \[0, 0\] is inf"),
        ("int4", {"*_shape": torch.tensor([32, 255])}, "255"),
        ("nf4", {"*.quant_map": torch.zeros(16)}, "codebook"),
        ("nf4", {"*.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "JSON"),
    ],
)
def test_parts_that_mean_nothing_are_refused(case: str, change: Tensors, says: str) -> None:
    parts, decoded, config = GOLDEN[case]
    with pytest.raises(Unusable, match=says):
        checked({**parts, **change}, config, tuple(decoded.shape))


@pytest.mark.parametrize(
    ("case", "config", "says"),
    [
        ("gptq4", {"bits": 5}, "5 bits"),
        ("gptq4", {"bits": 8}, "config.json says 8"),
        ("gptq4", {"checkpoint_format": "marlin"}, "marlin"),
        ("awq", {"version": "gemv"}, "gemv"),
        ("int4", {"config_groups": {"g": {"weights": {"type": "int", "num_bits": 9}}}}, "9 bits"),
    ],
)
def test_configurations_that_cannot_be_decoded_are_refused(case: str, config: dict[str, Any], says: str) -> None:
    with pytest.raises(Unusable, match=says):
        recognise(specs_of(GOLDEN[case][0]), config)


@pytest.mark.parametrize(("form", "name"), list(product(FORMS, ["weight", "gate"])))
def test_weights_are_found_by_the_names_of_their_parts(form: str, name: str) -> None:
    parts = FORMS[form].parts(32, 256)
    if name != "weight" and not any("*" in part and part != "*" for part in parts):
        name = "weight"  # Parts that are called alike whatever the parameter is called.
    found = weights_in({f"a.0.{part.replace('*', name)}": None for part in parts})  # type: ignore[misc]
    assert f"a.0.{name}" in found
