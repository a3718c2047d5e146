"""lightning's Trainer and Fabric, and litgpt on top of it: load, fine-tune, merge, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from test_others import assert_quantized
from torch import nn

from qtensor import QTensor, online_quant, quantize, weight_checksums


class Lit(lightning.LightningModule):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
        self.head = nn.Linear(width, 1)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.head(self.net(batch)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def trainer(folder: Path) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options: dict[str, Any] = {"accelerator": "cpu", "max_steps": 2, "enable_checkpointing": False, **quiet}
    return lightning.Trainer(default_root_dir=folder, **options)


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Lit, Path]:
    torch.manual_seed(0)
    plain, fit = Lit(), trainer(tmp_path)
    fit.strategy.connect(plain)
    fit.save_checkpoint(tmp_path / "plain.ckpt")
    return plain, tmp_path / "plain.ckpt"


def test_a_checkpoint_of_the_trainer(checkpoint: Any, tmp_path: Path) -> None:
    plain, path = checkpoint
    with online_quant("fp8", ignore=["head"]) as session:
        model = Lit.load_from_checkpoint(path, map_location="cpu")
    assert_quantized(model, plain, session, torch.float32)
    before = weight_checksums(model.net)
    fit = trainer(tmp_path)
    fit.fit(model, torch.utils.data.DataLoader(torch.randn(8, 16), batch_size=2))  # type: ignore[arg-type]
    after = weight_checksums(model.net)
    assert {n: after[n] for n in after if n.endswith("weight")} == {
        n: before[n] for n in before if n.endswith("weight")
    }
    assert not torch.equal(model.head.weight, plain.head.weight), "it trained"
    fit.save_checkpoint(tmp_path / "quantized.ckpt")
    state = torch.load(tmp_path / "quantized.ckpt", weights_only=True)["state_dict"]
    assert isinstance(state["net.0.weight"], QTensor)
    other = Lit()
    other.load_state_dict(state, assign=True)
    assert weight_checksums(other) == weight_checksums(model)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_fabric(precision: Any, checkpoint: Any, tmp_path: Path) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    plain = checkpoint[0]
    fabric.save(tmp_path / "state.ckpt", {"model": plain.net})
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    with online_quant("fp8") as session:
        with fabric.init_module(empty_init=True):
            model = Lit().net
        model = fabric.setup_module(model)
        fabric.load(tmp_path / "state.ckpt", {"model": model})
    assert_quantized(model.module, plain.net, session, dtype)
    fabric.save(tmp_path / "quantized.ckpt", {"model": model})
    found = torch.load(tmp_path / "quantized.ckpt", weights_only=True)["model"]
    assert {type(found[f"{i}.weight"]) for i in range(4)} == {QTensor}
    assert model(torch.randn(2, 16)).dtype == torch.float32


SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_query_groups": 2, "block_size": 16, "padded_vocab_size": 64}
LLAMA = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 64, "bias": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_litgpt_loads_with_its_own_loader(dtype: torch.dtype, tmp_path: Path) -> None:
    litgpt = pytest.importorskip("litgpt")
    from litgpt.utils import load_checkpoint

    config = litgpt.Config(**SIZES, **LLAMA)
    plain = litgpt.GPT(config)
    torch.save(plain.state_dict(), tmp_path / "lit_model.pth")
    precision: Any = "bf16-true" if dtype == torch.bfloat16 else "32-true"
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    with online_quant("fp8") as session:
        with fabric.init_module(empty_init=False):
            model = litgpt.GPT(config)
        model = fabric.setup_module(model)
        load_checkpoint(fabric, model, tmp_path / "lit_model.pth")
    assert_quantized(model.module, plain, session, dtype)
    assert sum(isinstance(p, QTensor) for p in model.parameters()) == 10
    assert model(torch.arange(8)[None]).shape == (1, 8, 64)


def test_litgpt_lora(tmp_path: Path) -> None:
    litgpt = pytest.importorskip("litgpt")
    from litgpt import lora
    from litgpt.utils import load_checkpoint

    plain = litgpt.GPT(litgpt.Config(**SIZES, **LLAMA))
    torch.save(plain.state_dict(), tmp_path / "lit_model.pth")
    places = ("query", "key", "value", "projection", "mlp")
    config = lora.Config(**SIZES, **LLAMA, lora_r=4, **{f"lora_{place}": True for place in places})
    fabric = lightning.Fabric(accelerator="cpu", devices=1)

    def load() -> Any:
        torch.manual_seed(1)
        model = lora.GPT(config)
        lora.mark_only_lora_as_trainable(model)
        load_checkpoint(fabric, fabric.setup_module(model), tmp_path / "lit_model.pth", strict=False)
        return model

    unquantized = load()
    with online_quant("fp8", on_missing="init"):
        model = load()
    kinds = [{n: (p.dtype, p.requires_grad) for n, p in m.named_parameters()} for m in (model, unquantized)]
    assert kinds[0] == kinds[1]
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, QTensor)}
    assert len(weights) == 10
    assert not any("lora" in name for name in weights)
    for name, param in weights.items():
        assert torch.equal(param.dequantize(), quantize(unquantized.get_parameter(name), "fp8").dequantize()), name
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(6):
        logits = model(torch.arange(8)[None])
        loss = nn.functional.cross_entropy(logits[0, :-1], torch.arange(1, 8))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    wanted = {
        n.removesuffix(".linear.weight"): p.dequantize() for n, p in weights.items() if n.endswith(".linear.weight")
    }
    with torch.no_grad():
        for name in wanted:
            wanted[name] += model.get_submodule(name).get_lora_AB()
        lora.merge_lora_weights(model)
    for name, merged in wanted.items():
        found = model.get_submodule(name).linear.weight
        assert torch.equal(found.dequantize(), quantize(merged, "fp8").dequantize()), name
