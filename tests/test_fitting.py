"""Loads, files and the command keep to a plan, and to the bytes of the oracle."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qtensor
from qtensor import ConfigError, QTensor, load_plan, online_quant, plan, quantize
from qtensor.cli.main import main
from qtensor.schemes.scheme import SCHEMES
from qtensor.sessions.fitting import SPARE
from support.planned_models import SIZE, Model, in_memory, same_bytes


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return Model().state_dict()


# The load ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.32, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(("given_model", "schemes"), [(False, ["fp8", "nvfp4"]), (True, ["nvfp4:searched", "mxfp8"])])
def test_a_load_keeps_to_its_bytes_and_to_the_oracle(
    part: float, given_model: bool, schemes: list[str], state: Any
) -> None:
    full = sum(t.nbytes for t in state.values())
    model = Model().to("meta") if given_model else None
    with online_quant(schemes, model, fit=int(part * full)) as session:
        model = model or Model()
        model.load_state_dict(state)
    assert session.plan is not None
    assert in_memory(model) == session.plan.bytes <= part * full
    chosen = {weight.name: weight.scheme for weight in session.plan.weights}
    for name, param in model.named_parameters():
        scheme = chosen[name]
        assert same_bytes(param, quantize(state[name], scheme)) if scheme else torch.equal(param, state[name])
    again = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not session.plan.targets else "error")
        with online_quant(session.plan, again):
            again.load_state_dict(state)
    assert [type(p) for p in again.parameters()] == [type(p) for p in model.parameters()]
    pairs = zip(again.parameters(), model.parameters(), strict=True)
    assert all(same_bytes(a, b) for a, b in pairs if type(a) is QTensor)


def test_what_is_kept_back_goes_to_a_weight_that_loses_more_than_planned(state: Any) -> None:
    state = dict(state)
    poor = "layers.4.mlp.down_proj.weight"
    between_codes = torch.where(torch.arange(2 * SIZE) % 16 == 0, 6.0, 5.0)
    state[poor] = between_codes.expand(SIZE, -1).bfloat16()
    fit = int(0.31 * sum(t.nbytes for t in state.values()))
    assert plan(Model(), fit - int(SPARE * fit)).targets[poor.removesuffix(".weight")] == SCHEMES["nvfp4"]
    with online_quant(fit=fit) as session:
        model = Model()
        model.load_state_dict(state)
    assert session.plan is not None
    found = {layer.name: layer for layer in session.report().layers}
    assert in_memory(model) == session.plan.bytes <= fit
    assert found[poor].scheme == "fp8_per_channel"
    assert "less than planned" in found[poor].note
    assert same_bytes(model.layers[4].mlp["down_proj"].weight, quantize(state[poor], "fp8"))
    assert sum("less than planned" in layer.note for layer in found.values()) == 1


def test_buffers_count_and_stay(state: Any) -> None:
    class Counted(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("ids", torch.arange(4 * SIZE).view(4, SIZE))
            self.register_buffer("table", torch.zeros(SIZE, SIZE))

    values = state | {"ids": torch.arange(4 * SIZE).view(4, SIZE), "table": torch.ones(SIZE, SIZE)}
    fit = sum(t.nbytes for t in values.values()) // 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with online_quant(fit=fit) as session:
            model = Counted()
            model.load_state_dict(values)
    assert session.plan is not None
    assert in_memory(model) == session.plan.bytes <= fit
    assert torch.equal(model.table, values["table"])


def test_a_weight_that_was_not_there_when_the_plan_was_made_is_refused(state: Any) -> None:
    with pytest.raises(ConfigError, match=r"qtensor\.plan"), online_quant(fit="1GB"):
        model = Model()
        model.load_state_dict(state)
        late = nn.Linear(SIZE, SIZE, bias=False)
        late.weight.data.copy_(torch.randn(SIZE, SIZE))


@pytest.mark.parametrize(
    "options",
    [
        {"fit": "1GB", "targets": ["*"]},
        {"fit": "1GB", "min_sqnr": 20.0},
        {"fit": "ten"},
        {"fit": "1GB", "reserve": -1},
        {"fit": "1GB", "scheme": {"*": "fp8"}},
        {"fit": "1GB", "scheme": ["fp9"]},
        {"fit": "1GB", "scheme": []},
        {"scheme": ["fp8", "nvfp4"]},
        {},
    ],
    ids=str,
)
def test_options_that_cannot_be(options: Any) -> None:
    with pytest.raises(ConfigError):
        online_quant(**options)


def test_a_model_that_does_not_fit_is_refused_before_anything_is_loaded(state: Any) -> None:
    model = Model()
    with pytest.raises(ConfigError, match="at least"), online_quant(fit="10KB", model=model):
        raise AssertionError
    assert all(type(p) is nn.Parameter for p in model.parameters())


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=SIZE, intermediate_size=2 * SIZE, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=3 * SIZE, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    found: Path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(found)
    return found


def size_of(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def test_a_folder_a_config_and_a_model_give_one_plan(folder: Path, tmp_path: Path) -> None:
    import transformers

    fit = size_of(folder) // 2
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    plans = [plan(where, fit) for where in (folder, tmp_path, model)]
    assert plans[0].targets == plans[1].targets == plans[2].targets
    assert "lm_head" in plans[0].targets
    assert plans[1].bytes == plans[2].bytes


def test_from_pretrained_fits(folder: Path, tmp_path: Path) -> None:
    import transformers

    fit = size_of(folder) // 2
    config_class = (
        qtensor.QTensorConfig
    )  # asked for here: it makes transformers know it, and other tests make it forget
    config = config_class(fit=fit)
    again = config_class.from_dict(json.loads(json.dumps(config.to_dict())))
    for each in (config, again):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=each)
        assert 0.8 * fit < in_memory(model) - sum(b.nbytes for b in model.buffers()) <= fit
    made = plan(folder, fit)
    by_plan = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config_class(made))
    assert {n: p.scheme for n, p in by_plan.named_parameters() if type(p) is QTensor} == {
        w.name: w.scheme for w in made.weights if w.scheme
    }


def test_the_command_writes_a_plan_that_may_be_edited_and_quantizes_by_it(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    file, fit = tmp_path / "plan.json", size_of(folder) // 2
    assert main(["plan", str(folder), "--fit", str(fit), "--schemes", "nvfp4,fp8", "--out", str(file)]) == 0
    out = capsys.readouterr().out
    made = plan(folder, fit)
    assert str(made) in out
    assert "attention in" in out
    assert load_plan(file) == made
    data = json.loads(file.read_text())
    data["targets"]["model.layers.2.mlp.down_proj"] = "mxfp8"
    file.write_text(json.dumps(data))
    edited = load_plan(file)
    assert {w.name: w.scheme for w in edited.weights}["model.layers.2.mlp.down_proj.weight"] == SCHEMES["mxfp8"]
    data["targets"]["model.embed_tokens"] = "mxfp8"
    del data["targets"]["lm_head"]
    file.write_text(json.dumps(data))
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--plan", str(file), "--json"]) == 0
    found = qtensor.inspect_checkpoint(tmp_path / "out", against=folder)
    wanted = {w.name: str(w.scheme) for w in load_plan(file).weights if w.scheme}
    assert {w.name: w.scheme for w in found.quantized} == wanted


def test_files_are_quantized_by_a_scheme_per_pattern(folder: Path, tmp_path: Path) -> None:
    chosen = {"*.down_proj": "mxfp8", "re:.*q_proj": SCHEMES["fp8"], "*.nowhere": "fp8"}
    report = qtensor.quantize_checkpoint(folder, tmp_path / "out", chosen)
    found = qtensor.inspect_checkpoint(tmp_path / "out")
    assert {w.name.split(".")[-2]: w.scheme for w in found.quantized} == {
        "down_proj": "mxfp8",
        "q_proj": "fp8_per_channel",
    }
    assert report.left["model.layers.0.self_attn.v_proj.weight"] == "selected by no pattern"
    assert "*.nowhere" in report.warnings[0]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"targets": {}, "plan": {}}', '{"targets": {"a": "fp9"}, "plan": {}}']
)
def test_what_is_no_plan_is_refused_by_the_files_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match=r"p\.json"):
        load_plan(tmp_path / "p.json")
    with pytest.raises(ConfigError, match=r"absent\.json"):
        load_plan(tmp_path / "absent.json")


def test_what_cannot_be_planned_for_is_an_error_of_the_command(tmp_path: Path, folder: Path, capsys: Any) -> None:
    assert main(["plan", str(tmp_path / "none"), "--fit", "1GB"]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["plan", str(folder), "--fit", "1KB"]) == 1
    assert "at least" in capsys.readouterr().err
    qtensor.quantize_checkpoint(folder, tmp_path / "q", "fp8")
    assert main(["plan", str(tmp_path / "q"), "--fit", "1GB"]) == 1
    assert "quantized already" in capsys.readouterr().err
