"""Options: where they come from, what is refused before any weight is read, and the versions that work."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import pytest

from qtensor import QTensorError, fp8_per_block, fp8_per_channel, mxfp8, nvfp4, plan
from qtensor.integrations.vllm import compat, register
from qtensor.integrations.vllm.config import NAMES, QTensorConfig
from qtensor.integrations.vllm.moe import expert_method
from qtensor.integrations.vllm.options import OptionsError, parse
from qtensor.integrations.vllm.reporting import report_paths
from qtensor.kernels import FORMATS
from support.vllm.checkpoints import checkpoint
from support.vllm.engines import engine, load_error, look
from support.vllm.scripts import output_of


def test_names() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    register()
    register()
    for name, config in NAMES.items():
        assert QUANTIZATION_METHODS.count(name) == 1
        assert get_quantization_config(name) is config
        assert type(pickle.loads(pickle.dumps(config()))) is config
    assert NAMES["qtensor_fp8_per_block"]().choice.options.linear == fp8_per_block
    assert NAMES.keys() == {"qtensor", *(f"qtensor_{name}" for name in FORMATS)}


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"lienar": "fp8"}, "lienar"),
        ({"linear": "fp9"}, "fp9"),
        ({"moe": "mxfp4", "activation": "dynamic"}, "mxfp4 is weight-only"),
        ({"targets": {"*": "int4_per_group"}, "activation": "dynamic"}, "int4_per_group is weight-only"),
        ({"linear": fp8_per_channel.weight_only()}, "by its name"),
        ({"targets": {"*": "none"}}, "names no scheme"),
        ({"targets": {"re:(": "fp8"}}, "not a regular expression"),
        ({"targets": {"*": "fp8"}, "linear": "fp8"}, "targets"),
        ({"ignore": 3}, "list of patterns"),
        ({"activation": "static"}, "static"),
        ({"lm_head": "perhaps"}, "lm_head is true or false"),
    ],
)
def test_refused_values(given: dict, word: str) -> None:
    with pytest.raises(OptionsError, match=word.replace("(", r"\(")):
        parse(fp8_per_channel, given, {})


def test_variables() -> None:
    options = parse(
        fp8_per_channel, {"ignore": ["a"]}, {"QTENSOR_VLLM_MOE": "none", "QTENSOR_VLLM_IGNORE": "b,c", "HOME": "/"}
    )
    assert (options.linear, options.moe, options.ignore) == (fp8_per_channel, None, ("a",))
    with pytest.raises(OptionsError, match="QTENSOR_VLLM_LINAR"):
        parse(fp8_per_channel, {}, {"QTENSOR_VLLM_LINAR": "fp8"})
    with pytest.raises(OptionsError, match="QTENSOR_VLLM_TARGETS is not JSON"):
        parse(fp8_per_channel, {}, {"QTENSOR_VLLM_TARGETS": "{*: fp8}"})


def test_options_are_checked_wherever_they_are_made() -> None:
    options = parse(fp8_per_channel, {}, {})
    with pytest.raises(OptionsError, match="nvfp4 is weight-only"):
        dataclasses.replace(options, moe=nvfp4, activation="dynamic")
    with pytest.raises(OptionsError, match="targets"):
        dataclasses.replace(options, targets={"*": nvfp4})


def test_the_model_says_what_it_fuses() -> None:
    """vLLM assigns its model's dictionary, or adds to the one it finds; a worker receives it with the options."""
    config = QTensorConfig({"ignore": ["a.q_proj", "a.k_proj"]})
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj"]}
    config.packed_modules_mapping.update(gate_up_proj=["gate_proj", "up_proj"])
    sent = pickle.loads(pickle.dumps(config))
    for choice in (config.choice, sent.choice):
        assert choice.parts("a.qkv_proj") == ["a.q_proj", "a.k_proj"]
        assert choice.parts("gate_up_proj") == ["gate_proj", "up_proj"]
        assert choice.scheme("a.qkv_proj", experts=False) is None
        assert choice.scheme("a.gate_up_proj", experts=False) == fp8_per_channel


