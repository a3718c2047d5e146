"""Other people's training loops over a quantized base: transformers' Trainer, trl, lightning's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from qtensor import QTensor, QTensorConfig, online_quant, weight_checksums

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghij"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> str:
    """A tiny model and its tokenizer."""
    path = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
    return str(path)


def base(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=QTensorConfig("fp8"))


def options(output: Path, **more: Any) -> dict[str, Any]:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False}
    return {"output_dir": str(output), "per_device_train_batch_size": 2, "max_steps": 4, **quiet, **more}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.dequantize() if isinstance(p, QTensor) else p.detach() for n, p in model.named_parameters()}


def assert_trained_adapters_alone(model: Any, folder: str) -> None:
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, QTensor)}
    assert len(weights) == 14
    assert {p.requires_grad for p in weights.values()} == {False}
    before = dict(base(folder).named_parameters())
    for name, weight in weights.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(weight.qdata.view(torch.uint8), before[plain].qdata.view(torch.uint8)), name
    assert any(p.any() for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd"])
def test_transformers_trainer_goes_on_from_its_checkpoint(optimizer: Any, folder: str, tmp_path: Path) -> None:
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    ended = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        model = peft.get_peft_model(base(folder), peft.LoraConfig(**LORA))  # type: ignore[arg-type]
        arguments = options(tmp_path, save_steps=2, optim=optimizer, gradient_checkpointing=True)
        trainer = transformers.Trainer(model, transformers.TrainingArguments(**arguments), train_dataset=rows)  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=resume)
        assert_trained_adapters_alone(model, folder)
        ended.append(state(model))
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


@pytest.mark.parametrize("by_name", [False, True])
def test_trl_fine_tunes(by_name: bool, folder: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"model_init_kwargs": {"quantization_config": QTensorConfig("fp8")}} if by_name else {}
    trainer = trl.SFTTrainer(
        model=folder if by_name else base(folder),
        args=trl.SFTConfig(**options(tmp_path, **more)),
        train_dataset=Dataset.from_list([{"text": "a b c d e f"}] * 8),
        peft_config=peft.LoraConfig(**LORA),  # type: ignore[arg-type]
    )
    trainer.train()
    assert_trained_adapters_alone(trainer.model, folder)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_trl_learns_preferences(folder: str, tmp_path: Path) -> None:
    """The reference model is the quantized base, without its adapters."""
    trainer = trl.DPOTrainer(
        model=base(folder),
        args=trl.DPOConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list([{"prompt": "a b", "chosen": "c d", "rejected": "e f"}] * 8),
        peft_config=peft.LoraConfig(**LORA),  # type: ignore[arg-type]
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    assert_trained_adapters_alone(trainer.model, folder)


class Lit(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        self.head = nn.Linear(32, 1)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.head(self.net(batch)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(8, 32), batch_size=2)  # type: ignore[arg-type]


def test_lightnings_trainer_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    plain = Lit().state_dict()

    def quantized() -> Lit:
        with online_quant("fp8", ignore=["head"]):
            model = Lit()
            model.load_state_dict(plain)
        return model

    def fit(model: Lit, steps: int, path: Path | None = None) -> None:
        saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
        quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(max_steps=steps, callbacks=[saving], default_root_dir=tmp_path, **quiet)
        trainer.fit(model, ckpt_path=path, weights_only=False)

    straight, first, then = quantized(), quantized(), quantized()
    fit(straight, 4)
    fit(first, 2)
    fit(then, 4, tmp_path / "last.ckpt")
    assert weight_checksums(then.net) == weight_checksums(straight.net)
    assert torch.equal(then.head.weight, straight.head.weight)
    with online_quant("fp8", ignore=["head"]):
        again = Lit.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu", weights_only=False)
    assert weight_checksums(again) == weight_checksums(then)
