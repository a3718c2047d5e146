"""Other people's loaders in a block: the bytes of `quantize(weight)`, no more memory than that, and a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qtensor import QTensor, online_quant, quantize


def assert_quantized(model: nn.Module, plain: nn.Module, session: Any, dtype: torch.dtype) -> None:
    """Every quantized weight has the bytes of the plain one's, and nothing waited for the end."""
    state, count = plain.state_dict(), 0
    for name, param in model.named_parameters():
        if isinstance(param, QTensor):
            wanted = quantize(state[name].to(dtype), "fp8")
            assert torch.equal(param.qdata.view(torch.uint8), wanted.qdata.view(torch.uint8)), name
            assert torch.equal(param.scale, wanted.scale), name
            count += 1
        else:
            assert torch.equal(param, state[name].to(dtype)), name
    assert count > 3
    assert {layer.note for layer in session.report().layers} == {""}


def dit() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, sample_size=8, num_embeds_ada_norm=4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_diffusers(dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    plain = dit()
    plain.save_pretrained(tmp_path)
    with online_quant("fp8") as session:
        model = type(plain).from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_quantized(model, plain, session, dtype)


def timm_model(path: Path, pretrained: bool) -> nn.Module:
    import timm

    options = {"checkpoint_path": str(path)} if pretrained else {}
    return timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=4, **options)


def clip_model(path: Path, pretrained: bool) -> nn.Module:
    import open_clip
    from open_clip.model import CLIP

    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 32, "width": 64, "heads": 2, "layers": 2}
    model: nn.Module = CLIP(32, vision, text)
    if pretrained:
        open_clip.load_checkpoint(model, str(path))
    return model


def torchvision_model(path: Path, pretrained: bool) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.VisionTransformer(32, 16, 2, 2, 64, 128, num_classes=4)
    if pretrained:
        model.load_state_dict(torch.load(path, weights_only=True))
    return model


def lightning_model(path: Path, pretrained: bool) -> nn.Module:
    import lightning

    model: nn.Module = Lit(lightning.LightningModule)
    if pretrained:
        model.load_state_dict(torch.load(path, weights_only=True))
    return model


def Lit(base: Any) -> Any:
    class Module(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))

    return Module()


OTHERS: dict[str, Callable[[Path, bool], nn.Module]] = {
    "timm": timm_model,
    "open_clip": clip_model,
    "torchvision": torchvision_model,
    "lightning": lightning_model,
}


@pytest.mark.parametrize("library", OTHERS)
def test_other_libraries(library: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    plain = OTHERS[library](path, False)
    torch.save(plain.state_dict(), path)
    with online_quant("fp8") as session:
        model = OTHERS[library](path, True)
    assert_quantized(model, plain, session, torch.float32)


def test_sentence_transformers(tmp_path: Path) -> None:
    import sentence_transformers
    import transformers
    from sentence_transformers import models

    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]))
    transformers.BertTokenizer(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(tmp_path / "bert")
    transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=64)).save_pretrained(tmp_path / "bert")
    word = models.Transformer(str(tmp_path / "bert"))
    plain = sentence_transformers.SentenceTransformer(
        modules=[word, models.Pooling(word.get_word_embedding_dimension())], device="cpu"
    )
    plain.save(str(tmp_path / "st"))
    with online_quant("fp8") as session:
        model = sentence_transformers.SentenceTransformer(str(tmp_path / "st"), device="cpu")
    assert_quantized(model, plain, session, torch.float32)
    assert model.encode(["a b c"]).shape == (1, 32)
