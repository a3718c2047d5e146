"""Experts at the level of the weight: those of this rank only, names of global experts, and the routed product."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qtensor import quantize
from qtensor.integrations.vllm import moe
from qtensor.integrations.vllm.missing import Names
from qtensor.integrations.vllm.moe import _activate, _experts
from qtensor.kernels import FORMATS

E, H, INNER, K = 4, 32, 48, 2


def _layer(first: int, count: int) -> Any:
    """A rank that owns the global experts first .. first + count."""
    return SimpleNamespace(
        ckpt_gate_proj_name="gate_proj",
        ckpt_up_proj_name="up_proj",
        ckpt_down_proj_name="down_proj",
        global_num_experts=8,
        _map_global_expert_id_to_local_expert_id=lambda g: g - first if first <= g < first + count else -1,
    )


def test_missing_experts_have_global_numbers_and_the_checkpoints_spelling() -> None:
    names = Names(lambda prefix: [prefix])
    prefix = "model.layers.0.mlp.experts.routed_experts"
    names.saw(prefix, "w13_weight", "w3", 5, "lm.layers.0.mlp.experts.5.up_proj.weight")
    gap = [((2, 3), (INNER, 2 * INNER), (0, H))]
    lines = names.describe(prefix, _layer(4, 4), "w13_weight", (4, 2 * INNER, H), gap)
    assert len(lines) == 1
    assert lines[0].startswith("'lm.layers.0.mlp.experts.6.up_proj.weight' (expert 6 of ")
    both = names.describe(
        prefix, _layer(4, 4), "w2_weight", (4, H, INNER), [((0, 1), (0, H), (0, INNER)), ((3, 4), (0, 1), (0, INNER))]
    )
    assert [line.split("'")[1] for line in both] == [
        "model.layers.0.mlp.experts.4.down_proj.weight",
        "model.layers.0.mlp.experts.7.down_proj.weight",
    ]


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "swigluoai", "relu2_no_mul"])
@pytest.mark.parametrize("scheme", FORMATS)
def test_product(scheme: str, activation: str, on_input: bool, local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop over tokens in fp32 on the dequantized weights; with an expert map, other ranks' experts add 0.
    All pairs of a token and an expert at once, and (with weights on the input) a few at a time."""
    torch.manual_seed(0)
    if on_input:
        monkeypatch.setattr(moe, "_PAIRS", 5)
    rows = INNER if activation.endswith("_no_mul") else 2 * INNER
    w13, w2 = torch.randn(E, rows, H) * 0.2, torch.randn(E, H, INNER) * 0.2
    q13, q2 = quantize(w13.bfloat16(), scheme), quantize(w2.bfloat16(), scheme)
    b13, b2 = torch.randn(E, rows).bfloat16(), torch.randn(E, H).bfloat16()
    x, weights = torch.randn(7, H).bfloat16(), torch.rand(7, K)
    ids = torch.stack([torch.randperm(2 * E if local else E)[:K] for _ in range(7)]).int()
    expert_map = torch.tensor([-1, -1, 0, 1, 2, 3, -1, -1], dtype=torch.int32) if local else None
    out = _experts(
        x,
        q13.parts(),
        q2.parts(),
        b13,
        b2,
        weights,
        ids,
        expert_map,
        scheme,
        activation,
        on_input,
        False,
    )
    expected = torch.zeros(7, H)
    d13, d2 = q13.dequantize(torch.float32), q2.dequantize(torch.float32)
    for t in range(7):
        for k in range(K):
            e = int(ids[t, k]) if expert_map is None else int(expert_map[ids[t, k]])
            if e < 0:
                continue
            w = weights[t, k]
            row = x[t].float() * (w if on_input else 1)
            hidden = _activate(F.linear(row, d13[e], b13[e].float())[None], activation)[0]
            expected[t] += F.linear(hidden, d2[e], b2[e].float()) * (1 if on_input else w)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
