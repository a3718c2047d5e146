"""torch.distributed: checkpoints, state dict helpers, and collectives that write straight into lazy weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from qtensor import IncompleteLoadError, NonFiniteWeightError, fp8, fp8_per_block, online_quant
from support.helpers import free_port
from support.loading import FORMS, SCHEMES, TinyNet, armed, assert_equals_oracle, assert_is, identities, weights_of
from support.ranks import process_group, spawn

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no distributed package"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
]

# Checkpoints --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[str, dict[str, torch.Tensor]]:
    state = weights_of(TinyNet)
    path = str(tmp_path_factory.mktemp("dcp"))
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path, state


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dcp_load_equals_the_oracle(form, scheme, saved) -> None:
    """DCP loads in place: it detaches each tensor of the state dict, narrows, and copies."""
    path, state = saved
    with armed(form, scheme) as (model, session):
        before = identities(model)
        dcp.load(model.state_dict(), checkpoint_id=path, no_dist=True)
    assert_equals_oracle(model, state, TinyNet.QUANTIZED, scheme)
    assert identities(model) == before
    assert session.report().peak_staged_bytes == 0


@pytest.mark.parametrize("form", FORMS)
def test_dcp_load_of_a_nested_state_dict_equals_the_oracle(form, tmp_path) -> None:
    state = weights_of(TinyNet)
    dcp.save({"app": {"model": state, "step": 3}}, checkpoint_id=str(tmp_path), no_dist=True)
    with armed(form) as (model, _):
        target = {"app": {"model": get_model_state_dict(model), "step": 0}}
        dcp.load(target, checkpoint_id=str(tmp_path), no_dist=True)
        set_model_state_dict(model, target["app"]["model"])
    assert target["app"]["step"] == 3
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)


def test_a_key_the_dcp_checkpoint_lacks_is_its_own_error_and_nothing_stays_armed(saved) -> None:
    path, state = saved

    class Wider(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(48, 48)

    with (
        pytest.raises(dcp.CheckpointException, match=r"Missing key.*extra\.bias"),
        armed("constructed", make=Wider) as (model, _),
    ):
        dcp.load(model.state_dict(), checkpoint_id=path, no_dist=True)
    with armed("constructed") as (model, _):
        dcp.load(model.state_dict(), checkpoint_id=path, no_dist=True)
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)


@pytest.mark.parametrize("full", [False, True], ids=["local", "full_state_dict"])
@pytest.mark.parametrize("form", FORMS)
def test_set_model_state_dict_equals_the_oracle(form, full) -> None:
    state = weights_of(TinyNet)
    with armed(form) as (model, session):
        before = identities(model)
        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=full))
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)
    assert identities(model) == before
    assert session.report().lossy_reads == 0


@pytest.mark.parametrize("form", FORMS)
def test_set_model_state_dict_in_parts_copies_no_weight_onto_itself(form) -> None:
    """With full_state_dict, PyTorch completes a partial dict with the model's own, perhaps unwritten, weights."""
    state = weights_of(TinyNet)
    names = sorted(state)
    with armed(form) as (model, session):
        for part in (names[::2], names[1::2]):
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(model, {n: state[n] for n in part}, options=options)
    assert_equals_oracle(model, state, TinyNet.QUANTIZED)
    assert session.report().lossy_reads == 0


def test_a_quantized_model_survives_a_dcp_round_trip_of_its_logical_values(tmp_path) -> None:
    state = weights_of(TinyNet)
    with armed("constructed") as (model, _):
        model.load_state_dict(state)
    values = {n: p.dequantize() if n in TinyNet.QUANTIZED else p for n, p in get_model_state_dict(model).items()}
    dcp.save(values, checkpoint_id=str(tmp_path), no_dist=True)
    with armed("meta") as (again, _):
        dcp.load(again.state_dict(), checkpoint_id=str(tmp_path), no_dist=True)
    assert_equals_oracle(again, values, TinyNet.QUANTIZED)


# Collectives: two processes -----------------------------------------------------------------------------------------


def broadcast(model: nn.Module, state: dict[str, torch.Tensor], rank: int) -> None:
    """What an RL trainer does: rank 0 holds plain tensors, rank 1 receives into its weights."""
    weights = dict(model.named_parameters())
    for name in sorted(weights):
        dist.broadcast(state[name] if rank == 0 else weights[name].data, src=0)


def send_and_receive(model: nn.Module, state: dict[str, torch.Tensor], rank: int) -> None:
    weights = dict(model.named_parameters())
    for name in sorted(weights):
        if rank == 0:
            dist.send(state[name], dst=1)
        else:
            dist.recv(weights[name].data, src=0)


def broadcast_slices(model: nn.Module, state: dict[str, torch.Tensor], rank: int) -> None:
    """Slice by slice into narrow views, columns of `down` and rows of everything else."""
    weights = dict(model.named_parameters())
    for name in sorted(weights):
        dim = 1 if name == "down.weight" else 0
        n = weights[name].shape[dim]
        for a in range(0, n, 50):
            b = min(a + 50, n)
            if rank == 0:
                dist.broadcast(state[name].narrow(dim, a, b - a).contiguous(), src=0)
            else:
                dist.broadcast(weights[name].data.narrow(dim, a, b - a), src=0)


