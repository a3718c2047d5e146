"""A model of speech (Whisper): encoder, decoder and the attention between them are quantized, served and refitted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams

from qtensor import fp8, quantize
from support.vllm.engines import engine, load_error, runtime_tensors
from support.vllm.reloads import reload

RATE = 16000  # Hz
WORDS = 500
SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
SIZES = {
    "vocab_size": 512,
    "num_mel_bins": 16,
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "max_source_positions": 100,  # Two seconds.
    "max_target_positions": 64,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random Whisper with its processor."""
    end = {f"{name}_token_id": WORDS for name in ("pad", "bos", "eos")}
    config = transformers.WhisperConfig(**SIZES, **end, decoder_start_token_id=WORDS + 1, dtype="bfloat16")
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).to(torch.bfloat16)
    for name, param in model.named_parameters():
        if param.dim() > 1:
            torch.nn.init.normal_(param, 0, 0.3 if "encoder_attn" in name or "conv" in name else 0.1)
    model.save_pretrained(tmp_path)
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {name: WORDS + i for i, name in enumerate(SPECIAL)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    ends = dict.fromkeys(("unk_token", "bos_token", "eos_token"), SPECIAL[0])
    tokenizer = transformers.WhisperTokenizer(vocab=vocabulary, merges=[], additional_special_tokens=[*SPECIAL], **ends)
    features = transformers.WhisperFeatureExtractor(feature_size=SIZES["num_mel_bins"], chunk_length=2)
    transformers.WhisperProcessor(features, tokenizer).save_pretrained(tmp_path)
    return tmp_path


def hear(llm: LLM, pitch: int) -> torch.Tensor:
    """log p `[512]` of the first word after a second of a tone (Hz)."""
    logits: list[torch.Tensor] = []
    handles: list[Callable[[], None]] = []

    def watch(model: torch.nn.Module) -> None:
        hook = model.logits_processor.register_forward_hook(lambda _m, _i, out: logits.append(out.float().clone()))
        handles.append(hook.remove)

    llm.apply_model(watch)
    sound = np.sin(2 * np.pi * pitch * np.arange(RATE) / RATE).astype(np.float32)
    heard = {"prompt": "", "multi_modal_data": {"audio": (sound, RATE)}}
    said = {"prompt_token_ids": [WORDS + i for i in range(1, len(SPECIAL))]}
    asked = SamplingParams(max_tokens=3, temperature=0, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"encoder_prompt": heard, "decoder_prompt": said}], asked, use_tqdm=False)
    assert len(outputs[0].outputs[0].token_ids) == 3
    handles[0]()
    return logits[0][0].log_softmax(-1)


def is_quantized_from(llm: LLM, sent: dict[str, torch.Tensor]) -> bool:
    """Are all bytes those of the whole (and fused) weights, quantized at once? 22 layers."""
    found = llm.apply_model(lambda model: {n: t.clone() for n, t in runtime_tensors(model).items()})[0]
    weights = [name for name in found if name.endswith(".weight")]
    assert len(weights) == 22
    same = []
    for name in weights:
        layer = name.removesuffix(".weight").replace(".mlp.", ".")
        fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "kv_proj": ("k_proj", "v_proj")}
        head, _, last = layer.rpartition(".")
        parts = [sent[f"{head}.{part}.weight"] for part in fused.get(last, (last,))]
        made = quantize(torch.cat(parts), fp8)
        same.append(torch.equal(found[name].view(torch.uint8), made.qdata.view(torch.uint8)))
        same.append(torch.equal(found[f"{name}_scale"], made.scale))
    return all(same)


OPTIONS = {"skip_tokenizer_init": False, "max_model_len": 64, "enable_prefix_caching": False}


def test_speech_is_quantized_answered_and_refitted(folder: Path) -> None:
    with engine(folder, None, **OPTIONS) as llm:
        plain, another = hear(llm, 300), hear(llm, 3000)
    apart = (plain - another).abs().mean()
    assert apart > 0.5  # It hears.
    sent = load_file(folder / "model.safetensors")
    moved = {name: tensor * 1.25 if tensor.dim() == 2 else tensor for name, tensor in sent.items()}
    with engine(folder, "qtensor", **OPTIONS) as llm:
        assert is_quantized_from(llm, sent)
        assert (hear(llm, 300) - plain).abs().mean() < apart / 5
        assert (hear(llm, 3000) - another).abs().mean() < apart / 5
        reload(llm, list(moved.items()))
        assert is_quantized_from(llm, moved)
        refitted = hear(llm, 300)
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    with engine(folder, "qtensor", **OPTIONS) as llm:
        assert torch.equal(refitted, hear(llm, 300))


def test_a_tensor_of_the_encoder_that_is_missing_is_named(folder: Path) -> None:
    sent = load_file(folder / "model.safetensors")
    del sent["model.encoder.layers.1.fc2.weight"]
    save_file(sent, folder / "model.safetensors", metadata={"format": "pt"})
    assert "'model.encoder.layers.1.fc2.weight'" in str(load_error(folder, **OPTIONS))
