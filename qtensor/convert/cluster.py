"""The ranks of one launch that make a checkpoint together: who does which shard, who is lost, and what went wrong.

They talk through the key-value store of their launcher and never wait for each other in a collective, so that no rank
hangs because another died.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch.distributed

from ..checkpoint.writing import MARK, partial_folder
from ..errors import CheckpointError, QTensorError
from ..version import __version__
from .converting import Conversion, ShardTask, attempt, finished
from .streaming import OnBytes

LOST_AFTER = 60.0
_JOIN_SECONDS = 300.0  # A cold import of torch from a network drive takes minutes.
_FAREWELL_SECONDS = 10.0
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_dist: Any = torch.distributed  # It does not tell type checkers all that it exports.
T = TypeVar("T")


def launched() -> bool:
    """Is this process one of several that torchrun, or a launcher that sets the same variables, started?"""
    several = os.environ.get("WORLD_SIZE", "1") != "1" and all(name in os.environ for name in _LAUNCHED)
    return several and torch.distributed.is_available()


def await_visible(task: ShardTask, notes: Path, seconds: float) -> None:
    """Network drives let a machine see another's new file only after a while."""
    until = time.monotonic() + seconds
    while finished(task, notes) is None:
        if time.monotonic() > until:
            raise CheckpointError(
                f"{task.target} was written by another machine and is not seen here; "
                f"do all machines see one {task.target.parent}?"
            )
        time.sleep(0.1)


