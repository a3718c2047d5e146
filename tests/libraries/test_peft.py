"""peft: adapters made, loaded, trained and merged, inside a block and after it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from qtensor import QTensor, online_quant, quantize, weight_checksums
from qtensor.schemes.scheme import SCHEMES

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
NAMES = sorted({scheme.name for scheme in SCHEMES.values()})
ALL = ["q_proj", "v_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "LoRA": peft.LoraConfig(r=4, target_modules=ALL, init_lora_weights=False),
    "LoRA with a trained layer": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["o_proj", "lm_head"]),
    "DoRA": peft.LoraConfig(r=4, target_modules=ALL, use_dora=True, init_lora_weights=False),
    "IA3": peft.IA3Config(target_modules=ALL, feedforward_modules=["down_proj"]),
    "LoHa": peft.LoHaConfig(r=4, target_modules=ALL),
    "LoKr": peft.LoKrConfig(r=4, target_modules=ALL),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "OFT": peft.OFTConfig(oft_block_size=8, r=0, target_modules=ALL),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=ALL, total_step=10, init_r=4, target_r=2),
    "RS-LoRA": peft.LoraConfig(r=4, target_modules=ALL, use_rslora=True, init_lora_weights=False),
    "FourierFT": peft.FourierFTConfig(n_frequency=10, target_modules=ALL, init_weights=False),
    "HRA": peft.HRAConfig(r=4, target_modules=ALL, init_weights=False),
    "VBLoRA": peft.VBLoRAConfig(num_vectors=8, vector_length=2, target_modules=ALL),
    "MiSS": peft.MissConfig(r=4, target_modules=ALL, init_weights=False),
    "RandLoRA": peft.RandLoraConfig(r=4, target_modules=ALL, init_weights=False),
    "SHiRA": peft.ShiraConfig(r=4, target_modules=ALL, init_weights=False),
    "C3A": peft.C3AConfig(block_size=8, target_modules=ALL, init_weights=False),
}
PROMPTS: dict[str, Any] = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=32),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True),
}
IDS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    torch.manual_seed(0)
    path: Path = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS)).bfloat16().save_pretrained(path)
    return path


def base(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def quantized(folder: Path, scheme: str = "fp8") -> Any:
    with online_quant(scheme):
        return base(folder)


def kinds(model: torch.nn.Module) -> dict[str, Any]:
    """What each parameter is; of a quantized weight, what it would be in a plain model."""
    return {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}


def values(param: torch.Tensor) -> torch.Tensor:
    return param.dequantize() if isinstance(param, QTensor) else param


def assert_equal(model: Any, other: Any) -> None:
    assert kinds(model) == kinds(other)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert type(a) is type(b), name
        assert torch.equal(values(a), values(b)), name


def adapted(config: Any, model: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, copy.deepcopy(config))


@pytest.mark.parametrize("name", [*CONFIGS, *PROMPTS])
def test_adapters_made_inside_are_as_after_and_as_of_a_plain_model(name: str, folder: Path) -> None:
    config = (CONFIGS | PROMPTS)[name]
    plain, after = adapted(config, base(folder)), adapted(config, quantized(folder))
    with online_quant("fp8"):
        inside = adapted(config, base(folder))
    assert_equal(inside, after)
    assert kinds(inside) == kinds(plain)
    assert sum(isinstance(p, QTensor) for p in inside.parameters()) == 14
    assert torch.equal(inside.eval()(IDS).logits, after.eval()(IDS).logits)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_loaded_inside_are_as_after_and_as_of_a_plain_model(
    name: str, trainable: bool, folder: Path, tmp_path: Path
) -> None:
    adapted(CONFIGS[name], base(folder)).save_pretrained(tmp_path)
    plain, after = (
        peft.PeftModel.from_pretrained(m, tmp_path, is_trainable=trainable) for m in (base(folder), quantized(folder))
    )
    for low_cpu_mem_usage in (False, True):
        with online_quant("fp8"):
            inside = peft.PeftModel.from_pretrained(
                base(folder), tmp_path, is_trainable=trainable, low_cpu_mem_usage=low_cpu_mem_usage
            )
        assert_equal(inside, after)
        assert kinds(inside) == kinds(plain)


def test_auto_classes_and_load_adapter(folder: Path, tmp_path: Path) -> None:
    adapted(CONFIGS["LoRA"], base(folder)).save_pretrained(tmp_path)
    with online_quant("fp8") as session:
        model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, is_trainable=True)
    assert len(session.report().layers) == 14
    assert sum(p.requires_grad for p in model.parameters()) == 16
    with online_quant("fp8") as session:
        other = base(folder)
        other.load_adapter(tmp_path)
    assert len(session.report().layers) == 14
    after = quantized(folder)
    after.load_adapter(tmp_path)
    assert_equal(other, after)
    assert torch.equal(other(IDS).logits, after(IDS).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_reaches_adapters_and_nothing_else(name: str, folder: Path) -> None:
    with online_quant("fp8"):
        model = adapted(CONFIGS[name], base(folder))
    before = {n: values(p).detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for n, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(values(p), before[n]), n


@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "LoRA with a trained layer"])
def test_a_merge_is_the_quantized_result_of_a_plain_models_merge(name: str, scheme: str, folder: Path) -> None:
    """The plain model has the dequantized weights. What it merges is quantized once, and unmerging is close."""
    model = adapted(CONFIGS[name], quantized(folder, scheme))
    plain = adapted(CONFIGS[name], base(folder))
    with torch.no_grad():
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.copy_(values(q))
    before = {n: values(p).detach().clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    model.unmerge_adapter()
    merged_plain = copy.deepcopy(plain)
    merged_plain.merge_adapter()
    loss = 0.3 if "4" in scheme else 0.1  # Of what was rounded: twice, to values as far apart as 4 bits have them.
    for (n, p), q in zip(model.named_parameters(), merged_plain.parameters(), strict=True):
        if isinstance(p, QTensor):
            size = max(before[n].float().norm(), q.float().norm())
            assert (values(p).float() - before[n].float()).norm() < loss * size, n
    model = adapted(CONFIGS[name], quantized(folder, scheme))
    merged, wanted = model.merge_and_unload(), plain.merge_and_unload()
    for (n, p), q in zip(merged.named_parameters(), wanted.parameters(), strict=True):
        if isinstance(p, QTensor) and n.rpartition(".")[0].endswith(tuple(CONFIGS[name].target_modules)):
            wanted_values = values(quantize(q, scheme))
            if (
                name == "HRA"
            ):  # It casts the weight to fp32 first: q × scale, where the plain model's is rounded to bf16.
                difference = (values(p).float() - wanted_values.float()).norm()
                assert difference < (0.1 if "4" in scheme else 0.03) * wanted_values.float().norm(), n
            else:
                assert torch.equal(values(p), wanted_values), n


def test_a_trained_model_saves_its_adapters_alone(folder: Path, tmp_path: Path) -> None:
    with online_quant("fp8"):
        model = adapted(CONFIGS["LoRA"], base(folder))
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    model.eval()
    again = peft.PeftModel.from_pretrained(quantized(folder), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    # With gradients a product decodes the weight and multiplies then; without, it decodes while it multiplies. The two
    # sum in another order, and what needs gradients is the adapters' own: here the loaded ones do not.
    trainable = peft.PeftModel.from_pretrained(quantized(folder), tmp_path, is_trainable=True)
    assert torch.equal(trainable(IDS).logits, model(IDS).logits)
    assert (again(IDS).logits - model(IDS).logits).abs().max() < 2**-6


def test_prepare_model_for_kbit_training(folder: Path) -> None:
    """It casts every parameter that is bf16 to fp32, quantized ones included: their bytes stay."""
    model = quantized(folder)
    before = {n: p.qdata.clone() for n, p in model.named_parameters() if isinstance(p, QTensor)}
    prepared = peft.prepare_model_for_kbit_training(model)
    for n, p in prepared.named_parameters():
        assert p.dtype == torch.float32
        if n in before:
            assert torch.equal(p.qdata.view(torch.uint8), before[n].view(torch.uint8))
    adapted(CONFIGS["LoRA"], prepared)(IDS, labels=IDS).loss.backward()


def dequantized(model: Any, folder: Path) -> Any:
    """The plain model with the values of a quantized one."""
    plain = base(folder)
    with torch.no_grad():
        for param, weight in zip(plain.parameters(), model.parameters(), strict=True):
            param.copy_(values(weight))
    return plain


def test_all_linear_means_the_layers_that_it_means_in_a_plain_model(folder: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model, plain = adapted(config, quantized(folder)), adapted(config, base(folder))
    assert model.targeted_module_names == plain.targeted_module_names
    assert len(model.targeted_module_names) == 14
    assert kinds(model) == kinds(plain)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian"])
def test_initialisations_that_read_the_weight(init: Any, folder: Path) -> None:
    """PiSSA and OLoRA take the adapter's part out of the weight; the rest is quantized anew. They decompose q × scale
    in fp32, where the plain model's weight is rounded to bf16."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    with torch.no_grad():
        plain = adapted(config, dequantized(quantized(folder), folder))
        model = adapted(config, quantized(folder))
        for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (param.dtype, param.requires_grad) == (other.dtype, other.requires_grad)
            if "q_proj.base_layer" in name:
                assert isinstance(param, QTensor)
                assert (values(param) - other).float().norm() < 0.05 * other.float().norm(), name
        x = torch.randn(3, 64).bfloat16()
        for layer in ("0", "1"):
            path = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            torch.testing.assert_close(model.get_submodule(path)(x), plain.get_submodule(path)(x), rtol=0.1, atol=0.02)


