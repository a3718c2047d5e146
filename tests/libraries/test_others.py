"""Other people's loaders in a block: the bytes of `quantize(weight)`, no more memory than that, and a forward pass."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qtensor import QTensor, QTensorConfig, QTensorError, online_quant, quantize, weight_checksums
from qtensor.schemes.scheme import SCHEMES


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


def timm_by_name(path: Path, pretrained: bool) -> nn.Module:
    """`pretrained=True`, from a file that stands where the hub's would."""
    import timm

    options: dict[str, Any] = {}
    if pretrained:
        options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 4}}
    return timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=4, **options)


def whisper_model(path: Path, pretrained: bool) -> nn.Module:
    import whisper
    from whisper.model import ModelDimensions, Whisper

    sizes = {"n_mels": 80, "n_audio_ctx": 16, "n_audio_state": 32, "n_audio_head": 2, "n_audio_layer": 2}
    sizes |= {"n_vocab": 64, "n_text_ctx": 16, "n_text_state": 32, "n_text_head": 2, "n_text_layer": 2}
    if pretrained:
        torch.save({"dims": sizes, "model_state_dict": torch.load(path)}, path.with_name("whisper.pt"))
        loaded: nn.Module = whisper.load_model(str(path.with_name("whisper.pt")), device="cpu")
        return loaded
    model: nn.Module = Whisper(ModelDimensions(**sizes))
    nn.init.normal_(model.decoder.positional_embedding)  # which is whatever memory held
    return model


def spandrel_model(path: Path, pretrained: bool) -> nn.Module:
    import spandrel
    from spandrel.architectures.SwinIR import SwinIR

    if pretrained:
        loaded: nn.Module = spandrel.ModelLoader(device="cpu").load_from_file(path).model
        return loaded
    sizes: dict[str, Any] = {"img_size": 16, "window_size": 8, "depths": [2], "embed_dim": 24, "num_heads": [2]}
    model: nn.Module = SwinIR(upscale=2, mlp_ratio=2, upsampler="pixelshuffledirect", **sizes)
    return model


def segmentation_model(path: Path, pretrained: bool) -> nn.Module:
    import segmentation_models_pytorch as smp

    if pretrained:
        loaded: nn.Module = smp.from_pretrained(str(path.with_name("smp")))
        return loaded
    model: nn.Module = smp.Segformer("mit_b0", encoder_weights=None, classes=2)
    model.save_pretrained(path.with_name("smp"))
    return model


def ignite_model(path: Path, pretrained: bool) -> nn.Module:
    from ignite.handlers import Checkpoint

    model = Lit(nn.Module)
    if pretrained:
        Checkpoint.load_objects({"model": model}, {"model": torch.load(path)})
    return model


def skorch_model(path: Path, pretrained: bool) -> nn.Module:
    import skorch

    net = skorch.NeuralNet(lambda: Lit(nn.Module), criterion=nn.MSELoss).initialize()
    if pretrained:
        net.load_params(f_params=str(path))
    model: nn.Module = net.module_
    return model


def x_transformers_model(path: Path, pretrained: bool) -> nn.Module:
    import x_transformers

    layers = x_transformers.Decoder(dim=32, depth=2, heads=2, rotary_pos_emb=True)
    model: nn.Module = x_transformers.TransformerWrapper(num_tokens=64, max_seq_len=16, attn_layers=layers)
    if pretrained:
        model.load_state_dict(torch.load(path))
    return model


def monai_model(path: Path, pretrained: bool) -> nn.Module:
    from monai.networks.nets import ViT
    from monai.networks.utils import copy_model_state

    sizes: dict[str, Any] = {"img_size": (32, 32), "patch_size": (8, 8), "spatial_dims": 2, "in_channels": 1}
    model: nn.Module = ViT(hidden_size=32, mlp_dim=64, num_layers=2, num_heads=2, **sizes)
    if pretrained:
        copy_model_state(model, torch.load(path))
    return model


OTHERS: dict[str, Callable[[Path, bool], nn.Module]] = {
    "timm": timm_model,
    "timm by name": timm_by_name,
    "open_clip": clip_model,
    "torchvision": torchvision_model,
    "lightning": lightning_model,
    "openai-whisper": whisper_model,
    "spandrel": spandrel_model,
    "segmentation-models-pytorch": segmentation_model,
    "ignite": ignite_model,
    "skorch": skorch_model,
    "x-transformers": x_transformers_model,
    "monai": monai_model,
}