class Ranks:
    """The ranks of one launch, and what they tell each other through the launcher's store.

    | key | value |
    | --- | --- |
    | plan | rank 0's digest of the work, and the files to do |
    | agreed/RANK, start | the rank has found the same plan; all have, or are lost |
    | claim/FILE | the rank that has it, or "done" |
    | beat/RANK | a count that grows while the rank lives: clocks are never compared |
    | bytes | of the source, done by all |
    | failure | the first one, in words |
    | finished, left/RANK | the result is in its place; the rank has nothing more to ask |
    """

    def __init__(self, lost_after: float) -> None:
        self.lost_after = lost_after
        try:
            joined = _dist.rendezvous("env://", timeout=timedelta(seconds=_JOIN_SECONDS))
            self._hall, self.rank, self.world = next(joined)
            self._store = self._enter()
        except (ValueError, RuntimeError) as error:
            where = ", ".join(f"{name}={os.environ.get(name)}" for name in _LAUNCHED)
            raise CheckpointError(f"the ranks did not find each other ({where}): {error}") from None
        self._lock, self._over, self._started = threading.Lock(), threading.Event(), False
        self._at, self._unsent, self._failure = "", 0, ""
        self._beats: dict[int, tuple[int, float]] = {}
        self._greeted: dict[int, str] = {}
        self._on_total: OnBytes = lambda total: None
        self._pulse = threading.Thread(target=self._live, daemon=True)
        self._pulse.start()

    def _enter(self) -> Any:
        """A part of the launcher's store for this launch alone: torchrun's holds what ranks said before a restart.

        A rank says hello with a fresh number, and rank 0 answers with that number, and the name of the part.
        """
        fresh = uuid4().hex
        if self.rank == 0:
            self._launch = fresh
            return _dist.PrefixStore(fresh, self._hall)
        self._hall.set(f"hello/{self.rank}", fresh)
        until, answer = time.monotonic() + _JOIN_SECONDS, [""]
        while answer[0] != fresh:
            if time.monotonic() > until:
                raise CheckpointError("rank 0 does not answer")
            time.sleep(0.05)
            if self._hall.check([f"welcome/{self.rank}"]):
                answer = self._hall.get(f"welcome/{self.rank}").decode().split()
        return _dist.PrefixStore(answer[1], self._hall)

    def _greet(self) -> None:
        for rank in range(1, self.world):
            if self._hall.check([f"hello/{rank}"]):
                name = self._hall.get(f"hello/{rank}").decode()
                if self._greeted.get(rank) != name:
                    self._greeted[rank] = name
                    self._hall.set(f"welcome/{rank}", f"{name} {self._launch}")

    def run(self, work: Callable[[], T]) -> T:
        """Do this rank's part. All ranks return, or all that live raise CheckpointError with the first failure."""
        try:
            result = work()
            if self.rank == 0:
                self._store.set("finished", "1")
            self._await("finished")
        except _dist.DistError as error:
            self._failure = self._failure or _gone(error)
            raise CheckpointError(self._failure) from None
        except (QTensorError, OSError) as error:
            raise CheckpointError(self._fail(str(error))) from error
        except BaseException as error:
            self._fail(repr(error))
            raise
        finally:
            self._leave()
        return result

    def lead(
        self, conversion: Conversion, todo: list[ShardTask], notes: Path, on_bytes: OnBytes, *, workers: int
    ) -> None:
        """Rank 0: say what there is to do, do a part of it, and wait for all of it."""
        most, told = sum(task.nbytes for task in todo), 0

        def on_total(total: int) -> None:  # Shards done twice count once.
            nonlocal told
            fresh, told = min(total, most) - told, min(total, most)
            if fresh > 0:
                on_bytes(fresh)

        self._on_total = on_total
        files = [task.target.name for task in todo]
        self._store.set("plan", json.dumps([self._identity(conversion), files]))
        self._await_all("agreed", self._require_no_failure)
        self._store.set("start", "1")
        self._started = True
        self._work(todo, notes, workers)
        for task in todo:
            self._await_unless_failed(task, notes)
        self._send()

    def follow(self, prepared: Callable[[], Conversion], target: str | Path, workers: int) -> None:
        """Any other rank: find the same work to be done, and do a part of it."""
        identity, files = json.loads(self._await("plan"))
        conversion = prepared()
        if self._identity(conversion) != identity:
            raise CheckpointError(
                "has another source, other settings or another version of qtensor than rank 0 "
                f"({conversion.checkpoint.folder}, qtensor {__version__})"
            )
        self._store.set(f"agreed/{self.rank}", "1")
        self._await("start")
        todo = [task for task in conversion.tasks if task.target.name in set(files)]
        self._work(todo, partial_folder(target) / MARK, workers)

    def _identity(self, conversion: Conversion) -> list[str]:
        return [__version__, conversion.digest()]

    def _work(self, todo: list[ShardTask], notes: Path, workers: int) -> None:
        """Take shards until all are done. Each rank looks from another place on, so that most first tries succeed."""
        start = self.rank * len(todo) // self.world
        open_tasks = todo[start:] + todo[:start]
        with ThreadPoolExecutor(workers) as pool:
            while open_tasks:
                left = []
                for task in open_tasks:
                    self._require_no_failure()
                    holder = self._claim(task)
                    if holder == str(self.rank):
                        self._do(task, notes, pool)
                    elif holder != "done":
                        left.append(task)
                open_tasks = left
                if open_tasks:
                    time.sleep(self._pause)

    def _do(self, task: ShardTask, notes: Path, pool: ThreadPoolExecutor) -> None:
        key, me, self._at = f"claim/{task.target.name}", str(self.rank), task.target.name
        try:
            if not notes.is_dir():
                raise CheckpointError(f"{notes} is not seen here; do all machines see one {task.target.parent}?")
            attempt(task, notes, pool, self._done)
        except (CheckpointError, OSError):
            if self._store.compare_set(key, me, me).decode() == me:
                raise
            # This rank stood still for so long that another has taken the shard, and maybe all has been finished.
        self._store.compare_set(key, me, "done")
        self._at = ""

    def _claim(self, task: ShardTask) -> str:
        """Who has it now: this rank, if nobody had, or who had it is lost."""
        key, me = f"claim/{task.target.name}", str(self.rank)
        holder = self._store.compare_set(key, "", me).decode()
        if holder not in (me, "done") and self._lost(int(holder)):
            holder = self._store.compare_set(key, holder, me).decode()
        return holder

    @property
    def _pause(self) -> float:
        """Seconds between two questions of a rank that waits; a thousand ranks must not wear out one store."""
        return max(0.1, 0.02 * self.world)

    # Life, loss and failure

    def _live(self) -> None:
        every = min(1.0, self.lost_after / 5)
        try:
            while not self._over.wait(every if self._started or self.rank else 0.05):
                if self.rank == 0 and not self._started:
                    self._greet()
                self._store.add(f"beat/{self.rank}", 1)
                self._send()
                if self._store.check(["failure"]):
                    self._failure = self._store.get("failure").decode()
        except _dist.DistError as error:
            self._failure = self._failure or _gone(error)

    def _done(self, nbytes: int) -> None:
        self._require_no_failure()
        with self._lock:
            self._unsent += nbytes

    def _send(self) -> None:
        with self._lock:
            fresh, self._unsent = self._unsent, 0
            self._on_total(self._store.add("bytes", fresh))

    def _lost(self, rank: int) -> bool:
        count, now = self._store.add(f"beat/{rank}", 0), time.monotonic()
        seen = self._beats.setdefault(rank, (count, now))
        if seen[0] != count:
            seen = self._beats[rank] = (count, now)
        return now - seen[1] > self.lost_after

    def _require_no_failure(self) -> None:
        if self._failure:
            raise CheckpointError(self._failure)

    def _await(self, key: str) -> str:
        """The value that rank 0 gives a key."""
        while not self._store.check([key]):
            self._require_no_failure()
            if self._lost(0):
                raise CheckpointError("rank 0 was lost; run it again: finished shards are kept")
            time.sleep(self._pause)
        return self._store.get(key).decode()

    def _await_unless_failed(self, task: ShardTask, notes: Path) -> None:
        self._require_no_failure()
        await_visible(task, notes, max(self.lost_after, LOST_AFTER))

    def _await_all(self, key: str, meanwhile: Callable[[], None]) -> None:
        """Every other rank has set its key, or is lost."""
        for rank in range(1, self.world):
            while not self._store.check([f"{key}/{rank}"]) and not self._lost(rank):
                meanwhile()
                time.sleep(self._pause)

    def _fail(self, error: str) -> str:
        """Tell all ranks, unless they know of another failure. Returns the first, naming rank and shard."""
        if self._failure:
            return self._failure
        text = f"rank {self.rank}{', ' + self._at if self._at else ''}: {error}"
        try:
            return self._store.compare_set("failure", "", text).decode()
        except _dist.DistError:
            self._failure = text
            return text

    def _leave(self) -> None:
        """The store may live in rank 0, which therefore leaves last, a little later at most."""
        until = time.monotonic() + _FAREWELL_SECONDS

        def not_for_long() -> None:
            if time.monotonic() > until:
                raise TimeoutError

        with suppress(_dist.DistError, TimeoutError):  # The store is gone already, or a rank is late.
            if self.rank == 0:
                self._await_all("left", not_for_long)
            else:
                self._store.set(f"left/{self.rank}", "1")
        self._over.set()
        self._pulse.join()


def _gone(error: Exception) -> str:
    reason = str(error).partition("\n")[0]
    return f"rank 0, or the launcher, was lost ({reason}); run it again: finished shards are kept"
