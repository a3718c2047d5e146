"""transformers and accelerate: models they build, place and load themselves."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qtensor import IncompleteLoadError, QTensor, fp8, fp8_per_block, online_quant
from support.loading import (
    FORMS,
    SCHEMES,
    TiedNet,
    TinyNet,
    armed,
    assert_equals_oracle,
    assert_is,
    identities,
    weights_of,
    write_sharded,
)

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

LLAMA_LIKE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
QUANTIZED = ("proj.weight", "gate_up_proj", "down_proj")
"""What the last part of a name says about these models: projections and fused experts are quantized, no more."""


def llama(tied: bool = False) -> torch.nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=tied))


def mixtral() -> torch.nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**LLAMA_LIKE, num_local_experts=4))


def qwen3_moe() -> torch.nn.Module:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**LLAMA_LIKE, **sizes))


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": llama,
    "tied llama": lambda: llama(tied=True),
    "mixtral": mixtral,
    "qwen3-moe": qwen3_moe,
}


class Checkpoint:
    """A saved model: its folder, its class, and the values it holds."""

    def __init__(self, model: torch.nn.Module, folder: Path) -> None:
        self.folder, self.kind, self.config = folder, type(model), model.config
        self.model = model.to(torch.bfloat16).eval()
        self.model.save_pretrained(folder)
        self.state = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
        self.quantized = [n for n in self.state if n.endswith(QUANTIZED)]

    def assert_loaded(self, model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16, scheme=fp8) -> None:
        assert_equals_oracle(model, {n: t.to(dtype) for n, t in self.state.items()}, self.quantized, scheme)


@pytest.fixture(scope="module", autouse=True)
def _cheap_collections() -> Iterator[None]:
    """accelerate collects garbage after each file; let it not walk all of transformers every time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Checkpoint]:
    torch.manual_seed(0)
    return {name: Checkpoint(make(), tmp_path_factory.mktemp("checkpoint")) for name, make in MODELS.items()}


@pytest.fixture
def checkpoint(checkpoints, request) -> Checkpoint:
    return checkpoints[getattr(request, "param", "llama")]


every_model = pytest.mark.parametrize("checkpoint", list(MODELS), indirect=True)

# transformers -------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=["default", "device_map=cpu"])
def test_from_pretrained_equals_the_oracle(checkpoint, options) -> None:
    """bitsandbytes #1849, transformers #42654: fused experts were silently skipped."""
    with online_quant(fp8) as session:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.bfloat16, **options)
    checkpoint.assert_loaded(model)
    report = session.report()
    assert {layer.name for layer in report.layers} == set(checkpoint.quantized)
    assert {layer.note for layer in report.layers} == {""}, "all of it was seen, nothing had to wait for the end"
    assert report.missing == {}
    assert report.peak_staged_bytes == 0
    ids = torch.arange(10)[None]
    with torch.no_grad():
        got, want = model(ids).logits, checkpoint.model(ids).logits
    assert torch.cosine_similarity(got.flatten().float(), want.flatten().float(), dim=0) > 0.99


@pytest.mark.parametrize("scheme", SCHEMES[1:], ids=str)
@pytest.mark.parametrize("checkpoint", ["llama", "mixtral"], indirect=True)
def test_from_pretrained_under_every_scheme_equals_the_oracle(checkpoint, scheme) -> None:
    with online_quant(scheme):
        model = checkpoint.kind.from_pretrained(checkpoint.folder)
    checkpoint.assert_loaded(model, scheme=scheme)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("checkpoint", ["llama", "mixtral"], indirect=True)
def test_from_pretrained_in_another_dtype_equals_the_oracle(checkpoint, dtype) -> None:
    with online_quant(fp8):
        model = checkpoint.kind.from_pretrained(checkpoint.folder, dtype=dtype)
    checkpoint.assert_loaded(model, dtype)


@pytest.mark.parametrize("checkpoint", ["llama", "mixtral"], indirect=True)
def test_from_pretrained_of_a_sharded_checkpoint_equals_the_oracle(checkpoint, tmp_path) -> None:
    checkpoint.model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with online_quant(fp8) as session:
        model = checkpoint.kind.from_pretrained(tmp_path)
    checkpoint.assert_loaded(model)
    assert session.report().peak_staged_bytes == 0


