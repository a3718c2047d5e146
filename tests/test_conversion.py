"""`quantize_checkpoint`: every matrix is `quantize(matrix)`, whatever is interrupted, and a full disk costs nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_checkpoints import digests
from torch import nn

from qtensor import CheckpointError, NonFiniteWeightError, fp8, fp8_per_tensor, quantize, save_checkpoint
from qtensor.checkpoint import problems, quantize_checkpoint, writing
from qtensor.checkpoint.fused import fused_group
from qtensor.checkpoint.reading import Checkpoint
from qtensor.checkpoint.verify import weights_of
from qtensor.convert import converting, streaming
from qtensor.schemes.scheme import SCHEMES as NAMED
from support.helpers import same_bytes
from support.interrupted import convert_alone, kill_at_random, quantize_folder, save_model
from support.processes import elsewhere

SCHEMES = tuple(dict.fromkeys(NAMED.values()))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def write(folder: Path, tensors: dict[str, torch.Tensor], files: int = 1, config: dict[str, Any] | None = None) -> Path:
    """A checkpoint of so many files, its tensors dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = list(tensors), {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"
        part = names[i::files]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
    return folder


def layers(
    seed: int = 0, count: int = 4, dtype: torch.dtype = torch.bfloat16, cols: tuple[int, int] = (64, 200)
) -> dict[str, torch.Tensor]:
    """A small decoder's names and values; cols: of its matrices."""
    make = torch.Generator().manual_seed(seed)
    shapes = {
        "self_attn.q_proj": (128, cols[0]),
        "self_attn.k_proj": (128, cols[0]),
        "self_attn.v_proj": (40, cols[0]),
        "mlp.down_proj": (64, cols[1]),
    }
    tensors = {"model.embed_tokens.weight": torch.randn(32, 64, generator=make).to(dtype)}
    for i in range(count):
        for name, shape in shapes.items():
            scale = 10 ** float(torch.randn((), generator=make))
            tensors[f"model.layers.{i}.{name}.weight"] = (torch.randn(shape, generator=make) * scale).to(dtype)
        tensors[f"model.layers.{i}.input_layernorm.weight"] = torch.ones(64, dtype=dtype)
    return tensors | {"lm_head.weight": torch.randn(32, 64, generator=make).to(dtype)}


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(DTYPES),
    files=st.integers(1, 4),
    chunk=st.sampled_from([1, 5_000, 4 << 20]),
    workers=st.integers(1, 3),
)
def test_every_matrix_is_the_oracles(tmp_path_factory, seed, scheme, dtype, files, chunk, workers):
    """A scale of whole matrices is that of q, k and v as one, which is how vLLM keeps them."""
    folder = tmp_path_factory.mktemp("conversion")
    tensors = layers(seed, 2, dtype, (128, 384) if scheme.format.granularity == "group" else (64, 200))
    source = write(folder / "source", tensors, files)
    before, streaming.CHUNK_BYTES = streaming.CHUNK_BYTES, chunk
    try:
        report = quantize_checkpoint(source, folder / "out", scheme, workers=workers)
    finally:
        streaming.CHUNK_BYTES = before
    weights, plain = weights_of(Checkpoint(folder / "out"))
    assert report.quantized == len(weights) == 8
    for name, values in tensors.items():
        if "proj" not in name:
            assert torch.equal(plain.pop(name).read(), values)
            continue
        module = name.removesuffix(".weight")
        group = [f"{m}.weight" for m in fused_group(module)] if scheme.format.needs_whole_matrix else [name]
        fused: Any = quantize(torch.cat([tensors[n] for n in group]), scheme)
        start = sum(tensors[n].shape[0] for n in group[: group.index(name)])
        made, expected = weights[module].read(dtype), fused[start : start + values.shape[0]]
        assert all(same_bytes(a, b) for a, b in zip(made.parts(), expected.parts(), strict=True)), name
    assert not plain


def test_a_shard_is_a_task_of_its_own(tmp_path):
    """One process plans, others convert a file each, in any order; the first writes what is common."""
    source = converting.Checkpoint(write(tmp_path / "source", layers(), 4))
    quantize_checkpoint(tmp_path / "source", tmp_path / "expected", fp8)
    schemes = {n.removesuffix(".weight"): fp8 for n in source.tensors if "proj" in n}
    (tmp_path / "out").mkdir()
    tasks = converting.plan(source, tmp_path / "out", schemes, "compressed-tensors")
    with elsewhere.Pool(1) as pool:
        records = pool.map(convert_alone, tasks[::-1])
    converting.begin(source, tmp_path / "out", schemes, "compressed-tensors")
    writing.write_manifest(tmp_path / "out", "compressed-tensors", {n: r for part in records for n, r in part.items()})
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


KILLS = 100 if os.environ.get("QTENSOR_ENDURANCE") else 6  # Of each kind of writer.

