"""A draft model (EAGLE, MTP) beside a quantized target: left alone, or quantized by vLLM's option, and refitted."""

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
from qtensor.integrations.vllm import save_snapshot
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


# MTP: the draft is in the target's checkpoint -------------------------------------------------------------------------

LAYER = "model.mtp_layers.0."


@pytest.fixture
def mimo(tmp_path: Path) -> Path:
    """MiMo: Qwen2's layers, and one that predicts the token after the next."""
    sizes = json.loads((checkpoint("llama") / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = transformers.Qwen2Config(
        **{name: sizes[name] for name in names}, num_key_value_heads=2, max_position_embeddings=256, dtype="bfloat16"
    )
    torch.manual_seed(4)
    tensors = {}
    for name, param in transformers.Qwen2ForCausalLM(config).named_parameters():
        tensors[name] = (0.05 * torch.randn(param.shape) + (param.dim() == 1)).bfloat16()
        if name.startswith("model.layers.0."):
            tensors[name.replace("model.layers.0.", LAYER)] = (1.5 * tensors[name]).contiguous()
    norm = tensors["model.norm.weight"]
    tensors |= {f"{LAYER}{kind}_layernorm.weight": norm.clone() for kind in ("token", "hidden", "final")}
    tensors[f"{LAYER}input_proj.weight"] = (0.05 * torch.randn(len(norm), 2 * len(norm))).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    written = config.to_dict() | {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(written))
    return tmp_path


def predicting(**more: str) -> dict[str, Any]:
    config = {"method": "mtp", "num_speculative_tokens": 1} | more
    return {"speculative_config": config, "enable_prefix_caching": False}


def is_quantized_block(llm: LLM, sent: dict[str, torch.Tensor]) -> bool:
    """Are the bytes of its block those of the whole weights, quantized at once?"""
    found = {name.partition("mtp_block.")[2]: tensor for name, tensor in drafts_tensors(llm).items()}
    layers = {"mlp.down_proj": ["mlp.down_proj"], "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"]}
    layers |= {"self_attn.qkv_proj": [f"self_attn.{x}_proj" for x in "qkv"], "self_attn.o_proj": ["self_attn.o_proj"]}
    assert len(found) == 2 * len(layers)
    for layer, parts in layers.items():
        made = quantize(torch.cat([sent[f"{LAYER}{part}.weight"] for part in parts]), fp8)
        name = f"{layer}.weight"
        if not torch.equal(found[name].view(torch.uint8), made.qdata.view(torch.uint8)):
            return False
        if not torch.equal(found[f"{name}_scale"], made.scale):
            return False
    return True


def test_mtp_is_quantized_as_its_target_is_and_refitted(mimo: Path) -> None:
    sent = load_file(mimo / "model.safetensors")

    def load(worker: Any, tensors: dict[str, torch.Tensor]) -> None:
        worker.model_runner.drafter.model.load_weights(iter(tensors.items()))

    with engine(mimo, "qtensor", enable_prefix_caching=False) as llm:
        alone = look(llm)
    with engine(mimo, "qtensor", **predicting()) as llm:
        seen = look(llm)
        assert (seen.weights, seen.tokens) == (alone.weights, alone.tokens)
        assert is_quantized_block(llm, sent)
        moved = {name: tensor * 1.25 for name, tensor in sent.items()}
        llm.collective_rpc(load, args=(moved,))
        assert is_quantized_block(llm, moved)
        reload(llm, list(moved.items()))
        refitted = look(llm)
        assert is_quantized_block(llm, moved)
    save_file(moved, mimo / "model.safetensors", metadata={"format": "pt"})
    with engine(mimo, "qtensor", enable_prefix_caching=False) as llm:
        new = look(llm)
    assert (refitted.weights, refitted.tokens) == (new.weights, new.tokens)
    # Its own path, without a quantization: left alone.
    with engine(mimo, "qtensor", **predicting(model=str(mimo))) as llm:
        assert drafts_tensors(llm) == {}
        assert look(llm).tokens == new.tokens


def test_a_target_starts_from_a_snapshot_and_its_mtp_from_the_checkpoint(
    mimo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = load_file(mimo / "model.safetensors")
    with engine(mimo, "qtensor", **predicting()) as llm:
        save_snapshot(llm, tmp_path / "snapshot")
        before = look(llm)
    others = {name: tensor * 1.25 for name, tensor in sent.items()}
    save_file(others, mimo / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("QTENSOR_VLLM_SNAPSHOT", str(tmp_path / "snapshot"))
    with engine(mimo, "qtensor", **predicting()) as llm:
        after = look(llm)
        assert is_quantized_block(llm, others)
    assert (after.weights, after.tokens) == (before.weights, before.tokens)


def test_what_is_missing_of_mtp_is_named(mimo: Path) -> None:
    sent = load_file(mimo / "model.safetensors")
    del sent[f"{LAYER}mlp.down_proj.weight"]
    save_file(sent, mimo / "model.safetensors", metadata={"format": "pt"})
    assert f"{LAYER}mlp.down_proj.weight" in str(load_error(mimo, **predicting()))


@pytest.fixture
def deepseek(tmp_path: Path) -> Path:
    """DeepSeek-V3 with a layer of latent attention and experts that predicts: what follows the last layer."""
    source = checkpoint("deepseek-v3")
    tensors = load_file(source / "model.safetensors")
    torch.manual_seed(5)
    ahead = {
        name.replace("model.layers.1.", "model.layers.2."): 1.5 * tensor
        for name, tensor in tensors.items()
        if name.startswith("model.layers.1.")
    }
    norm = tensors["model.norm.weight"]
    ahead |= {f"model.layers.2.{name}.weight": norm.clone() for name in ("enorm", "hnorm", "shared_head.norm")}
    ahead["model.layers.2.eh_proj.weight"] = (0.05 * torch.randn(len(norm), 2 * len(norm))).bfloat16()
    ahead["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    ahead["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors | ahead, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_mtp_with_latent_attention_and_experts_is_quantized_and_refitted(deepseek: Path) -> None:
    def load(worker: Any, tensors: dict[str, torch.Tensor]) -> None:
        worker.model_runner.drafter.model.load_weights(iter(tensors.items()))

    with engine(deepseek, "qtensor", enable_prefix_caching=False) as llm:
        alone = look(llm)
    sent = load_file(deepseek / "model.safetensors")
    moved = {name: tensor * 1.25 if tensor.dim() == 2 else tensor for name, tensor in sent.items()}
    with engine(deepseek, "qtensor", **predicting()) as llm:
        seen = look(llm)
        assert seen.weights == alone.weights
        assert torch.equal(seen.logprobs, alone.logprobs)
        assert sum("_proj" in name or "w13" in name or "w2" in name for name in drafts_tensors(llm)) >= 12
        llm.collective_rpc(load, args=(moved,))
        refitted = drafts_tensors(llm)
    save_file(moved, deepseek / "model.safetensors", metadata={"format": "pt"})
    with engine(deepseek, "qtensor", **predicting()) as llm:
        new = drafts_tensors(llm)
    assert refitted.keys() == new.keys()
    assert [name for name in new if not torch.equal(refitted[name].float(), new[name].float())] == []
