"""What the rest of vLLM asks of weights: adapters, sleep and reload, a tied head, checkpoints that are quantized
already, and models spread over ranks."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_layering import MODULES, import_alone
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from qtensor import QTensorError, int4_per_group, mxfp4, mxfp8, nvfp4, quantize
from qtensor.integrations.vllm import reports
from qtensor.integrations.vllm.layers import Slot
from qtensor.integrations.vllm.options import OptionsError
from qtensor.integrations.vllm.parallel import RankHost, split_axes
from qtensor.kernels import FORMATS
from qtensor.schemes.scheme import Scheme
from support.processes import in_forks
from support.vllm.checkpoints import adapter, checkpoint, quantized_checkpoint, tensors_of
from support.vllm.engines import DISTANCE, Seen, digest, engine, load_error, look, runtime_tensors
from support.vllm.oracle import fused, mistakes
from support.vllm.scripts import FRESH_VLLM


def test_every_file_can_be_imported_first() -> None:
    """And so in any order: as tests/test_layering.py tests it of the rest, here where vLLM is installed."""
    plugin = sorted(module for module in MODULES if module.startswith("qtensor.integrations."))
    assert [problem for problem in in_forks(import_alone, plugin, FRESH_VLLM) if problem] == []


def _with_options(**options: object) -> dict[str, Any]:
    return {"hf_overrides": {"quantization_config_dict_json": json.dumps(options)}}


def _seen(folder: Path, quantization: str | None, **options: Any) -> Seen:
    with engine(folder, quantization, **options) as llm:
        return look(llm, keep_tensors=True)


@functools.cache
def _base_and_adapted(quantization: str | None) -> tuple[Seen, Seen]:
    path = adapter("llama", ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))
    with engine(checkpoint("llama"), quantization, enable_lora=True, max_lora_rank=8) as llm:
        return look(llm), look(llm, lora=LoRARequest("adapter", 1, str(path)))


@pytest.mark.parametrize("scheme", ["fp8_per_channel", pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_lora(scheme: str) -> None:
    """The adapter's part is added to the quantized product: as close to unquantized vLLM as without an adapter."""
    (base, adapted), (plain_base, plain_adapted) = _base_and_adapted(f"qtensor_{scheme}"), _base_and_adapted(None)
    assert adapted.distance(base) > 0.15  # It does something.
    assert base.distance(plain_base) < DISTANCE[scheme]
    assert adapted.distance(plain_adapted) < DISTANCE[scheme]


def _scramble(model: torch.nn.Module) -> None:
    """What a level-2 sleep leaves of parameters: memory at the same addresses with something else in it."""
    for param in model.parameters():
        param.data.view(torch.uint8).fill_(0x3B)


def _addresses(model: torch.nn.Module) -> dict[str, int]:
    return {name: param.data_ptr() for name, param in model.named_parameters()}


@pytest.mark.parametrize("architecture", ["llama", pytest.param("qwen3-moe", marks=pytest.mark.slow)])
def test_sleep_and_reload(architecture: str) -> None:
    """A CPU ignores sleep itself. What a GPU would find after level 2 is made by hand; a reload then gives a fresh
    load's bytes at the old addresses."""
    with engine(checkpoint(architecture), "qtensor") as llm:
        before, addresses = look(llm), llm.apply_model(_addresses)
        llm.sleep(level=1)
        llm.wake_up()
        assert look(llm).tokens == before.tokens
        llm.sleep(level=2)
        llm.apply_model(_scramble)
        llm.wake_up()
        assert look(llm).weights != before.weights
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(checkpoint(architecture))})
        after = look(llm)
        assert llm.apply_model(_addresses) == addresses
    assert (after.weights, after.tokens) == (before.weights, before.tokens)


@pytest.mark.parametrize(
    "scheme",
    ["fp8_per_channel", *(pytest.param(s, marks=pytest.mark.slow) for s in FORMATS if s != "fp8_per_channel")],
)
def test_tied_head(scheme: str) -> None:
    """The embedding and the head are one quantized weight, whose bytes are the oracle's."""
    seen = _seen(checkpoint("qwen3-tied"), f"qtensor_{scheme}", **_with_options(lm_head=True))
    source = tensors_of(checkpoint("qwen3-tied"))
    assert "model.embed_tokens.weight" in seen.weights
    assert not any("lm_head" in name for name in seen.weights)
    assert mistakes(source, seen.tensors, scheme) == []
    plain = _seen(checkpoint("qwen3-tied"), None)
    assert seen.distance(plain) < DISTANCE[scheme]
    assert seen.report is not None
    whole = sum(quantize(fused(source, layer["name"]), scheme).nbytes for layer in seen.report["layers"])
    assert seen.report["quantized_bytes"] == whole


def test_a_head_that_is_not_there() -> None:
    """Gemma2 multiplies with its embedding and has no head to quantize: said before any weight is read."""
    error = load_error(checkpoint("gemma2"), **_with_options(lm_head=True))
    assert isinstance(error, OptionsError)
    assert "no output head of its own" in str(error)


def test_quantized_checkpoints_are_left_alone() -> None:
    """They load by their own method: weights, scales and logits are those without the plugin."""
    native = _seen(quantized_checkpoint(), None)
    with engine(quantized_checkpoint(), "qtensor") as llm:
        seen = look(llm)
        assert reports(llm) == []
    assert len(native.weights) > 0
    assert seen.weights == native.weights
    assert torch.equal(seen.logprobs, native.logprobs)


# Several ranks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of their own; they are sent the functions of these tests."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")


