"""A draft model (EAGLE) beside a quantized target: left alone, or quantized by vLLM's option, and refitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from vllm import LLM

from qtensor import fp8, quantize
from support.vllm.checkpoints import checkpoint
from support.vllm.engines import engine, look, runtime_tensors
from support.vllm.reloads import fresh, other, reload

DOWN = "layers.0.mlp.down_proj.weight"


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """EAGLE's: one layer of the target's sizes, fed by its hidden states; embedding and head are the target's."""
    config = json.loads((checkpoint("llama") / "config.json").read_text()) | {"num_hidden_layers": 1}
    torch.manual_seed(3)
    model = transformers.LlamaModel(transformers.LlamaConfig(**config))
    tensors = {name: 0.05 * torch.randn(p.shape) for name, p in model.named_parameters() if p.dim() == 2}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items() if not name.startswith("embed")}
    tensors["layers.0.post_attention_layernorm.weight"] = torch.ones(128).bfloat16()
    tensors["fc.weight"] = (0.05 * torch.randn(128, 256)).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def drafts_tensors(llm: LLM) -> dict[str, torch.Tensor]:
    found = llm.collective_rpc(lambda worker: runtime_tensors(worker.model_runner.drafter.model))[0]
    return {name: tensor.clone() for name, tensor in found.items()}


def oracle(weight: torch.Tensor) -> list[torch.Tensor]:
    made = quantize(weight, fp8)
    return [made.qdata.view(torch.uint8), made.scale]


def bytes_of(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensors[f"model.{DOWN}"].view(torch.uint8), tensors[f"model.{DOWN}_scale"]]


@pytest.mark.parametrize("quantization", [None, "qtensor"])
def test_a_draft_is_left_alone_or_quantized_and_refitted(draft: Path, quantization: str | None) -> None:
    with engine(checkpoint("llama"), "qtensor") as llm:
        alone = look(llm)
    speculation: dict[str, Any] = {"method": "eagle", "model": str(draft), "num_speculative_tokens": 2}
    speculation |= {"quantization": quantization} if quantization else {}
    sent = load_file(draft / "model.safetensors")
    options = {"speculative_config": speculation, "enable_prefix_caching": False}
    with engine(checkpoint("llama"), "qtensor", **options) as llm:
        seen = look(llm)
        assert (seen.weights, seen.tokens) == (alone.weights, alone.tokens)  # Whatever the draft proposes.
        first = drafts_tensors(llm)
        assert bool(first) == bool(quantization)
        if quantization:
            assert all(map(torch.equal, bytes_of(first), oracle(sent[DOWN])))
        # The target's refit leaves the draft's weights alone.
        reload(llm, other("llama"))
        assert look(llm).weights == fresh("llama").weights
        after = drafts_tensors(llm)
        assert all(torch.equal(after[name].view(torch.uint8), t.view(torch.uint8)) for name, t in first.items())
        # The draft's own: a call of its model's load_weights, all or nothing.
        moved = {name: tensor * 1.5 for name, tensor in sent.items()}
        bad = moved | {DOWN: torch.full_like(sent[DOWN], float("nan"))}

        def load(worker: Any, tensors: dict[str, torch.Tensor]) -> None:
            worker.model_runner.drafter.model.load_weights(iter(tensors.items()))

        if quantization:
            with pytest.raises(Exception, match="nan at index"):
                llm.collective_rpc(load, args=(bad,))
            assert all(map(torch.equal, bytes_of(drafts_tensors(llm)), oracle(sent[DOWN])))
        llm.collective_rpc(load, args=(moved,))
        if quantization:
            assert all(map(torch.equal, bytes_of(drafts_tensors(llm)), oracle(moved[DOWN])))
        assert look(llm).tokens == fresh("llama").tokens
