"""Many processes that make one checkpoint: ranks, what befalls them, and hosts that are network namespaces.

Ranks are forks (support/processes.py) and run the command itself. Under torchrun this file is
the program: a rank 1 that is killed once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtensor.cli.main import main
from qtensor.convert import cluster, converting
from support.helpers import free_port
from support.processes import elsewhere

CLONE_NEWNET = 0x40000000


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def befall_at_the_end_of_a_shard(fate: Callable[[], None]) -> None:
    """All of the first shard is written, and it is not in its place yet."""
    whole = converting.ShardWriter.finish

    def finish(writer: Any) -> Any:
        fate()
        return whole(writer)

    converting.ShardWriter.finish = finish  # type: ignore[method-assign]


def befall_before_the_end(fate: Callable[[], None]) -> None:
    """All shards are in their places, and the index is not written."""
    cluster.Ranks._await_unless_failed = lambda *_: fate()  # type: ignore[method-assign]


def _rank(number: int, variables: dict[str, str], arguments: list[str], log: Path, setup: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    os.environ |= variables | {"RANK": str(number), "QTENSOR_KERNELS": "torch"}
    with log.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        setup()
        code = main(["quantize", *arguments])
    sys.exit(code)


def be_slow() -> None:
    """What befalls most ranks: the others find something left to do."""
    befall_at_the_end_of_a_shard(partial(time.sleep, 0.05))


class Ranks:
    """A launch of ranks without an agent that would end the others when one dies."""

    def __init__(
        self,
        world: int,
        arguments: list[Any],
        logs: Path,
        setups: dict[int, Callable[[], None]] | None = None,
        addresses: list[str] | None = None,
        given: dict[int, list[Any]] | None = None,
    ) -> None:
        logs.mkdir(exist_ok=True)
        self.logs = [logs / f"rank{i}" for i in range(world)]
        master = addresses[0] if addresses else "127.0.0.1"
        variables = {"WORLD_SIZE": str(world), "MASTER_ADDR": master, "MASTER_PORT": str(free_port())}
        self.processes = []
        for i in range(world):
            own = [str(a) for a in (given or {}).get(i, arguments)]
            task = (i, variables, own, self.logs[i], (setups or {}).get(i, be_slow))
            self.processes.append(elsewhere.Process(target=_rank, args=task))
        for process in self.processes:
            process.start()

    def end(self, seconds: float = 60, of: int | None = None) -> list[int | None]:
        """Exit codes, when all have ended, or the first so many; None of a rank that was still alive, and is killed."""
        until = time.monotonic() + seconds
        for process in self.processes[:of]:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]


class Torchrun:
    """The torchrun command, without the seconds that importing torch for it would take; its ranks are new programs."""

    def __init__(self, arguments: list[Any], log: Path, host: str = "") -> None:
        self.log = log
        self.process = elsewhere.Process(target=_torchrun, args=([str(a) for a in arguments], log, host))
        self.process.start()

    def end(self, seconds: float = 120) -> tuple[int | None, str]:
        """Exit code and all that was said."""
        self.process.join(seconds)
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        return code, self.log.read_text()


def _torchrun(arguments: list[str], log: Path, host: str) -> None:
    from torch.distributed.run import main

    if host:
        enter(host)
    os.environ |= {"OMP_NUM_THREADS": "1", "QTENSOR_KERNELS": "torch", "PYTHONPATH": os.pathsep.join(sys.path)}
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    main(arguments)


# Hosts ----------------------------------------------------------------------------------------------------------------


class Hosts:
    """Network namespaces on one bridge; their processes share nothing but files."""

    def __init__(self, count: int) -> None:
        # Names of interfaces have 15 characters at most.
        self._tag, subnet = f"qt{os.getpid() % 100_000}", f"10.{200 + count}.{os.getpid() % 250}"
        self.names = [f"{self._tag}-{i}" for i in range(count)]
        self.addresses = [f"{subnet}.{i + 1}" for i in range(count)]

    @contextlib.contextmanager
    def up(self) -> Iterator[Hosts]:
        try:
            _ip(f"link add {self._tag} type bridge")
            _ip(f"link set {self._tag} up")
            for name, address in zip(self.names, self.addresses, strict=True):
                _ip(f"netns add {name}")
                _ip(f"link add {name} type veth peer name eth0 netns {name}")
                _ip(f"link set {name} master {self._tag} up")
                _ip(f"-n {name} link set lo up")
                _ip(f"-n {name} address add {address}/24 dev eth0")
                _ip(f"-n {name} link set eth0 up")
            yield self
        finally:
            for name in self.names:
                subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", self._tag], capture_output=True, check=False)


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True, timeout=10)


def why_no_hosts() -> str:
    """Why network namespaces cannot be made here, or nothing."""
    try:
        with Hosts(1).up():
            return ""
    except FileNotFoundError:
        return "there is no ip command here (iproute2)"
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"


def enter(name: str) -> None:
    """Move this process to a host."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{name}") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")


def enter_and_be_cut_off(name: str) -> None:
    """The host's cable is pulled in the middle of its first shard, which takes a while."""
    enter(name)

    def cut() -> None:
        _ip("link set eth0 down")
        time.sleep(60)

    befall_at_the_end_of_a_shard(cut)


def enter_and_be_slow(name: str) -> None:
    enter(name)
    be_slow()


def inside(name: str, *arguments: Any) -> str:
    """Run Python on a host; what it prints."""
    command = ["ip", "netns", "exec", name, sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def ray_cluster(hosts: Hosts, logs: Path) -> Iterator[str]:
    """A Ray node of one CPU on each host."""
    # Ray remembers the last cluster in its folder; paths of sockets are short.
    folder = tempfile.mkdtemp(prefix="qt")
    address, nodes = f"{hosts.addresses[0]}:6379", []
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    try:
        for i, (name, own) in enumerate(zip(hosts.names, hosts.addresses, strict=True)):
            role = (
                ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}"]
                if i == 0
                else [f"--address={address}"]
            )
            with (logs / f"ray{i}").open("w") as log:
                start = ["ip", "netns", "exec", name, *command, *role, f"--node-ip-address={own}"]
                nodes.append(subprocess.Popen(start, stdout=log, stderr=log, start_new_session=True))
            until = time.monotonic() + 60
            while "runtime started" not in (logs / f"ray{i}").read_text():
                assert time.monotonic() < until, (logs / f"ray{i}").read_text()
                assert nodes[i].poll() is None, (logs / f"ray{i}").read_text()
                time.sleep(0.2)
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(20)
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        befall_at_the_end_of_a_shard(die)
    else:
        be_slow()
    sys.exit(main(["quantize", *sys.argv[1:]]))
