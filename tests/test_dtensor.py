"""DTensor: models that PyTorch's own parallelisms have split load and quantize to the bytes of the unsplit model."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from qtensor import (
    ConfigError,
    LoadReport,
    QTensor,
    QTensorError,
    Scheme,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    online_quant,
    online_reload,
    quantize,
)
from support.helpers import same_bytes
from support.ranks import at_length, spawn

SCHEMES = (fp8_per_channel, fp8_per_tensor, fp8_per_block)


class Mlp(nn.Module):
    """Sizes that four ranks can split at multiples of 128."""

    def __init__(self, hidden: int = 512, inner: int = 1024) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return Mlp().bfloat16().state_dict()


def made(meta: bool) -> nn.Module:
    with torch.device("meta" if meta else "cpu"):
        return Mlp().bfloat16()


def split(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()}, **options)


def parallel(mesh: DeviceMesh, *, meta: bool = False) -> nn.Module:
    return split(made(meta), mesh)


def assert_unsharded_bytes(model: nn.Module, scheme: Any) -> None:
    for name, full in state().items():
        module, attribute = name.split(".")
        param = getattr(getattr(model, module), attribute)
        local, dim = (param, None)
        if isinstance(param, DTensor):
            local, (placement,) = param._local_tensor, param.placements
            dim = placement.dim if isinstance(placement, Shard) else None
        rank, world = dist.get_rank(), dist.get_world_size()
        if not (full.dim() == 2 and module != "norm"):
            assert torch.equal(local, full if dim is None else full.chunk(world, dim)[rank]), name
            continue
        assert type(local) is QTensor, name
        expected = quantize(full, scheme)
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, (local.qdata.view(torch.uint8), local.scale))
        assert dim is not None
        assert same_bytes(torch.cat([p[0] for p in parts], dim), expected.qdata.view(torch.uint8)), name
        apart = local.scale.shape != expected.scale.shape
        scale = torch.cat([p[1] for p in parts], dim) if apart else local.scale
        assert same_bytes(scale, expected.scale), name


def copy_distributed(model: nn.Module, full: dict[str, torch.Tensor]) -> None:
    for name, param in model.named_parameters():
        value = full[name]
        if isinstance(param, DTensor):
            value = distribute_tensor(value, param.device_mesh, param.placements)
        with torch.no_grad():
            param.copy_(value)


def load_state_dict(model: nn.Module, full: dict[str, torch.Tensor]) -> None:
    """Local shards, assigned: what a rank reads from a file of its own."""
    sharded = {}
    for name, param in model.named_parameters():
        value = full[name]
        sharded[name] = (
            distribute_tensor(value, param.device_mesh, param.placements) if isinstance(param, DTensor) else value
        )
    model.load_state_dict(sharded, assign=True)


def full_state_dict(model: nn.Module, full: dict[str, torch.Tensor]) -> None:
    set_model_state_dict(model, dict(full), options=StateDictOptions(full_state_dict=True))


def from_rank_0(model: nn.Module, full: dict[str, torch.Tensor]) -> None:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(full) if dist.get_rank() == 0 else {}, options=options)


LOADERS = [copy_distributed, load_state_dict, full_state_dict, from_rank_0]


def tensor_parallel_models_load_to_the_unsharded_bytes(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    for scheme in SCHEMES:
        for loader in LOADERS:
            for meta in (False, True):
                model = parallel(mesh, meta=meta)
                before = dict(model.named_parameters())
                with online_quant(scheme, model):
                    loader(model, state())
                assert_unsharded_bytes(model, scheme)
                assert all(param is before[name] for name, param in model.named_parameters()), loader
        unsharded = Mlp().bfloat16()
        with online_quant(scheme.weight_only(), unsharded):
            unsharded.load_state_dict(state())
        model = parallel(mesh)
        with online_quant(scheme.weight_only(), model):
            copy_distributed(model, state())
        with torch.no_grad():
            torch.testing.assert_close(model(x), unsharded(x), rtol=0.05, atol=0.02)


def a_model_that_is_split_while_a_session_is_open_gives_them_too(rank: int, world: int) -> None:
    """As transformers does after it has asked its quantizer."""
    mesh = init_device_mesh("cpu", (world,))
    for scheme in SCHEMES:
        model = made(meta=True)
        with online_quant(scheme, model):
            with pytest.raises(QTensorError, match="src_data_rank=None"):
                split(model, mesh)
            load_state_dict(split(model, mesh, src_data_rank=None), state())
        assert_unsharded_bytes(model, scheme)


def reloads_give_the_unsharded_bytes_on_all_ranks_or_none(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    ways: list[dict[str, Any]] = [{}, {"shadow": "host"}, {"atomic": False}]
    for scheme in SCHEMES:
        model = parallel(mesh)
        with online_quant(scheme, model):
            copy_distributed(model, state(seed=1))
        for i, how in enumerate(ways):
            for loader in LOADERS[i : i + 2]:
                with online_reload(model, assert_identity=True, **how) as session:
                    loader(model, state())
                assert_unsharded_bytes(model, scheme)
                assert session.report().missing == {}
                with online_reload(model, assert_identity=True, **how):
                    loader(model, state(seed=1))
        with online_reload(model):
            copy_distributed(model, state())
        for bad in range(world):
            with pytest.raises(ValueError if rank == bad else QTensorError, match="no good"):  # noqa: SIM117
                with online_reload(model, shadow="host" if bad else "device"):
                    copy_distributed(model, state(seed=2))
                    if rank == bad:
                        raise ValueError("this checkpoint is no good")
            assert_unsharded_bytes(model, scheme)


def scales_split_between_ranks_that_no_rank_can_hold_are_refused(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    model = nn.Linear(24, 300, bias=False).bfloat16()
    parallelize_module(model, mesh, ColwiseParallel())
    with pytest.raises(QTensorError, match="a rank's 150 of dimension 0 end inside a group of 128"):
        online_quant(fp8_per_block, model)


def bytes_of_one_rank_decide_nothing_for_all(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    with pytest.raises(ConfigError, match=r"split over ranks.*qtensor\.plan"):
        online_quant(model=parallel(mesh, meta=True), fit="1GB")


def from_pretrained_with_a_plan(folder: str, rank: int, world: int) -> None:
    """transformers splits the model it has built, on the meta device, and assigns each rank's part."""
    import transformers

    from qtensor import QTensorConfig

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    whole = transformers.LlamaForCausalLM(config).bfloat16().eval()
    if rank == 0:
        whole.save_pretrained(folder)
    dist.barrier()

    def load(**options: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", **options)

    def in_a_block(scheme: Scheme) -> tuple[Any, LoadReport]:
        with online_quant(scheme) as session:
            model = load(tp_plan="auto")
        return model, session.report()

    def with_a_config(scheme: Scheme) -> tuple[Any, LoadReport]:
        model = load(tp_plan="auto", quantization_config=QTensorConfig(scheme))
        return model, model.hf_quantizer.report

    ways = (in_a_block, with_a_config)
    for scheme, way in itertools.product((fp8_per_channel, fp8_per_tensor), ways):
        model, report = way(scheme.weight_only())
        assert len(report.layers) == 14
        for name, full in whole.state_dict().items():
            if "proj" not in name:
                continue
            param = model.get_parameter(name)
            dim = param.placements[0].dim
            expected = quantize(full, scheme)
            shard = expected.qdata.view(torch.uint8).chunk(world, dim)[rank]
            assert same_bytes(param._local_tensor.qdata.view(torch.uint8), shard), name
        with online_quant(scheme.weight_only()):
            unsharded = load()
        with torch.no_grad():
            ids = torch.arange(5)[None]
            torch.testing.assert_close(model(ids).logits, unsharded(ids).logits, rtol=0.05, atol=0.02)


def save(folder: str, rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    model = parallel(mesh)
    copy_distributed(model, state())
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)


def load_resharded(folder: str, rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for scheme in SCHEMES:
        model = parallel(mesh)
        with online_quant(scheme, model):
            dcp.load(get_model_state_dict(model), checkpoint_id=folder)
        assert_unsharded_bytes(model, scheme)


def test_two_ranks() -> None:
    spawn(
        2,
        tensor_parallel_models_load_to_the_unsharded_bytes,
        a_model_that_is_split_while_a_session_is_open_gives_them_too,
        reloads_give_the_unsharded_bytes_on_all_ranks_or_none,
        scales_split_between_ranks_that_no_rank_can_hold_are_refused,
        bytes_of_one_rank_decide_nothing_for_all,
    )


def test_transformers_plan(tmp_path: Path) -> None:
    pytest.importorskip("transformers", "5.20", reason="older ones copy each parameter before it is filled")
    spawn(2, functools.partial(from_pretrained_with_a_plan, str(tmp_path)))


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=at_length)])
def test_a_checkpoint_saved_on_other_ranks_loads_on_two(tmp_path: Path, world: int) -> None:
    spawn(world, functools.partial(save, str(tmp_path)))
    spawn(2, functools.partial(load_resharded, str(tmp_path)))