def _likely(llm: Any) -> list[dict[int, float]]:
    """The log probabilities of the 20 most likely next tokens of three prompts."""
    settings = SamplingParams(max_tokens=1, temperature=0, detokenize=False, ignore_eos=True, logprobs=20)
    prompts = [{"prompt_token_ids": list(range(first, first + 8))} for first in (5, 20, 300)]
    outputs = [request.outputs[0] for request in llm.generate(prompts, settings, use_tqdm=False)]
    return [{token: p.logprob for token, p in out.logprobs[0].items()} for out in outputs]


def _likely_on_one_rank(quantization: str) -> list[dict[int, float]]:
    with engine(checkpoint("qwen3-moe"), quantization) as llm:
        return _likely(llm)


@pytest.mark.usefixtures("_ranks")
@pytest.mark.parametrize(
    "scheme", ["fp8_per_channel", *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in ("nvfp4", "mxfp4"))]
)
def test_two_ranks_share_layers_and_experts(scheme: str, tmp_path: Path) -> None:
    """Tensor-parallel attention, expert-parallel experts: each rank holds its part of the unsharded bytes, also where a
    scale spans ranks, and writes its own report."""
    options = _with_options(report=str(tmp_path / "report.json"))
    quantization = f"qtensor_{scheme}"
    with engine(
        checkpoint("qwen3-moe"), quantization, tensor_parallel_size=2, enable_expert_parallel=True, **options
    ) as llm:
        found = llm.apply_model(runtime_tensors)
        seen = reports(llm)
        shared = _likely(llm)
    source = tensors_of(checkpoint("qwen3-moe"))
    for rank, tensors in enumerate(found):
        assert {len(tensor) for name, tensor in tensors.items() if name.endswith("w13_weight")} == {2}
        assert mistakes(source, tensors, scheme, rank, ranks=2) == []
        written = json.loads((tmp_path / f"report-rank{rank}.json").read_text())
        assert [layer["name"] for layer in written["layers"]] == [layer["name"] for layer in seen[rank]["layers"]]
    assert [report["rank"] for report in seen] == [0, 1]
    whole = _likely_on_one_rank(quantization)
    gaps = [abs(a[token] - b[token]) for a, b in zip(shared, whole, strict=True) for token in a.keys() & b.keys()]
    assert len(gaps) > 45  # Of 60: the same tokens are likely.
    assert sum(gaps) / len(gaps) < 0.05


@pytest.mark.parametrize(("cols", "scheme"), [(64, int4_per_group), (48, mxfp8), (48, mxfp4), (24, nvfp4)])
def test_columns_are_not_split_inside_a_group(cols: int, scheme: Scheme) -> None:
    """A rank that held a part of a group would have a scale of its own for it. Rows may be split anywhere."""

    def share(shape: tuple[int, ...], axes: frozenset[int]) -> None:
        slot = Slot("model.layers.0.mlp.down_proj", torch.nn.Module(), "weight", lambda _: None, {}, axes)
        RankHost().share(SimpleNamespace(shape=shape, scheme=scheme), slot)  # type: ignore[arg-type]

    for shape in ((8, cols), (4, 8, cols)):
        with pytest.raises(QTensorError, match=rf"down_proj\.weight: a rank's {cols} .*inside a group of"):
            share(shape, split_axes(rows=False, columns=True))
        share(shape, split_axes(rows=True, columns=False))
        share((*shape[:-1], 128), split_axes(rows=False, columns=True))


@pytest.mark.slow
@pytest.mark.usefixtures("_ranks")
def test_two_ranks_refuse_a_split_group(capfd: pytest.CaptureFixture[str]) -> None:
    """The tiny model's o_proj has 64 columns on each rank. The workers say so; vLLM's error refers to what they say."""
    error = load_error(checkpoint("llama"), "qtensor_int4_per_group", tensor_parallel_size=2)
    assert "initialization failed" in str(error)
    assert "o_proj.weight: a rank's 64 of dimension 1 end inside a group of 128" in "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.usefixtures("_ranks")
def test_pipeline_stages() -> None:
    """Each stage quantizes its own layers, once. (vLLM 0.32's CPU workers cannot generate with stages, whatever the
    method: the second one never gets its buffers.)"""
    with engine(checkpoint("llama"), "qtensor", pipeline_parallel_size=2) as llm:
        stages = llm.apply_model(runtime_tensors)
    source = tensors_of(checkpoint("llama"))
    assert [mistakes(source, stage, "fp8_per_channel") for stage in stages] == [[], []]
    assert [{name.split(".")[2] for name in stage} for stage in stages] == [{"0"}, {"1"}]
    whole = _seen(checkpoint("llama"), "qtensor").weights
    assert {name: digest(tensor) for stage in stages for name, tensor in stage.items()} == {
        name: sha for name, (_, sha) in whole.items()
    }


@pytest.mark.slow
@pytest.mark.usefixtures("_ranks")
@pytest.mark.parametrize("quantization", [None, "qtensor"])
def test_ray_is_refused_on_a_cpu(quantization: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM itself, before a worker starts. A load in the same process is whole afterwards. Should the CPU platform
    take Ray one day: compare the ranks' bytes, as with two ranks above, and tell docs/vllm.md."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("RAY_ADDRESS", "local")  # A cluster of its own, whatever else runs here.
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    try:
        error = load_error(checkpoint("llama"), quantization, **options)
    finally:
        ray.shutdown()
    assert "platform cpu does not support ray" in str(error)
    with engine(checkpoint("llama"), "qtensor") as llm:
        assert mistakes(tensors_of(checkpoint("llama")), llm.apply_model(runtime_tensors)[0], "fp8_per_channel") == []
