"""Snapshots that are damaged, of another model, or cut short by a kill: refused by name, or whole."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtensor import (
    CheckpointError,
    ConfigError,
    QTensor,
    SnapshotError,
    fp8,
    load_snapshot,
    online_quant,
    quantize,
    save_snapshot,
    weight_checksums,
    weight_root,
)
from qtensor.checkpoint.snapshot_file import PAGE, MappedFile
from qtensor.checkpoint.snapshot_tensors import HOW
from qtensor.checkpoint.snapshots import snapshot_roots, verify_snapshot
from support.interrupted import kill_at_random, snapshot_model
from support.snapshots import FILE, fresh, linear, state


def test_every_flipped_byte_is_refused_or_changes_nothing(tmp_path):
    """Of the header, all are refused; of the data, those between tensors are of no consequence."""
    model = linear("nvfp4")
    save_snapshot(model, tmp_path / "s")
    path, root = tmp_path / "s" / FILE, weight_root(model)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert header % PAGE == 0
    gaps = 0
    for at in [*range(header), *range(header, len(whole), 9)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        if at < header and at % 16:
            with pytest.raises(SnapshotError):
                MappedFile(path)
            continue
        target = fresh()
        before = [*target.parameters()]
        try:
            assert load_snapshot(target, tmp_path / "s", verify=HOW[at % 2]) == root
        except SnapshotError:
            assert all(a is b for a, b in zip(target.parameters(), before, strict=True))
        else:
            assert at >= header
            assert weight_root(target) == root
            gaps += 1
    assert gaps < 100
    for length in (0, 7, 8, 100, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SnapshotError, match=re.escape(FILE)):
            load_snapshot(fresh(), tmp_path / "s")
    path.write_bytes(whole + b"\0")
    with pytest.raises(SnapshotError, match="belong to no tensor"):
        load_snapshot(fresh(), tmp_path / "s")


@given(data=st.data())
@settings(max_examples=80)
def test_a_header_that_someone_has_sealed_again_gives_no_wrong_model(tmp_path_factory, data):
    """What the header says of the snapshot is changed, and its digest with it."""
    from qtensor.checkpoint import snapshot_file

    folder = tmp_path_factory.mktemp("sealed")
    model = linear("nvfp4")
    save_snapshot(model, folder / "s")
    file = MappedFile(folder / "s" / FILE)
    about, tensors = file.about, {name: file.tensor(name) for name in file._tensors if "padding" not in name}
    holder: Any = about
    path: list[Any] = []
    while isinstance(holder, (dict, list)) and holder:
        path.append(data.draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder)))))
        if data.draw(st.integers(0, 3)) == 0:
            break
        holder = holder[path[-1]]
    holder = about
    for key in path[:-1]:
        holder = holder[key]
    others = [None, 0, 1, -1, 2**70, "", "fp8_per_channel", "BF16", "none", True, [], {}, [0], [1, 0], {"a": 1}]
    holder[path[-1]] = data.draw(st.sampled_from(others))
    os.unlink(folder / "s" / FILE)
    snapshot_file.write_file(folder / "s" / FILE, tensors, about)
    target = fresh()
    try:
        load_snapshot(target, folder / "s")
    except SnapshotError:
        assert all(p.is_meta for p in target.parameters())
    else:
        assert weight_checksums(target) == weight_checksums(model)
        assert type(target[0].weight) is QTensor


def changed(model: nn.Module, how: str) -> nn.Module:
    if how == "shape":
        model[0] = nn.Linear(64, 128, dtype=torch.bfloat16)
    elif how == "dtype":
        model.float()
    elif how == "class":
        model[0].__class__ = type("Linear2", (nn.Linear,), {})
    elif how == "more":
        model[0].register_buffer("extra", torch.ones(2))
    elif how == "less":
        model[0].bias = None
    elif how == "tied":
        model[0].register_parameter("twin", model[0].bias)
    elif how == "buffer":
        bias = model[0]._parameters.pop("bias")
        model[0].register_buffer("bias", bias.data)
    return model


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("shape", "0.weight is torch.bfloat16"),
        ("dtype", "0.weight is torch.bfloat16"),
        ("class", "other modules"),
        ("more", "the snapshot has no 0.extra"),
        ("less", "the model has no 0.bias"),
        ("tied", "0.bias has other names"),
        ("buffer", "0.bias has other names"),
    ],
)
def test_another_model_is_refused_by_what_differs(tmp_path, how, says):
    save_snapshot(linear(), tmp_path / "s")
    target = changed(nn.Sequential(nn.Linear(128, 128, dtype=torch.bfloat16)), how)
    before = state(target)
    with pytest.raises(SnapshotError, match=re.escape(says)) as error:
        load_snapshot(target, tmp_path / "s")
    assert "Load the model in the ordinary way" in str(error.value)
    assert state(target) == before


def test_another_configuration_and_version_are_refused(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    with online_quant(fp8):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    save_snapshot(model, tmp_path / "s")

    def empty(**other: Any) -> nn.Module:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **other))

    again = empty()
    load_snapshot(again, tmp_path / "s")
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    with pytest.raises(SnapshotError, match=r"config.rms_norm_eps is 0.5 now, and was 1e-06"):
        load_snapshot(empty(rms_norm_eps=0.5), tmp_path / "s")
    monkeypatch.setattr("qtensor.checkpoint.snapshots.__version__", "9.9")
    with pytest.raises(SnapshotError, match=r"qtensor is '9.9' now"):
        load_snapshot(empty(), tmp_path / "s")


class WithExtra(nn.Linear):
    def get_extra_state(self) -> int:
        return 1


def test_what_cannot_be_in_a_snapshot_is_named(tmp_path):
    views = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    views[1].weight = nn.Parameter(views[0].weight.data[:])
    cases: list[tuple[nn.Module, str]] = [
        (nn.Linear(4, 4, device="meta"), "weight is on the meta device"),
        (views, "0.weight and 1.weight have memory in common"),
        (WithExtra(4, 4), "WithExtra has extra state"),
    ]
    part = nn.Linear(128, 8)
    part.weight = nn.Parameter(quantize(torch.randn(16, 128), "fp8_per_tensor")[:8], requires_grad=False)
    cases.append((part, "weight is a part of a quantized weight"))
    sparse = nn.Module()
    sparse.register_buffer("mask", torch.eye(3).to_sparse())
    cases.append((sparse, "mask is a Tensor"))
    for model, says in cases:
        with pytest.raises(SnapshotError, match=re.escape(says)):
            save_snapshot(model, tmp_path / "s")
    with online_quant(fp8) as session:
        model = nn.Linear(64, 64)
        with pytest.raises(SnapshotError, match="still being loaded"):
            save_snapshot(model, tmp_path / "s")
        session.abort()
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "s.partial").exists()


def test_a_tensor_that_is_no_state_is_not_left_on_the_meta_device(tmp_path):
    model = linear()
    save_snapshot(model, tmp_path / "s")
    target = fresh()
    target[0].table = torch.ones(2, device="meta")
    with pytest.raises(SnapshotError, match=r"Linear\.table is a tensor on the meta device"):
        load_snapshot(target, tmp_path / "s")
    target[0].__dict__["table"] = target[0].bias  # The same object as a parameter follows it.
    load_snapshot(target, tmp_path / "s")
    assert target[0].table is target[0].bias


def test_a_folder_of_others_is_not_replaced_and_arguments_are_checked(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        save_snapshot(linear(), tmp_path / "s")
    for wrong in (tmp_path / "none", tmp_path / "s"):
        with pytest.raises(SnapshotError, match="it is no snapshot"):
            load_snapshot(fresh(), wrong)
    save_snapshot(linear(), tmp_path / "t")
    for bad in ({"verify": True}, {"device": "nowhere"}):
        with pytest.raises(ConfigError):
            load_snapshot(fresh(), tmp_path / "t", **bad)
    save_snapshot(linear(seed=1), tmp_path / "t")  # One of its own is.
    assert snapshot_roots(tmp_path / "t") == [weight_root(linear(seed=1))]


def test_a_killed_save_leaves_the_old_snapshot_or_the_new_one(tmp_path):
    target, roots, seen = tmp_path / "s", [], [0, 0]
    for seed in (1, 2):
        snapshot_model(seed, tmp_path / str(seed))
        roots += snapshot_roots(tmp_path / str(seed))

    def before() -> None:
        if not target.exists() or snapshot_roots(target) != roots[:1]:
            snapshot_model(1, target)

    times = 100 if os.environ.get("QTENSOR_ENDURANCE") else 8
    for _ in kill_at_random(snapshot_model, 2, target, before=before, times=times):
        assert verify_snapshot(target) == []
        seen[roots.index(snapshot_roots(target)[0])] += 1
    assert seen[0] >= times // 4, "the moments were badly chosen"
