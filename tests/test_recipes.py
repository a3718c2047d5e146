"""Recipes: the bytes of other tools, compared with the tools that are installed, or with their published formula.

vLLM's, which are the formats' own, are compared in tests/vllm/test_vllm_formulas.py. That whatever a loader did equals
the oracle is in test_properties.py, whose schemes some of these are among."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import qtensor
from qtensor import ConfigError, QTensor, load_checkpoint, online_quant, online_reload, quantize
from qtensor.checkpoint.layouts import LAYOUTS
from qtensor.checkpoint.quantization_config import QTensorConfig
from qtensor.cli.main import main
from qtensor.kernels import RECIPES
from qtensor.schemes.config import read_config
from qtensor.schemes.scheme import SCHEMES, Scheme, as_scheme

OWN = [SCHEMES[name].by_recipe(tool) for tool, formats in RECIPES.items() for name, own in formats.items() if own]
recipes = pytest.mark.parametrize("scheme", OWN, ids=str)
EVERY_DTYPE = (torch.bfloat16, torch.float16, torch.float32)
PRESETS = {
    "fp8_per_tensor": ("FP8", "float-quantized"),
    "fp8_per_channel": ("FP8_DYNAMIC", "float-quantized"),
    "fp8_per_block": ("FP8_BLOCK", "float-quantized"),
    "mxfp8": ("MXFP8", "mxfp8-quantized"),
    "mxfp4": ("MXFP4A16", "mxfp4-pack-quantized"),
    "nvfp4": ("NVFP4A16", "nvfp4-pack-quantized"),
    "int8_per_channel": ("W8A8", "int-quantized"),
    "int4_per_group": ("W4A16", "pack-quantized"),
    "int4_per_group_32": ("W4A16", "pack-quantized"),
    "int4_asymmetric": ("W4A16_ASYM", "pack-quantized"),
}
"""Format → compressed-tensors' preset, and the compressor that stores it."""


@st.composite
def matrices(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = EVERY_DTYPE) -> torch.Tensor:
    """Whole groups; rows of many sizes, down to subnormals, and among them zeros of both signs and amax on the borders
    between two powers of two. What makes a tool's own arithmetic overflow is left out."""
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, cols = draw(st.sampled_from([(3, 128), (40, 256), (130, 128)]))
    limit = 5e4 if dtype == torch.float16 else 1e38
    weight = torch.randn(rows, cols, generator=generator).clamp(-4, 4) * draw(st.sampled_from([1e-38, 1e-6, 0.02, 1e3]))
    exponents = torch.randint(-30, 12, (rows, 1), generator=generator) * draw(st.booleans())
    weight = (weight * torch.exp2(exponents.float())).clamp(-limit, limit)
    top = draw(st.sampled_from([0.0, 1.0, 1.25, 1.5, 1.75, 1.7500001, 1.9921875]))
    for row in range(0, rows, 3):
        size = 2.0 ** int(torch.randint(-20, 12, (), generator=generator))
        weight[row, 5::32] = top * size
        weight[row] = weight[row].clamp(-top * size, top * size)
    weight[torch.rand(rows, cols, generator=generator) < 0.05] *= -0.0
    return weight.to(dtype)


