"""`qtensor quantize` by many processes and hosts: the folder is that of one process, whoever is lost on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoints import digests
from test_conversion import layers, write

from qtensor import CheckpointError
from qtensor.checkpoint import quantize_checkpoint, quantize_on_ray
from qtensor.convert import launch
from support import many
from support.many import Hosts, Ranks, Torchrun
from support.sources import FORMS

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no distributed package"),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are killed, and hosts made, the way Linux does"),
]
HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed (extra: ray)")
at_length = pytest.mark.skipif(not os.environ.get("QTENSOR_ENDURANCE"), reason="half a minute more: make endurance")
SCHEMES = ("fp8_per_tensor", "fp8_per_channel", "fp8_per_block")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("source") / "model", layers(count=6), files=7)


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory) -> dict[str, str]:
    return by_one_process(source, tmp_path_factory.mktemp("expected") / "fp8")


def by_one_process(source: Path, target: Path, scheme: str = "fp8") -> dict[str, str]:
    quantize_checkpoint(source, target, scheme)
    return digests(target)


def with_a_nan(folder: Path, name: str) -> str:
    """The source, with a NaN in one matrix. Returns the file that has it."""
    tensors = layers(count=6)
    tensors[name][1, 2] = float("nan")
    write(folder, tensors, files=7)
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


@pytest.fixture(scope="module")
def hosts_are_possible() -> None:
    if reason := many.why_no_hosts():
        pytest.skip(reason)


# torchrun -------------------------------------------------------------------------------------------------------------


def test_torchrun_with_three_processes(source, expected, tmp_path):
    command = ["-m", "qtensor", "quantize", source, tmp_path / "fp8", "--json"]
    code, said = Torchrun(["--standalone", "--nproc-per-node", 3, *command], tmp_path / "log").end()
    assert code == 0, said
    assert said.count('"quantized": 24') == 1  # Rank 0 alone reports.
    assert digests(tmp_path / "fp8") == expected


def test_torchrun_with_two_processes_restarts_one_that_was_killed(source, expected, tmp_path):
    command = ["--nproc-per-node", 2, "--max-restarts", 1, many.__file__, source, tmp_path / "fp8", "--json"]
    code, said = Torchrun(["--standalone", *command], tmp_path / "log").end()
    assert code == 0, said
    assert "exitcode: -9" in said
    assert digests(tmp_path / "fp8") == expected


@settings(max_examples=3)
@given(
    seed=st.integers(0, 1000),
    scheme=st.sampled_from(SCHEMES),
    files=st.integers(1, 6),
    world=st.integers(2, 4),
    victim=st.integers(0, 3),
)
def test_ranks_finish_what_a_killed_one_began(tmp_path_factory, seed, scheme, files, world, victim):
    folder = tmp_path_factory.mktemp("ranks")
    source = write(folder / "model", layers(seed, count=2), files=files)
    killed = {victim: partial(many.befall_at_the_end_of_a_shard, many.die)} if 0 < victim < world else {}
    ranks = Ranks(world, [source, folder / "fp8", "--scheme", scheme, "--lost-after", 2], folder, killed)
    codes = ranks.end()
    died = [-9 if i in killed and files > i else 0 for i in range(world)]
    assert codes == died or codes == [0] * world, ranks.said()  # Rarely, the others leave a victim nothing to die of.
    assert digests(folder / "fp8") == by_one_process(source, folder / "again", scheme)
    assert not (folder / "fp8.partial").exists()


@pytest.mark.parametrize("moment", [many.befall_at_the_end_of_a_shard, many.befall_before_the_end])
def test_without_rank_0_the_others_end_and_the_next_run_goes_on(moment, source, expected, tmp_path):
    target = tmp_path / "fp8"
    ranks = Ranks(3, [source, target, "--lost-after", 2], tmp_path / "logs", {0: partial(moment, many.die)})
    started = time.monotonic()
    assert ranks.end() == [-9, 1, 1]
    assert time.monotonic() - started < 30
    assert all("rank 0" in said and "lost" in said for said in ranks.said()[1:])
    assert not target.exists()

    again = Ranks(2, [source, target, "--json"], tmp_path / "logs")
    assert again.end() == [0, 0], again.said()
    report, nothing = again.said()
    assert nothing == ""
    assert json.loads(report)["resumed_files"] == 7 or moment is many.befall_at_the_end_of_a_shard
    assert digests(target) == expected


def test_ranks_share_a_source_that_is_quantized_already(tmp_path):
    """Whose parts lie in several files; one rank is killed."""
    tensors = {"lm_head.weight": torch.randn(32, 64).bfloat16()}
    for i, form in enumerate(("fp8 blocks", "mxfp4", "int4 channel", "nvfp4 of ModelOpt", "GPTQ", "GGUF Q8_0")):
        for part, tensor in FORMS[form].parts(160, 192, i).items():
            tensors[f"model.layers.{i}.mlp.up_proj.{part.replace('*', 'weight')}"] = tensor
    source = write(tmp_path / "model", tensors, files=4)
    killed = {1: partial(many.befall_at_the_end_of_a_shard, many.die)}
    ranks = Ranks(3, [source, tmp_path / "fp8", "--scheme", "mxfp8", "--lost-after", 2], tmp_path / "logs", killed)
    assert ranks.end() in ([0, -9, 0], [0, 0, 0]), ranks.said()
    assert digests(tmp_path / "fp8") == by_one_process(source, tmp_path / "again", "mxfp8")


def test_a_rank_that_fails_ends_all_naming_rank_and_shard(tmp_path):
    name = "model.layers.1.self_attn.v_proj.weight"
    file = with_a_nan(tmp_path / "faulty", name)
    ranks = Ranks(3, [tmp_path / "faulty", tmp_path / "fp8"], tmp_path / "logs")
    started = time.monotonic()
    assert ranks.end() == [1, 1, 1]
    assert time.monotonic() - started < 20
    messages = {said.strip() for said in ranks.said()}
    assert len(messages) == 1, messages
    assert re.search(rf"rank \d, {file}: {re.escape(name)}.* nan at", messages.pop())
    assert not (tmp_path / "fp8").exists()


def test_what_one_rank_refuses_all_report(source, tmp_path):
    """Rank 0 refuses a target that exists; another, a source that is not rank 0's."""
    (tmp_path / "fp8").mkdir()
    (tmp_path / "fp8" / "notes.txt").write_text("mine")
    ranks = Ranks(2, [source, tmp_path / "fp8"], tmp_path / "logs")
    assert ranks.end() == [1, 1]
    assert all("rank 0: " in said and "nothing is overwritten" in said for said in ranks.said())

    other = write(tmp_path / "other", layers(seed=1, count=6), files=7)
    target = tmp_path / "new"
    ranks = Ranks(2, [source, target], tmp_path / "logs", given={1: [other, target]})
    assert ranks.end() == [1, 1]
    assert all("rank 1: has another source" in said for said in ranks.said()), ranks.said()
    assert not target.exists()


