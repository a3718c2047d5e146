"""Quantized models in the hands of whoever else saves, sends or shares tensors: it works, or names save_checkpoint."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtensor import QTensor, QTensorError, fp8, online_quant, quantize, weight_checksums
from qtensor.schemes.scheme import SCHEMES

SCHEMES_BY_NAME = {scheme.name: scheme for scheme in SCHEMES.values()}


def through_torch_save(value: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def through_ray(value: Any) -> Any:
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    return pickle.loads(cloudpickle.dumps(value))


WAYS: dict[str, Callable[[Any], Any]] = {
    **{f"pickle {n}": lambda value, n=n: pickle.loads(pickle.dumps(value, protocol=n)) for n in (2, 4, 5)},
    "torch.save": lambda value: through_torch_save(value, weights_only=False),
    "torch.save, weights only": lambda value: through_torch_save(value, weights_only=True),
    "deepcopy": copy.deepcopy,
    "Ray": through_ray,
}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(SCHEMES_BY_NAME)),
    weight_only=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    shape=st.one_of(st.tuples(*[st.integers(1, 150)] * 2), st.tuples(st.integers(1, 3), *[st.integers(1, 40)] * 2)),
    form=st.sampled_from(["weight", "parameter", "transposed", "in a state dict"]),
)
def test_a_copy_is_equal_and_independent(
    way: str, name: str, weight_only: bool, dtype: torch.dtype, shape: tuple[int, ...], form: str
) -> None:
    scheme = SCHEMES_BY_NAME[name]
    weight: Any = quantize(torch.randn(shape).to(dtype), scheme.weight_only() if weight_only else scheme)
    wrapped = {"parameter": lambda: nn.Parameter(weight, requires_grad=False), "transposed": lambda: weight.mT}
    sent: Any = wrapped.get(form, lambda: weight)()
    got = WAYS[way]({"w": sent})["w"] if form == "in a state dict" else WAYS[way](sent)
    assert type(got) is QTensor
    assert isinstance(got, nn.Parameter) == isinstance(sent, nn.Parameter)
    assert (got.scheme, got.dtype, got.shape, got.cols) == (sent.scheme, sent.dtype, sent.shape, sent.cols)
    assert [p.dtype for p in got.parts()] == [p.dtype for p in sent.parts()]
    assert torch.equal(got.dequantize(), sent.dequantize())
    before = got.dequantize().clone()
    sent.zero_()
    assert torch.equal(got.dequantize(), before)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).bfloat16()


def loaded() -> nn.Sequential:
    state = {name: torch.randn(t.shape).bfloat16() for name, t in net().state_dict().items()}
    with online_quant(fp8):
        model = net()
        model.load_state_dict(state)
    return model


def save_state(model: nn.Module, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(folder))


def save_model(model: nn.Module, folder: Path) -> None:
    pytest.importorskip("accelerate").Accelerator(cpu=True).save_model(model, str(folder))


SAFETENSORS: dict[str, Callable[[nn.Module, Path], object]] = {
    "save": lambda model, folder: safetensors.torch.save(model.state_dict()),
    "save_file": lambda model, folder: safetensors.torch.save_file(model.state_dict(), folder / "file"),
    "save_model": lambda model, folder: safetensors.torch.save_model(model, str(folder / "file")),
    "Accelerator.save_state": save_state,
    "Accelerator.save_model": save_model,
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("way", SAFETENSORS)
def test_what_saves_through_safetensors_is_told_what_to_call(way: str, tmp_path: Path) -> None:
    with pytest.raises(QTensorError, match=r"save_checkpoint\(model, folder\)"):
        SAFETENSORS[way](loaded(), tmp_path)


def test_accelerates_other_format_holds_quantized_weights(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator, model = accelerate.Accelerator(cpu=True), loaded()
    model = accelerator.prepare(model)
    before = weight_checksums(model)
    accelerator.save_state(str(tmp_path), safe_serialization=False)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    accelerator.load_state(str(tmp_path), load_kwargs={"weights_only": True})
    assert weight_checksums(model) == before


def _zero(weight: torch.Tensor) -> None:
    weight.zero_()


def test_a_shared_model_is_one_memory_for_several_processes() -> None:
    """torch's own share_memory() dies of a null pointer on a tensor that wraps others."""
    model = loaded()
    assert not model[0].weight.is_shared()
    model.share_memory()
    assert all(param.is_shared() for param in model.parameters())
    process = mp.get_context("fork").Process(target=_zero, args=(model[0].weight,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not model[0].weight.dequantize().any()


def test_dlpack_gives_the_values() -> None:
    weight = quantize(torch.randn(8, 16), fp8)
    assert torch.equal(torch.from_dlpack(weight), weight.dequantize())