def compressed(weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """What llm-compressor makes of a matrix without data, by compressed-tensors' own functions: the largest and the
    smallest value of each group, scales from these, in the weight's dtype, and the compressor."""
    pytest.importorskip("compressed_tensors", reason="the comparison is with compressed-tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    preset, packing = PRESETS[name]
    scheme, fmt = preset_name_to_scheme(preset, ["Linear"]), SCHEMES[name].format
    if fmt.element == "int4":  # The preset is of groups of 128.
        scheme.weights.group_size = fmt.block[1]
    rows, cols = weight.shape
    if fmt.granularity == "tensor":
        units = weight.reshape(1, -1)
    elif fmt.granularity == "block":
        padded = nn.functional.pad(weight, (0, -cols % 128, 0, -rows % 128))
        down, across = padded.shape[0] // 128, padded.shape[1] // 128
        units = padded.reshape(down, 128, across, 128).transpose(1, 2).flatten(-2)
    else:
        units = weight.unflatten(-1, (-1, fmt.block[1] if fmt.block[1] > 1 else cols))
    low, high = units.amin(-1), units.amax(-1)
    state = {"weight": weight.clone()}
    gain = None
    if fmt.has_global_scale:
        largest = torch.max(high.max(), -low.min()).reshape(1)
        gain = state["weight_global_scale"] = generate_gparam(-largest, largest)
    scale, zero = calculate_qparams(low, high, scheme.weights, global_scale=gain)
    if fmt.has_zero_point:
        state["weight_zero_point"] = zero
    state["weight_scale"] = scale.to(weight.dtype)  # The parameter that holds it has that dtype.
    return dict(BaseCompressor.get_value_from_registry(packing).compress(state, scheme))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """The same bytes; of scales in fp32 the same numbers, for theirs are in the weight's dtype."""
    if ours.itemsize == 4:
        return torch.equal(ours.flatten(), theirs.to(ours.dtype).flatten())
    return torch.equal(ours.contiguous().view(torch.uint8).flatten(), theirs.contiguous().view(torch.uint8).flatten())


@pytest.mark.parametrize("name", PRESETS)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=25)
@given(weight=matrices())
def test_the_bytes_of_compressed_tensors(name: str, weight: torch.Tensor) -> None:
    if name == "int4_asymmetric" and weight.dtype == torch.float32:
        weight = weight.bfloat16()  # A scale of 24 bits is not stored.
    if name == "int4_per_group_32":
        weight = weight.bfloat16()  # Nor is one of more than 8.
    theirs = compressed(weight, name)
    ours = quantize(weight, SCHEMES[name].by_recipe("compressed-tensors"))
    stored = {
        key: entry.encode(ours, len(weight)) for key, entry in LAYOUTS["compressed-tensors"][name].entries.items()
    }
    if name == "int8_per_channel":  # Its compressor for quantized activations does not pack.
        stored = {"weight": ours.qdata, "weight_scale": ours.scale}
    if ours.global_scale is not None:  # We keep the inverse, and the way back may be off by its last bit.
        gain = theirs["weight_global_scale"]
        assert torch.equal(ours.global_scale, 1.0 / gain)
        torch.testing.assert_close(stored.pop("weight_global_scale"), gain, rtol=2.0**-23, atol=0)
    for key, part in stored.items():
        assert same(part, theirs[key]), key


@pytest.mark.parametrize("name", RECIPES["torchao"])
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=25)
@given(weight=matrices(dtypes=(torch.bfloat16,)))  # Of fp32 their logarithm can fall a power of two short.
def test_the_bytes_of_torchao(name: str, weight: torch.Tensor) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="the comparison is with torchao")
    element = torch.float8_e4m3fn if name == "mxfp8" else torch.float4_e2m1fn_x2
    scale, qdata = mx.to_mx(weight, element, 32, mx.ScaleCalculationMode.RCEIL)
    ours = quantize(weight, f"{name}:torchao")
    assert same(ours.scale, scale)
    assert same(ours.qdata, qdata)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=25)
@given(weight=matrices())
def test_the_bytes_of_quark(weight: torch.Tensor) -> None:
    """Its formulas as amd-quark 0.13 publishes them: `quark_aligned_fp8_per_channel_quant`, and of mxfp4 `even_round`,
    whose scale is ours."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448.0).to(weight.dtype)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    ours = quantize(weight, "fp8_per_channel:quark")
    assert same(ours.scale, scale)
    assert same(ours.qdata, (weight / safe).clamp(-448.0, 448.0).to(torch.float8_e4m3fn))

    amax = weight.float().unflatten(1, (-1, 32)).abs().amax(-1)
    rounded = ((amax.view(torch.int32) + (1 << 21)) & 0x7F800000).view(torch.float32)
    rounded = rounded.masked_fill(amax == 0, 2.0**-126).log2().floor().sub(2).clamp(-127, 127)
    assert same(quantize(weight, "mxfp4:quark").scale, (rounded + 127).to(torch.uint8))


def test_what_needs_no_recipe_stays_and_what_has_none_is_refused() -> None:
    for tool, formats in RECIPES.items():
        for scheme in set(SCHEMES.values()):
            if scheme.name not in formats:
                with pytest.raises(ConfigError, match=f"no recipe of {tool} for {scheme.name}"):
                    scheme.by_recipe(tool)
            else:
                assert (scheme.by_recipe(tool) == scheme) == (formats[scheme.name] is None)
    assert set(RECIPES["vllm"].values()) == {None}
    nvfp4 = SCHEMES["nvfp4"]
    for again in (nvfp4.searched(), nvfp4.by_recipe("compressed-tensors")):
        with pytest.raises(ConfigError, match="name what its scales are once"):
            again.by_recipe("vllm")
    with pytest.raises(ConfigError, match="none to search"):
        nvfp4.by_recipe("compressed-tensors").searched()
    with pytest.raises(ConfigError, match="unknown recipe 'gptq': use one of vllm, compressed-tensors, quark, torchao"):
        nvfp4.by_recipe("gptq")
    for attempt in (
        lambda: online_quant("fp8", recipe="gptq"),
        lambda: online_quant("int4_per_group", recipe="vllm"),
        lambda: online_quant(["nvfp4", "fp8"], fit="1GB", recipe="vllm"),
        lambda: online_quant(["nvfp4:compressed-tensors"], fit="1GB"),
        lambda: QTensorConfig("mxfp8", recipe="quark"),
        lambda: as_scheme("fp8:gptq"),
    ):
        with pytest.raises(ConfigError):
            attempt()


@recipes
def test_a_name_is_read_back(scheme: Scheme) -> None:
    """By everything that takes one: strings, configurations, pickles and files of PyTorch."""
    assert scheme.name == f"{scheme.format.name}:{scheme.recipe}"
    assert as_scheme(scheme.name) == scheme
    assert scheme.plain() == SCHEMES[scheme.format.name]
    assert read_config({"linear": scheme.name}).linear == scheme
    for config in (QTensorConfig(scheme), QTensorConfig(scheme.plain(), recipe=scheme.recipe)):
        assert QTensorConfig.from_dict(config.to_dict()).selection().config.linear == scheme
    weight = quantize(torch.randn(8, 32).bfloat16(), scheme)
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=True), pickle.loads(pickle.dumps(weight))):
        assert twin.scheme == scheme
        assert torch.equal(twin.qdata.view(torch.uint8), weight.qdata.view(torch.uint8))


class Net(nn.Module):
    """Layers with names that are not tied together by servers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(a, b, bias=False, dtype=torch.bfloat16) for a, b in ((128, 256), (256, 128)))