def test_several_adapters_on_one_model(folder: Path, tmp_path: Path) -> None:
    model = adapted(CONFIGS["LoRA"], quantized(folder))
    plain = adapted(CONFIGS["LoRA"], dequantized(quantized(folder), folder))

    def base_bytes() -> dict[str, str]:
        return {n: c for n, c in weight_checksums(model.get_base_model()).items() if "lora" not in n}

    bytes_before = base_bytes()
    for each in (model, plain):
        torch.manual_seed(2)
        each.add_adapter("second", copy.deepcopy(CONFIGS["LoRA"]))
        each.add_weighted_adapter(["default", "second"], [0.5, 0.25], "sum", combination_type="cat")
        each.eval()
    outputs = {}
    with torch.no_grad():
        for name in ("default", "second", "sum"):
            for each in (model, plain):
                each.set_adapter(name)
            outputs[name] = model(IDS).logits
            torch.testing.assert_close(outputs[name], plain(IDS).logits, rtol=0.05, atol=0.05)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, quantized(folder)(IDS).logits)
        assert not torch.equal(outputs["default"], outputs["second"])
        mixed = model(IDS.expand(3, -1), adapter_names=["default", "second", "__base__"]).logits
        torch.testing.assert_close(mixed[0], outputs["default"][0], rtol=0.05, atol=0.05)
        model.save_pretrained(tmp_path)
        model.delete_adapter("sum")
        again = peft.PeftModel.from_pretrained(quantized(folder), tmp_path)
        again.load_adapter(tmp_path / "second", "second")
        again.set_adapter("second")
        assert torch.equal(again.eval()(IDS).logits, outputs["second"])
    assert base_bytes() == bytes_before


def test_unloading_without_a_merge_leaves_the_bytes(folder: Path) -> None:
    wanted = weight_checksums(quantized(folder))
    assert weight_checksums(adapted(CONFIGS["DoRA"], quantized(folder)).unload()) == wanted


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merges_of_several_adapters_and_safe_ones(safe_merge: bool, folder: Path) -> None:
    """peft adds one adapter after the other, and a safe merge assigns what it has checked: each is quantized once."""
    model, plain = (adapted(CONFIGS["LoRA"], m) for m in (quantized(folder), dequantized(quantized(folder), folder)))
    for each in (model, plain):
        torch.manual_seed(2)
        each.add_adapter("second", copy.deepcopy(CONFIGS["LoRA"]))
        each.merge_adapter(["default"], safe_merge=safe_merge)
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, QTensor) and ".base_layer" in n}
    assert len(weights) == 8
    for name, weight in weights.items():
        assert torch.equal(values(weight), values(quantize(plain.get_parameter(name), "fp8"))), name
    merged = model.merge_and_unload(adapter_names=["second"], safe_merge=safe_merge)
    assert sum(isinstance(p, QTensor) for p in merged.parameters()) == 14
