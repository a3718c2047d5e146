"""fully_shard: shards are gathered in quantized form, and the model computes what the unsharded quantized one does."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from qtensor import (
    QTensor,
    QTensorError,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    int4_per_group,
    online_quant,
    online_reload,
    quantize,
)
from support.helpers import Experts, assert_oracle, same_bytes
from support.programs import PLAIN
from support.ranks import at_length, spawn

State = dict[str, torch.Tensor]


class Net(nn.Module):
    """Two matrices, a norm, and a stack of experts. Sizes: columns, rows of the first, rows of the last, experts."""

    def __init__(self, cols: int, inner: int, rows: int, experts: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.up = nn.Linear(cols, inner, dtype=dtype)
        self.norm = nn.LayerNorm(inner, dtype=dtype)
        self.experts = Experts((experts, inner, inner), dtype)
        self.down = nn.Linear(inner, rows, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(torch.relu(self.up(x)))
        w: Any = self.experts.w
        return self.down(torch.bmm(h.expand(w.shape[0], *h.shape), w.mT).sum(0))


def state_of(sizes: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator).to(dtype) for k, v in Net(*sizes).state_dict().items()}


def sizes_for(scheme: Any, world: int, rng: random.Random) -> tuple[int, ...]:
    """Rows that do not divide evenly; fewer than ranks, too; all but the last rank's in whole blocks."""
    block = scheme.format.block[0]
    if block == 1:
        rows = [rng.randint(30, 300), rng.choice([1, world + 1, rng.randint(5, 90)])]
    else:
        rows = [block * world * rng.randint(1, 2) - rng.randrange(world) for _ in range(2)]
    return rng.randint(10, 200), *rows, rng.randint(1, 2 * world)


def load(model: nn.Module, state: State) -> None:
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))


def shard(model: nn.Module, **how: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.up, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def unsharded(sizes: tuple[int, ...], scheme: Any, state: State) -> nn.Module:
    model = Net(*sizes)
    with online_quant(scheme, model):
        model.load_state_dict(state)
    return model


def sharded(order: str, sizes: tuple[int, ...], scheme: Any, state: State) -> Any:
    if order == "quantized, then sharded":
        return shard(unsharded(sizes, scheme, state))
    with torch.device("meta" if order == "sharded on meta" else "cpu"):
        model = shard(Net(*sizes))
    with online_quant(scheme, model):
        load(model, state)
    return model


def quantized_weights(model: Any) -> dict[str, Any]:
    for module in (model, model.up):
        module.reshard()
    return {k: p for k, p in model.named_parameters() if isinstance(p._local_tensor, QTensor)}


def assert_unsharded_bytes(model: Any, scheme: Any, state: State) -> None:
    """Of all ranks' shards one below the other."""
    found = quantized_weights(model)
    assert len(found) == 3
    for name, param in found.items():
        expected, local = quantize(state[name], scheme), param._local_tensor
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, [part.view(torch.uint8) for part in local.parts()])
        for i, wanted in enumerate(expected.parts()):
            by_rows = any(local.parts()[i] is part for part in local.parts_by_rows())
            mine = torch.cat([parts[i] for parts in ranks]) if by_rows else ranks[0][i]
            assert same_bytes(mine, wanted.view(torch.uint8)), (name, scheme, i)


def records(model: Any) -> list[Any]:
    """What FSDP keeps of each parameter."""
    groups = [m._get_fsdp_state()._fsdp_param_group for m in (model, model.up)]
    return [param for group in groups for param in group.fsdp_params]