# Killed ---------------------------------------------------------------------------------------------------------------


def test_a_killed_conversion_leaves_nothing_wrong_and_resumes_to_the_same_bytes(tmp_path):
    source, target, kills = write(tmp_path / "source", layers(count=8), 8), tmp_path / "out", 0
    quantize_checkpoint(source, tmp_path / "expected", fp8)
    expected = digests(tmp_path / "expected")

    def before() -> None:
        if target.exists():  # Otherwise the next run continues what a killed one left.
            assert digests(target) == expected
            shutil.rmtree(target)

    for killed in kill_at_random(quantize_folder, source, target, before=before, times=KILLS):
        kills += killed
        assert killed or target.exists()
    assert kills == KILLS
    before()
    quantize_checkpoint(source, target, fp8)
    assert digests(target) == expected
    assert not (tmp_path / "out.partial").exists()


def test_a_killed_save_leaves_the_old_folder_or_the_new_one(tmp_path):
    target, seen = tmp_path / "saved", [0, 0]
    save_model(1, tmp_path / "old")
    save_model(2, tmp_path / "new")
    whole = [digests(tmp_path / "old"), digests(tmp_path / "new")]

    def before() -> None:
        if not target.exists() or digests(target) != whole[0]:
            save_model(1, target)

    for _ in kill_at_random(save_model, 2, target, before=before, times=KILLS):
        held = digests(target)
        assert held in whole
        assert problems(target) == []
        seen[whole.index(held)] += 1
    assert seen[0] >= KILLS // 4, "the moments were badly chosen"


