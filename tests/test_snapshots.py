"""Snapshots: a model's memory as files that the next start maps. Whole or refused by name; pages are shared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from qtensor import (
    fp8,
    load_snapshot,
    online_reload,
    quantize,
    save_snapshot,
    weight_checksums,
    weight_root,
)
from qtensor.checkpoint.snapshot_file import PAGE
from qtensor.checkpoint.snapshot_tensors import HOW, column_sums
from qtensor.checkpoint.snapshots import is_snapshot, snapshot_roots, verify_snapshot
from qtensor.cli.main import main
from qtensor.schemes.scheme import SCHEMES
from support.processes import elsewhere
from support.snapshots import FILE, KINDS, build, fresh, linear, state

MOST_SCHEMES = sorted({s.name for s in SCHEMES.values()} | {"nvfp4:searched", "int4_per_group:searched"})


@given(
    kind=st.sampled_from(list(KINDS)),
    scheme=st.sampled_from([None, *MOST_SCHEMES]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    meta=st.booleans(),
    verify=st.sampled_from(HOW),
)
@settings(max_examples=60)
def test_a_model_comes_back_as_it_was(tmp_path_factory, kind, scheme, dtype, meta, verify):
    folder = tmp_path_factory.mktemp("snapshot")
    model = build(kind, scheme, dtype, seed=1)
    save_snapshot(model, folder / "a")
    with torch.device("meta" if meta else "cpu"):
        again = KINDS[kind]().to(dtype)
    assert load_snapshot(again, folder / "a", verify=verify) == weight_root(model) == weight_root(again)
    assert state(again) == state(model)
    save_snapshot(again, folder / "b")
    assert (folder / "a" / FILE).read_bytes() == (folder / "b" / FILE).read_bytes()
    assert snapshot_roots(folder / "a") == [weight_root(model)]
    assert verify_snapshot(folder / "a") == []
    if kind == "recurrent":
        assert all(a is b for a, b in zip(again._flat_weights, again.parameters(), strict=True))
        x = torch.randn(5, 1, 16, dtype=dtype)
        assert torch.equal(again(x)[0], model(x)[0])


def test_the_file_is_safetensors_with_tensors_at_page_borders(tmp_path):
    model = linear("fp8_per_channel", "nvfp4")
    save_snapshot(model, tmp_path / "s")
    held = load_file(tmp_path / "s" / FILE)
    assert torch.equal(held["1.weight::qdata"], model[1].weight.qdata)
    assert torch.equal(held["1.bias"], model[1].bias)
    again = fresh(2)
    load_snapshot(again, tmp_path / "s")
    assert [again[i].weight.qdata.data_ptr() % PAGE for i in (0, 1)] == [0, 0]
    assert all(p.data_ptr() % 64 == 0 for w in again for p in (w.bias, w.weight.scale))


def test_what_users_put_on_a_parameter_stays(tmp_path):
    save_snapshot(linear(), tmp_path / "s")
    target = fresh()
    target[0].weight.tag = "mine"
    load_snapshot(target, tmp_path / "s")
    assert target[0].weight.tag == "mine"


def test_a_reload_writes_to_pages_of_its_own(tmp_path):
    model = linear("fp8_per_channel", "nvfp4")
    save_snapshot(model, tmp_path / "s")
    before = (tmp_path / "s" / FILE).read_bytes()
    served, other = fresh(2), fresh(2)
    load_snapshot(served, tmp_path / "s")
    load_snapshot(other, tmp_path / "s")
    new = {name: torch.randn(p.shape).bfloat16() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError), online_reload(served):
        served.load_state_dict(new | {"1.weight": torch.full((128, 128), float("nan"))})
    assert weight_root(served) == weight_root(model)
    addresses = [p.data_ptr() for w in served for p in w.weight.parts()]
    with online_reload(served):
        served.load_state_dict(new)
    wanted = {n: quantize(v, model[int(n[0])].weight.scheme) if n.endswith("weight") else v for n, v in new.items()}
    assert weight_checksums(served) == weight_checksums(wanted)
    assert weight_root(served) == weight_root(wanted)
    assert addresses == [p.data_ptr() for w in served for p in w.weight.parts()]
    assert weight_root(other) == weight_root(model)
    assert (tmp_path / "s" / FILE).read_bytes() == before
    save_snapshot(served, tmp_path / "s")  # Over the file that both have mapped.
    assert weight_root(other) == weight_root(model)
    assert snapshot_roots(tmp_path / "s") == [weight_root(wanted)]


def resident(folder: Path, verify: Any, reader: Any, writer: Any) -> None:
    """In a process of its own: map a snapshot and read all of it; when told, say what of it is resident here."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16) for _ in range(16)))
    load_snapshot(model, folder, verify=verify)
    weight_root(model)
    writer.send("ready")
    reader.recv()
    found: dict[str, int] = {}
    mine = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            mine = line.endswith(FILE)
        elif mine and (match := re.match(r"^(\w+): +(\d+) kB", line)):
            found[match[1]] = found.get(match[1], 0) + int(match[2]) * 1024
    writer.send(found)
    reader.recv()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is resident")
