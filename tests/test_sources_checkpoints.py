"""Quantized checkpoints into another scheme: into a model, and file to file; and what is wrong with one, by name."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from qtensor import (
    CheckpointError,
    LossySourceError,
    QTensor,
    load_checkpoint,
    online_quant,
    quantize,
    save_checkpoint,
    verify_checkpoint,
)
from qtensor.checkpoint import quantize_checkpoint, requantizing
from qtensor.checkpoint.requantizing import Buffer
from qtensor.schemes.scheme import SCHEMES
from qtensor.sources.mxfp4 import MxFp4
from support.helpers import assert_oracle, same_bytes
from support.sources import FORMS, whole

SOURCES = ["fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "mxfp8", "mxfp4", "nvfp4"]
LOSSLESS = {(s, s) for s in SOURCES} | {("fp8_per_tensor", "fp8_per_channel"), ("fp8_per_tensor", "fp8_per_block")}
LOSSLESS |= {("mxfp4", "mxfp8"), ("mxfp4", "nvfp4")}
TARGETS = ["fp8_per_channel", "fp8_per_block", "mxfp8", "nvfp4", "int4_per_group"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(a, b, bias=b == 128, dtype=torch.bfloat16) for a, b in ((128, 384), (384, 128)))
        self.norm = nn.LayerNorm(128, dtype=torch.bfloat16)
        self.lm_head = nn.Linear(128, 32, bias=False, dtype=torch.bfloat16)


def meta() -> Net:
    with torch.device("meta"):
        return Net()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Path]:
    """A model in each format, its head among what is quantized."""
    made = {}
    for scheme in SOURCES:
        torch.manual_seed(0)
        state = Net().state_dict()
        with online_quant(scheme, ignore=[]):
            model = Net()
            model.load_state_dict(state)
        made[scheme] = tmp_path_factory.mktemp(scheme) / "folder"
        save_checkpoint(model, made[scheme])
    return made


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The values of a folder, as its own loader has them."""
    model = meta()
    load_checkpoint(model, folder)
    return {n: p.dequantize() if isinstance(p, QTensor) else p.detach() for n, p in model.named_parameters()}


def assert_became(weight: Any, values: torch.Tensor, source: str, scheme: str) -> None:
    if (source, scheme) in LOSSLESS:
        assert weight.scheme.name == scheme
        assert same_bytes(weight.dequantize(), values)
    else:
        assert_oracle(weight, values, weight.scheme)