def assert_parts(got: QTensor, wanted: QTensor) -> None:
    assert got.scheme == wanted.scheme
    for part, expected in zip(got.parts(), wanted.parts(), strict=True):
        assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))


@recipes
def test_a_checkpoint_remembers_and_a_reload_follows(scheme: Scheme, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = Net().state_dict()
    with online_quant(scheme.plain(), recipe=scheme.recipe):
        model = Net()
        model.load_state_dict(state)
    qtensor.save_checkpoint(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["recipes"] == {"group_0": scheme.recipe}
    again = Net()
    load_checkpoint(again, tmp_path / "saved")
    for name, weight in state.items():
        assert_parts(again.get_parameter(name), quantize(weight, scheme))
    new = {name: weight * 3 + 0.01 for name, weight in state.items()}
    with online_reload(again):
        again.load_state_dict(new)
    for name, weight in new.items():
        assert_parts(again.get_parameter(name), quantize(weight, scheme))


def test_the_fp8_format_remembers_too(tmp_path: Path) -> None:
    state = Net().state_dict()
    with online_quant("fp8_per_block", recipe="compressed-tensors"):
        model = Net()
        model.load_state_dict(state)
    qtensor.save_checkpoint(model, tmp_path / "saved", format="fp8")
    again = Net()
    load_checkpoint(again, tmp_path / "saved")
    assert_parts(again.up.weight, model.up.weight)


def test_the_command_line_follows_a_recipe(tmp_path: Path) -> None:
    source, made = tmp_path / "source", tmp_path / "made"
    source.mkdir()
    weight = torch.randn(64, 256).bfloat16()
    save_file({"model.layers.0.mlp.down_proj.weight": weight}, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text("{}")
    assert main(["quantize", str(source), str(made), "--scheme", "fp8", "--recipe", "compressed-tensors"]) == 0
    held = load_file(next(made.glob("*.safetensors")))
    wanted = compressed(weight, "fp8_per_channel")
    for key, part in wanted.items():
        assert same(held[f"model.layers.0.mlp.down_proj.{key}"], part)
    assert main(["verify", str(made)]) == 0
    assert main(["quantize", str(source), str(tmp_path / "other"), "--scheme", "mxfp8", "--recipe", "quark"]) != 0


@recipes
def test_bytes_of_the_same_format_are_kept(scheme: Scheme) -> None:
    """A weight copied from a quantized one has its bytes, whoever made it, and products read the smallest ones."""
    weight = torch.randn(256, 128).bfloat16()
    weight[:, 0] = -weight.abs().amax(1)  # The code -128, or -8, where there is one.
    given, got = quantize(weight, scheme), quantize(torch.zeros_like(weight), scheme.plain())
    got.copy_(given)
    for part, wanted in zip(got.parts(), given.parts(), strict=True):
        assert torch.equal(part.view(torch.uint8), wanted.view(torch.uint8))
    x = torch.randn(3, 128)
    exact = nn.functional.linear(x, given.dequantize(torch.float32))
    plain = QTensor(given.qdata, given.scale, scheme.weight_only(), torch.float32, global_scale=given.global_scale)
    torch.testing.assert_close(nn.functional.linear(x, plain), exact, rtol=1e-4, atol=1e-4)


@recipes
def test_what_is_let_through_does_no_harm(scheme: Scheme) -> None:
    """NaN and infinity beside finite values: these keep the codes that they have without them."""
    weight = torch.randn(128, 128).bfloat16()
    marred = weight.clone()
    marred[:, 7], marred[:, 8] = float("nan"), float("-inf")
    calm = weight.clone()
    calm[:, 7:9] = 0.0
    layer = nn.Linear(128, 128, bias=False, dtype=torch.bfloat16)
    with online_quant(scheme, layer, on_nonfinite="keep"):
        layer.load_state_dict({"weight": marred})
    got, wanted = layer.weight, quantize(calm, scheme)
    assert torch.equal(got.scale.view(torch.uint8), wanted.scale.view(torch.uint8))
    keep = [c for c in range(128) if c not in (6, 7, 8, 9)]
    assert torch.equal(got.dequantize()[:, keep], wanted.dequantize()[:, keep])