def asynchronous(model: nn.Module, state: dict[str, torch.Tensor], rank: int) -> None:
    weights = dict(model.named_parameters())
    works = []
    for name in sorted(weights):
        received = state[name].clone() if rank == 0 else weights[name].data
        works.append(dist.broadcast(received, src=0, async_op=True))
    for work in works:
        work.wait()


def object_list(model: nn.Module, state: dict[str, torch.Tensor], rank: int) -> None:
    """broadcast_object_list delivers tensors that are copied; the buffers are reused at once."""
    for name, param in sorted(model.named_parameters()):
        box = [state[name] if rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        if rank == 1:
            param.data.copy_(box[0])
            box[0].fill_(float("nan"))


def gather_rows(model: nn.Module, state: dict[str, torch.Tensor], rank: int) -> None:
    """Each rank holds half of the rows, as FSDP and tensor parallelism keep them."""
    weights = dict(model.named_parameters())
    for name in sorted(weights):
        half = state[name].chunk(2)[rank].contiguous()
        dist.all_gather_into_tensor(weights[name].data, half)


def gather_list(model: nn.Module, state: dict[str, torch.Tensor], rank: int) -> None:
    """all_gather into a list of views of the weight."""
    weights = dict(model.named_parameters())
    for name in sorted(weights):
        dist.all_gather(list(weights[name].data.chunk(2)), state[name].chunk(2)[rank].contiguous())


def sum_of_parts(model: nn.Module, state: dict[str, torch.Tensor], rank: int) -> None:
    """all_reduce in place: both ranks hold a part in the weight, of which one is zero."""
    weights = dict(model.named_parameters())
    for name in sorted(weights):
        weights[name].data.copy_(state[name] if rank == 0 else torch.zeros(()))
        dist.all_reduce(weights[name].data)


def from_rank_0(model: nn.Module, state: dict[str, torch.Tensor], rank: int) -> None:
    """PyTorch's own: rank 0 has the checkpoint, the others have nothing."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(state) if rank == 0 else {}, options=options)


RECEIVING = [broadcast, send_and_receive, broadcast_slices, asynchronous, object_list]
"""Rank 0 is a plain sender, rank 1 receives into lazy weights."""
SYMMETRIC = [gather_rows, gather_list, sum_of_parts, from_rank_0]
"""Both ranks fill lazy weights."""


GLOO_THREADS = 2
"""gloo writes what it received from threads of its own, and each keeps what it last wrote until it writes elsewhere."""


def check(rank: int, world: int) -> None:
    """Everything above in one pair of processes: starting them is what takes time."""
    state = weights_of(TinyNet)
    for program in (*RECEIVING, *SYMMETRIC):
        for scheme in (fp8, fp8_per_block):
            for form in ("constructed", "meta"):
                with armed(form, scheme) as (model, session):
                    model.steps.copy_(state["steps"])
                    program(model, state, rank)
                    if rank == 0 and program in RECEIVING:
                        model.load_state_dict(state)
                try:
                    assert_equals_oracle(model, state, TinyNet.QUANTIZED, scheme)
                    staged = session.report().peak_staged_bytes
                    assert staged <= GLOO_THREADS * state["down.weight"].nbytes, f"staged {staged}"
                except AssertionError as error:
                    raise AssertionError(f"rank {rank}, {program.__name__}, {scheme}, {form}: {error}") from error
    bad_input(rank, state)


def bad_input(rank: int, state: dict[str, torch.Tensor]) -> None:
    """What arrives by collective is checked as everything else is."""
    poisoned = state["up.weight"].clone()
    poisoned[7, 3] = float("nan")
    if rank == 0:
        dist.broadcast(poisoned, src=0)
        return
    with pytest.raises(NonFiniteWeightError, match=r"up\.weight: nan at index \[7, 3\]"), online_quant(fp8):
        model = TinyNet().bfloat16()
        dist.broadcast(model.up.weight.data, src=0)


@pytest.mark.slow
def test_collectives_into_lazy_weights_equal_the_oracle() -> None:
    """verl #7987, NeMo-RL #3545: refits broadcast into the model's own weights, whole or slice by slice."""
    spawn(2, check)


def test_a_collective_that_brings_half_of_a_weight_leaves_the_rest_missing() -> None:
    """One process is a group too: what it gathers covers what it gathers, no more."""
    with process_group(0, 1, free_port()):
        state = weights_of(TinyNet)
        rest = {k: v for k, v in state.items() if k != "up.weight"}
        with pytest.raises(IncompleteLoadError) as caught, armed("constructed") as (model, _):
            model.load_state_dict(rest, strict=False)
            dist.all_gather_into_tensor(model.up.weight.data[:80], state["up.weight"][:80])
        assert caught.value.missing == {"up.weight": [((80, 160), (0, 48))]}
        with armed("constructed") as (model, _):
            model.load_state_dict(state)
            dist.broadcast(model.up.weight.data, src=0)
            dist.all_gather_into_tensor(model.up.weight.data, state["up.weight"] * 2)
        assert_is(model.up.weight, state["up.weight"] * 2, fp8)
