"""A vision-language model: its image tower is quantized as its language model is, and a picture is answered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from vllm import SamplingParams

from qtensor import fp8, quantize
from support.vllm.engines import engine, is_quantized, runtime_tensors

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError) as error:  # One that was built for another torch lacks its operators.
    pytest.skip(f"vLLM's Qwen2-VL needs torchvision: {error}", allow_module_level=True)

IMAGE, VIDEO, BEGIN, END = range(500, 504)
TEXT = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
}
VISION = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random Qwen2-VL with a tokenizer and an image processor."""
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END}
    config = transformers.Qwen2VLConfig(text_config=TEXT, vision_config=VISION, torch_dtype="bfloat16", **ids)
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    for param in model.parameters():
        if param.dim() > 1:
            torch.nn.init.normal_(param, 0, 0.05)
    model.save_pretrained(tmp_path)
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    vocabulary = {(special[i - IMAGE] if IMAGE <= i <= END else f"w{i}"): i for i in range(512)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    names = {"pad_token": "w0", "eos_token": "w2", "additional_special_tokens": special}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path)
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12544}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | sizes))
    return tmp_path


def test_an_image_tower_is_quantized_and_a_picture_answered(folder: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8))
    prompt = {"prompt_token_ids": [1, BEGIN, IMAGE, END, 7, 8], "multi_modal_data": {"image": picture}}
    options = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1, "video": 0}}
    with engine(folder, "qtensor", **options) as llm:
        found = llm.apply_model(lambda model: {n: t.clone() for n, t in runtime_tensors(model).items()})[0]
        asked = SamplingParams(max_tokens=4, temperature=0, detokenize=False, ignore_eos=True)
        assert len(llm.generate([prompt], asked, use_tqdm=False)[0].outputs[0].token_ids) == 4
    saved = load_file(folder / "model.safetensors")
    compared = 0
    for name in found:
        own = [n for n in saved if n.endswith(name.removeprefix("language_model.").removeprefix("model."))]
        if is_quantized(name, found) and own:  # The others are fused: test_architectures compares those.
            made = quantize(saved[own[0]], fp8)
            assert torch.equal(found[name].view(torch.uint8), made.qdata.view(torch.uint8)), name
            assert torch.equal(found[f"{name}_scale"], made.scale), name
            compared += "visual" in name
    assert compared >= 8
