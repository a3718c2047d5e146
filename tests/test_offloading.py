"""accelerate's hooks on a quantized model: what waits on the CPU for its turn stays quantized; what would lie on the
disk is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qtensor import ConfigError, IncompleteLoadError, QTensor, QTensorError, online_quant, weight_checksums
from qtensor.schemes.scheme import SCHEMES
from support import fake_device
from support.processes import elsewhere

accelerate = pytest.importorskip("accelerate")

NAMES = sorted({scheme.name for scheme in SCHEMES.values()})


class Net(nn.Module):
    """`c` has the weight of `a`; `b` has one of the same shape, which must not be taken for it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32, bias=bias) for _ in range(3))
        self.c.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def net(scheme: str = "fp8", dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> Net:
    torch.manual_seed(0)
    state = Net(bias).to(dtype).state_dict()
    with online_quant(scheme):
        model = Net(bias).to(dtype)
        model.load_state_dict(state)
    return model


@torch.no_grad()
def run(model: nn.Module, device: Any = "cpu", dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(1)
    return model(torch.randn(3, 32).to(dtype).to(device)).to("cpu")


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(param).__name__ for name, param in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("given", [False, True], ids=["its own weights", "a state dict"])
@pytest.mark.parametrize("scheme", NAMES)
def test_what_waits_on_the_cpu_stays_quantized(scheme: str, given: bool) -> None:
    model = net(scheme)
    wanted, before, checksums = run(model), kinds(model), weight_checksums(model)
    state = model.state_dict() if given else None
    accelerate.cpu_offload(model, execution_device="cpu", state_dict=state)
    assert all(param.is_meta for param in model.parameters())
    for _ in range(2):
        assert torch.equal(run(model), wanted)
    assert kinds(model) == before
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert weight_checksums(model) == checksums


def test_tied_weights_are_told_by_their_addresses() -> None:
    """All quantized weights had the address 0: a tied group took in whatever came next."""
    model = net()
    wanted = run(model)
    accelerate.dispatch_model(model, {"a": "cpu", "b": "cpu", "c": "cpu"}, force_hooks=True)
    assert torch.equal(run(model), wanted)
    assert model.a.weight is model.c.weight
    assert model.b.weight.data_ptr() == 0, "a kernel that reads elements of the logical dtype finds none"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_disk_is_refused_and_the_model_goes_on(dtype: torch.dtype, tmp_path: Path) -> None:
    model = net(dtype=dtype)
    wanted = run(model, dtype=dtype)
    with pytest.raises(QTensorError, match="cpu_offload"):
        accelerate.disk_offload(model, tmp_path / "one")
    with pytest.raises(QTensorError, match="cpu_offload"):
        accelerate.dispatch_model(model, {"a": "cpu", "b": "disk", "c": "cpu"}, offload_dir=tmp_path / "two")
    assert torch.equal(run(model, dtype=dtype), wanted)
    assert torch.equal(model.b.weight.view(torch.uint8), model.b.weight.dequantize().view(torch.uint8))


def _on_another_device(connection: Any) -> None:
    there = fake_device.install()
    found: list[Any] = []
    for device_map in ({"a": there, "b": "cpu", "c": there}, {"": there}, {"a": there, "b": there, "c": there}):
        model = net("int8_per_channel", bias=False)  # The stand-in has no Parameters of its own.
        wanted = run(model)
        accelerate.dispatch_model(model, device_map, main_device=there)
        where = {name: param.device.type for name, param in model.named_parameters()}
        got = [run(model, there if device_map == {"": there} else "cpu") for _ in range(2)]
        found.append((where, all(torch.allclose(g, wanted, atol=0.01) for g in got), kinds(model)))
    model = net(bias=False)
    model, hook = accelerate.cpu_offload_with_hook(model, there)
    run(model, there)
    on = {param.device.type for param in model.parameters()}
    hook.offload()
    found.append((on, {param.device.type for param in model.parameters()}, kinds(model)))
    connection.send(found)


def test_with_a_device_to_wait_for() -> None:
    """The device is a stand-in: its memory is the host's."""
    ours, theirs = elsewhere.Pipe()
    process = elsewhere.Process(target=_on_another_device, args=(theirs,))
    process.start()
    assert ours.poll(120)
    mixed, *whole, hooked = ours.recv()
    process.join(30)
    weights = {"a.weight": "QTensor", "b.weight": "QTensor"}
    assert mixed[0] == {n: "meta" if n[0] == "b" else fake_device.NAME for n in mixed[0]}
    assert mixed[1]
    assert mixed[2].items() > weights.items()
    for where, equal, kind in whole:
        assert set(where.values()) == {fake_device.NAME}
        assert equal
        assert kind.items() > weights.items()
    assert hooked[:2] == ({fake_device.NAME}, {"cpu"})
    assert hooked[2].items() > weights.items()


def test_a_device_map_that_offloads_says_what_to_do_instead(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from qtensor import QTensorConfig
    from qtensor.checkpoint import quantizer

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "plain")

    def load(name: str, places: dict[str, Any], **options: Any) -> Any:
        folder = tmp_path / name
        return transformers.BertModel.from_pretrained(folder, device_map=places, offload_folder=tmp_path, **options)

    disk, cpu = {"": "cpu", "encoder.layer.1": "disk"}, {"": 0, "encoder.layer.1": "cpu"}
    for places, advice in ((disk, "plain values and no scales"), (cpu, "dispatch_model")):
        with pytest.raises(ConfigError, match=advice):
            load("plain", places, quantization_config=QTensorConfig("fp8"))
    with pytest.raises(IncompleteLoadError, match="cpu_offload"), online_quant("fp8"):
        load("plain", disk)
    model = load("plain", {"": "cpu"}, quantization_config=QTensorConfig("fp8"))
    model.save_pretrained(tmp_path / "quantized")
    if quantizer.transformers_asks():
        # Its fp8 values would be read there as if they needed no scale.
        with pytest.raises(ConfigError, match="plain values and no scales"):
            load("quantized", disk)
        with pytest.raises(ConfigError, match="plain values and no scales"), online_quant("fp8"):
            load("quantized", disk)
    quantizer.unregister()
    assert any(isinstance(param, QTensor) for param in model.parameters())
