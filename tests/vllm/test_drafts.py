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
from support.vllm.engines import engine, load_error, look, runtime_tensors
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


def is_quantized_from(llm: LLM, weight: torch.Tensor) -> bool:
    """Are the draft's bytes those of the whole weight, quantized at once?"""
    found, made = drafts_tensors(llm), quantize(weight, fp8)
    ours = [found[f"model.{DOWN}"].view(torch.uint8), found[f"model.{DOWN}_scale"]]
    return all(map(torch.equal, ours, [made.qdata.view(torch.uint8), made.scale]))


def speculation(draft: Path, **more: str) -> dict[str, Any]:
    config = {"method": "eagle", "model": str(draft), "num_speculative_tokens": 2} | more
    return {"speculative_config": config, "enable_prefix_caching": False}


def test_a_draft_is_left_alone_by_a_load_and_a_refit(draft: Path) -> None:
    """Tokens are the target's, whatever the draft proposes."""
    with engine(checkpoint("llama"), "qtensor", enable_prefix_caching=False) as llm:
        alone = look(llm)
    with engine(checkpoint("llama"), "qtensor", **speculation(draft)) as llm:
        seen = look(llm)
        assert (seen.weights, seen.tokens) == (alone.weights, alone.tokens)
        assert drafts_tensors(llm) == {}
        reload(llm, other("llama"))
        again, new = look(llm), fresh("llama")
        assert (again.weights, again.tokens) == (new.weights, new.tokens)


def test_a_draft_is_quantized_and_refitted(draft: Path) -> None:
    """It takes its target's embedding and head, which are not in its checkpoint."""
    sent = load_file(draft / "model.safetensors")

    def load(worker: Any, tensors: dict[str, torch.Tensor]) -> None:
        worker.model_runner.drafter.model.load_weights(iter(tensors.items()))

    with engine(checkpoint("llama"), "qtensor", **speculation(draft, quantization="qtensor")) as llm:
        assert is_quantized_from(llm, sent[DOWN])
        reload(llm, other("llama"))
        assert is_quantized_from(llm, sent[DOWN])
        moved = {name: tensor * 1.5 for name, tensor in sent.items()}
        with pytest.raises(Exception, match="nan at index"):
            llm.collective_rpc(load, args=(moved | {DOWN: torch.full_like(sent[DOWN], float("nan"))},))
        assert is_quantized_from(llm, sent[DOWN])
        llm.collective_rpc(load, args=(moved,))
        assert is_quantized_from(llm, moved[DOWN])
        assert look(llm).tokens == fresh("llama").tokens


def test_what_a_draft_does_not_take_from_its_target_is_missing_by_name(draft: Path) -> None:
    sent = load_file(draft / "model.safetensors")
    del sent[DOWN]
    save_file(sent, draft / "model.safetensors", metadata={"format": "pt"})
    error = load_error(checkpoint("llama"), **speculation(draft, quantization="qtensor"))
    assert "down_proj" in str(error)
    assert "embed_tokens" not in str(error)
