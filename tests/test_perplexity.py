"""The measurement of bench/perplexity.py on models whose answers are known, and the text its model learns from."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import perplexity
    finally:
        sys.path[:] = before
    return perplexity


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes)).eval()


@pytest.fixture
def windows(bench: ModuleType) -> torch.Tensor:
    tokens = torch.randint(64, (400,), generator=torch.Generator().manual_seed(0))
    return bench.windows_of(tokens, 16, 12)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(
    bench: ModuleType, windows: torch.Tensor
) -> None:
    def nothing(tokens: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*tokens.shape, 64))

    found = bench.judge(nothing, windows, list(bench.predictions(nothing, windows)))
    assert found["perplexity"] == pytest.approx(64)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["error"] == 0


def test_the_divergence_is_that_of_the_definition(
    bench: ModuleType, llama: LlamaForCausalLM, windows: torch.Tensor
) -> None:
    reference = list(bench.predictions(llama, windows))
    assert bench.judge(llama, windows, reference)["kl"] == 0
    with torch.no_grad():
        for param in llama.parameters():
            param.mul_(1.5)
    found = bench.judge(llama, windows, reference)
    changed = torch.cat(list(bench.predictions(llama, windows)))
    wanted = (
        nn.functional.kl_div(changed, torch.cat(reference), reduction="sum", log_target=True) / windows[:, 1:].numel()
    )
    assert found["kl"] == pytest.approx(wanted.item(), rel=1e-4) != 0
    loss = llama(windows[:, :-1]).logits.flatten(0, 1)
    entropy = nn.functional.cross_entropy(loss, windows[:, 1:].flatten()).item()
    assert found["perplexity"] == pytest.approx(torch.tensor(entropy).exp().item(), rel=1e-5)


def test_windows_are_of_the_text_and_cover_it(bench: ModuleType) -> None:
    found = bench.windows_of(torch.arange(1000), 10, 7)
    assert found.shape == (7, 11)
    assert found[0, 0] == 0
    assert found[-1, -1] >= 990 - 10
    assert torch.equal(found - found[:, :1], torch.arange(11).expand(7, 11))


def test_bits_count_codes_and_scales(bench: ModuleType, llama: LlamaForCausalLM) -> None:
    layers = bench.linears(llama)
    assert len(layers) == 14
    weights = {name: linear.weight.detach().bfloat16() for name, linear in layers.items()}
    own = {q.label: q for q in bench.quantizers.ours()}
    bits_of = {"mxfp4": 4.25, "int4_per_group:searched": 4.25, "int4_per_group_32": 4.5, "mxfp8": 8.25}
    for label, bits in bits_of.items():
        assert bench.quantized(layers, weights, lambda name, label=label: own[label])["bits"] == bits
    assert bench.quantized(layers, weights, lambda name: None) == {"bits": 16.0, "seconds": 0.0}
    some = next(iter(weights))
    assert torch.equal(layers[some].weight, weights[some].float())


def test_what_is_installed_says_what_a_weight_is(bench: ModuleType) -> None:
    """Every peer that is here: shape, dtype, a size between four and nine bits, and a likely error."""
    torch.manual_seed(0)
    weight = torch.randn(64, 384).bfloat16()
    found, absent = bench.quantizers.peers()
    families = {"torchao": "torchao", "bitsandbytes": "bitsandbytes", "hqq": "HQQ", "sinq": "SINQ", "gguf": "llama.cpp"}
    assert {q.family for q in found} == {"four-over-six"} | {families[p] for p in families if p not in absent}
    for quantizer in found:
        made = quantizer.make(weight)
        values, bits = quantizer.values(made), 8 * quantizer.bytes(made) / weight.numel()
        assert values.shape == weight.shape
        assert values.dtype == torch.float32
        error = (values - weight.float()).square().mean().sqrt().item()
        assert 4 < bits < 9
        assert 0.001 < error < (0.13 if bits < 6 else 0.04), quantizer


def test_outliers_leave_the_function_as_it_is(
    bench: ModuleType, llama: LlamaForCausalLM, windows: torch.Tensor
) -> None:
    before, shape = llama(windows).logits, bench.shape_of(llama, windows)
    bench.with_outliers(llama, alpha=8.0, channels=3)
    assert torch.equal(llama(windows).logits, before)
    after = bench.shape_of(llama, windows)
    assert after["q_proj"]["channel"] > 4 > shape["q_proj"]["channel"]
    assert after["gate_proj"]["inputs"] > shape["gate_proj"]["inputs"] + 1
    assert after["down_proj"] == pytest.approx(shape["down_proj"])


def test_searching_is_judged_by_kind_of_layer(
    bench: ModuleType, llama: LlamaForCausalLM, windows: torch.Tensor
) -> None:
    found = bench.by_kind(llama, windows)
    assert set(found) == {"nvfp4", "int4_per_group", "int4_per_group_32"}
    assert set(found["nvfp4"]) == set(bench.KINDS)
    for weights, answers in found["nvfp4"].values():
        assert 0.65 < weights < 0.85  # Of normally distributed weights three quarters stay.
        assert 0.5 < answers < 1


def row(label: str, family: str, bits: float, perplexity: float) -> dict[str, object]:
    return {
        "label": label,
        "family": family,
        "bits": bits,
        "perplexity": perplexity,
        "kl": perplexity / 100,
        "error": 0.001,
    }


def test_the_goals_say_who_is_better(bench: ModuleType) -> None:
    rows = [
        row("bf16", "bf16", 16, 10.0),
        row("nvfp4", "qtensor", 4.5, 11.0),
        row("nvfp4:searched", "qtensor", 4.5, 10.7),
        row("smaller", "HQQ", 4.25, 10.9),
        row("worse", "HQQ", 4.5, 10.8),
        row("better", "llama.cpp", 5.0, 10.6),
        row("better by chance", "llama.cpp", 5.0, 10.69),
    ]
    assert bench.perplexity_page.gap_closed(rows, "nvfp4", "perplexity") == pytest.approx(0.3)
    assert bench.perplexity_page.gap_closed([r | {"error": 0.1} for r in rows], "nvfp4", "perplexity") is None
    found = bench.perplexity_page.below_us(rows, "perplexity")
    assert [(r["label"], best and best["label"]) for r, best in found] == [
        ("smaller", None),
        ("better", "nvfp4:searched"),
    ]


def test_the_text_is_what_the_sources_say_in_a_fixed_order(bench: ModuleType, tmp_path: Path) -> None:
    said = "A long text about something that is worth reading, " * 8
    for name, text in (("b.py", f'"""B. {said}"""\nx = "{"f" * 300}"\n'), ("a.py", f'def f():\n    """A. {said}"""\n')):
        (tmp_path / name).write_text(text)
    (tmp_path / "copy.py").write_text((tmp_path / "a.py").read_text())
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "c.py").write_text(f'"""C. {said}"""')
    documents = bench.language_model.documents
    found = documents({"p": tmp_path})
    assert list(found) == ["p/a.py", "p/b.py"]
    assert found["p/a.py"].startswith("A. A long text")
    assert "ffff" not in found["p/b.py"]
    assert documents({"p": tmp_path}) == found


def test_another_recipe_is_another_folder_and_a_twentieth_is_held_out(bench: ModuleType) -> None:
    of = bench.language_model
    assert of.folder_of(10) == of.folder_of(10) != of.folder_of(11)
    assert of.folder_of() != of.folder_of(stop=of.STOP - 1)
    held_out = sum(of.is_held_out(f"document/{i}.py") for i in range(4000)) / 4000
    assert 0.035 < held_out < 0.065
    rates = [of.rate(step, 1000) for step in range(1000)]
    assert max(rates) == of.RATE
    assert rates[0] < rates[100] < rates[300] > rates[700] > rates[999] > 0
