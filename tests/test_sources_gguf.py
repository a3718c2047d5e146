"""A `.gguf` file into a model, and into a folder of files, in any scheme; what is wrong with one, by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qtensor import (
    CheckpointError,
    ConfigError,
    LossySourceError,
    MissingExtraError,
    QTensor,
    load_checkpoint,
    verify_checkpoint,
)
from qtensor.checkpoint import inspect_checkpoint
from qtensor.checkpoint.gguf import ARCHITECTURES, GgufCheckpoint
from qtensor.checkpoint.transformers import transformers_asks
from qtensor.cli.main import main
from qtensor.convert import converting, quantize_checkpoint
from qtensor.schemes.scheme import SCHEMES
from qtensor.sources.gguf import TYPES
from support.gguf_files import Tensor, blocks, fields_of, tensors_of, write
from support.helpers import assert_oracle, same_bytes
from support.sources import whole

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not transformers_asks(), reason="needs transformers 5.21 or newer")
EXPERTS = 3
CASES = {
    "llama": (fields_of("llama"), tensors_of("llama")),
    "llama, head tied": (fields_of("llama"), tensors_of("llama", ("Q8_0",), head=False)),
    "mixtral": (
        fields_of("llama", expert_count=EXPERTS, expert_used_count=2, feed_forward_length=256),
        tensors_of("llama", experts=EXPERTS),
    ),
    "qwen2": (fields_of("qwen2"), tensors_of("qwen2", ("Q5_K", "Q4_0"))),
    "qwen3": (fields_of("qwen3"), tensors_of("qwen3", ("Q2_K", "Q3_K", "Q5_1"))),
    "qwen2moe": (
        fields_of("qwen2moe", expert_count=EXPERTS, expert_used_count=2),
        tensors_of("qwen2moe", experts=EXPERTS),
    ),
    "qwen3moe": (
        fields_of("qwen3moe", expert_count=EXPERTS, expert_used_count=2),
        tensors_of("qwen3moe", experts=EXPERTS),
    ),
}


def file(folder: Path, case: str = "llama") -> Path:
    return write(folder / "model.gguf", *CASES[case])


def empty_model(path: Path) -> Any:
    """The model that the file's own configuration describes."""
    told = GgufCheckpoint(path).config
    config = transformers.AutoConfig.for_model(**told)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def decoded(case: str) -> dict[str, torch.Tensor]:
    """Each tensor of the file in bf16, with transformers' order of rows, by its name in the file."""
    fields, tensors = CASES[case]
    kinds = {number: name for name, (number, _, _) in TYPES.items()}
    found = {}
    for name, (kind, shape, held) in tensors.items():
        if kind == 0:
            values = torch.frombuffer(bytearray(held), dtype=torch.float32).view(shape).bfloat16()
        else:
            rows = torch.frombuffer(bytearray(held), dtype=torch.uint8).view(*shape[:-1], -1)
            parts = [{f"*.{kinds[kind]}": matrix} for matrix in rows.view(-1, *rows.shape[-2:])]
            values = torch.stack([whole(part, torch.bfloat16, shape[-2:]) for part in parts]).view(shape)
        if fields["general.architecture"] == "llama" and ("attn_q." in name or "attn_k." in name):
            heads = 4 if "attn_q" in name else 2
            values = values.view(heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        found[name] = values
    return found


def expected(case: str, model: Any) -> dict[str, torch.Tensor]:
    """By the names of the model's parameters, by hand."""
    values = decoded(case)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inside = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
        "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
        "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
    }  # fmt: skip
    found = {}
    for name, param in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            at = f"blk.{name.split('.')[2]}.ffn_"
            found[name] = torch.cat((values[at + "gate_exps.weight"], values[at + "up_exps.weight"]), 1)
        elif kind == "down_proj":
            found[name] = values[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"]
        elif module in names:
            found[name] = values[f"{names[module]}.{kind}"]
        else:
            layer, inner = name.split(".")[2], module.split(".", 3)[3]
            found[name] = values[f"blk.{layer}.{inside[inner]}.{kind}"].view(param.shape)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", ["fp8_per_channel", "mxfp8"])
def test_a_file_becomes_a_model_in_any_scheme(case: str, scheme: str, tmp_path: Path) -> None:
    path = file(tmp_path, case)
    model = empty_model(path)
    wanted = expected(case, model)
    report = load_checkpoint(model, path, scheme=scheme)
    quantized = 0
    for name, param in model.named_parameters():
        if isinstance(param, QTensor):
            assert_oracle(param, wanted[name], SCHEMES[scheme])
            quantized += 1
        else:
            assert same_bytes(param, wanted[name]), name
    assert quantized >= 8
    sources = {name for layer in report.layers if layer.source for name in layer.source.partition(":")[0].split(", ")}
    assert sources <= {f"GGUF {kind}" for kind in TYPES}
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_a_file_becomes_files_that_load_alike(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtensor.checkpoint.gguf.SHARD_BYTES", 400_000)  # Several files.
    path = file(tmp_path, case)
    direct = empty_model(path)
    load_checkpoint(direct, path, scheme="fp8_per_channel")
    report = quantize_checkpoint(path, tmp_path / "out", "fp8_per_channel")
    assert report.files == len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert verify_checkpoint(tmp_path / "out") == []
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    del config.quantization_config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    load_checkpoint(model, tmp_path / "out")
    assert sum(isinstance(p, QTensor) for p in model.parameters()) >= 8
    for name, param in direct.named_parameters():
        found = model.get_parameter(name)
        if isinstance(param, QTensor):
            assert same_bytes(found.qdata, param.qdata)
            assert same_bytes(found.scale, param.scale)
        else:
            assert same_bytes(found, param)


def test_an_interrupted_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtensor.checkpoint.gguf.SHARD_BYTES", 400_000)
    path, calls = file(tmp_path), []

    def stopped(task: Any, *rest: Any, original: Any = converting.convert_shard) -> Any:
        calls.append(task)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(task, *rest)

    monkeypatch.setattr(converting, "convert_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(path, tmp_path / "out", "fp8")
    assert quantize_checkpoint(path, tmp_path / "out", "fp8").resumed_files == 1
    quantize_checkpoint(path, tmp_path / "whole", "fp8")
    for one in (tmp_path / "whole").iterdir():
        assert one.read_bytes() == (tmp_path / "out" / one.name).read_bytes()


def test_a_model_in_several_files_is_read_whole(tmp_path: Path) -> None:
    fields, tensors = CASES["llama"]
    names = sorted(tensors)
    for i, (told, part) in enumerate(((fields, names[:9]), ({}, names[9:]))):
        write(tmp_path / f"m-{i + 1:05}-of-00002.gguf", told, {n: tensors[n] for n in part})
    path = tmp_path / "m-00002-of-00002.gguf"
    model = empty_model(path)
    load_checkpoint(model, path, scheme="fp8")
    wanted = expected("llama", model)
    assert same_bytes(model.lm_head.weight, wanted["lm_head.weight"])
    for name in ("layers.0.mlp.up_proj.weight", "layers.1.self_attn.k_proj.weight"):
        assert_oracle(model.model.get_parameter(name), wanted[f"model.{name}"], SCHEMES["fp8"])
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"one of 2 files, and m-00001-of-00002\.gguf is missing"):
        GgufCheckpoint(path)


def test_inspect_tells_the_types(tmp_path: Path, capsys: Any) -> None:
    path = file(tmp_path, "mixtral")
    report = inspect_checkpoint(path)
    assert report.method == "gguf"
    assert {w.scheme for w in report.quantized} == {"GGUF Q4_K", "GGUF Q6_K"}
    by_name = {w.name: w for w in report.quantized}
    assert by_name["model.layers.1.block_sparse_moe.experts.2.w2.weight"].shape == (256, 256)
    assert main(["inspect", str(path)]) == 0
    assert "GGUF Q6_K" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="not compared"):
        inspect_checkpoint(path, tmp_path)


def test_the_command_takes_a_file(tmp_path: Path, capsys: Any) -> None:
    path = file(tmp_path, "qwen2")
    assert main(["quantize", str(path), str(tmp_path / "out"), "--scheme", "mxfp4"]) == 0
    assert "came in GGUF Q5_K" in capsys.readouterr().out
    assert main(["quantize", str(tmp_path), str(tmp_path / "no"), "--scheme", "mxfp4"]) == 1
    assert "Give its file model.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_rotations_are_told(kind: str, tmp_path: Path) -> None:
    scaling = {"rope.scaling.type": kind, "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
    path = write(tmp_path / "model.gguf", fields_of("qwen2", **scaling), CASES["qwen2"][1])
    assert empty_model(path).config.rope_parameters == {
        "rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0,
    }  # fmt: skip


def test_llama_3s_rotation_is_found_by_its_factors(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    told = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    told["original_max_position_embeddings"] = 8192
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "max_position_embeddings": 131072}
    config = transformers.LlamaConfig(**sizes, rope_theta=500000.0, rope_scaling=dict(told))
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = 500000.0 ** -(torch.arange(32) / 32)
    factors: Tensor = (0, (32,), (plain / scaled).numpy().tobytes())
    fields, tensors = fields_of("llama", **{"rope.freq_base": 500000.0}), CASES["llama"][1]
    path = write(tmp_path / "model.gguf", fields, {**tensors, "rope_freqs.weight": factors})
    assert GgufCheckpoint(path).config["rope_scaling"] == told
    strange = (0, (32,), torch.linspace(1, 9, 32).numpy().tobytes())
    path = write(tmp_path / "model.gguf", fields, {**tensors, "rope_freqs.weight": strange})
    with pytest.raises(CheckpointError, match="no factors that Llama 3"):
        quantize_checkpoint(path, tmp_path / "out", "fp8")


def changed(what: str, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    q = "blk.0.attn_q.weight"
    match what:
        case "architecture":
            fields["general.architecture"] = "rwkv6"
        case "unknown tensor":
            tensors["blk.0.attn_sinks.weight"] = tensors[q]
        case "unknown type":
            tensors[q] = (9, *tensors[q][1:])
        case "columns":
            tensors[q] = (tensors[q][0], (256, 250), tensors[q][2])
        case "heads":
            fields["llama.attention.head_count"] = 3
        case "heads by layer":
            fields["llama.attention.head_count"] = [4, 4]
        case "quantized vector":
            tensors["output_norm.weight"] = (8, (256,), b"\0" * 272)
        case "no layers":
            del fields["llama.block_count"]
        case "cut off":
            tensors["output.weight"] = (*tensors["output.weight"][:2], b"")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("architecture", "architecture is 'rwkv6'; those that are read are llama"),
        ("unknown tensor", r"attn_sinks\.weight is no tensor"),
        ("unknown type", r"attn_q\.weight has the type 9"),
        ("columns", "250 columns, which are no blocks of 256"),
        ("heads", "256 rows, which are no 3 heads"),
        ("heads by layer", r"head_count is \[4, 4\]"),
        ("quantized vector", r"output_norm\.weight is quantized"),
        ("no layers", r"has no llama\.block_count"),
        ("cut off", "is cut off|within another tensor"),
    ],
)
def test_what_cannot_be_read_is_told_before_the_first_write(what: str, says: str, tmp_path: Path) -> None:
    fields, tensors = dict(CASES["llama"][0]), dict(CASES["llama"][1])
    changed(what, fields, tensors)
    path = write(tmp_path / "model.gguf", fields, tensors)
    with pytest.raises(CheckpointError, match=says):
        quantize_checkpoint(path, tmp_path / "out", "fp8")
    assert not (tmp_path / "out").exists()
    if what != "no layers":  # A model is its own configuration.
        with pytest.raises(CheckpointError, match=says):
            load_checkpoint(torch.nn.Linear(2, 2), path, scheme="fp8")


def test_a_scheme_is_needed_and_a_loss_can_be_refused(tmp_path: Path) -> None:
    path = file(tmp_path)
    with pytest.raises(ConfigError, match="a scheme is needed"):
        load_checkpoint(empty_model(path), path)
    with pytest.raises(LossySourceError, match=r"^model\.layers\.\d\..*: GGUF Q[46]_K is not the same numbers"):
        load_checkpoint(empty_model(path), path, scheme="fp8", strict_source="lossless")


def test_a_type_that_another_package_decodes_asks_for_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    fields, tensors = CASES["llama"]
    rows = torch.zeros(512, 136, dtype=torch.uint8)
    path = write(tmp_path / "model.gguf", fields, {**tensors, "blk.1.ffn_up.weight": blocks("IQ4_XS", rows)})
    model = empty_model(path)
    with pytest.raises(MissingExtraError, match=r"IQ4_XS needs gguf: pip install 'qtensor-online\[gguf\]'"):
        load_checkpoint(model, path, scheme="fp8")
    assert not any(isinstance(param, QTensor) for param in model.parameters())
    with pytest.raises(MissingExtraError, match="IQ4_XS"):
        quantize_checkpoint(path, tmp_path / "out", "fp8")


def test_every_truncation_and_many_changes_are_refused_or_read(tmp_path: Path) -> None:
    path = file(tmp_path)
    content = path.read_bytes()
    head = len(content) - sum(len(t[2]) for t in CASES["llama"][1].values())
    g = torch.Generator().manual_seed(0)
    for length in [*range(0, head, 97), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            GgufCheckpoint(path)
    refused = 0
    for _ in range(300):
        at, byte = (int(torch.randint(0, n, (), generator=g)) for n in (head, 256))
        path.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
        try:
            json.dumps(GgufCheckpoint(path).config, allow_nan=False)
        except CheckpointError:
            refused += 1
    assert refused > 30


def test_the_page_lists_the_architectures() -> None:
    page = (Path(__file__).parents[1] / "docs" / "sources.md").read_text()
    assert all(f"`{name}`" in page for name in ARCHITECTURES)