def test_two_writers_of_one_target_leave_what_one_of_them_wrote(tmp_path):
    whole = []
    for seed in (1, 2):
        save_model(seed, tmp_path / "expected")
        whole.append(digests(tmp_path / "expected"))
    for _ in range(KILLS // 2):
        writers = [elsewhere.Process(target=save_model, args=(seed, tmp_path / "saved")) for seed in (1, 2)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert 0 in [writer.exitcode for writer in writers]  # The other may be told that the target is being written.
        assert digests(tmp_path / "saved") in whole
        assert not (tmp_path / "saved.partial").exists()


def test_finished_files_are_not_done_again(tmp_path, monkeypatch):
    source = write(tmp_path / "source", layers(), 4)
    quantize_checkpoint(source, tmp_path / "expected", fp8)
    done = []
    convert = converting.convert_shard

    def interrupted(task, *args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task.target.name)
        return convert(task, *args)

    monkeypatch.setattr(converting, "convert_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", fp8)
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        CheckpointError, match=r"out\.partial holds an unfinished conversion of another source, or with"
    ):
        quantize_checkpoint(source, tmp_path / "out", fp8_per_tensor)
    monkeypatch.setattr(converting, "convert_shard", convert)
    assert quantize_checkpoint(source, tmp_path / "out", fp8).resumed_files == 2
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def test_what_an_interrupted_run_left_beside_its_shards_is_not_believed(tmp_path, monkeypatch):
    source = write(tmp_path / "source", layers(), 2)
    quantize_checkpoint(source, tmp_path / "expected", fp8)
    (source / "gone.txt").write_text("later on")
    monkeypatch.setattr(converting, "attempt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", fp8)
    monkeypatch.undo()
    (source / "gone.txt").unlink()
    quantize_checkpoint(source, tmp_path / "out", fp8)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def test_a_damaged_plan_is_another_plan(tmp_path, monkeypatch):
    """As a power cut may leave it."""
    source = write(tmp_path / "source", layers(), 2)
    monkeypatch.setattr(converting, "attempt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", fp8)
    (tmp_path / "out.partial" / writing.MARK / writing.PLAN).write_bytes(b'"\xff')
    with pytest.raises(CheckpointError, match="holds an unfinished conversion of another source"):
        quantize_checkpoint(source, tmp_path / "out", fp8)


def test_two_at_once_do_not_mix(tmp_path, monkeypatch):
    source = write(tmp_path / "source", layers(), 2)
    convert, messages = converting.convert_shard, []

    def meanwhile(task, *args):
        with pytest.raises(CheckpointError) as refused:
            quantize_checkpoint(source, tmp_path / "out", fp8)
        messages.append(str(refused.value))
        return convert(task, *args)

    monkeypatch.setattr(converting, "convert_shard", meanwhile)
    quantize_checkpoint(source, tmp_path / "out", fp8)
    assert all("is being written by another process" in message for message in messages)
    assert problems(tmp_path / "out") == []


# No space -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path, monkeypatch) -> Iterator[Path]:
    """A file system of 96 kB. Where none may be mounted, writes fail beyond that size as they would on one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True).returncode == 0
    )
    if not mounted:
        write, held = writing.ShardWriter.write, [0]

        def limited(self, file, name, piece):
            held[0] += piece.nbytes
            if held[0] > 96_000:
                raise OSError(28, "No space left on device")
            write(self, file, name, piece)

        monkeypatch.setattr(writing.ShardWriter, "write", limited)
    yield disk
    if mounted:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_loses_nothing(small_disk, tmp_path, monkeypatch):
    source = write(tmp_path / "source", layers(count=8), 2)
    saved = save_checkpoint(nn.Sequential(nn.Linear(8, 8)), small_disk / "saved")
    before = digests(saved)
    for honest in (True, False):  # the file system says how much is free, or (quotas, other writers) does not
        if not honest:
            monkeypatch.setattr(writing.Staging, "require_space", lambda self, nbytes: None)
        with pytest.raises(CheckpointError, match=r"are free|no space left on the disk"):
            quantize_checkpoint(source, small_disk / "out", fp8)
        with pytest.raises(CheckpointError, match=r"are free|no space left on the disk"):
            save_checkpoint(nn.Sequential(nn.Linear(256, 256)), saved)
        assert digests(saved) == before
        assert not (small_disk / "out").exists()
        assert not (small_disk / "saved.partial").exists()
        shutil.rmtree(small_disk / "out.partial", ignore_errors=True)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path):
    source = write(tmp_path / "source", layers())
    with pytest.raises(CheckpointError, match="exists; nothing is overwritten"):
        quantize_checkpoint(source, source, fp8)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_link_out_of_the_source_is_not_published(name, tmp_path):
    source = write(tmp_path / "source", layers())
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").symlink_to("config.json")  # Within the folder, it may be.
    (source / name).rename(tmp_path / "secret")
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name} is a link out of its folder"):
        quantize_checkpoint(source, tmp_path / "out", fp8)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "secret"}


def test_a_save_leaves_links_out_of_the_source_behind(tmp_path):
    source, saved = tmp_path / "source", tmp_path / "saved"
    for folder in (source, saved):
        folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    (source / "LICENSE").write_text("free")
    with pytest.warns(UserWarning, match=r"tokenizer\.json is a link out of its folder"):
        writing.carry_over(source, saved)
    assert [p.name for p in saved.iterdir()] == ["LICENSE"]


def test_a_snapshot_of_the_hubs_cache_is_converted(tmp_path):
    source = write(tmp_path / "models--a--b" / "snapshots" / "main", layers())
    (source / "tokenizer.json").write_text("{}")
    quantize_checkpoint(source, tmp_path / "expected", fp8)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for path in list(source.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("..", "..", "blobs", path.name))
    quantize_checkpoint(source, tmp_path / "out", fp8)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def test_names_that_meet_are_refused_before_the_first_byte(tmp_path):
    tensors = layers() | {
        "lm_head.weight_scale": torch.ones(1),
        "model.layers.0.mlp.down_proj.weight_scale": torch.ones(1),
    }
    source = write(tmp_path / "source", tensors, 3)
    both = r"(?=.*down_proj\.weight \(fp8)(?=.*down_proj\.weight_scale and|.*and \S*down_proj\.weight_scale would)"
    with pytest.raises(CheckpointError, match=both):
        quantize_checkpoint(source, tmp_path / "out", fp8)
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_nonfinite_weight_is_refused_by_name_and_index(tmp_path, scheme, value, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 4096)
    tensors = layers(cols=(128, 256))
    tensors["model.layers.2.self_attn.k_proj.weight"][77, 5] = value
    with pytest.raises(NonFiniteWeightError, match=r"layers\.2\.self_attn\.k_proj\.weight: .* at index \[77, 5\]"):
        quantize_checkpoint(write(tmp_path / "source", tensors), tmp_path / "out", scheme)
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_in_an_unknown_format_is_refused(tmp_path):
    source = write(tmp_path / "source", {**layers(), "model.codes.W_q": torch.ones(4, 4, dtype=torch.uint8)})
    (source / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "another"}}))
    with pytest.raises(CheckpointError, match=r"is quantized already, and model\.codes\.W_q is of no format"):
        quantize_checkpoint(source, tmp_path / "twice", fp8)


def test_a_report_says_what_stayed_and_what_matched_nothing(tmp_path):
    tensors = layers() | {"model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 4, 4)}
    tensors["model.codes.weight"] = torch.ones(4, 4, dtype=torch.int32)
    report = quantize_checkpoint(
        write(tmp_path / "source", tensors), tmp_path / "out", fp8, ignore=["*.k_proj", "lm_hat"]
    )
    assert report.warnings == ["patterns that matched no weight: lm_hat"]
    assert report.left["model.layers.0.self_attn.k_proj.weight"] == "ignored by '*.k_proj'"
    assert "stack" in report.left["model.layers.0.mlp.experts.gate_up_proj"]
    assert "int32" in report.left["model.codes.weight"]
    with pytest.raises(CheckpointError, match="there is nothing to quantize"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "none", fp8, ignore=["*"])
