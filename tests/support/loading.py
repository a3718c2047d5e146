"""What the loader tests share: small models, the three ways to arm them, and the comparison with the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules import module as torch_module

from qtensor import LazyWeight, Scheme, Session, fp8, fp8_per_block, fp8_per_channel, fp8_per_tensor, online_quant
from support.helpers import assert_no_hooks, assert_oracle

SCHEMES = [fp8_per_channel, fp8_per_block, fp8_per_tensor]
FORMS = ["constructed", "real", "meta"]
"""How a model meets its session: built in the block, given with values, given on the meta device."""


class TinyNet(nn.Module):
    """One of everything: an embedding, a norm, two linears with biases, an output head, a buffer. 160 rows leave the
    last 128-row band of a per-block weight incomplete."""

    QUANTIZED = ("down.weight", "up.weight")

    def __init__(self, width: int = 48, hidden: int = 160) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.lm_head = nn.Linear(width, 32, bias=False)
        self.register_buffer("steps", torch.tensor(7.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.lm_head(x + self.down(torch.relu(self.up(self.norm(x)))))


class TiedNet(TinyNet):
    """The head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head.weight = self.embed.weight


class Experts(nn.Module):
    """Fused experts as mixtures keep them: 3-d parameters without a Linear."""

    QUANTIZED = ("down_proj", "gate_up_proj")

    def __init__(self, experts: int = 3, hidden: int = 48, inner: int = 40) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))


def weights_of(
    make: Callable[[], nn.Module], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A full set of values for the model that `make` builds: what a checkpoint of it would hold."""
    generator = torch.Generator().manual_seed(seed)
    state = make().to(dtype).state_dict()
    aliases: dict[int, torch.Tensor] = {}
    for name, tensor in state.items():
        values = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        state[name] = aliases.setdefault(tensor.data_ptr(), values)
    return dict(state)


@contextmanager
def armed(
    form: str,
    scheme: Scheme = fp8,
    make: Callable[[], nn.Module] = TinyNet,
    dtype: torch.dtype | None = torch.bfloat16,
    **options: Any,
) -> Iterator[tuple[nn.Module, Session]]:
    """An open session with a model that waits for its weights."""
    if form == "constructed":
        with online_quant(scheme, **options) as session:
            yield make().to(dtype=dtype), session
    else:
        with torch.device("meta" if form == "meta" else "cpu"):
            model = make().to(dtype=dtype)
        with online_quant(scheme, model, **options) as session:
            yield model, session


def assert_is(param: torch.Tensor, full: torch.Tensor, scheme: Scheme, name: str = "weight") -> None:
    """The weight is a Parameter, and exactly what quantizing the full weight at once gives."""
    try:
        assert isinstance(param, nn.Parameter)
        assert_oracle(param, full, scheme)
    except AssertionError as error:
        error.add_note(f"the weight is {name}")
        raise


def assert_equals_oracle(
    model: nn.Module, state: dict[str, torch.Tensor], quantized: Collection[str], scheme: Scheme = fp8
) -> None:
    """Every parameter named in `quantized` is the oracle's, every other one a plain Parameter with the checkpoint's
    values; buffers too. Nothing is lazy, on meta, or left over."""
    seen = set()
    for name, param in model.named_parameters(remove_duplicate=False):
        if name in quantized:
            seen.add(name)
            assert_is(param, state[name], scheme, name)
        else:
            assert type(param) is nn.Parameter, f"{name} is a {type(param).__name__}"
            assert param.dtype == state[name].dtype, name
            assert torch.equal(param, state[name]), name
    assert seen == set(quantized)
    for name, buffer in model.named_buffers():
        assert type(buffer) is torch.Tensor, f"{name} is a {type(buffer).__name__}"
        if name in state:
            assert torch.equal(buffer, state[name]), name


def write_sharded(state: dict[str, torch.Tensor], folder: Path, shards: int = 3) -> None:
    """A checkpoint as transformers writes it: several files and an index."""
    names = sorted(state)
    files = {n: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file(
            {n: state[n].contiguous() for n in names if files[n] == file}, folder / file, metadata={"format": "pt"}
        )
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def identities(model: nn.Module) -> dict[str, int]:
    return {name: id(param) for name, param in model.named_parameters(remove_duplicate=False)}


def lazy_names(model: nn.Module) -> list[str]:
    return [name for name, param in model.named_parameters(remove_duplicate=False) if isinstance(param, LazyWeight)]


def assert_nothing_armed() -> None:
    """No session is open, none is half-open, and PyTorch's own hook tables are as they were."""
    assert_no_hooks()
    assert not torch_module._global_parameter_registration_hooks
    assert not torch_module._global_module_registration_hooks


def assert_session_works(model: nn.Module | None = None, scheme: Scheme = fp8) -> None:
    """The same process can load again: a fresh model, and `model` (a TinyNet) if given."""
    state = weights_of(TinyNet, seed=99)
    with online_quant(scheme):
        fresh = TinyNet().bfloat16()
        fresh.load_state_dict(state)
    assert_equals_oracle(fresh, state, TinyNet.QUANTIZED, scheme)
    if model is not None:
        with online_quant(scheme, model):
            model.load_state_dict(state)
        assert_equals_oracle(model, state, TinyNet.QUANTIZED, scheme)
    assert_nothing_armed()
