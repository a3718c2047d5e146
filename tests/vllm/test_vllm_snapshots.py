"""Engines that start from a snapshot: answers, weights and root of the one it was saved of; reloads; refusals."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm import LLM

from qtensor import SnapshotError, weight_root
from qtensor.checkpoint import snapshot_file, snapshots
from qtensor.checkpoint.snapshots import snapshot_roots, verify_snapshot
from qtensor.checkpoint.writing import Staging
from qtensor.integrations.vllm import checksums, compat, entry, garbage, root, save_snapshot
from qtensor.lazy import quantized_rows
from support.vllm.checkpoints import checkpoint, variant
from support.vllm.engines import engine, load_error, look
from support.vllm.reloads import other, reload

FILE = "ranks-1/rank-0-of-1.safetensors"
INT8 = {"hf_overrides": {"quantization_config_dict_json": json.dumps({"activation": "int8"})}}


def without_weights(architecture: str, folder: Path) -> Path:
    """The checkpoint's config alone: who reads weights from here fails."""
    return Path(shutil.copytree(checkpoint(architecture), folder, ignore=shutil.ignore_patterns("*.safetensors*")))


def mapped(llm: LLM) -> list[str]:
    """The parameters whose memory is a file of a snapshot."""

    def read(model: torch.nn.Module) -> list[str]:
        spans = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith(".safetensors") and "/rank-" in line:
                spans.append(tuple(int(end, 16) for end in line.split()[0].split("-")))
        params = [(n, p.data_ptr()) for n, p in model.named_parameters() if p.numel()]
        return [name for name, address in params if any(start <= address < stop for start, stop in spans)]

    found: list[str] = llm.apply_model(read)[0]
    return found


@pytest.mark.parametrize(
    ("architecture", "quantization", "options"),
    [
        ("llama", "qtensor", {}),
        ("qwen3-tied", "qtensor_nvfp4", {}),
        ("mixtral", "qtensor_mxfp4", {}),
        ("qwen3-moe", "qtensor_fp8_per_block", {}),
        ("llama", "qtensor_int8_per_channel", INT8),
    ],
)
def test_an_engine_starts_from_a_snapshot(architecture, quantization, options, tmp_path, monkeypatch) -> None:
    with engine(checkpoint(architecture), quantization, **options) as llm:
        roots = save_snapshot(llm, tmp_path / "s")
        assert roots == [root(llm)] == [weight_root(checksums(llm)[0])] == snapshot_roots(tmp_path / "s" / "ranks-1")
        first = look(llm)
        assert mapped(llm) == []
        reload(llm, other(architecture))
        moved = root(llm)
        llm.reset_prefix_cache()
        second = look(llm)
    assert verify_snapshot(tmp_path / "s" / "ranks-1") == []
    before = (tmp_path / "s" / FILE).read_bytes()
    monkeypatch.setenv("QTENSOR_VLLM_SNAPSHOT", str(tmp_path / "s"))
    with engine(without_weights(architecture, tmp_path / "bare"), quantization, **options) as llm:
        assert root(llm) == roots[0] != moved
        again = look(llm)
        assert (again.tokens, again.weights) == (first.tokens, first.weights)
        assert torch.equal(again.logprobs, first.logprobs)
        served = [name for name in mapped(llm) if "norm" not in name]
        assert any("embed_tokens" in name for name in served)
        if not options:
            assert sum(name.endswith(("proj.weight", "w13_weight", "w2_weight")) for name in served) >= 4
        reload(llm, other(architecture))
        assert root(llm) == moved
        llm.reset_prefix_cache()
        assert torch.equal(look(llm).logprobs, second.logprobs)
        save_snapshot(llm, tmp_path / "t")
    assert (tmp_path / "s" / FILE).read_bytes() == before
    assert snapshot_roots(tmp_path / "t" / "ranks-1") == [moved]