# Hosts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hosts_are_possible")
def test_torchrun_on_two_hosts(source, expected, tmp_path):
    with Hosts(2).up() as hosts:
        common = ("--nnodes", 2, "--nproc-per-node", 1, "--master-addr", hosts.addresses[0], "--master-port", 29500)
        command = ("-m", "qtensor", "quantize", source, tmp_path / "fp8")
        launch = [*common, "--node-rank"]
        runs = [Torchrun([*launch, i, *command], tmp_path / f"log{i}", host=name) for i, name in enumerate(hosts.names)]
        ended = [run.end() for run in runs]
    assert [code for code, _ in ended] == [0, 0], ended
    assert digests(tmp_path / "fp8") == expected


@pytest.mark.usefixtures("hosts_are_possible")
def test_three_hosts_of_which_one_is_cut_off(source, expected, tmp_path):
    with Hosts(3).up() as hosts:
        setups: dict[int, Any] = {i: partial(many.enter_and_be_slow, hosts.names[i]) for i in range(2)}
        setups[2] = partial(many.enter_and_be_cut_off, hosts.names[2])
        ranks = Ranks(
            3, [source, tmp_path / "fp8", "--lost-after", 2], tmp_path / "logs", setups, addresses=hosts.addresses
        )
        started = time.monotonic()
        codes = ranks.end(of=2)
        assert time.monotonic() - started < 30
    assert codes == [0, 0, None], ranks.said()
    assert digests(tmp_path / "fp8") == expected


# Ray ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_machine() -> Iterator[None]:
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
@needs_ray
@pytest.mark.usefixtures("one_machine")
def test_ray_gives_the_shard_of_a_killed_worker_to_another(source, expected, tmp_path, monkeypatch):
    killed = tmp_path / "killed"

    def killed_once(task: Any, notes: Path, workers: int) -> str | None:
        from qtensor.convert import converting

        with suppress(FileExistsError):
            killed.touch(exist_ok=False)
            converting.ShardWriter.finish = lambda writer: os.kill(os.getpid(), signal.SIGKILL)
        return launch._attempt_on_ray(task, notes, workers)

    monkeypatch.setattr(launch, "_attempt_on_ray", killed_once)
    heard: list[tuple[int, int]] = []
    report = quantize_on_ray(
        source, tmp_path / "fp8", "fp8", workers=1, on_bytes=lambda done, total: heard.append((done, total))
    )
    assert killed.exists()
    assert report.quantized == 24
    assert {total for _, total in heard} == {report.source_bytes}
    assert sum(done for done, _ in heard) == report.source_bytes
    assert digests(tmp_path / "fp8") == expected


@pytest.mark.slow
@needs_ray
@pytest.mark.usefixtures("one_machine")
def test_ray_failures_name_machine_and_shard(source, tmp_path):
    name = "model.layers.1.self_attn.v_proj.weight"
    file = with_a_nan(tmp_path / "faulty", name)
    with pytest.raises(CheckpointError, match=rf"^[\d.]+, {file}: {re.escape(name)}.* nan at"):
        quantize_on_ray(tmp_path / "faulty", tmp_path / "fp8", "fp8", workers=1)
    with pytest.raises(CheckpointError, match="has 3 CPUs; ask for 2 workers"):
        quantize_on_ray(source, tmp_path / "new", "fp8", workers=3)
    assert not (tmp_path / "fp8").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@needs_ray
@pytest.mark.usefixtures("hosts_are_possible")
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=at_length)])
def test_ray_on_several_hosts(count, source, expected, tmp_path):
    with Hosts(count).up() as hosts, many.ray_cluster(hosts, tmp_path) as address:
        command = ["quantize", source, tmp_path / "fp8", "--ray", address, "--workers", 1, "--json"]
        said = many.inside(hosts.names[0], "-m", "qtensor", *command)
    assert json.loads(said)["quantized"] == 24
    assert digests(tmp_path / "fp8") == expected