def _by_json(**options: object) -> dict:
    return {"hf_overrides": {"quantization_config_dict_json": json.dumps(options)}}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"ignore": ["model.layers.7.mlp"]}, "match no layer"),
        ({"ignore": ["*.q_proj"]}, "leaves out"),
        ({"targets": {"*.down_proj": "fp8"}, "ignore": ["model.layers.0.mlp.down_proj"]}, "both ignore"),
        ({"targets": {"*.down_proj": "fp8", "re:.*layers.0.mlp.down": "fp8_per_block"}}, "different schemes"),
        ({"linears": "fp8"}, "linears"),
    ],
)
def test_refused_before_any_weight_is_read(options: dict, word: str) -> None:
    assert word in str(load_error(checkpoint("llama"), **_by_json(**options)))


def test_dynamic_activations() -> None:
    """mxfp8 has them; a weight-only default that `targets` leaves unused does not matter."""
    assert parse(mxfp8, {"activation": "dynamic"}, {}).activation == "dynamic"
    targets = {"targets": {"*": "fp8"}, "activation": "dynamic"}
    assert parse(nvfp4, targets, {}).targets == {"*": fp8_per_channel}
    for others in (targets, {"linear": "none", "moe": "fp8", "activation": "dynamic"}):
        with pytest.raises(OptionsError, match="nvfp4 is weight-only"):
            parse(nvfp4, {**others, "lm_head": True}, {})


def test_targets_by_json() -> None:
    chosen = {"targets": {"re:.*mlp.*": "int4_per_group", "*.qkv_proj": "fp8_per_channel"}}
    with engine(checkpoint("llama"), "qtensor", **_by_json(**chosen)) as llm:
        seen = look(llm)
    assert seen.report is not None
    schemes = {layer["name"]: layer["scheme"] for layer in seen.report["layers"]}
    assert {name.split(".")[-2]: scheme for name, scheme in schemes.items()} == {
        "qkv_proj": "fp8_per_channel",
        "gate_up_proj": "int4_per_group",
        "down_proj": "int4_per_group",
    }


def test_a_plan_is_served() -> None:
    """As the file that `qtensor plan --engine vllm` writes: fused layers and experts find their schemes."""
    folder = checkpoint("qwen3-moe")
    full = (folder / "model.safetensors").stat().st_size
    made = plan(folder, int(0.55 * full), schemes=["int4_per_group", "fp8_per_channel"], engine="vllm")
    assert {str(scheme) for scheme in made.targets.values()} == {"int4_per_group", "fp8_per_channel"}
    with engine(folder, "qtensor", **_by_json(**made.to_json())) as llm:
        seen = look(llm)
    assert seen.report is not None
    found = {layer["name"]: (layer["scheme"], layer["bytes"]) for layer in seen.report["layers"]}
    kept = {w.name: w for w in made.weights if w.scheme is not None}
    assert sum(size for _, size in found.values()) == sum(w.bytes for w in kept.values())
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        assert (found[name][0] if name in found else None) == (kept[name].scheme.name if name in kept else None)


def test_config_route_and_quantized_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hf_overrides may carry a whole quantization_config; quantization= is not needed then. A report is written."""
    config = {"quant_method": "qtensor", "lm_head": True}
    monkeypatch.setenv("QTENSOR_VLLM_REPORT", str(tmp_path / "report-{rank}.json"))
    with engine(checkpoint("llama"), None, hf_overrides={"quantization_config": config}) as llm:
        seen = look(llm)
    assert "lm_head.weight" in seen.weights
    assert json.loads((tmp_path / "report-0.json").read_text())["quantized_bytes"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"report": "/etc/passwd"},
            "has no report; give it as quantization_config_dict_json, .*_REPORT",
        ),
        ({"snapshot": "/etc"}, "has no snapshot; give it as quantization_config_dict_json, .*_SNAPSHOT"),
        ({"ignore": [r"re:(a)\1"]}, "ignore: .* needs backtracking .* QTENSOR_VLLM_IGNORE"),
        ({"ignore": r"x, re:(a)\1"}, "ignore: .* needs backtracking"),
        ({"targets": {"re:(?=a)": "fp8"}}, "targets: .* needs backtracking .* QTENSOR_VLLM_TARGETS"),
    ],
)
def test_what_a_checkpoints_own_config_may_not_say(given: dict, message: str) -> None:
    """vLLM hands over config.json's quantization_config as it does the user's: a stranger's pattern ran for ever, and a
    stranger's path was written to."""
    with pytest.raises(OptionsError, match=message):
        QTensorConfig.from_config({"quant_method": "qtensor", **given})
    QTensorConfig.from_config_dict_json(json.dumps(given))  # This is the user's.
    exploding = QTensorConfig.from_config({"ignore": ["re:(a+)+$"]})
    assert exploding.choice.scheme("a" * 500 + "!", experts=False) == fp8_per_channel


