"""CopyCounter: exact account of what a loader wrote, on plain, lazy and meta models."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from qtensor import CopyCounter, fp8, online_quant


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))


def test_partial_writes_are_named_by_region() -> None:
    m = model()
    with CopyCounter(m) as counter:
        m[0].weight.data[2:4].copy_(torch.ones(2, 6))
        m[0].weight.data[:, 1].fill_(2)
        m[0].bias.data[torch.tensor([1, 5])] = 3.0
    assert counter.copied_numel == 12 + 8 + 2
    assert counter.coverage("0.weight").covered == 12 + 8 - 2
    assert counter.missing()["0.bias"] == [((0, 1),), ((2, 5),), ((6, 8),)]
    assert "0.weight: 30 of 48 elements never written" in str(counter.report())
    assert json.loads(counter.report().to_json())["copied_numel"] == 22


def test_duplicates_count_as_copies_but_not_as_coverage() -> None:
    m = model()
    with CopyCounter(m) as counter:
        for _ in range(3):
            m[0].weight.data[:4].copy_(torch.ones(4, 6))
    assert counter.copied_numel == 72
    assert counter.missing()["0.weight"] == [((4, 8), (0, 6))]


@pytest.mark.parametrize("how", ["plain", "meta", "assign", "lazy"])
def test_load_state_dict_is_complete(how: str) -> None:
    m, state = model(), model().state_dict()
    if how == "meta":
        m = m.to("meta")
    if how == "lazy":
        with online_quant(fp8, m), CopyCounter(m) as counter:
            m.load_state_dict(state)
            assert counter.missing() == {}
        return
    with CopyCounter(m) as counter:
        m.load_state_dict(state, assign=how == "assign")
    assert counter.missing() == {}
    assert len(counter.report().complete) == len(state)


def test_initialisation_is_no_load_and_ties_share_their_coverage() -> None:
    m = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    m[1].weight = m[0].weight
    with CopyCounter(m) as counter:
        nn.init.kaiming_uniform_(m[0].weight)
        assert set(counter.missing()) == {"0.weight", "1.weight"}
        m[1].weight.data.copy_(torch.eye(4))
    assert counter.missing() == {}


def test_weights_that_are_views_of_one_buffer() -> None:
    """A flat buffer of several weights, as FSDP and RL transports use."""
    flat = torch.zeros(40)
    m = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 4, bias=False))
    m[0].weight, m[1].weight = nn.Parameter(flat[:20].view(5, 4)), nn.Parameter(flat[20:].view(4, 5))
    with CopyCounter(m) as counter:
        flat[10:25].copy_(torch.ones(15))
    assert counter.missing() == {"0.weight": [((0, 2), (0, 4)), ((2, 3), (0, 2))], "1.weight": [((1, 4), (0, 5))]}


def test_unknown_names_are_refused() -> None:
    with CopyCounter(model()) as counter, pytest.raises(KeyError):
        counter.coverage("nothing")