@pytest.mark.parametrize("scheme", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_model_takes_a_quantized_folder_in_any_scheme(folders: dict[str, Path], source: str, scheme: str) -> None:
    values, model = stored(folders[source]), meta()
    report = load_checkpoint(model, folders[source], scheme=scheme)
    assert_became(model.up.weight, values["up.weight"], source, scheme)
    assert_became(model.down.weight, values["down.weight"], source, scheme)
    assert torch.equal(model.lm_head.weight, values["lm_head.weight"])  # Ignored: decoded.
    assert torch.equal(model.norm.weight, values["norm.weight"])
    assert all(layer.source for layer in report.layers)


def test_a_folder_in_high_precision_becomes_the_scheme(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = Net().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    model = meta()
    load_checkpoint(model, tmp_path, scheme="mxfp8")
    assert_oracle(model.up.weight, state["up.weight"], SCHEMES["mxfp8"])


@pytest.mark.parametrize("scheme", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_files_become_files_in_any_scheme(folders: dict[str, Path], source: str, scheme: str, tmp_path: Path) -> None:
    values = stored(folders[source])
    report = quantize_checkpoint(folders[source], tmp_path / "out", scheme)
    assert verify_checkpoint(tmp_path / "out") == []
    assert sum(report.sources.values()) == 3
    model = meta()
    load_checkpoint(model, tmp_path / "out")
    if source != "nvfp4" or scheme != "nvfp4":
        assert_became(model.up.weight, values["up.weight"], source, scheme)
    assert torch.equal(model.lm_head.weight, values["lm_head.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_moved_files_are_the_very_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    quantize_checkpoint(folders["fp8_per_block"], tmp_path / "out", "fp8_per_block")
    before = load_file(folders["fp8_per_block"] / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("up.weight", "up.weight_scale", "down.weight", "down.weight_scale"):
        assert same_bytes(before[name], after[name])


@pytest.mark.parametrize("form", ["bitsandbytes nf4", "bitsandbytes fp4"])
def test_bitsandbytes_files_tell_their_shape(form: str, tmp_path: Path) -> None:
    parts = {name: FORMS[form].parts(*shape) for name, shape in (("up", (384, 128)), ("down", (128, 384)))}
    tensors = {f"{name}.{part.replace('*', 'weight')}": t for name, held in parts.items() for part, t in held.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    report = quantize_checkpoint(tmp_path, tmp_path / "out", "fp8_per_channel")
    assert sum(report.sources.values()) == 2
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, held in parts.items():
        wanted = quantize(whole(held, torch.bfloat16, (384, 128) if name == "up" else (128, 384)), "fp8_per_channel")
        assert same_bytes(found[f"{name}.weight"], wanted.qdata)
        assert same_bytes(found[f"{name}.weight_scale"], wanted.scale)
    state = next(name for name in tensors if "up.weight.quant_state" in name)
    text = bytes(tensors[state].tolist()).replace(b"384", b"385")
    save_file({**tensors, state: torch.tensor(list(text), dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up\.weight: .*says that its shape is \[385, 128\]"):
        quantize_checkpoint(tmp_path, tmp_path / "again", "fp8_per_channel")


def test_a_lossy_pair_is_refused_and_nothing_is_written(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(LossySourceError, match=r"^(up|down)\.weight: mxfp8 is not the same numbers in mxfp4"):
        quantize_checkpoint(folders["mxfp8"], tmp_path / "out", "mxfp4", strict_source="lossless")
    assert not (tmp_path / "out").exists()
    with pytest.raises(LossySourceError, match=r"^(up|down)\.weight: "):
        load_checkpoint(meta(), folders["mxfp8"], scheme="mxfp4", strict_source="lossless")
    load_checkpoint(meta(), folders["mxfp8"], scheme="mxfp8", strict_source="lossless")


@pytest.mark.parametrize("scheme", ["mxfp8", "int8_per_channel"])
def test_what_is_read_and_decoded_at_a_time_is_bounded(scheme: str, monkeypatch: Any, tmp_path: Path) -> None:
    """Rows of a matrix, matrices of a stack: by bytes, whether they are moved or decoded."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.empty(6, 256, 1024, dtype=torch.bfloat16))
            self.up = nn.Linear(1024, 4096, bias=False, dtype=torch.bfloat16)
            self.plain = nn.Linear(1024, 4096, bias=False, dtype=torch.bfloat16)

    stack = [FORMS["mxfp4 blocks"].parts(1024, 256, seed) for seed in range(6)]
    tensors = {name.replace("*", "experts"): torch.stack([p[name] for p in stack]) for name in stack[0]}
    parts = FORMS["mxfp4"].parts(4096, 1024)
    tensors |= {f"up.{name.replace('*', 'weight')}": t for name, t in parts.items()}
    tensors["plain.weight"] = torch.randn(4096, 1024, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    at_once, read = [], []
    take, move, decode = Buffer.take, MxFp4.move, MxFp4.decode_into
    monkeypatch.setattr(requantizing, "CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(requantizing.pieces, "__defaults__", (1 << 18,))
    monkeypatch.setattr(Buffer, "take", lambda b, size, dtype: (read.append(prod(size)), take(b, size, dtype))[1])
    monkeypatch.setattr(MxFp4, "move", lambda s, p, size, f: (at_once.append(prod(size)), move(s, p, size, f))[1])
    monkeypatch.setattr(MxFp4, "decode_into", lambda s, p, n, out: (at_once.append(prod(n)), decode(s, p, n, out))[1])
    with torch.device("meta"):
        model = Mixture()
    load_checkpoint(model, tmp_path, scheme={"experts": scheme, "*": scheme})
    assert max(read) <= 1 << 18
    assert max(at_once) <= 1 << 20
    assert_became(model.up.weight, whole(parts, torch.bfloat16, (4096, 1024)), "mxfp4", scheme)
    assert_oracle(model.plain.weight, tensors["plain.weight"], SCHEMES[scheme])


@pytest.mark.parametrize("what", ["no scale", "another shape", "another dtype"])
def test_what_is_wrong_with_a_folder_is_told_before_the_first_write(
    what: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(folders["fp8_per_block"] / "model.safetensors")
    scale = tensors.pop("down.weight_scale")
    if what != "no scale":
        tensors["down.weight_scale"] = scale[:1, :2].contiguous() if what == "another shape" else scale.int()
    save_file(tensors, tmp_path / "model.safetensors")
    model = Net()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"^down\.weight: |.*down\.weight"):
        load_checkpoint(model, tmp_path, scheme="mxfp8")
    with pytest.raises(CheckpointError, match=r"down\.weight"):
        quantize_checkpoint(tmp_path, tmp_path / "out", "mxfp8")
    assert quantize(before["up.weight"], "fp8").shape == model.up.weight.shape


@pytest.mark.parametrize("way", ["all parts", "values into the weight"])
def test_a_distributed_checkpoint_of_parts(way: str, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    shapes = {"up": (384, 128), "down": (128, 384)}
    parts = {name: FORMS["fp8 blocks"].parts(*shape) for name, shape in shapes.items()}
    stored = {f"{name}.{part.replace('*', 'weight')}": t for name, held in parts.items() for part, t in held.items()}
    dcp.save(stored, checkpoint_id=tmp_path, no_dist=True)
    with online_quant("mxfp8", source={}, on_missing="zero"):
        model = Net()
        state = {name: torch.empty_like(tensor) for name, tensor in stored.items()}
        if way != "all parts":
            state |= {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in shapes}
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        rest = state if way == "all parts" else {n: t for n, t in state.items() if n.endswith("_scale_inv")}
        model.load_state_dict(rest, strict=False)
    for name, held in parts.items():
        assert_oracle(model.get_submodule(name).weight, whole(held, torch.bfloat16, shapes[name]), SCHEMES["mxfp8"])


def test_a_weights_parts_may_lie_in_several_files(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["mxfp4"] / "model.safetensors")
    files = {name: f"{int(name.endswith('scale'))}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    values, model = stored(folders["mxfp4"]), meta()
    load_checkpoint(model, tmp_path, scheme="fp8_per_channel")
    assert_oracle(model.up.weight, values["up.weight"], SCHEMES["fp8"])
    quantize_checkpoint(tmp_path, tmp_path / "out", "fp8_per_channel")
    again = meta()
    load_checkpoint(again, tmp_path / "out")
    assert same_bytes(again.up.weight.qdata, model.up.weight.qdata)


ANYWHERE = sorted(FORMS)


def write_anywhere(folder: Path, tensors: dict[str, torch.Tensor], order: list[str], files: int) -> None:
    """A checkpoint of so many files, in each of which the tensors lie in that order. (The library sorts them.)"""
    dtypes = {
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.int32: "I32",
        torch.int64: "I64",
    }
    dtypes |= {torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0"}
    weight_map = {}
    for i in range(files):
        header, data = {}, b""
        for name in order[i::files]:
            held = bytes(tensors[name].contiguous().reshape(-1).view(torch.uint8).tolist())
            offsets = [len(data), len(data) + len(held)]
            header[name] = {
                "dtype": dtypes[tensors[name].dtype],
                "shape": list(tensors[name].shape),
                "data_offsets": offsets,
            }
            data += held
        text = json.dumps(header).encode()
        (folder / f"{i}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        weight_map |= dict.fromkeys(header, f"{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(ANYWHERE), st.sampled_from(ANYWHERE), st.sampled_from(TARGETS), st.integers(1, 3))
def test_parts_lie_anywhere_in_any_files(
    tmp_path_factory: Any, data: Any, first: str, second: str, scheme: str, files: int
) -> None:
    """A model and files in that scheme have the same bytes, without a configuration."""
    folder, tensors, wanted = tmp_path_factory.mktemp("anywhere"), {}, {}
    for name, form, shape in (("up", first, (384, 128)), ("down", second, (128, 384))):
        parts = FORMS[form].parts(*shape)
        tensors |= {f"{name}.{part.replace('*', 'weight')}": tensor for part, tensor in parts.items()}
        wanted[name] = whole(parts, torch.bfloat16, shape)
    order = data.draw(st.permutations(sorted(tensors)))
    write_anywhere(folder, tensors, order, min(files, len(tensors)))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (
                nn.Linear(a, b, bias=False, dtype=torch.bfloat16, device="meta") for a, b in ((128, 384), (384, 128))
            )

    model, again = Two(), Two()
    report = load_checkpoint(model, folder, scheme=scheme)
    told = {layer.name: layer.source.rpartition(": ")[2] for layer in report.layers}
    for name, values in wanted.items():
        weight = model.get_submodule(name).weight
        if told[f"{name}.weight"] == "requantized":
            assert_oracle(weight, values, weight.scheme)
        else:
            assert torch.allclose(weight.dequantize().float(), values.float(), rtol=2**-7, atol=0)
    quantize_checkpoint(folder, folder / "out", scheme)
    load_checkpoint(again, folder / "out")
    for name in wanted:
        pairs = zip(again.get_submodule(name).weight.parts(), model.get_submodule(name).weight.parts(), strict=True)
        assert all(same_bytes(a, b) for a, b in pairs), name
