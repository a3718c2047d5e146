"""Checkpoints that are damaged, unsafe or of another kind: refused by name; `qtensor verify` finds what is wrong."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_conversion import layers, write
from torch import nn

from qtensor import CheckpointError, fp8, load_checkpoint
from qtensor.checkpoint import problems, quantize_checkpoint
from qtensor.checkpoint.reading import Checkpoint
from qtensor.cli import main

INDEX = "model.safetensors.index.json"


def reindex(folder: Path, name: str, file: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def drop_from_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def swapped(folder: Path) -> None:
    held = json.loads((folder / INDEX).read_text())["weight_map"]["lm_head.weight"]
    reindex(folder, "lm_head.weight", next(p.name for p in folder.glob("*.safetensors") if p.name != held))


def only_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def twice(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: torch.ones(1)}, second)


def twice_in_a_header(folder: Path) -> None:
    entry = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = b"{" + entry + b"," + entry + b"}"
    (folder / INDEX).unlink()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")


def cut(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-7])


def huge_header(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no shard": (
        lambda f: sorted(f.glob("*.safetensors"))[0].unlink(),
        r"model-00001-of-00003\.safetensors is missing",
    ),
    "pickles": (only_pickles, r"pickled \(pytorch_model\.bin\), and reading a pickle can run code"),
    "parent": (lambda f: reindex(f, "lm_head.weight", "../secret.safetensors"), "not a file of this folder"),
    "absolute": (lambda f: reindex(f, "lm_head.weight", "/etc/passwd"), "not a file of this folder"),
    "windows": (lambda f: reindex(f, "lm_head.weight", "..\\secret.safetensors"), "not a file of this folder"),
    "wrong file": (swapped, "says that lm_head.weight is in"),
    "unlisted": (drop_from_index, "does not list lm_head.weight"),
    "no map": (lambda f: (f / INDEX).write_text("{}"), 'has no "weight_map"'),
    "no JSON": (lambda f: (f / INDEX).write_text("{"), "cannot be read as JSON"),
    "twice": (twice, r"is in two files"),
    "twice in a header": (twice_in_a_header, "names a twice|not a whole safetensors file"),
    "cut": (cut, r"00002-of-00003\.safetensors: is not a whole safetensors file.* are cut off"),
    "huge header": (huge_header, r"is not a whole safetensors file.* cut short within its header"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_is_refused_by_name(fault, tmp_path):
    tensors = layers()
    tensors["a.first"] = torch.ones(3)
    folder = write(tmp_path / "source", tensors, 3)
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(folder, tmp_path / "out", fp8)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(nn.Linear(2, 2), folder)
    assert not (tmp_path / "out").exists()
    assert problems(folder)


def test_what_is_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        Checkpoint(tmp_path)


def change(name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = edit(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed
        save_file(tensors, folder / "model.safetensors")

    return apply


WEIGHT = "model.layers.1.mlp.down_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no scale": (change(f"{WEIGHT}_scale", lambda t: None), "no scales for them|is missing"),
    "no data": (change(WEIGHT, lambda t: None), r"has no model\.layers\.1\.mlp\.down_proj\.weight"),
    "NaN scale": (change(f"{WEIGHT}_scale", lambda t: t * float("nan")), "not finite and positive"),
    "negative scale": (change(f"{WEIGHT}_scale", lambda t: -t), "not finite and positive"),
    "scale shape": (change(f"{WEIGHT}_scale", lambda t: t[:-1]), r"\[64, 200\] has \[64, 1\]"),
    "stored as bytes": (change(WEIGHT, lambda t: t.view(torch.uint8)), "stores torch.float8_e4m3fn matrices"),
    "one bit": (
        change("lm_head.weight", lambda t: (t.view(torch.int16) ^ 1).view(t.dtype)),
        r"lm_head\.weight: its bytes",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json: is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_finds_what_servers_do_not(damage, tmp_path, capsys):
    """vLLM loads checkpoints without scales, or with fp8 stored as integers, and serves garbage."""
    source = write(tmp_path / "source", layers())
    (source / "tokenizer.json").write_text("{}")
    assert main.main(["quantize", str(source), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantized"] == 16
    assert main.main(["verify", str(tmp_path / "out")]) == 0
    spoil, message = DAMAGE[damage]
    spoil(tmp_path / "out")
    capsys.readouterr()
    assert main.main(["verify", str(tmp_path / "out"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert any(re.search(message, problem) for problem in found["problems"]), found


def test_the_commands_for_people(tmp_path, capsys):
    source = write(tmp_path / "source", layers(), 2)
    assert (
        main.main(
            ["quantize", str(source), str(tmp_path / "out"), "--scheme", "fp8_per_tensor", "--ignore", "*.k_proj"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "12 weights to fp8_per_tensor" in out
    assert "ignored by '*.k_proj': model.layers.0.self_attn.k_proj.weight and 3 more" in out
    assert main.main(["inspect", str(tmp_path / "out"), "--against", str(source)]) == 0
    out = capsys.readouterr().out
    assert "2 files, compressed-tensors" in out
    assert "12 weights" in out
    assert "SQNR 31" in out
    assert main.main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["quantized"]) == 12
    assert main.main(["inspect", str(tmp_path / "out"), "--json", "--against", str(source)]) == 0
    assert len(json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["quantized"]) == 12
    assert main.main(["quantize", str(source), str(tmp_path / "out")]) == 1
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main.main(["inspect", str(tmp_path / "nowhere"), "--json"]) == 1
    assert "no such folder" in json.loads(capsys.readouterr().out)["error"]
    for wrong in (["quantize", "a"], ["quantize", "a", "b", "--workers", "0"], ["quantize", "a", "b", "--scheme", "x"]):
        with pytest.raises(SystemExit) as stop:
            main.main(wrong)
        assert stop.value.code == 2


def test_a_weight_that_lost_nothing_is_valid_json(tmp_path, capsys):
    """Python's own JSON would say Infinity, which other parsers refuse."""
    source = write(tmp_path / "source", {"up.weight": torch.zeros(4, 128), "down.weight": torch.randn(4, 128)}, 1)
    assert main.main(["quantize", str(source), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main.main(["inspect", str(tmp_path / "out"), "--json", "--against", str(source)]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["quantized"]
    assert {weight["name"]: weight["sqnr"] is None for weight in found} == {"up.weight": True, "down.weight": False}