def test_vllms_own_quantization_config_is_refused() -> None:
    with pytest.raises(OptionsError, match="QTENSOR_VLLM"):
        QTensorConfig().online_quantization_config = object()


def test_quantized_checkpoints_keep_their_method() -> None:
    config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    assert QTensorConfig.override_quantization_method(config, "qtensor") == "compressed-tensors"
    assert QTensorConfig.override_quantization_method(config, None) is None
    assert QTensorConfig.override_quantization_method({"quant_method": "qtensor"}, "qtensor") is None
    packed = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    for method in ("gptq", "awq"):
        found = QTensorConfig.override_quantization_method({"quant_method": method, **packed}, "qtensor")
        assert method in found
        assert found not in NAMES


def test_report_paths() -> None:
    """JSON and HTML unless the path says which; no rank overwrites another's."""

    def names(where: str, rank: int = 0, world: int = 1) -> list[str]:
        return [path.name for path in report_paths(where, rank, world)]

    assert names("a/report.json") == ["report.json"]
    assert names("a/report-{rank}.json", 1, 2) == ["report-1.json"]
    assert names("a/report.json", 1, 2) == ["report-rank1.json"]
    assert names("a/v0.5")[0] == "v0.5.json"
    assert names("a/report", 1, 2) == ["report-rank1.json", "report-rank1.html"]


def test_experts_on_an_old_cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 0.29 vLLM's CPU build has no operator to route with: said while the model is built."""
    monkeypatch.setattr(compat, "cpu_experts_problem", lambda: "vLLM 0.28.0 has no router")
    with pytest.raises(QTensorError, match=r"mlp\.experts: vLLM 0\.28\.0 has no router"):
        expert_method(QTensorConfig().choice, "mlp.experts", fp8_per_channel, None)


def test_versions() -> None:
    for good in ("0.28.0", "0.32.0", "0.33.1+cpu"):
        assert compat.version_problem(good) is None
    for bad in ("0.27.1", "0.34.0", "1.0.0"):
        problem = compat.version_problem(bad)
        assert problem is not None
        assert "0.28 to 0.33" in problem


def test_other_versions_get_a_sentence_and_no_method() -> None:
    code = (
        "import qtensor.integrations.vllm as q\n"
        "from qtensor.integrations.vllm import compat\n"
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS\n"
        "compat.vllm_version = lambda: '0.34.0'\n"
        "q.register()\n"
        "print([name for name in QUANTIZATION_METHODS if 'qtensor' in name])"
    )
    said = output_of(code)
    assert "works with vLLM 0.28 to 0.33, and this is vLLM 0.34.0" in said
    assert said.strip().splitlines()[-1] == "[]"


def test_cheap_when_unused() -> None:
    """Registering loads no kernels: numba and the model code stay out of processes that do not quantize."""
    code = (
        "import sys, vllm.model_executor.layers.quantization\n"
        "import qtensor.integrations.vllm as q\n"
        "q.register()\n"
        "heavy = ('numba', 'qtensor.integrations.vllm.load', 'qtensor.integrations.vllm.moe')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert output_of(code).strip().splitlines()[-1] == "[]"
