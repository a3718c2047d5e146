"""What tests of reloads share: two checkpoints per architecture, the call, and what an engine holds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm import LLM

from qtensor.integrations.vllm.served import find_served
from support.vllm.checkpoints import variant
from support.vllm.engines import Seen, digest, engine, look, runtime_tensors

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "rl_refit.py"
Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.1."
Q = LAYER + "self_attn.q_proj.weight"
QKV = LAYER + "self_attn.qkv_proj.weight"
Q_ROWS = 128  # 4 heads of 32; k and v have 64 rows each


@functools.cache
def example() -> Any:
    """docs/examples/rl_refit.py, whose weight transfer through shared memory the lifecycle is tested with."""
    spec = importlib.util.spec_from_file_location("rl_refit", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rl_refit"] = module
    spec.loader.exec_module(module)
    module.register_transport()
    return module


@functools.cache
def other(architecture: str) -> Path:
    """Checkpoint B: every value of checkpoint A moved. Made once: tensors read from it are views of its file."""

    def move(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(5)
        for name, tensor in tensors.items():
            noise = 0.05 * torch.randn(tensor.shape, generator=generator)
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)

    return variant(architecture, "other", move)


def reload(llm: LLM, source: Any = None) -> None:
    """From a folder, an iterator of (name, tensor), or (None) where the engine loaded from."""
    key = "weights_path" if isinstance(source, Path) else "weights_iterator"
    kwargs = {} if source is None else {key: str(source) if isinstance(source, Path) else iter(source)}
    llm.collective_rpc("reload_weights", kwargs=kwargs)


def state(llm: LLM) -> dict[str, tuple[int, int, str]]:
    """Object, address and bytes of every parameter and buffer, and what its layer multiplies with."""

    def read(model: torch.nn.Module) -> dict[str, tuple[int, int, str]]:
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        found = {name: (id(t), t.data_ptr(), digest(t.reshape(-1))) for name, t in tensors if not t.is_meta}
        for name, module in model.named_modules():
            if hasattr(module, "cpu_linear"):
                found[f"{name}.cpu_linear"] = (id(module.cpu_linear), 0, "")
        return found

    return llm.apply_model(read)[0]


def lasting(entries: dict[str, tuple[int, int, str]]) -> dict[str, tuple[int, int, str]]:
    """What a good reload keeps too: it packs anew."""
    return {name: entry for name, entry in entries.items() if not name.endswith("cpu_linear")}


def addresses(llm: LLM) -> dict[str, tuple[int, int]]:
    return {name: entry[:2] for name, entry in lasting(state(llm)).items()}


def runtime(llm: LLM) -> Tensors:
    """Copies of what `runtime_tensors` finds."""
    return llm.apply_model(lambda model: {name: t.clone() for name, t in runtime_tensors(model).items()})[0]


@contextlib.contextmanager
def options(llm: LLM, **changed: str) -> Iterator[None]:
    """The engine as if it had been started with other options for reloads."""

    def change(model: torch.nn.Module) -> Any:
        served = find_served(model)
        assert served is not None
        before = served.choice.options
        served.choice.options = dataclasses.replace(before, **changed)
        return before

    before = llm.apply_model(change)[0]
    yield
    llm.apply_model(lambda model: setattr(find_served(model).choice, "options", before))  # type: ignore[union-attr]


@functools.cache
def fresh(architecture: str, choice: str = "{}") -> Seen:
    """A fresh engine's answers on checkpoint B. choice: the plugin's options as JSON."""
    overrides = {"quantization_config_dict_json": choice}
    with engine(other(architecture), "qtensor", enable_prefix_caching=False, hf_overrides=overrides) as llm:
        return look(llm)