@pytest.mark.parametrize("library", OTHERS)
def test_other_libraries(library: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    plain = OTHERS[library](path, False)
    torch.save(plain.state_dict(), path)
    with online_quant("fp8") as session:
        model = OTHERS[library](path, True)
    assert_quantized(model, plain, session, torch.float32)


def bert(path: Path, kind: str = "BertModel", **sizes: Any) -> str:
    """A folder with a tiny model and its tokenizer."""
    import transformers

    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]))
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    sizes |= {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    getattr(transformers, kind)(transformers.BertConfig(intermediate_size=64, **sizes)).save_pretrained(path)
    return str(path)


def test_sentence_transformers(tmp_path: Path) -> None:
    """In a block, and in transformers' own words; saved, and loaded again."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    word = modules.Transformer(bert(tmp_path / "bert"))
    plain = SentenceTransformer(modules=[word, modules.Pooling(32)], device="cpu")
    plain.save(str(tmp_path / "st"))
    with online_quant("fp8") as session:
        model = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    assert_quantized(model, plain, session, torch.float32)
    assert model.encode(["a b c"]).shape == (1, 32)
    options = {"quantization_config": QTensorConfig("fp8")}
    same = SentenceTransformer(str(tmp_path / "st"), device="cpu", model_kwargs=options)
    assert weight_checksums(same) == weight_checksums(model)
    for each, name in ((model, "once"), (same, "twice")):
        each.save(str(tmp_path / name))
        again = SentenceTransformer(str(tmp_path / name), device="cpu")
        assert weight_checksums(again) == weight_checksums(model)
        assert (again.encode(["a b c"]) == model.encode(["a b c"])).all()


def test_a_layer_that_sentence_transformers_saves_by_itself_is_an_error_that_says_what_to_call(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    word = modules.Transformer(bert(tmp_path / "bert"))
    SentenceTransformer(modules=[word, modules.Pooling(32), modules.Dense(32, 32)], device="cpu").save(
        str(tmp_path / "st")
    )
    with online_quant("fp8"):
        model = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    assert type(model[2].linear.weight) is QTensor
    with pytest.raises(QTensorError, match="save_checkpoint"):
        model.save(str(tmp_path / "quantized"))
    with online_quant("fp8", ignore=["linear"]):  # It is loaded before it is the model's "2.linear".
        model = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    model.save(str(tmp_path / "left alone"))
    again = SentenceTransformer(str(tmp_path / "left alone"), device="cpu")
    assert weight_checksums(again) == weight_checksums(model)


def test_a_cross_encoder(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    folder = bert(tmp_path / "bert", "BertForSequenceClassification", num_labels=1)
    plain = CrossEncoder(folder, device="cpu")
    with online_quant("fp8") as session:
        model = CrossEncoder(folder, device="cpu")
    assert_quantized(model, plain, session, torch.float32)
    model.save_pretrained(str(tmp_path / "quantized"))
    again = CrossEncoder(str(tmp_path / "quantized"), device="cpu")
    assert again.predict([("a", "b")]) == model.predict([("a", "b")])


def test_huggingface_hubs_mixin(tmp_path: Path) -> None:
    from huggingface_hub import PyTorchModelHubMixin

    class Mixed(nn.Module, PyTorchModelHubMixin):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))

    plain = Mixed()
    plain.save_pretrained(tmp_path / "plain")
    with online_quant("fp8") as session:
        model = Mixed.from_pretrained(tmp_path / "plain")
    assert_quantized(model, plain, session, torch.float32)
    with pytest.raises(QTensorError, match="save_checkpoint"):
        model.save_pretrained(tmp_path / "quantized")


def test_cloudpickle_takes_models_whose_classes_are_in_no_file() -> None:
    import cloudpickle

    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    state = Local().state_dict()
    for scheme in sorted({scheme.name for scheme in SCHEMES.values()}):
        with online_quant(scheme):
            model = Local()
            model.load_state_dict(state)
        again = pickle.loads(cloudpickle.dumps(model))
        assert type(again.up.weight) is QTensor
        assert weight_checksums(again) == weight_checksums(model)
