"""Bad checkpoints: each ends the load with an error that names the checkpoint's tensor, the layer and the remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from qtensor import IncompleteLoadError, NonFiniteWeightError, QTensorError, WeightShapeError
from support.vllm.checkpoints import checkpoint, tensors_of, variant
from support.vllm.engines import load_error

LAYER = "model.layers.1."
Change = Callable[[dict[str, torch.Tensor]], None]


def drop(*names: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            del tensors[LAYER + name if LAYER + name in tensors else name]

    return change


def edit(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LAYER + name] = make(tensors[LAYER + name])

    return change


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[3, 5] = float("nan")
    return tensor


def short(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:-8].clone()


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors[LAYER + "self_attn.z_proj.weight"] = torch.zeros(4, 4)


_Q, _EXPERT = "self_attn.q_proj.weight", "mlp.experts.2."
CASES = {
    "q_proj missing": ("llama", drop(_Q), IncompleteLoadError, [LAYER + _Q, "qkv_proj", "128 of 128 rows"]),
    "down_proj missing": ("llama", drop("mlp.down_proj.weight"), IncompleteLoadError, [LAYER + "mlp.down_proj.weight"]),
    "norm missing": ("llama", drop("input_layernorm.weight"), IncompleteLoadError, [LAYER + "input_layernorm.weight"]),
    "embedding missing": (
        "llama",
        drop("model.embed_tokens.weight"),
        IncompleteLoadError,
        ["model.embed_tokens.weight"],
    ),
    "head missing": ("llama", drop("lm_head.weight"), IncompleteLoadError, ["lm_head.weight"]),
    "bias missing": ("opt", drop("model.decoder.layers.1.self_attn.q_proj.bias"), IncompleteLoadError, ["q_proj.bias"]),
    "expert missing": (
        "qwen3-moe",
        drop(*(f"{_EXPERT}{p}_proj.weight" for p in ("gate", "up", "down"))),
        IncompleteLoadError,
        [f"{LAYER}{_EXPERT}{p}_proj.weight" for p in ("gate", "up", "down")],
    ),
    "expert's up_proj missing": (
        "qwen3-moe",
        drop(_EXPERT + "up_proj.weight"),
        IncompleteLoadError,
        [LAYER + _EXPERT + "up_proj.weight", "expert 2"],
    ),
    "NaN": (
        "llama",
        edit("self_attn.k_proj.weight", with_nan),
        NonFiniteWeightError,
        [LAYER + "self_attn.k_proj.weight", "nan at"],
    ),
    "NaN in an expert": (
        "qwen3-moe",
        edit(_EXPERT + "up_proj.weight", with_nan),
        NonFiniteWeightError,
        [LAYER + _EXPERT + "up_proj.weight"],
    ),
    "o_proj short": (
        "llama",
        edit("self_attn.o_proj.weight", short),
        WeightShapeError,
        [LAYER + "self_attn.o_proj.weight", "[120, 128]"],
    ),
    "q_proj short": ("llama", edit(_Q, short), WeightShapeError, [LAYER + _Q, "qkv_proj", "[120, 128]"]),
    "norm short": (
        "llama",
        edit("input_layernorm.weight", short),
        QTensorError,
        [LAYER + "input_layernorm.weight", "[120]"],
    ),
    "expert short": (
        "qwen3-moe",
        edit(_EXPERT + "down_proj.weight", short),
        QTensorError,
        [LAYER + _EXPERT + "down_proj.weight", "[120, 64]"],
    ),
    "extra tensor": ("llama", extra, QTensorError, [LAYER + "self_attn.z_proj.weight", "does not belong"]),
}


@pytest.mark.parametrize("label", CASES)
def test_named(label: str) -> None:
    architecture, change, kind, words = CASES[label]
    error = load_error(variant(architecture, label.replace(" ", "-"), change))
    assert isinstance(error, kind), error
    for word in words:
        assert word in str(error)


def test_truncated_file() -> None:
    folder = variant("llama", "truncated", lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50_000])
    message = str(load_error(folder))
    assert "model.safetensors has" in message
    assert "are cut off" in message
    assert "model.layers.1." in message


def test_duplicate_tensor() -> None:
    folder = variant("llama", "duplicate", lambda tensors: None)
    name = LAYER + "mlp.up_proj.weight"
    save_file(
        {name: tensors_of(checkpoint("llama"))[name]}, folder / "model-old.safetensors", metadata={"format": "pt"}
    )
    error = load_error(folder)
    assert isinstance(error, QTensorError)
    assert f"'{name}'" in str(error)
    assert "more than once" in str(error)
