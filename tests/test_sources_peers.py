"""Checkpoints that other libraries wrote, with their own code: torchao (by transformers) and compressed-tensors. More
of them, which need an environment of their own, are in tests/libraries/test_library_sources.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qtensor.checkpoint.transformers import transformers_asks

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not transformers_asks(), reason="needs transformers 5.21 or newer")

from support import peers  # noqa: E402
from support.peers import Made  # noqa: E402

TORCHAO = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig")
PRESETS = (
    *("W3A16", "W4A16", "W4A16_ASYM", "W8A16", "INT8"),
    *("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16"),
)


def by_torchao(folder: Path, which: str) -> Made:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is in the extra 'bench'")
    more: dict[str, Any] = {
        "Int8WeightOnlyConfig": {"version": 2},
        "IntxWeightOnlyConfig": {"weight_dtype": torch.int4},
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(
        peers.plain_folder(folder / "plain"),
        quantization_config=transformers.TorchAoConfig(getattr(torchao, which)(**more.get(which, {}))),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder / which)
    weights = peers.linear_weights(model, lambda module: module.weight.dequantize())
    return Made(folder / which, weights, peers.logits(model))


def calibrated(module: Any) -> None:
    """Scales by the largest values of a weight, with the library's formula."""
    from compressed_tensors.quantization.utils import calculate_qparams
    from compressed_tensors.quantization.utils.helpers import generate_gparam

    args, weight = module.quantization_scheme.weights, module.weight.detach().float()
    how, whole = str(getattr(args.strategy, "value", args.strategy)), None
    if how == "block":
        (a, b), (n, k) = args.block_structure, weight.shape
        runs = weight.view(n // a, a, k // b, b).transpose(1, 2).flatten(2)
    elif how in ("group", "tensor_group"):
        runs = weight.unflatten(1, (-1, args.group_size))
    else:
        runs = weight.unsqueeze(1) if how == "channel" else weight.view(1, -1)
    low, high = runs.amin(-1), runs.amax(-1)
    if how == "tensor_group":
        whole = generate_gparam(weight.amin().view(1), weight.amax().view(1))
        module.weight_global_scale.data.copy_(whole)
    scale, zero = calculate_qparams(low, high, args, global_scale=whole)
    module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.view_as(module.weight_zero_point))


def by_compressed_tensors(folder: Path, preset: str) -> Made:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is in the extra 'checkpoint'")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    model = peers.plain_model()
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.input_activations = None
    apply_quantization_config(model, QuantizationConfig(config_groups={"g": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            calibrated(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / preset)
    compressor.update_config(folder / preset)
    compressor.decompress_model(model)
    weights = peers.linear_weights(model, lambda module: module.weight)
    return Made(folder / preset, weights, peers.logits(model))


@pytest.mark.parametrize("which", TORCHAO)
def test_torchaos_checkpoints(which: str, tmp_path: Path) -> None:
    made = by_torchao(tmp_path, which)
    peers.assert_decoded_as_theirs(made)
    assert peers.assert_becomes(made, "mxfp8") == {"requantized"}
    expected = {"Float8WeightOnlyConfig": "fp8_per_channel"}.get(which, "int8_per_channel")
    assert peers.assert_becomes(made, expected) == {"lossless"}


MOVED = {
    "W4A16": "int4_per_group",
    "INT8": "int8_per_channel",
    "FP8": "fp8_per_channel",
    "FP8_DYNAMIC": "fp8_per_channel",
    "FP8_BLOCK": "fp8_per_block",
    "NVFP4A16": "nvfp4",  # Its divisor becomes a factor.
    "MXFP4A16": "mxfp8",
    "MXFP8A16": "mxfp8",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_compressed_tensors_checkpoints(preset: str, tmp_path: Path) -> None:
    made = by_compressed_tensors(tmp_path, preset)
    peers.assert_decoded_as_theirs(made)
    assert peers.assert_becomes(made, "int8_per_channel" if preset != "INT8" else "fp8_per_block") == {"requantized"}
    if (scheme := MOVED.get(preset)) is not None:
        outcome = "moved" if preset == "NVFP4A16" else "lossless"
        assert peers.assert_becomes(made, scheme, shared=scheme == "nvfp4") == {outcome}
