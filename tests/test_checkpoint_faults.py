"""Checkpoints that are damaged, unsafe or of another kind: refused by name; `qtensor verify` finds what is wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_conversion import layers, write
from torch import nn

from qtensor import CheckpointError, fp8, load_checkpoint, online_quant, save_checkpoint, weight_checksums
from qtensor.checkpoint import problems, quantize_checkpoint
from qtensor.checkpoint.reading import Checkpoint
from qtensor.cli import main
from qtensor.convert import converting

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


def in_the_way(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else where a file was."""

    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return apply


def alone(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else than a file among files that no index lists."""

    def apply(folder: Path) -> None:
        (folder / INDEX).unlink()
        make(folder / name)

    return apply


def socket_file(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as held, contextlib.chdir(path.parent):  # Its path may have some 100 characters.
        held.bind(path.name)


def sparse(size: int, beginning: bytes = b"") -> Callable[[Path], None]:
    """A file that claims a size and takes no room."""

    def make(path: Path) -> None:
        path.write_bytes(beginning)
        os.truncate(path, size)

    return make


def header(name: str = "a.first", shape: str = "[3]", nbytes: int = 12) -> bytes:
    text = f'{{"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{nbytes}]}}}}'.encode("latin-1")
    return struct.pack("<Q", len(text)) + text


SHARD = "model-00001-of-00003.safetensors"
NO_FILE = "is no ordinary file"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no shard": (
        lambda f: sorted(f.glob("*.safetensors"))[0].unlink(),
        r"model-00001-of-00003\.safetensors is missing or no",
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
    "FIFO as index": (in_the_way(INDEX, os.mkfifo), rf"{INDEX}: {NO_FILE}"),
    "folder as index": (in_the_way(INDEX, Path.mkdir), rf"{INDEX}: {NO_FILE}"),
    "FIFO as shard": (in_the_way(SHARD, os.mkfifo), rf"{SHARD} is missing or no ordinary file"),
    "FIFO": (alone("a.safetensors", os.mkfifo), rf"a\.safetensors: {NO_FILE}"),
    "folder": (alone("a.safetensors", Path.mkdir), rf"a\.safetensors: {NO_FILE}"),
    "socket": (alone("a.safetensors", socket_file), r"a\.safetensors: cannot be opened"),
    "device": (alone("a.safetensors", lambda p: p.symlink_to("/dev/zero")), rf"a\.safetensors: {NO_FILE}"),
    "8 TB of index": (in_the_way(INDEX, sparse(1 << 43)), rf"{INDEX}: 8,796,093,022,208 bytes of it are text"),
    "100 GB of header": (in_the_way(SHARD, sparse(1 << 40, struct.pack("<Q", 10**11))), "100,000,000,000 bytes of it"),
    "4 TB of nothing": (in_the_way(SHARD, sparse(1 << 42, header())), "bytes at its end belong to no tensor"),
    "4 TB of 8": (
        in_the_way(SHARD, sparse(1 << 42, header(shape="[2199023255552]", nbytes=1 << 43))),
        rf"{SHARD} has 4398046511104 of 87960930\d+ bytes: 'a.first' are cut off",
    ),
    "half a character": (in_the_way(SHARD, sparse(100, header("\\ud800"))), "surrogates not allowed"),
    "no UTF-8": (in_the_way(SHARD, sparse(100, header("\xff"))), "can't decode byte 0xff"),
    "index in no UTF-8": (lambda f: (f / INDEX).write_bytes(b'{"weight_map": {"\xff": "a"}}'), f"{INDEX}: cannot be"),
    "long name": (in_the_way(SHARD, sparse(600, header("a" * 513))), "is a name of 513 characters"),
    "vast and empty": (
        in_the_way(SHARD, sparse(200, header(shape=f"[0,{2**63 - 1}]", nbytes=0))),
        r"has shape \[0, 92",
    ),
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


CONFIGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "config.json: is no ordinary file"),
    "folder": (Path.mkdir, "config.json: is no ordinary file"),
    "8 TB": (sparse(1 << 43), "config.json: 8,796,093,022,208 bytes of it are text, and at most 16,777,216 are"),
    "no UTF-8": (lambda path: path.write_bytes(b'{"a": "\xff"}'), "config.json: cannot be read as JSON: .*0xff"),
    "half a character": (
        lambda path: path.write_text('{"a": "\\ud800"}'),
        "config.json: cannot .* surrogates not allowed",
    ),
    "deep": (lambda path: path.write_text("[" * 100_000), "config.json: cannot be read as JSON"),
    "long number": (lambda path: path.write_text('{"a": ' + "9" * 5000 + "}"), "config.json: cannot be read as JSON"),
    "list": (lambda path: path.write_text("[]"), "config.json: holds list"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_is_none_is_refused_before_anything_is_written(what, tmp_path):
    folder, (make, message) = write(tmp_path / "source", layers()), CONFIGS[what]
    in_the_way("config.json", make)(folder)
    for act in (
        lambda: quantize_checkpoint(folder, tmp_path / "out", fp8),
        lambda: load_checkpoint(nn.Linear(2, 2), folder),
    ):
        with pytest.raises(CheckpointError, match=message):
            act()
    assert re.search(message, problems(folder)[0])
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_side_files_are_judged_and_copied_before_the_shards(tmp_path, monkeypatch):
    """Hours of shards were done, and then a name that is no UTF-8 could not be listed."""
    folder = write(tmp_path / "source", layers())
    monkeypatch.setattr(converting, "attempt", lambda *_: pytest.fail("a shard was begun"))
    named = Path(os.fsdecode(bytes(folder) + b"/\xff.txt"))
    named.write_text("")
    with pytest.raises(CheckpointError, match=r"the name b'\\xff\.txt' is not UTF-8"):
        quantize_checkpoint(folder, tmp_path / "out", fp8)
    named.unlink()
    sparse(1 << 43)(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match="GB are needed and"):
        quantize_checkpoint(folder, tmp_path / "out", fp8)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "pipe")  # What is no file is nothing to carry over.
    monkeypatch.undo()
    quantize_checkpoint(folder, tmp_path / "out", fp8)
    assert not (tmp_path / "out" / "pipe").exists()


def test_what_memory_cannot_hold_is_refused_by_name(tmp_path):
    """A sparse file may be of any size, and its header right."""
    beginning = header("up.weight", "[1073741824, 1024]", 1 << 42)
    sparse(len(beginning) + (1 << 42), beginning)(tmp_path / "model.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 41, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"up\.weight takes 4,398\.0 GB, and there is no memory for them"):
            Checkpoint(tmp_path).tensors["up.weight"].read()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    with pytest.raises(CheckpointError, match=r"up\.weight: is \[1073741824, 1024\], and up\.weight needs \[2, 2\]"):
        load_checkpoint(nn.ModuleDict({"up": nn.Linear(2, 2, bias=False)}), tmp_path)
    with pytest.raises(CheckpointError, match="GB are needed and"):
        quantize_checkpoint(tmp_path, tmp_path.parent / "out", fp8)


@pytest.mark.parametrize("shape", [(1 << 40, 0), (0, 1 << 40)])
def test_a_matrix_without_elements_is_left_as_it_is(shape, tmp_path):
    """Each of its rows would have a scale: some terabytes for a header of a hundred bytes."""
    folder = write(tmp_path / "source", {"up.weight": torch.empty(shape), "down.weight": torch.ones(4, 8)})
    assert quantize_checkpoint(folder, tmp_path / "out", fp8).left == {"up.weight": "holds no elements"}
    assert Checkpoint(tmp_path / "out").tensors["up.weight"].shape == shape


def test_a_tensor_of_another_shape_is_not_spread_over_the_models(tmp_path):
    save_file({"weight": torch.ones(1, 8), "bias": torch.ones(8)}, tmp_path / "model.safetensors")
    model = nn.Linear(8, 8)
    with pytest.raises(CheckpointError, match=r"weight: is \[1, 8\], and weight needs \[8, 8\]"):
        load_checkpoint(model, tmp_path)


@pytest.mark.parametrize("scheme", [None, "fp8"])
def test_a_flipped_bit_is_refused_before_anything_is_loaded(tmp_path, scheme):
    source = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8))
    with online_quant(fp8, source):
        source.load_state_dict(nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8)).state_dict())
    save_checkpoint(source, tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    held = bytearray(path.read_bytes())
    target = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8))
    load_checkpoint(target, tmp_path / "saved", scheme=scheme, verify=True)
    for at in (8 + int.from_bytes(held[:8], "little"), len(held) - 1):
        path.write_bytes(held[:at] + bytes([held[at] ^ 1]) + held[at + 1 :])
        target = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8))
        before = weight_checksums(target)
        with pytest.raises(CheckpointError, match=r"its bytes in model\.safetensors are not those that were written"):
            load_checkpoint(target, tmp_path / "saved", scheme=scheme, verify=True)
        assert weight_checksums(target) == before
        load_checkpoint(target, tmp_path / "saved", scheme=scheme)
    (tmp_path / "saved" / "qtensor.json").unlink()
    with pytest.raises(CheckpointError, match="there is no checksum to verify it by"):
        load_checkpoint(target, tmp_path / "saved", scheme=scheme, verify=True)


def test_files_of_the_hubs_cache_are_called_by_their_checksums(tmp_path):
    """models--NAME/snapshots/REVISION/FILE is a link to models--NAME/blobs/SHA256."""
    blobs, folder = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    source = nn.Linear(64, 8)
    save_file(source.state_dict(), tmp_path / "held")
    data = (tmp_path / "held").read_bytes()
    blob = blobs / hashlib.sha256(data).hexdigest()
    blob.write_bytes(data)
    (folder / "model.safetensors").symlink_to(blob)
    assert problems(folder) == []
    load_checkpoint(nn.Linear(64, 8), folder, verify=True)
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert problems(folder) == ["model.safetensors: its bytes in model.safetensors are not those that were written"]
    with pytest.raises(CheckpointError, match="not those that were written"):
        load_checkpoint(nn.Linear(64, 8), folder, verify=True)
    load_checkpoint(nn.Linear(64, 8), folder)
