"""diffusers: `quantization_config=QTensorConfig(...)` of models and pipelines, `save_pretrained`, and the way back."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from diffusers.quantizers import auto

import qtensor
from qtensor import (
    CheckpointError,
    IncompleteLoadError,
    QTensor,
    load_checkpoint,
    online_quant,
    quantize,
    save_checkpoint,
    weight_checksums,
)
from qtensor.checkpoint import diffusers as ours
from qtensor.schemes.scheme import SCHEMES

NAMES = sorted({scheme.name for scheme in SCHEMES.values()})


def dit(cls: Any = diffusers.DiTTransformer2DModel) -> Any:
    """Both sides of every matrix are whole blocks and groups, so that every scheme can be saved."""
    cls._no_split_modules = ["BasicTransformerBlock"]  # Without it the class has no automatic device maps.
    return cls(num_layers=2, num_attention_heads=2, attention_head_dim=64, sample_size=4, num_embeds_ada_norm=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    torch.manual_seed(0)
    path: Path = tmp_path_factory.mktemp("dit")
    dit().save_pretrained(path, max_shard_size="400KB")
    return path


@pytest.fixture
def config() -> Iterator[Any]:
    yield qtensor.QTensorConfig
    from qtensor.checkpoint import quantizer

    quantizer.unregister()
    ours.unregister()


def load(path: Path, **options: Any) -> Any:
    return diffusers.DiTTransformer2DModel.from_pretrained(path, **options)


def in_block(path: Path, scheme: Any = "fp8", **options: Any) -> Any:
    with online_quant(scheme):
        return load(path, **options)


def forward(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    x = torch.randn(1, 4, 4, 4, dtype=model.dtype)
    with torch.no_grad():
        out: torch.Tensor = model(x, timestep=torch.tensor([1]), class_labels=torch.tensor([2])).sample
    return out


def assert_same(model: Any, other: Any) -> None:
    assert weight_checksums(model) == weight_checksums(other)
    kinds = [{n: (type(p), p.dtype, p.requires_grad) for n, p in m.named_parameters()} for m in (model, other)]
    assert kinds[0] == kinds[1]
    assert any(kind[0] is QTensor for kind in kinds[0].values())
    assert torch.equal(forward(model), forward(other))


def contents(path: Path) -> dict[str, Any]:
    files = {p.name: p.read_bytes() for p in path.iterdir()}
    found = {n: json.loads(data) if n.endswith(".json") else data for n, data in files.items()}
    found["config.json"].pop("_name_or_path", None)
    return found


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", NAMES)
def test_it_loads_the_bytes_of_the_context_manager_and_reads_back_what_it_saved(
    scheme: str, dtype: Any, folder: Path, config: Any, tmp_path: Path
) -> None:
    model = load(folder, quantization_config=config(scheme), torch_dtype=dtype)
    assert_same(model, in_block(folder, scheme, torch_dtype=dtype))
    assert len(model.hf_quantizer.report.layers) > 8
    assert {layer.note for layer in model.hf_quantizer.report.layers} == {""}
    model.save_pretrained(tmp_path / "once", max_shard_size="30KB")  # A weight and its scale lie in different files.
    again = load(tmp_path / "once", torch_dtype=dtype)
    assert_same(again, model)
    again.save_pretrained(tmp_path / "twice", max_shard_size="30KB")
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"disable_mmap": True}], ids=str)
def test_the_options_of_from_pretrained_are_diffusers(options: Any, folder: Path, config: Any) -> None:
    model = load(folder, quantization_config=config("fp8"), **options)
    assert_same(model, in_block(folder, **options))
    assert model.config["quantization_config"].scheme == "fp8"
    assert model.is_quantized


def test_a_model_of_a_block_saves_itself(folder: Path, config: Any, tmp_path: Path) -> None:
    model = in_block(folder)
    before = dict(model.config)
    model.save_pretrained(tmp_path / "it")
    assert dict(model.config) == before
    assert isinstance(model.state_dict()["proj_out_1.weight"], QTensor)
    assert_same(load(tmp_path / "it"), model)
    for path in (tmp_path / "it", save_checkpoint(model, tmp_path / "ours")):
        other = dit()
        load_checkpoint(other, path)
        assert weight_checksums(other) == weight_checksums(model)
    with pytest.raises(CheckpointError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "pickled", safe_serialization=False)


def test_its_footprint_is_what_it_holds(folder: Path, config: Any) -> None:
    model = load(folder, quantization_config=config("mxfp4"), torch_dtype=torch.bfloat16)
    held = sum(p.nbytes for p in model.parameters())
    assert model.get_memory_footprint(return_buffers=False) == held
    assert held < 0.4 * load(folder, torch_dtype=torch.bfloat16).get_memory_footprint(return_buffers=False)


def test_automatic_device_maps_count_quantized_bytes(folder: Path, config: Any, monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}
    original = diffusers.models.model_loading_utils.infer_auto_device_map

    @functools.wraps(original)
    def spy(model: Any, **options: Any) -> Any:
        seen.update(options)
        return original(model, **options)

    monkeypatch.setattr(diffusers.models.model_loading_utils, "infer_auto_device_map", spy)
    model = load(folder, quantization_config=config("mxfp4"), torch_dtype=torch.bfloat16, device_map="auto")
    quantized = {name for name, param in model.named_parameters() if isinstance(param, QTensor)}
    assert {name for name, kind in seen["special_dtypes"].items() if kind.value == "int4"} == quantized


def test_what_the_checkpoint_lacks_is_an_error(folder: Path, config: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    dit().save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del state["proj_out_1.weight"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(IncompleteLoadError, match=r"proj_out_1\.weight"):
        load(tmp_path, quantization_config=config("fp8"))


def test_dequantize_gives_a_plain_model(folder: Path, config: Any) -> None:
    model = load(folder, quantization_config=config("fp8"))
    wanted = {n: p.dequantize() if isinstance(p, QTensor) else p.clone() for n, p in model.named_parameters()}
    model.dequantize()
    assert all(type(p) is torch.nn.Parameter and torch.equal(p, wanted[n]) for n, p in model.named_parameters())


def test_its_adapters(config: Any, tmp_path: Path) -> None:
    """Trainable and in high precision, as on a plain model of the same values; fused, they are quantized."""
    kind = diffusers.SD3Transformer2DModel
    sizes = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4, "caption_projection_dim": 64}
    dims = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "sample_size": 8, "pos_embed_max_size": 8}
    kind(in_channels=4, patch_size=2, **sizes, **dims).save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)

    def load_base() -> Any:
        return kind.from_pretrained(tmp_path / "base", quantization_config=config("fp8"))

    def run(model: Any) -> torch.Tensor:
        torch.manual_seed(2)
        text, pooled = torch.randn(1, 3, 32), torch.randn(1, 32)
        with torch.no_grad():
            out: torch.Tensor = model(torch.randn(1, 4, 8, 8), text, pooled, torch.tensor([1])).sample
        return out

    with online_quant("fp8"):  # Of a model with a quantization config diffusers refuses to save an adapter: it casts.
        model = kind.from_pretrained(tmp_path / "base")
    plain, again = load_base(), load_base()
    plain.dequantize()
    for each in (model, plain):
        torch.manual_seed(1)
        each.add_adapter(copy.deepcopy(lora))
    kinds = [{n: (p.dtype, p.requires_grad) for n, p in m.named_parameters() if "lora" in n} for m in (model, plain)]
    assert kinds[0] == kinds[1]
    assert len(kinds[0]) == 4
    before = run(model)
    model.save_lora_adapter(tmp_path / "lora")
    again.load_lora_adapter(tmp_path / "lora", prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(run(again), before)
    for each in (model, plain):
        each.fuse_lora()
    fused = {n: p for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    assert len(fused) == 2
    for name, param in fused.items():
        assert torch.equal(param.dequantize(), quantize(plain.get_parameter(name), "fp8").dequantize()), name


def test_a_single_file(folder: Path, config: Any, tmp_path: Path) -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=[32, 32], layers_per_block=1, norm_num_groups=8)
    vae.save_pretrained(tmp_path)
    file = str(tmp_path / "diffusion_pytorch_model.safetensors")
    with online_quant("fp8"):
        other = diffusers.AutoencoderKL.from_single_file(file, config=str(tmp_path))
    options: dict[str, Any] = {"low_cpu_mem_usage": True, "quantization_config": config("fp8")}
    model = diffusers.AutoencoderKL.from_single_file(file, config=str(tmp_path), **options)
    assert weight_checksums(model) == weight_checksums(other)
    assert any(isinstance(param, QTensor) for param in model.parameters())


class Pipeline(diffusers.DiffusionPipeline):
    def __init__(self, transformer: Any, text_encoder: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("pipeline")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=64, **sizes))
    Pipeline(dit(), text).save_pretrained(path)
    return path


def parts(pipe: Any) -> tuple[dict[str, str], dict[str, str]]:
    return weight_checksums(pipe.transformer), weight_checksums(pipe.text_encoder)


def test_pipelines(pipeline: Path, config: Any, tmp_path: Path) -> None:
    backend = diffusers.PipelineQuantizationConfig(quant_backend="qtensor", quant_kwargs={"scheme": "fp8"})
    one = Pipeline.from_pretrained(pipeline, quantization_config=backend)
    with online_quant("fp8"):
        other = Pipeline.from_pretrained(pipeline)
    assert parts(one) == parts(other)
    mapped = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": config("mxfp8")})
    two = Pipeline.from_pretrained(pipeline, quantization_config=mapped)
    assert {p.scheme.name for p in two.transformer.parameters() if isinstance(p, QTensor)} == {"mxfp8"}
    assert not any(isinstance(p, QTensor) for p in two.text_encoder.parameters())
    for pipe, where in ((one, "one"), (other, "other"), (two, "two")):
        pipe.save_pretrained(tmp_path / where)
        assert parts(Pipeline.from_pretrained(tmp_path / where)) == parts(pipe)


def test_other_methods_are_as_they_were(config: Any) -> None:
    ours.unregister()
    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert "qtensor" not in before[0]
    ours.register()
    ours.register()
    assert before[0].items() < auto.AUTO_QUANTIZER_MAPPING.items()
    assert before[1].items() < auto.AUTO_QUANTIZATION_CONFIG_MAPPING.items()
    ours.unregister()
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