def test_a_start_from_a_snapshot_asks_for_no_kernels(tmp_path, monkeypatch) -> None:
    """Nor for numba, whose import takes as long as the rest: it comes beside vLLM's steps after the load."""
    with engine(checkpoint("llama"), "qtensor") as llm:
        save_snapshot(llm, tmp_path / "s")
    begun: list[str] = []

    class Later:
        def __call__(self) -> None:
            raise AssertionError("the load waits for numba")

        def begin(self) -> None:
            begun.append("numba")

    def choose(*_: object) -> None:
        raise AssertionError("the load asks for kernels")

    monkeypatch.setattr(entry, "loops", Later())
    monkeypatch.setattr(quantized_rows.kernels, "choose", choose)
    assert "waits for numba" in str(load_error(checkpoint("llama")))
    monkeypatch.setenv("QTENSOR_VLLM_SNAPSHOT", str(tmp_path / "s"))
    with engine(checkpoint("llama"), "qtensor") as llm:
        assert mapped(llm) != []
    assert begun == ["numba"]


@pytest.mark.parametrize("there", [0, 7])
def test_collections_of_a_load_leave_out_what_was_there_before(there, monkeypatch, request) -> None:
    """Unless the process has frozen something itself; and an end of any kind takes it in again."""
    said: list[str] = []

    def collected(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            said.append("collect")

    fake = {name: lambda name=name: said.append(name) for name in ("freeze", "unfreeze")}
    monkeypatch.setattr(garbage, "gc", SimpleNamespace(**fake, get_freeze_count=lambda: there))
    gc.callbacks.append(collected)
    request.addfinalizer(lambda: gc.callbacks.remove(collected))
    with engine(checkpoint("llama"), "qtensor") as llm:
        assert "eval" not in llm.apply_model(vars)[0]
    if there:
        assert {*said} == {"collect"}
        return
    first, last = said.index("freeze"), said.index("unfreeze")
    assert said[first:last].count("collect") >= 2
    assert [line for line in said if line != "collect"] == ["freeze", "unfreeze"]
    said.clear()
    folder = variant("llama", "headless", lambda tensors: [tensors.pop("lm_head.weight")].clear())
    assert "lm_head" in str(load_error(folder))
    assert [line for line in said if line != "collect"] == ["freeze", "unfreeze"]


def test_a_snapshot_that_does_not_fit_is_not_used(tmp_path, monkeypatch) -> None:
    with engine(checkpoint("llama"), "qtensor") as llm:
        save_snapshot(llm, tmp_path / "s")
        own = root(llm)
    monkeypatch.setenv("QTENSOR_VLLM_SNAPSHOT", str(tmp_path / "s"))
    said: list[str] = []
    monkeypatch.setattr(compat.logger(), "warning", lambda text, *args: said.append(text % args))
    with engine(checkpoint("llama"), "qtensor_fp8_per_tensor") as llm:
        assert root(llm) != own
        assert mapped(llm) == []
    assert any("fp8_per_channel, and here" in line for line in said)
    path = tmp_path / "s" / FILE
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    said.clear()
    with engine(checkpoint("llama"), "qtensor") as llm:
        assert root(llm) == own
        assert mapped(llm) == []
    assert any("is damaged" in line for line in said)
    monkeypatch.setenv("QTENSOR_VLLM_SNAPSHOT", str(tmp_path / "none"))
    said.clear()
    with engine(checkpoint("llama"), "qtensor") as llm:
        assert root(llm) == own
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "ranks-1").write_text("mine")
        with pytest.raises(Exception, match="is a file") as error:
            save_snapshot(llm, tmp_path / "other")
        assert isinstance(error.value, SnapshotError)
    assert any("it is no snapshot" in line for line in said)


def test_a_shard_with_a_flipped_bit_is_refused_before_it_serves(tmp_path, monkeypatch) -> None:
    """The folder is one of the Hub's cache, whose files are called by their checksums."""
    blobs, folder = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    without_weights("llama", folder)
    data = (checkpoint("llama") / "model.safetensors").read_bytes()
    blob = blobs / hashlib.sha256(data).hexdigest()
    (folder / "model.safetensors").symlink_to(blob)
    flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    blob.write_bytes(flipped)
    with engine(folder, "qtensor") as llm:  # Nobody notices,
        wrong = root(llm)
    monkeypatch.setenv("QTENSOR_VLLM_VERIFY", "true")
    assert "its bytes in model.safetensors are not" in str(load_error(folder))  # unless it is asked for.
    assert "there is no checksum" in str(load_error(checkpoint("llama")))
    blob.write_bytes(data)
    with engine(folder, "qtensor") as llm:
        own = root(llm)
        assert own != wrong
        blob.write_bytes(flipped)
        with pytest.raises(Exception, match="are not those that were written"):
            reload(llm, folder)
        assert root(llm) == own
        blob.write_bytes(data)
        reload(llm, folder)
        assert root(llm) == own