def products_equal_the_unsharded(rank: int, world: int) -> None:
    rng = random.Random(world)
    for scheme in (*PLAIN, int4_per_group.searched()):
        sizes = sizes_for(scheme, world, rng)
        state = state_of(sizes, seed=world)
        x = torch.randn(3, sizes[0], generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.no_grad():
            expected = unsharded(sizes, scheme, state)(x)
        for order in ("sharded", "sharded on meta", "quantized, then sharded"):
            model = sharded(order, sizes, scheme, state)
            assert_unsharded_bytes(model, scheme, state)
            for _ in range(2):
                with torch.no_grad():
                    assert torch.equal(model(x), expected), (scheme, order, sizes)
            for _ in range(2):  # Each of these makes FSDP look at its parameters anew.
                model.to("cpu")
                assert_unsharded_bytes(model, scheme, state)
            with torch.no_grad():
                assert torch.equal(model(x), expected), (scheme, order, sizes)
            high = [p for p in records(model) if isinstance(p.sharded_param._local_tensor, QTensor)]
            assert all(isinstance(p._sharded_param_data, QTensor) for p in high), "FSDP kept bf16 memory"


class Counted:
    """FSDP's all-gather, counting what this rank gives."""

    def __init__(self) -> None:
        self.given = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> Any:
        self.given += input_tensor.nbytes
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


def quantized_bytes_travel(rank: int, world: int) -> None:
    sizes = 96, 32 * world, 16 * world, world
    state, given = state_of(sizes, seed=0), []
    for scheme in (None, fp8_per_channel, fp8_per_tensor):
        model: Any = shard(Net(*sizes)) if scheme is None else sharded("sharded", sizes, scheme, state)
        counted = Counted()
        for module in (model, model.up):
            module.set_custom_all_gather(counted)
        with torch.no_grad():
            model(torch.ones(1, 96).bfloat16())
        given.append(counted.given)
    elements = sum(v.numel() for v in state.values()) // world
    weights = sum(state[f"{name}"].numel() for name in ("up.weight", "experts.w", "down.weight")) // world
    rows = 32 + 16 + 32 * world
    plain = 2 * (elements - weights)
    assert given == [2 * elements, plain + weights + 4 * rows, plain + weights + 4]  # The stack has a scale per expert.


def what_cannot_be_gathered_is_refused(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    cut = Net(96, 150, 128, 2)
    with pytest.raises(QTensorError, match=r"fully_shard: a shard of \d+ rows .* ends inside a group of 128"):
        shard(unsharded((96, 150, 128, 2), fp8_per_block, state_of((96, 150, 128, 2), 0)))
    with pytest.raises(QTensorError, match="Split at multiples of 128"):
        online_quant(fp8_per_block, shard(cut))
    square = (128, 128, 128, 4)
    other: Any = {"shard_placement_fn": lambda p: Shard(1) if p.dim() == 2 else None}
    with pytest.raises(QTensorError, match=r"(up|down)\.weight: fully_shard split it along dimension 1"):
        online_quant(fp8_per_channel, shard(Net(*square), **other))
    with pytest.raises(QTensorError, match=r"along its first dimension only"):
        shard(unsharded(square, fp8_per_channel, state_of(square, 0)), **other)
    model = Net(*square)
    with pytest.raises(QTensorError, match=r"up\.weight is being loaded, and fully_shard cannot split it"):  # noqa: SIM117
        with online_quant(fp8_per_channel, model):
            fully_shard(model.up, mesh=mesh)
    if world == 4:
        with pytest.raises(QTensorError, match=r"reshard_after_forward=<number>"):
            online_quant(fp8_per_channel, shard(Net(*square), reshard_after_forward=2))
    dist.barrier()


def a_model_that_ran_is_quantized_and_one_that_failed_is_armed_again(rank: int, world: int) -> None:
    sizes = 50, 45, 10, 3
    state, x = state_of(sizes, seed=0), torch.ones(2, 50).bfloat16()
    model = shard(Net(*sizes))
    with torch.no_grad():
        model(x)
    with pytest.raises(ValueError, match="loader"):  # noqa: SIM117
        with online_quant(fp8_per_channel, model):
            load(model, state)
            raise ValueError("a loader failed")
    dist.barrier()
    with online_quant(fp8_per_channel, model):
        load(model, state)
    with torch.no_grad():
        assert torch.equal(model(x), unsharded(sizes, fp8_per_channel, state)(x))


def mixed_precision_decides_the_dtype_of_products(rank: int, world: int) -> None:
    sizes = 50, 45, 10, 3
    state = state_of(sizes, 0, torch.float32)
    model = shard(Net(*sizes, torch.float32), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with online_quant(fp8_per_channel, model):
        load(model, state)
    expected: Any = Net(*sizes, torch.float32)
    with online_quant(fp8_per_channel, expected):
        expected.load_state_dict(state)
    with torch.no_grad():
        x = torch.ones(2, 50).bfloat16()
        assert torch.equal(model(x), expected.to(torch.bfloat16)(x))


def tensor_parallel_and_sharded(rank: int, world: int) -> None:
    """Two dimensions: columns and rows of layers over one, FSDP over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    scheme = fp8_per_channel.weight_only()
    generator = torch.Generator().manual_seed(0)
    state = {"up.weight": (64, 48), "down.weight": (48, 64)}
    full = {k: torch.randn(s, generator=generator).bfloat16() for k, s in state.items()}

    def build() -> Any:
        model = nn.ModuleDict({"up": nn.Linear(48, 64, bias=False), "down": nn.Linear(64, 48, bias=False)}).bfloat16()
        return nn.Sequential(model["up"], nn.ReLU(), model["down"])

    names = {"0.weight": full["up.weight"], "2.weight": full["down.weight"]}
    model = build()
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    for weights in (names, {k: v.flip(0) for k, v in names.items()}):
        with online_quant(scheme, model) if weights is names else online_reload(model):
            load(model, weights)
        with online_quant(scheme, plain := build()):
            plain.load_state_dict(weights)
        with torch.no_grad():
            x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
            torch.testing.assert_close(model(x), plain(x), rtol=0.05, atol=0.5)
        scale = quantize(weights["2.weight"], fp8_per_channel).scale.chunk(2)[rank // 2]
        model.reshard()
        assert same_bytes(model[2].weight._local_tensor.scale, scale)


def reloads_keep_addresses_and_old_values_until_all_commit(rank: int, world: int) -> None:
    for scheme in (fp8_per_channel, fp8_per_tensor):
        sizes = 50, 45, world + 1, 3
        old, new = state_of(sizes, seed=0), state_of(sizes, seed=1)
        x = torch.ones(2, 50).bfloat16()
        with torch.no_grad():
            before, after = (unsharded(sizes, scheme, s)(x) for s in (old, new))
            model = sharded("sharded", sizes, scheme, old)
            assert torch.equal(model(x), before)
            with online_reload(model, assert_identity=True):
                load(model, new)
                assert torch.equal(model(x), before)
            assert torch.equal(model(x), after)
            assert_unsharded_bytes(model, scheme, new)
            for bad in range(world):
                started = time.monotonic()
                with pytest.raises(RuntimeError, match=f"rank {bad} failed: late" if rank != bad else "late"):  # noqa: SIM117
                    with online_reload(model):
                        load(model, old)
                        if rank == bad:
                            raise RuntimeError("late")
                assert time.monotonic() - started < 10
            assert_unsharded_bytes(model, scheme, new)
            assert torch.equal(model(x), after)


def test_two_ranks() -> None:
    spawn(
        2,
        products_equal_the_unsharded,
        quantized_bytes_travel,
        what_cannot_be_gathered_is_refused,
        a_model_that_ran_is_quantized_and_one_that_failed_is_armed_again,
        mixed_precision_decides_the_dtype_of_products,
        reloads_keep_addresses_and_old_values_until_all_commit,
    )


@at_length
def test_four_ranks() -> None:
    spawn(
        4,
        products_equal_the_unsharded,
        quantized_bytes_travel,
        what_cannot_be_gathered_is_refused,
        tensor_parallel_and_sharded,
        reloads_keep_addresses_and_old_values_until_all_commit,
    )


def test_one_rank() -> None:
    """FSDP has a way of its own for a mesh of one."""
    spawn(1, products_equal_the_unsharded, reloads_keep_addresses_and_old_values_until_all_commit)


def test_the_operations_of_a_shard_are_fsdp_s_alone() -> None:
    """Anybody else's new_zeros and flat view are high-precision tensors."""
    full = torch.randn(6, 8).bfloat16()
    w = quantize(full, fp8_per_channel)
    assert_oracle(w, full, fp8_per_channel)
    assert type(w.new_zeros((9, 8))) is torch.Tensor
    assert torch.equal(w.view(-1), w.dequantize().view(-1))
    assert torch.equal(w.as_strided((2, 3), (1, 2), 5), w.dequantize().as_strided((2, 3), (1, 2), 5))
