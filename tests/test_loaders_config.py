"""transformers' own words: `quantization_config=QTensorConfig(...)`, and `save_pretrained` of what it loaded."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import qtensor
from qtensor import (
    ConfigError,
    IncompleteLoadError,
    MissingExtraError,
    QTensor,
    fp8,
    fp8_per_block,
    online_quant,
    save_checkpoint,
    weight_checksums,
)
from qtensor.checkpoint.transformers import transformers_asks
from qtensor.lazy import lazy_tensor
from qtensor.schemes.scheme import SCHEMES

transformers = pytest.importorskip("transformers")

# Both sides of every matrix are whole blocks and groups, so that every scheme can be saved.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "tied llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=2)),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(**{k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")})
    ),
}
reads_back = pytest.mark.skipif(
    not transformers_asks(), reason="from_pretrained of quantized checkpoints needs transformers 5.21 or newer"
)


@pytest.fixture
def config() -> Iterator[Any]:
    """The class that users import; transformers forgets it afterwards."""
    yield qtensor.QTensorConfig
    from qtensor.checkpoint import quantizer

    quantizer.unregister()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Path]:
    torch.manual_seed(0)
    folders = {name: tmp_path_factory.mktemp("model") for name in MODELS}
    for name, folder in folders.items():
        MODELS[name]().bfloat16().save_pretrained(folder)
    return folders


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModel.from_pretrained(folder, **options)


def load_lm(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Bytes, dtypes, and what is trained."""
    assert weight_checksums(model) == weight_checksums(other)
    kinds = [
        {n: (type(p), p.dtype, p.device, p.requires_grad) for n, p in m.named_parameters()} for m in (model, other)
    ]
    assert kinds[0] == kinds[1]
    assert any(kind[0] is QTensor for kind in kinds[0].values())


NAMES = sorted({scheme.name for scheme in SCHEMES.values()})
EACH = [("llama", scheme) for scheme in NAMES] + [(name, "fp8_per_block") for name in ("tied llama", "mixtral")]
EACH += [("mixtral", "fp8_per_tensor"), ("mixtral", "int4_per_group")]
each_model_and_scheme = pytest.mark.parametrize(("name", "scheme"), EACH)


@pytest.mark.parametrize(("name", "scheme"), [*EACH, ("bert", "fp8_per_channel")])
def test_it_loads_the_bytes_of_the_context_manager(name: str, scheme: str, folders: Any, config: Any) -> None:
    model = load(folders[name], quantization_config=config(scheme))
    with online_quant(scheme) as session:
        other = load(folders[name])
    assert_same(model, other)
    mine, theirs = model.hf_quantizer.report, session.report()
    assert [layer.name for layer in mine.layers] == [layer.name for layer in theirs.layers]
    assert mine.peak_staged_bytes == theirs.peak_staged_bytes