@pytest.mark.parametrize("checkpoint", ["tied llama"], indirect=True)
def test_from_pretrained_keeps_the_head_tied_to_the_embedding(checkpoint) -> None:
    """transformers #37905, pytorch/ao #3015: a tied head was untied, or quantized with the embedding."""
    for ignore in ((), None):
        options = {} if ignore is None else {"ignore": ignore}
        with online_quant(fp8, **options):
            model = checkpoint.kind.from_pretrained(checkpoint.folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        checkpoint.assert_loaded(model)


@every_model
def test_a_model_that_is_given_loads_as_one_that_is_constructed(checkpoint) -> None:
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = checkpoint.kind._from_config(checkpoint.config, dtype=torch.bfloat16)
        model.tie_weights()
        if device == "meta":
            rebuild_runtime_buffers(model, checkpoint.model)
        before = identities(model)
        with online_quant(fp8, model):
            model.load_state_dict(checkpoint.state)
        checkpoint.assert_loaded(model)
        assert identities(model) == before


def rebuild_runtime_buffers(model: torch.nn.Module, like: torch.nn.Module) -> None:
    """Non-persistent buffers are in no checkpoint: whoever builds on meta computes them anew."""
    values = dict(like.named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module).register_buffer(leaf, values[name].clone(), persistent=False)


@every_model
def test_generation_runs_and_survives_saving_and_loading_the_quantized_state(checkpoint, tmp_path) -> None:
    with online_quant(fp8):
        model = checkpoint.kind.from_pretrained(checkpoint.folder)
    prompt, options = torch.arange(1, 6)[None], {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    text = model.generate(prompt, **options)
    assert text.shape == (1, 13)
    torch.save(model.state_dict(), tmp_path / "quantized.pt")
    again = checkpoint.kind._from_config(checkpoint.config, dtype=torch.bfloat16).eval()
    again.load_state_dict(torch.load(tmp_path / "quantized.pt", weights_only=True), assign=True)
    again.tie_weights()
    checkpoint.assert_loaded(again)
    assert torch.equal(again.generate(prompt, **options), text)


def test_already_quantized_values_load_into_a_session_unchanged(checkpoint) -> None:
    """field-bugs scenario 25: what a sharded_state or tensorizer loader delivers is final."""
    with online_quant(fp8):
        model = checkpoint.kind.from_pretrained(checkpoint.folder)
    with online_quant(fp8):
        again = checkpoint.kind._from_config(checkpoint.config, dtype=torch.bfloat16)
        again.load_state_dict(model.state_dict())
    checkpoint.assert_loaded(again)


@pytest.fixture
def incomplete(checkpoint, tmp_path) -> Path:
    """The checkpoint without one quantized and one plain weight."""
    gone = ("model.layers.1.mlp.down_proj.weight", "model.norm.weight")
    state = {n: t.contiguous() for n, t in checkpoint.state.items() if n not in gone}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint.config.save_pretrained(tmp_path)
    return tmp_path


def test_tensors_missing_from_the_checkpoint_are_refused_by_name(checkpoint, incomplete) -> None:
    """sglang #16235. transformers assigns uninitialised memory for them and initialises it in place later."""
    with pytest.raises(IncompleteLoadError) as caught, online_quant(fp8):
        model = checkpoint.kind.from_pretrained(incomplete)
    assert set(caught.value.missing) == {"model.layers.1.mlp.down_proj.weight", "model.norm.weight"}
    with online_quant(fp8):
        model = checkpoint.kind.from_pretrained(checkpoint.folder)
    checkpoint.assert_loaded(model)


def test_tensors_missing_from_the_checkpoint_can_have_their_initialisation(checkpoint, incomplete) -> None:
    with online_quant(fp8, on_missing="init") as session:
        model = checkpoint.kind.from_pretrained(incomplete)
    assert set(session.report().missing) == {"model.layers.1.mlp.down_proj.weight", "model.norm.weight"}
    assert torch.equal(model.model.norm.weight, torch.ones(64, dtype=torch.bfloat16))
    values = model.model.layers[1].mlp.down_proj.weight.dequantize(torch.float32)
    assert 0.01 < values.std() < 0.03, "normal with the config's initializer_range of 0.02"


def test_pipelines_and_auto_classes_may_build_several_models_in_one_block(checkpoints) -> None:
    """#40849: the second model of a pair (a draft model) was left unquantized."""
    with online_quant(fp8) as session:
        models = {n: c.kind.from_pretrained(c.folder) for n, c in checkpoints.items() if n in ("llama", "mixtral")}
    for name, model in models.items():
        checkpoints[name].assert_loaded(model)
    assert len(session.report().layers) == sum(len(checkpoints[name].quantized) for name in models)


# accelerate ---------------------------------------------------------------------------------------------------------

LOADS: dict[str, Callable[[torch.nn.Module, str], object]] = {
    "load_checkpoint_in_model": accelerate.load_checkpoint_in_model,
    "load_checkpoint_in_model on cpu": lambda m, path: accelerate.load_checkpoint_in_model(
        m, path, device_map={"": "cpu"}
    ),
    "load_checkpoint_and_dispatch": accelerate.load_checkpoint_and_dispatch,
    "load_checkpoint_and_dispatch on cpu": lambda m, path: accelerate.load_checkpoint_and_dispatch(
        m, path, device_map={"": "cpu"}
    ),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("form", ["init_empty_weights", *FORMS])
def test_accelerate_equals_the_oracle(form, load, sharded, tmp_path) -> None:
    state = weights_of(TinyNet)
    if sharded:
        write_sharded(state, tmp_path)
    else:
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if form == "init_empty_weights":
        with online_quant(fp8) as session:
            with accelerate.init_empty_weights():
                model = TinyNet().bfloat16()
            LOADS[load](model, str(tmp_path))
    else:
        with armed(form) as (model, session):
            LOADS[load](model, str(tmp_path))
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)
    report = session.report()
    assert report.missing == {}
    # With a device_map accelerate writes into module._parameters.
    assert {layer.note for layer in report.layers} == {""}
    assert {type(module._parameters) for module in model.modules()} == {dict}
    assert model(torch.arange(4)[None]).isfinite().all()


@pytest.mark.parametrize("load", LOADS)
def test_accelerate_keeps_ties(load, tmp_path) -> None:
    """accelerate #3668."""
    state = weights_of(TiedNet)
    saved = {n: t for n, t in state.items() if n != "lm_head.weight"}
    save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with online_quant(fp8):
        with accelerate.init_empty_weights():
            model = TiedNet().bfloat16()
        model.lm_head.weight = model.embed.weight  # init_empty_weights unties, and accelerate says so
        if "on cpu" not in load:
            # Without a device_map accelerate asks for every key.
            saved["lm_head.weight"] = state["embed.weight"].clone()
            save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
        LOADS[load](model, str(tmp_path))
    assert model.lm_head.weight is model.embed.weight
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)


def test_init_empty_weights_before_the_session_is_a_model_on_meta(tmp_path) -> None:
    state = weights_of(TinyNet)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with accelerate.init_empty_weights(include_buffers=True):
        model = TinyNet().bfloat16()
    with online_quant(fp8_per_block, model):
        accelerate.load_checkpoint_in_model(model, str(tmp_path))
    assert_equals_oracle(model, state, TinyNet.QUANTIZED, fp8_per_block)


def test_an_index_that_names_a_missing_file_leaves_nothing_armed(checkpoint, tmp_path) -> None:
    checkpoint.model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / sorted(set(index["weight_map"].values()))[-1]).unlink()
    with pytest.raises(OSError, match="safetensors"), online_quant(fp8):
        checkpoint.kind.from_pretrained(tmp_path)
    with online_quant(fp8):
        model = checkpoint.kind.from_pretrained(checkpoint.folder)
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, QTensor)
    assert_is(model.model.layers[0].mlp.up_proj.weight, checkpoint.state["model.layers.0.mlp.up_proj.weight"], fp8)


def test_layers_on_the_disk_are_refused_by_name(checkpoint, tmp_path) -> None:
    """What accelerate leaves on the disk is not there to quantize; a model half on meta would fail much later."""
    places = {f"model.layers.{i}": "cpu" for i in range(1, len(checkpoint.model.model.layers))}
    places |= {"model.layers.0": "disk"} | dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
    places["model.rotary_emb"] = "cpu"
    message = r"layers\.0.*offloaded by accelerate(.|\n)*keep all layers"
    with pytest.raises(IncompleteLoadError, match=message), online_quant(fp8):
        checkpoint.kind.from_pretrained(checkpoint.folder, device_map=places, offload_folder=tmp_path)