def test_processes_share_the_pages(tmp_path):
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16) for _ in range(16)))
    for layer in model:
        layer.weight = nn.Parameter(quantize(layer.weight.data, fp8), requires_grad=False)
    save_snapshot(model, tmp_path / "s")
    size = (tmp_path / "s" / FILE).stat().st_size
    ends = []
    for verify in ("sums", "header"):
        (their_reader, our_writer), (our_reader, their_writer) = elsewhere.Pipe(False), elsewhere.Pipe(False)
        process = elsewhere.Process(
            target=resident, args=(tmp_path / "s", verify, their_reader, their_writer), daemon=True
        )
        process.start()
        their_reader.close()
        their_writer.close()  # Else nobody would hear of it if the other process failed.
        ends.append((process, our_reader, our_writer))
        assert our_reader.recv() == "ready"
    found = []
    for _, reader, writer in ends:
        writer.send("say")
        found.append(reader.recv())
    for process, _, writer in ends:
        writer.send("end")
        process.join()
    for held in found:
        assert held["Private_Dirty"] == 0
        assert held["Rss"] > 0.95 * size
        assert held["Pss"] < 0.55 * size, "a process has pages of its own"


def test_the_command_verifies_a_snapshot(tmp_path, capsys):
    model = linear()
    save_snapshot(model, tmp_path / "s")
    assert is_snapshot(tmp_path / "s")
    assert main(["verify", str(tmp_path / "s")]) == 0
    assert weight_root(model) in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "s"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["roots"] == [weight_root(model)]
    path = tmp_path / "s" / FILE
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 5] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(tmp_path / "s")]) == 1
    assert "0.weight is damaged" in capsys.readouterr().out


@given(
    size=st.integers(0, 700_000),
    kind=st.sampled_from(["bits", "zeros", "exchanged", "shifted"]),
    numbers=st.tuples(*[st.integers(0, 2**20)] * 3),
    sector=st.sampled_from([512, 4096, 32768]),
)
def test_sums_see_the_damage_that_a_disk_does(size, kind, numbers, sector):
    whole = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    damaged, count = whole.clone(), max(size // sector, 1)
    a, b = (n % count * sector for n in numbers[:2])
    if kind == "bits":
        damaged[a : a + numbers[2] % 4072 + 1] ^= 1 + numbers[2] % 255
    elif kind == "zeros":
        damaged[a : a + sector] = 0
    elif kind == "exchanged":
        width = min(len(whole[a : a + sector]), len(whole[b : b + sector]))
        damaged[a : a + width], damaged[b : b + width] = whole[b : b + width], whole[a : a + width]
    else:
        damaged[a : a + 2 * sector] = damaged[a : a + 2 * sector].roll(numbers[2])
    assert (column_sums([whole]) == column_sums([damaged])) == torch.equal(whole, damaged)
    assert column_sums([whole[: size // 2], whole[size // 2 :]]) != column_sums([whole])