CHOICES: dict[str, tuple[Any, dict[str, Any]]] = {
    "a Scheme": (fp8.weight_only(), {}),
    "a scheme per pattern": ({"*q_proj": "fp8_per_block", "*up_proj": fp8.weight_only()}, {}),
    "vLLM's": ({"linear": "fp8_per_block", "ignore": ["*v_proj"]}, {}),
    "ignore": ("fp8", {"ignore": ["*self_attn*"]}),
    "targets": ("int8_per_channel", {"targets": ["*mlp.down_proj", "lm_head"]}),
    "targets with schemes": ("fp8", {"targets": {"*down_proj": "mxfp8", "*up_proj": fp8_per_block}}),
    "min_sqnr": ("mxfp4", {"min_sqnr": 18.6}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_schemes_and_patterns_are_those_of_the_library_through_json_too(choice: str, folders: Any, config: Any) -> None:
    scheme, options = CHOICES[choice]
    with online_quant(scheme, **options):
        wanted = load_lm(folders["llama"])
    written = json.loads(config(scheme, **options).to_json_string())
    for given in (config(scheme, **options), config.from_dict(written), copy.deepcopy(config(scheme, **options))):
        assert given.to_dict() == written
        assert_same(load_lm(folders["llama"], quantization_config=given), wanted)


def test_a_mistake_is_an_error_where_it_is_made(config: Any) -> None:
    for mistake in ({"scheme": "fp9"}, {"ignore": "lm_head"}, {"on_missing": "guess"}, {"min_sqnr": "high"}):
        with pytest.raises(ConfigError):
            config(**mistake)
    with pytest.raises(ConfigError, match="spelled"):
        config.from_dict({"quant_method": "qtensor", "spelled": "wrong"})
    with pytest.raises(ConfigError, match="quant_method"):
        config(quant_method="awq")


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"device_map": "cpu"}, {"device_map": "auto"}], ids=str)
def test_dtype_and_device_map_are_transformers(options: Any, folders: Any, config: Any) -> None:
    model = load_lm(folders["llama"], quantization_config=config("fp8"), **options)
    with online_quant("fp8"):
        other = load_lm(folders["llama"], **options)
    assert_same(model, other)
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_automatic_device_maps_count_quantized_bytes(folders: Any, config: Any) -> None:
    """A map for the high-precision size would put layers on the disk that fit."""
    seen: dict[str, float] = {}
    original = qtensor.checkpoint.quantizer.QTensorQuantizer.param_element_size

    def spy(self: Any, model: Any, name: str, param: Any) -> float:
        seen[name] = original(self, model, name, param)
        return seen[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qtensor.checkpoint.quantizer.QTensorQuantizer, "param_element_size", spy)
        model = load_lm(folders["llama"], quantization_config=config("mxfp4"), device_map="auto")
    if not seen:
        pytest.skip("this transformers does not ask")
    for name, param in model.named_parameters():
        assert seen[name] == (param.nbytes / param.numel() if isinstance(param, QTensor) else param.element_size())


@pytest.mark.parametrize("name", ["tied llama", "bert"])
def test_a_footprint_is_what_is_held(name: str, folders: Any, config: Any) -> None:
    for model in (load(folders[name], quantization_config=config("mxfp4")), _in_block(folders[name], "mxfp4", load)):
        held = sum(param.nbytes for param in model.parameters())
        assert model.get_memory_footprint(return_buffers=False) == held
        assert model.get_memory_footprint() == held + sum(buffer.nbytes for buffer in model.buffers())
        assert held < 0.6 * load(folders[name]).get_memory_footprint(return_buffers=False)


