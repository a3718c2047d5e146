"""What a user points at is quantized, or the report says by name why not; the default choice leaves nothing large alone
without a word."""

from __future__ import annotations

import pytest
import torch
from test_loaders_config import load_lm
from torch import nn

from qtensor import QTensor, fp8, online_quant
from support.helpers import assert_oracle


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 8, bias=False)
        self.gate = nn.Linear(16, 1056, bias=False)
        self.lm_head = nn.Linear(16, 1056, bias=False)
        self.conv = nn.Conv2d(3, 4, 3)
        self.embed = nn.Embedding(40, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)


def loaded(**options: object) -> tuple[Layers, object]:
    torch.manual_seed(0)
    state = Layers().state_dict()
    with online_quant(fp8, **options) as session:  # type: ignore[arg-type]
        model = Layers()
        model.load_state_dict(state)
    for name, param in model.named_parameters():
        if isinstance(param, QTensor):
            assert_oracle(param, state[name], fp8)
    return model, session.report()


def quantized(model: nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if isinstance(param, QTensor)}


def test_a_large_gate_is_no_router() -> None:
    model, report = loaded()
    assert quantized(model) == {"gate.weight", "attention.out_proj.weight"}
    assert report.passthrough["router.weight"].startswith("ignored by 're:")  # type: ignore[attr-defined]
    assert report.passthrough["lm_head.weight"] == "ignored by 'lm_head'"  # type: ignore[attr-defined]
    assert "not quantized: lm_head.weight: ignored by 'lm_head'" in str(report)
    model, _ = loaded(ignore=["gate"])
    assert "gate.weight" not in quantized(model), "a user's own pattern means what it says, whatever the size"


def test_what_targets_name_is_quantized_or_refused_by_name() -> None:
    model, report = loaded(targets=["embed", "attention.in_proj_weight", "conv*"])
    assert quantized(model) == {"embed.weight", "attention.in_proj_weight"}
    why = report.passthrough["conv.weight"]  # type: ignore[attr-defined]
    assert why == "[4, 3, 3, 3] is neither a matrix nor a stack of them, though 'conv*' selects it"
    assert "not quantized: conv.weight: " + why in str(report)
    ids = torch.arange(8)[None]
    x = model.embed(ids)
    assert torch.equal(x, nn.functional.embedding(ids, model.embed.weight.dequantize()))
    out, _ = model.attention(x, x, x)
    assert out.isfinite().all()


def test_gpt2s_layers_by_targets(tmp_path: object) -> None:
    """Conv1D keeps its weight [in, out], and multiplies by it from the other side."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with online_quant("int8_per_channel", targets=["*c_attn", "*c_fc", "*c_proj"]):
        model = load_lm(tmp_path)  # type: ignore[arg-type]
    plain = load_lm(tmp_path)  # type: ignore[arg-type]
    assert len(quantized(model)) == 4
    ids = torch.arange(8)[None]
    got, want = model(ids).logits, plain(ids).logits
    assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.999


def test_long_lists_of_one_reason_are_one_line() -> None:
    state = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9))).state_dict()
    with online_quant(fp8, ignore=["*"]) as session:
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
        model.load_state_dict(state)
    lines = [line for line in str(session.report()).splitlines() if line.startswith("not quantized")]
    assert lines == ["not quantized: 0.weight, 1.weight, 2.weight and 6 more: ignored by '*'"]