def killed(llm: LLM, folder: Path, moment: tuple[object, str], before: bool) -> None:
    """A fork of the engine saves a snapshot, and is killed before, or after, it calls this function."""
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)  # OpenMP's threads are not forked.
            at, name = moment
            real: Callable[..., object] = getattr(at, name)

            def last(*args: object, **kwargs: object) -> None:
                if not before:
                    real(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)

            setattr(at, name, last)
            save_snapshot(llm, folder)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


MOMENTS = [(snapshot_file, "bytes_of"), (snapshots, "write_rank"), (snapshots, "seal_folder"), (Staging, "publish")]


def test_an_engine_that_is_killed_as_it_saves_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    """Half a snapshot is none, the next start loads in the ordinary way, and the next save works."""
    said: list[str] = []
    monkeypatch.setattr(compat.logger(), "warning", lambda text, *args: said.append(text % args))
    with engine(checkpoint("llama"), "qtensor") as llm:
        own = root(llm)
        for n, moment in enumerate(MOMENTS):
            killed(llm, tmp_path / str(n), moment, before=bool(n % 2))
            with pytest.raises(SnapshotError):
                snapshot_roots(tmp_path / str(n) / "ranks-1")
        monkeypatch.setenv("QTENSOR_VLLM_SNAPSHOT", str(tmp_path / "0"))
    with engine(checkpoint("llama"), "qtensor") as llm:
        assert root(llm) == own
        assert mapped(llm) == []
        assert any("the checkpoint is loaded instead" in line for line in said)
        for folder in ("0", "1"):
            assert save_snapshot(llm, tmp_path / folder) == [own]
        reload(llm, other("llama"))
        killed(llm, tmp_path / "0", (snapshots, "seal_folder"), before=True)
    assert snapshot_roots(tmp_path / "0" / "ranks-1") == [own]
    with engine(without_weights("llama", tmp_path / "bare"), "qtensor") as llm:
        assert root(llm) == own
        assert mapped(llm) != []


def test_vllms_weight_cache_refuses_a_layer_of_qtensors_by_name() -> None:
    """Its daemon hands out weights that layers have processed; the plugin's have to see theirs arrive."""
    protocol = pytest.importorskip("vllm.model_executor.model_loader.weight_cache.protocol")

    def ask(model: torch.nn.Module) -> str:
        with pytest.raises(protocol.UnsupportedQuantForIPCError) as refused:
            protocol.check_ipc_quant_support(model)
        return str(refused.value)

    with engine(checkpoint("llama"), "qtensor") as llm:
        said = llm.apply_model(ask)[0]
    assert "qkv_proj: QTensor" in said
    with pytest.raises(protocol.UnsupportedPlatformForIPCError):
        protocol.check_ipc_platform_support()


@pytest.mark.slow
def test_every_rank_has_a_file(tmp_path, monkeypatch) -> None:
    options = {"tensor_parallel_size": 2, "enable_prefix_caching": False}
    with engine(checkpoint("llama"), "qtensor_fp8_per_tensor", **options) as llm:
        roots = save_snapshot(llm, tmp_path / "s")
        whole = root(llm)
        assert snapshot_roots(tmp_path / "s" / "ranks-2") == roots
        assert whole == weight_root({"rank-0": roots[0], "rank-1": roots[1]})
    monkeypatch.setenv("QTENSOR_VLLM_SNAPSHOT", str(tmp_path / "s"))
    with engine(without_weights("llama", tmp_path / "bare"), "qtensor_fp8_per_tensor", **options) as llm:
        assert root(llm) == whole
    # One rank's file is damaged: both load the checkpoint.
    path = tmp_path / "s" / "ranks-2" / "rank-1-of-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with engine(checkpoint("llama"), "qtensor_fp8_per_tensor", **options) as llm:
        assert root(llm) == whole