def test_a_weight_goes_where_the_loader_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """device_map="cuda" assigns values on the GPU to a model that was built on meta. There may be no GPU here, so the
    write is looked at and not done."""

    class OnGpu(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is torch.ops.aten.detach.default
            return args[0]

    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    value: Any = torch.Tensor._make_wrapper_subclass(OnGpu, (8, 8), dtype=torch.float32, device="cuda:0")
    seen = []
    monkeypatch.setattr(lazy_tensor, "assign", lambda lazy, value: seen.append(lazy._armed.device.type))
    for device in (None, "cpu"):
        target = copy.deepcopy(model)
        with online_quant("fp8", target, device=device) as session:
            target[0].weight = nn.Parameter(value)
            session.abort()
    assert seen == ["cuda", "cpu"], "where it is put, unless online_quant was told where"


def test_what_the_checkpoint_lacks_is_an_error_unless_it_may_be_new(folders: Any, config: Any) -> None:
    def classifier(**options: Any) -> Any:
        return transformers.AutoModelForSequenceClassification.from_pretrained(folders["llama"], **options)

    with pytest.raises(IncompleteLoadError, match=r"score\.weight"):
        classifier(quantization_config=config("fp8"))
    model = classifier(quantization_config=config("fp8", on_missing="init"))
    assert model.hf_quantizer.report.missing.keys() == {"score.weight"}
    assert 0.001 < model.score.weight.dequantize(torch.float32).std() < 0.1


def test_a_load_that_fails_leaves_no_hook(folders: Any, config: Any, tmp_path: Path) -> None:
    """The suite's fixture looks for hooks after this."""
    broken = tmp_path / "broken"
    MODELS["llama"]().save_pretrained(broken)
    (broken / "model.safetensors").write_bytes(b"no")
    with pytest.raises(SafetensorError):
        load_lm(broken, quantization_config=config("fp8"))
    assert_same(load_lm(folders["llama"], quantization_config=config("fp8")), _in_block(folders["llama"]))


def _in_block(folder: Path, scheme: str = "fp8", loads: Callable[..., Any] = load_lm) -> Any:
    with online_quant(scheme):
        return loads(folder)


def contents(folder: Path) -> dict[str, Any]:
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    return {n: json.loads(data) if n.endswith(".json") else data for n, data in files.items() if n != "qtensor.json"}


@pytest.mark.filterwarnings("ignore:save_checkpoint:UserWarning")
@each_model_and_scheme
def test_save_pretrained_writes_what_save_checkpoint_writes(
    name: str, scheme: str, folders: Any, config: Any, tmp_path: Path
) -> None:
    loaded = load_lm(folders[name], quantization_config=config(scheme))
    for kind, model in {"config": loaded, "block": _in_block(folders[name], scheme)}.items():
        before = model.config.to_dict()
        model.save_pretrained(tmp_path / kind)
        save_checkpoint(model, tmp_path / f"{kind} saved")
        assert contents(tmp_path / kind) == contents(tmp_path / f"{kind} saved")
        after = model.config.to_dict()
        assert {k: v for k, v in after.items() if k not in ("dtype", "architectures")} == {
            k: v for k, v in before.items() if k not in ("dtype", "architectures")
        }
    assert contents(tmp_path / "config") == contents(tmp_path / "block")


@reads_back
@pytest.mark.filterwarnings("ignore:save_checkpoint:UserWarning")  # of scales that vLLM fuses
@each_model_and_scheme
def test_a_saved_folder_loads_by_itself_and_saves_the_same_again(
    name: str, scheme: str, folders: Any, config: Any, tmp_path: Path
) -> None:
    model = load_lm(folders[name], quantization_config=config(scheme))
    model.save_pretrained(tmp_path / "once", max_shard_size="40KB")
    again = load_lm(tmp_path / "once")
    assert_same(again, model)
    again.save_pretrained(tmp_path / "twice", max_shard_size="40KB")
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


@reads_back
def test_push_to_hub_uploads_a_folder_that_loads_by_itself(
    folders: Any, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder here: what is uploaded is copied there."""
    name = next(iter(folders))
    model = load_lm(folders[name], quantization_config=config("fp8"))
    hub, module = Mock(), transformers.utils.hub
    monkeypatch.setattr(module, "hf_api", lambda: hub, raising=False)
    monkeypatch.setattr(module, "create_repo", hub.create_repo, raising=False)  # in older versions
    monkeypatch.setattr(module, "create_and_tag_model_card", Mock())

    def upload(_: Any, source: str, *__: Any, **___: Any) -> None:
        shutil.copytree(source, tmp_path / "repository", dirs_exist_ok=True)

    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    for _ in range(2):  # Over what is there, too.
        model.push_to_hub("me/model")
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "repository").iterdir()}
    assert_same(load_lm(tmp_path / "repository"), model)


@reads_back
def test_others_are_read_by_transformers_as_before(folders: Any, config: Any, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    load_lm(folders["llama"], quantization_config=config("fp8")).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["quantization_config"].pop("producer") == {"name": "qtensor"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = load_lm(tmp_path)
    assert not any(isinstance(param, QTensor) for param in model.parameters())


def test_copies_save_themselves(folders: Any, config: Any, tmp_path: Path) -> None:
    model = load_lm(folders["llama"], quantization_config=config("fp8"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.fill_(7)
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    assert contents(tmp_path / "other") != contents(tmp_path / "model")


def test_dequantize_gives_the_plain_model(folders: Any, config: Any, tmp_path: Path) -> None:
    model = load_lm(folders["llama"], quantization_config=config("fp8"))
    wanted = {n: p.dequantize() if isinstance(p, QTensor) else p.clone() for n, p in model.named_parameters()}
    model.dequantize()
    found = dict(model.named_parameters())
    assert all(type(p) is nn.Parameter and torch.equal(p, wanted[n]) for n, p in found.items())
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """That `import qtensor` brings no transformers along is in test_public_names."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match="QTensorConfig needs transformers: pip install"):
        _ = qtensor.QTensorConfig
