"""save_checkpoint and load_checkpoint: the same bytes there and back, in forms that other tools read.

It is one file because what is written and what is read are tested by each other; conversions have their own.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, MixtralConfig

from qtensor import (
    CheckpointError,
    ConfigError,
    IncompleteLoadError,
    QTensor,
    fp8,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    int4_asymmetric,
    int4_per_group,
    int4_per_group_32,
    int8_per_channel,
    load_checkpoint,
    mxfp4,
    mxfp8,
    nvfp4,
    online_quant,
    quantize,
    save_checkpoint,
)
from qtensor.checkpoint import inspect_checkpoint, problems, quantize_checkpoint, writing
from qtensor.checkpoint.layouts import COMPRESSED_TENSORS, LAYOUTS, quantization_config
from qtensor.checkpoint.transformers import transformers_asks
from qtensor.kernels import SEARCHES
from qtensor.schemes.scheme import SCHEMES as NAMED
from support.helpers import Experts, same_bytes

SCHEMES = tuple(dict.fromkeys(NAMED.values()))
FP8_SCHEMES = (fp8_per_tensor, fp8_per_channel, fp8_per_block)
PACKINGS = {
    mxfp8: "mxfp8-quantized",
    mxfp4: "mxfp4-pack-quantized",
    nvfp4: "nvfp4-pack-quantized",
    int8_per_channel: "pack-quantized",
    int4_per_group: "pack-quantized",
    int4_per_group_32: "pack-quantized",
    int4_asymmetric: "pack-quantized",
}
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}
CONFIGS = {
    "llama": LlamaConfig(**COMMON, intermediate_size=256),
    "tied": LlamaConfig(**COMMON, intermediate_size=256, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**COMMON, intermediate_size=128, num_local_experts=4),
}

reads_quantized = pytest.mark.skipif(
    not transformers_asks(), reason="from_pretrained of quantized checkpoints needs transformers 5.21 or newer"
)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """High-precision checkpoints, with a tokenizer's file beside them."""
    torch.manual_seed(0)
    made = {}
    for name, config in CONFIGS.items():
        made[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
        (made[name] / "tokenizer.json").write_text('{"version": "1.0"}')
    return made


def load_online(source: Path, scheme: Any, **options: Any) -> Any:
    with online_quant(scheme, **options):
        return AutoModelForCausalLM.from_pretrained(source)


def save_quietly(model: nn.Module, folder: Path, *args: Any, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scales of whole matrices, of q, k and v, that differ
        return save_checkpoint(model, folder, *args, **options)


def quantized(model: nn.Module) -> dict[str, QTensor]:
    return {name: param for name, param in model.named_parameters() if isinstance(param, QTensor)}


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = quantized(a), quantized(b)
    assert ours
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.scheme == theirs[name].scheme
        assert all(same_bytes(x, y) for x, y in zip(weight.parts(), theirs[name].parts(), strict=True)), name


# There and back -------------------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """Matrices, a stack of experts, a norm, a buffer, and a weight that is known under two names."""

    def __init__(self, shapes: list[tuple[int, int]], experts: tuple[int, int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(k, n, dtype=dtype) for n, k in shapes)
        self.experts = Experts(experts, dtype)
        self.norm = nn.LayerNorm(8, dtype=dtype)
        self.lm_head = nn.Linear(8, 8, bias=False, dtype=dtype)
        self.embed_tokens = nn.Embedding(8, 8, dtype=dtype)
        self.embed_tokens.weight = self.lm_head.weight
        self.register_buffer("steps", torch.arange(5))


sizes = st.integers(1, 300)


def fitting(scheme: Any, shape: tuple[int, ...]) -> Any:
    """The shape with as many columns as a format without short groups takes."""
    group = scheme.format.block[1] if scheme.format.granularity == "group" else 1
    return (*shape[:-1], -(-shape[-1] // group) * group)


@settings(max_examples=40)
@given(
    shapes=st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3),
    experts=st.tuples(st.integers(1, 3), sizes, sizes),
    scheme=st.sampled_from(list(dict.fromkeys([*SCHEMES, *(s.weight_only() for s in SCHEMES)]))),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    shard=st.sampled_from([10_000, 100_000, "5GB"]),
)
def test_what_is_saved_is_what_is_loaded_and_saved_again(tmp_path_factory, shapes, experts, scheme, dtype, shard):
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(len(shapes))
    shapes, experts = [fitting(scheme, shape) for shape in shapes], fitting(scheme, experts)
    values = Zoo(shapes, experts, dtype)
    nn.init.normal_(values.experts.w)
    with online_quant(scheme):
        model = Zoo(shapes, experts, dtype)
        model.load_state_dict(values.state_dict())
    one = save_checkpoint(model, folder / "one", max_shard_size=shard)
    with torch.device("meta"):
        fresh = Zoo(shapes, experts, dtype)
    report = load_checkpoint(fresh, one)
    assert len(report.layers) == len(shapes) + 1
    assert_same_weights(model, fresh)
    for name, tensor in values.state_dict().items():
        if name not in quantized(fresh):
            assert torch.equal(fresh.state_dict()[name], tensor), name
    assert fresh.embed_tokens.weight is fresh.lm_head.weight
    two = save_checkpoint(fresh, folder / "two", max_shard_size=shard)
    assert digests(one) == digests(two)
    assert problems(one) == []


@reads_quantized
@pytest.mark.parametrize(
    ("name", "scheme"), [(n, s) for n in CONFIGS for s in (FP8_SCHEMES if n == "tied" else SCHEMES)], ids=str
)
def test_every_way_back_gives_identical_files(name, scheme, sources, tmp_path):
    model = load_online(sources[name], scheme)
    one = digests(save_quietly(model, tmp_path / "one"))
    assert {"tokenizer.json", "generation_config.json", "config.json", "qtensor.json"} < one.keys()

    # from_pretrained in a session of another scheme: the file's own bytes win.
    pretrained = load_online(tmp_path / "one", fp8_per_tensor.weight_only())
    assert_same_weights(model, pretrained)
    assert not any(weight.requires_grad for weight in quantized(pretrained).values())
    assert digests(save_quietly(pretrained, tmp_path / "two")) == one

    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(pretrained.config)
    load_checkpoint(fresh, tmp_path / "one")
    assert_same_weights(model, fresh)
    prompt = torch.arange(3, 20)[None]
    assert torch.equal(fresh.eval()(prompt).logits, model(prompt).logits)

    # From the high-precision files, without the model. Scales of whole matrices are shared by q, k and v there.
    quantize_checkpoint(sources[name], tmp_path / "three", scheme)
    if scheme.format.needs_whole_matrix:
        converted = load_online(tmp_path / "three", fp8)
        assert digests(save_checkpoint(converted, tmp_path / "four")) == digests(tmp_path / "three")
    else:
        assert digests(tmp_path / "three") == one


def test_a_model_that_waits_for_its_loader_takes_a_checkpoint(sources, tmp_path):
    model = load_online(sources["llama"], fp8)
    save_checkpoint(model, tmp_path / "saved")
    with online_quant(fp8) as session:
        fresh = AutoModelForCausalLM.from_config(CONFIGS["llama"])
        load_checkpoint(fresh, tmp_path / "saved")
    assert len(session.report().layers) == 14
    assert_same_weights(model, fresh)


@reads_quantized
def test_schemes_may_differ_by_layer(sources, tmp_path):
    targets = {
        "*.self_attn.*": fp8_per_channel,
        "*.up_proj": fp8_per_tensor.weight_only(),
        r"re:.*\.mlp\.(gate|down)_": fp8_per_block,
    }
    model = load_online(sources["llama"], fp8, targets=targets)
    folder = save_checkpoint(model, tmp_path / "mixed")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 3
    QuantizationConfig.model_validate(config)
    again = load_online(folder, fp8)
    assert_same_weights(model, again)
    assert digests(save_checkpoint(again, tmp_path / "again")) == digests(folder)


# What others make of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", dict.fromkeys([*SCHEMES, *(s.weight_only() for s in SCHEMES), nvfp4.searched()]), ids=str
)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_config_is_what_compressed_tensors_defines(name, scheme, sources, tmp_path):
    folder = save_quietly(load_online(sources[name], scheme), tmp_path / "saved")
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    (group,) = config.config_groups.values()
    fmt = scheme.format
    assert group.weights.num_bits == 8 // fmt.per_byte
    assert group.weights.type == ("int" if fmt.element.startswith("int") else "float")
    assert group.weights.strategy == ("tensor_group" if fmt.has_global_scale else fmt.granularity)
    assert group.weights.group_size == (fmt.block[1] if fmt.granularity == "group" else None)
    assert (group.input_activations is None) == (scheme.activation == "none")
    packing = "naive-quantized" if scheme.activation == "none" else "float-quantized"
    assert config.format == {s.format: packing for s, packing in PACKINGS.items()}.get(fmt.plain, packing)
    assert "lm_head" in config.ignore
    assert any("gate" in module for module in config.ignore) == (name == "mixtral"), "routers are named"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_packing_and_scales_are_those_of_compressed_tensors(scheme):
    """Its own functions read our tensors as the weight we mean, and make the same bytes of it."""
    torch.manual_seed(0)
    weight = quantize(torch.randn(48, 256) * 0.02, scheme)
    layout = LAYOUTS[COMPRESSED_TENSORS][scheme.name]
    tensors = {name: entry.encode(weight, 48) for name, entry in layout.entries.items()}
    config = QuantizationConfig.model_validate(quantization_config(COMPRESSED_TENSORS, {"a": scheme}, ()))
    (group,) = config.config_groups.values()
    theirs = BaseCompressor.get_value_from_registry(config.format)
    assert set(theirs.compression_param_names(group)) == tensors.keys()
    read = theirs.decompress(tensors, group)["weight"].float()
    # They multiply in bfloat16 where scales are kept in 8 or 16 bits.
    exact = scheme.format.has_e8m0_scale or scheme.format.scale_dtype.itemsize == 4
    assert torch.allclose(read, weight.dequantize(torch.float32), rtol=1e-6 if exact else 2**-7, atol=0)
    packed, fmt = tensors[layout.data], scheme.format
    if fmt.element == "e2m1":
        assert torch.equal(pack_fp4_to_uint8(unpack_fp4_from_uint8(packed, 48, 256)), packed)
    if fmt.element.startswith("int"):
        bits = 8 // fmt.per_byte
        assert torch.equal(pack_to_int32(unpack_from_int32(packed, bits, (48, 256)), bits), packed)
        assert tensors["weight_shape"].tolist() == [48, 256]
    if fmt.has_zero_point:
        zeros = fmt.zero(weight.scale).to(torch.int8)
        assert torch.equal(pack_to_int32(zeros, 4, packed_dim=0), tensors["weight_zero_point"])
    if fmt.has_e8m0_scale:
        assert torch.equal(compress_mx_scale(fmt.step(weight.scale), torch.uint8), tensors["weight_scale"])


@settings(max_examples=50)
@given(cols=st.integers(1, 70), rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_int8_of_any_width_packs_as_compressed_tensors_packs_it(cols, rows, seed):
    torch.manual_seed(seed)
    weight = quantize(torch.randn(rows, cols), int8_per_channel)
    layout = LAYOUTS[COMPRESSED_TENSORS]["int8_per_channel"]
    tensors = {name: entry.encode(weight, rows) for name, entry in layout.entries.items()}
    assert torch.equal(tensors["weight_packed"], pack_to_int32(weight.qdata, 8))
    again = layout.weight("a", tensors, weight.dtype)
    assert again.shape == weight.shape
    assert all(same_bytes(a, b) for a, b in zip(again.parts(), weight.parts(), strict=True))


def test_global_scales_survive_being_stored_as_divisors():
    """compressed-tensors and vLLM keep nvfp4's G; a QTensor keeps 1 / G. For every mantissa there is."""
    gains = (torch.arange(1 << 23, dtype=torch.int32) | (127 << 23)).view(torch.float32)
    for exponent in (-40, 0, 38):
        held = (gains * 2.0**exponent).reciprocal()
        assert torch.equal(held.reciprocal().reciprocal(), held)


# No mixtral in mxfp8 and nvfp4: transformers decodes experts as if they had neither groups of 32 nor a global scale.
# Not int4_asymmetric: compressed-tensors 0.20 expects zero points that are not packed in a model on the meta device, as
# transformers makes it, and so refuses its own files.
@reads_quantized
@pytest.mark.parametrize(
    ("name", "scheme", "format"),
    [
        *(("llama", scheme, "compressed-tensors") for scheme in SCHEMES if scheme != int4_asymmetric),
        *(("llama", scheme, "fp8") for scheme in (fp8_per_tensor, fp8_per_block, mxfp4)),
        *(("llama", NAMED[name].searched(), "compressed-tensors") for name in SEARCHES),
        *(
            ("llama", scheme.by_recipe("compressed-tensors"), "compressed-tensors")
            for scheme in (nvfp4, int4_per_group, int8_per_channel)
        ),
        ("llama", fp8_per_block.searched(), "fp8"),
        *(("mixtral", scheme, "compressed-tensors") for scheme in (mxfp4, int8_per_channel, int4_per_group)),
    ],
    ids=str,
)
def test_transformers_reads_it_by_itself(name, scheme, format, sources, tmp_path):
    model = load_online(sources[name], scheme)
    if format == "fp8" and scheme.plain() != fp8_per_block:
        with pytest.raises(CheckpointError, match=f"no place for {scheme.name}"):
            save_checkpoint(model, tmp_path / "saved", format)
        return
    folder = save_quietly(model, tmp_path / "saved", format)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs(torch.arange(3, 20)[None])  # compressed-tensors decompresses at the first call
    for name, weight in quantized(model).items():
        held, ours = theirs.get_parameter(name).float(), weight.dequantize(torch.float32)
        # compressed-tensors rounds the scale to bfloat16, and the product again.
        assert torch.allclose(held, ours, rtol=2**-7, atol=0), name


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_files_are_those_that_safetensors_would_write(scheme, sources, tmp_path):
    (file,) = save_quietly(load_online(sources["llama"], scheme), tmp_path / "saved").glob("*.safetensors")
    save_file(load_file(file), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "theirs.safetensors").read_bytes() == file.read_bytes()


@reads_quantized
def test_llm_compressors_bf16_scales_are_read(sources, tmp_path):
    """compressed-tensors keeps scales in the weight's dtype; their values are what counts."""
    folder = save_checkpoint(load_online(sources["llama"], fp8), tmp_path / "theirs")
    tensors = load_file(folder / "model.safetensors")
    rounded = {n: t.bfloat16() if n.endswith("weight_scale") else t for n, t in tensors.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "qtensor.json").unlink()
    model = load_online(folder, fp8)
    for name, weight in quantized(model).items():
        assert torch.equal(weight.scale, rounded[f"{name}_scale"].float())


@reads_quantized
@pytest.mark.parametrize(
    ("scheme", "fate"), [(fp8_per_tensor, "rounds to the largest scale"), (nvfp4, "wrong for the others")], ids=str
)
def test_parts_that_servers_fuse_are_warned_of_where_their_scales_differ(scheme, fate, sources, tmp_path):
    """vLLM fuses q, k and v. Per tensor it rounds them to the largest of their scales, of nvfp4 it takes one's."""
    with pytest.warns(UserWarning, match=rf"layers.0.\w+.\w+ and its partners, and 3 other.*{fate}"):
        save_checkpoint(load_online(sources["llama"], scheme), tmp_path / "saved")
    quantize_checkpoint(sources["llama"], tmp_path / "converted", scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save_checkpoint(load_online(tmp_path / "converted", scheme), tmp_path / "again")


def test_a_packed_checkpoint_is_inspected_by_the_weights_own_shape(sources, tmp_path):
    quantize_checkpoint(sources["llama"], tmp_path / "saved", nvfp4)
    report = inspect_checkpoint(tmp_path / "saved", sources["llama"])
    down = next(w for w in report.quantized if w.name == "model.layers.1.mlp.down_proj.weight")
    source = load_file(sources["llama"] / "model.safetensors")[down.name]
    assert (down.scheme, down.shape, down.bytes) == ("nvfp4", (128, 256), 128 * 128 + 128 * 16 + 4)
    noise = source.float() - quantize(source, nvfp4).dequantize(torch.float32)
    expected = 10 * torch.log10(source.float().square().sum() / noise.square().sum())
    assert down.sqnr == pytest.approx(float(expected), abs=1e-3)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_transformers_that_casts_what_it_reads_is_refused(sources, tmp_path, monkeypatch):
    """Before 5.21 it casts fp8 values to bfloat16 as it reads them, and 5.0 drops the scales with a warning."""
    folder = save_checkpoint(load_online(sources["llama"], fp8), tmp_path / "saved")
    if transformers_asks():
        monkeypatch.delattr("transformers.quantizers.base.HfQuantizer.get_new_dtype")
    with pytest.raises(CheckpointError, match=r"needs transformers 5\.21 or newer.*load_checkpoint"):
        load_online(folder, fp8)


def linear(scheme: Any = fp8) -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 32))
    model[0].weight = nn.Parameter(quantize(torch.randn(32, 16), scheme), requires_grad=False)
    return model


def test_blocks_across_a_fused_border_are_refused_by_name(tmp_path):
    config = LlamaConfig(**COMMON | {"num_key_value_heads": 2}, intermediate_size=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj has 64 rows"):
        save_checkpoint(load_online(tmp_path / "source", fp8_per_block), tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj has 64 rows"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "saved", fp8_per_block)
    assert not (tmp_path / "saved").exists()
    online = load_online(tmp_path / "source", fp8_per_block, ignore=["lm_head", "*.self_attn.?_proj"])
    assert problems(save_checkpoint(online, tmp_path / "saved")) == []


@pytest.mark.parametrize(
    ("scheme", "cols"),
    [(mxfp8, 48), (mxfp4, 33), (nvfp4, 8), (int4_per_group, 64), (int4_per_group_32, 48)],
    ids=str,
)
def test_short_groups_are_refused_by_name(scheme, cols, tmp_path):
    """compressed-tensors refuses columns that are no multiple of the group; qtensor in memory does not."""
    model = nn.Sequential(nn.Linear(cols, 32))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model[0].weight = nn.Parameter(quantize(model[0].weight, scheme), requires_grad=False)
    message = rf"0 has {cols} columns: {scheme} is stored in groups of {scheme.format.block[1]}.*use fp8_per_channel"
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(model, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(tmp_path, tmp_path / "saved", scheme)
    assert not (tmp_path / "saved").exists()


SPOILED: dict[str, tuple[Any, str, Any, str]] = {
    "zero scale": (int4_per_group, "weight_scale", lambda t: t * 0, "not finite and positive"),
    "e8m0 NaN": (mxfp4, "weight_scale", lambda t: t | 255, "not finite and positive"),
    "zero divisor": (nvfp4, "weight_global_scale", lambda t: t * 0, "not finite and positive"),
    "no divisor": (nvfp4, "weight_global_scale", lambda t: None, r"has no 0\.weight_global_scale"),
    "no scale": (int8_per_channel, "weight_scale", lambda t: None, r"0\.weight_packed: .* has no scales"),
    "zero scale, zero points": (int4_asymmetric, "weight_scale", lambda t: t * 0, "not finite and positive"),
    "many bits": (int4_asymmetric, "weight_scale", lambda t: t * (1 + 2**-20), "more than 20 significant bits"),
    "wide scales": (int4_per_group_32, "weight_scale", lambda t: t.float() * (1 + 2**-9), "bfloat16 does not hold"),
    "no zero points": (int4_asymmetric, "weight_zero_point", lambda t: None, r"has no 0\.weight_zero_point"),
    "few zero points": (int4_asymmetric, "weight_zero_point", lambda t: t[:2], r"0\.weight_zero_point is .*\[4, 1\]"),
    "other shape": (int4_per_group, "weight_shape", lambda t: t * 2, r"0: is said to be \[64, 256\]"),
    "vast shape": (int4_per_group, "weight_shape", lambda t: t + 2**62, r"0: is said to be \[4611686018427387936, "),
    "many shapes": (int8_per_channel, "weight_shape", lambda t: t[:, None], "should be the shape of a matrix"),
    "no shape": (int4_per_group, "weight_shape", lambda t: t[:1], "should be the shape of a matrix"),
    "signed": (mxfp4, "weight_packed", lambda t: t.view(torch.int8), "stores torch.uint8 matrices"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_damage_to_packed_weights_is_found(what, tmp_path):
    scheme, suffix, spoil, message = SPOILED[what]
    model = nn.Sequential(nn.Linear(128, 32))
    model[0].weight = nn.Parameter(quantize(model[0].weight, scheme), requires_grad=False)
    file = save_checkpoint(model, tmp_path / "saved") / "model.safetensors"
    (tmp_path / "saved" / "qtensor.json").unlink()
    assert problems(tmp_path / "saved") == []
    tensors = load_file(file)
    spoiled = spoil(tensors.pop(f"0.{suffix}"))
    save_file(tensors | ({} if spoiled is None else {f"0.{suffix}": spoiled}), file)
    (problem,) = problems(tmp_path / "saved")
    assert re.search(message, problem), problem


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_of_zeros_are_sound(scheme, tmp_path):
    """Where a scale may be 0, its values are."""
    model = nn.Sequential(nn.Linear(128, 32, bias=False))
    model[0].weight = nn.Parameter(quantize(torch.zeros(32, 128), scheme), requires_grad=False)
    assert problems(save_checkpoint(model, tmp_path / "saved")) == []


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True}},
        {"weights": {"actorder": "group"}},
        {"weights": {"symmetric": False, "num_bits": 8}},
        {"input_activations": {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}},
    ],
)
def test_integer_checkpoints_of_another_kind_are_not_misread(change, tmp_path):
    model = nn.Sequential(nn.Linear(128, 32))
    model[0].weight = nn.Parameter(quantize(model[0].weight, int4_per_group), requires_grad=False)
    folder = save_checkpoint(model, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    for key, value in change.items():
        group[key] = (group[key] or {}) | value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="none of the schemes that can be read"):
        load_checkpoint(nn.Sequential(nn.Linear(128, 32)), folder)


def test_experts_that_no_tool_has_a_form_for_are_refused(tmp_path):
    config = GptOssConfig(**COMMON, head_dim=32, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    model = load_online(tmp_path / "source", fp8)
    with pytest.raises(CheckpointError, match=r"experts\.\w+: GptOssForCausalLM's checkpoint has these experts in one"):
        save_checkpoint(model, tmp_path / "saved")


def test_a_model_without_values_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"0\.weight is on the meta device"):
        save_checkpoint(nn.Sequential(nn.Linear(4, 4, bias=False, device="meta")), tmp_path / "saved")
    session = online_quant(fp8, model := nn.Sequential(nn.Linear(4, 4, bias=False)))
    with session, pytest.raises(CheckpointError, match=r"0\.weight is still being loaded"):
        try:
            save_checkpoint(model, tmp_path / "saved")
        finally:
            session.abort()
    with pytest.raises(ConfigError, match="unknown checkpoint format 'gguf'"):
        save_checkpoint(linear(), tmp_path / "saved", "gguf")
    with pytest.raises(CheckpointError, match="cannot say that activations are not quantized"):
        save_checkpoint(linear(fp8_per_block.weight_only()), tmp_path / "saved", "fp8")
    assert not (tmp_path / "saved").exists()


def test_names_that_meet_are_refused_before_the_first_byte(tmp_path):
    model = linear()
    model[0].weight_scale = nn.Parameter(torch.ones(1))
    with pytest.raises(CheckpointError, match=r"0\.weight \(fp8.*\) and 0\.weight_scale would both"):
        save_checkpoint(model, tmp_path / "saved")
    model = nn.Module()
    model.experts = nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(16, 32, bias=False)})])
    model.experts.w1 = nn.Parameter(quantize(torch.randn(2, 32, 16), fp8), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.weight and experts\.w1 \(fp8.*\) would both"):
        save_checkpoint(model, tmp_path / "saved")
    model = nn.Module()
    model.register_parameter("__metadata__", nn.Parameter(torch.ones(1)))
    with pytest.raises(CheckpointError, match="the metadata of each file and __metadata__ would both"):
        save_checkpoint(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_only_what_a_save_wrote_is_replaced(tmp_path):
    folder = save_checkpoint(linear(fp8_per_tensor), tmp_path / "saved")
    before = digests(folder)
    save_checkpoint(linear(fp8), folder)
    assert digests(folder).keys() == before.keys()
    assert digests(folder)["config.json"] != before["config.json"]
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex, which was not written by a save"):
        save_checkpoint(linear(), folder)
    assert (folder / "thesis.tex").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        save_checkpoint(linear(), tmp_path / "file")


def test_a_neighbour_is_never_removed(tmp_path):
    """Of all that lies where a save builds, only what bears its mark is its own."""
    neighbour = save_checkpoint(linear(), tmp_path / "ck.partial")
    (neighbour / "thesis.tex").write_text("years of work")
    before = digests(neighbour)
    with pytest.raises(CheckpointError, match=r"ck\.partial is in the way, and was not made by qtensor"):
        save_checkpoint(linear(), tmp_path / "ck")
    assert digests(neighbour) == before
    left = tmp_path / "other.partial"  # What a killed save left, and a file that someone put there.
    (left / writing.MARK).mkdir(parents=True)
    (left / writing.MARK / writing.LOCK).touch()
    (left / "thesis.tex").write_text("years of work")
    save_checkpoint(linear(), tmp_path / "other")
    assert [p.name for p in left.iterdir()] == ["thesis.tex"]
    (tmp_path / "link.partial").symlink_to(neighbour)
    with pytest.raises(CheckpointError, match="in the way"):
        save_checkpoint(linear(), tmp_path / "link")
    assert digests(neighbour) == before


def test_a_forged_list_of_contents_removes_no_folder(tmp_path):
    folder = tmp_path / "ck"
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "thesis.tex").write_text("years of work")
    (folder / "qtensor.json").write_text(json.dumps({"files": ["qtensor.json", "thesis"], "tensors": {}}))
    with pytest.raises(CheckpointError, match="holds thesis, which was not written by a save"):
        save_checkpoint(linear(), folder)
    assert (folder / "thesis" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_the_target_is_followed(there, tmp_path):
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    if there:
        save_checkpoint(linear(fp8_per_tensor), real)
    link.symlink_to(real)
    for _ in range(2):
        assert save_checkpoint(linear(), link) == link
        assert link.is_symlink()
        assert problems(real) == []
        assert [p.name for p in real.parent.iterdir()] == ["real"]
        assert [p.name for p in tmp_path.iterdir() if p.name not in ("disk", "link")] == []
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(CheckpointError, match="circle is a link that leads nowhere"):
        save_checkpoint(linear(), tmp_path / "circle")


def test_what_does_not_fit_the_model_is_refused_before_the_first_write(tmp_path):
    folder = save_checkpoint(linear(), tmp_path / "saved")
    other = nn.Sequential(nn.Linear(16, 32, bias=False))
    before = other[0].weight.clone()
    with pytest.raises(CheckpointError, match=r"Sequential has no 0\.bias"):
        load_checkpoint(other, folder)
    assert torch.equal(other[0].weight, before)
    with pytest.raises(IncompleteLoadError, match=r"1\.weight"):
        load_checkpoint(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)), folder)
    with pytest.raises(CheckpointError, match=r"0: is \[32, 16\], and 0\.weight needs \[32, 8\]"):
        load_checkpoint(nn.Sequential(nn.Linear(8, 32)), folder)
