"""Vote: one decision for all ranks of a session, whether it has succeeded everywhere or is given up everywhere.

The ranks speak through the key-value store of torch.distributed, so that nobody waits in a collective for a rank that
is gone. The sessions of a set of ranks are numbered there, in epochs. What decides an epoch is one key that can be set
once: whoever comes first, a rank that failed or one that saw all succeed, decides for all.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch.distributed as dist

from ..errors import QTensorError

_POLL_SECONDS = 0.002
_AGREED = "agreed"
_open: WeakValueDictionary[tuple[str, int], Vote] = WeakValueDictionary()  # this process's, under way
_used: dict[tuple[str, int], list[tuple[int, str]]] = {}  # epochs, and keys that this process set in them


class Vote:
    """What the ranks (of the default group) decide about one session.

    A rank that opens a session joins the epoch that the store names, if that is undecided and it was not in it yet;
    else it moves the epoch on by one, and joins that. So ranks are in step again whatever became of the session before,
    and whoever took part in it. In the store, for a set of ranks:

        epoch              the newest epoch. It is moved on only when it is decided, so all before it are decided.
        <what>/<rank>      the newest epoch in which a rank said so, and its words
        <epoch>/vote       how it ended
        <epoch>/...        what else the session of an epoch has to keep

    - Two ranks move the epoch on at once: `compare_set` lets one of them, and the other joins it.
    - A rank sees an undecided epoch and joins it as another fails it: it finds that out as it waits for the others.
    - A rank leaves an epoch and opens the next while another has not left: the outcome of each epoch has a key of its
      own, which stays until all ranks have agreed in a later one, and so have left.
    - A rank was in an epoch that is undecided, but its session is gone, and could not say so: it fails that epoch when
      it opens the next.

    Nobody goes on before all have joined: a rank cannot fail in the midst of a session that others have yet to open.

    timeout: seconds to wait for other ranks before giving up.
    """

    def __init__(self, ranks: Sequence[int], timeout: float) -> None:
        require_distributed()
        self.ranks, self.timeout = list(ranks), timeout
        self.rank = dist.get_rank()
        self.members = name_of(ranks)
        self._place = (self.members, 0)
        self._epoch = 0
        self._said: str | None = None  # how it ended

    @property
    def leads(self) -> bool:
        return self.rank == self.ranks[0]

    @property
    def store(self) -> Any:
        """Keys of this epoch."""
        return dist.distributed_c10d.PrefixStore(str(self._epoch), self._all_epochs)

    def open(self) -> None:
        """Join an epoch. Returns when all ranks have."""
        if not self._epoch:
            # Sessions of the same ranks that are open at once have epochs of their own.
            self._place = next(p for d in count() if (p := (self.members, d)) not in _open)
            _open[self._place] = self
            self._epoch = self._undecided_epoch()
        self.meet("opened this session")

    def meet(self, what: str, ranks: Sequence[int] | None = None) -> None:
        """Return when all `ranks` have come to the same point. Raises QTensorError naming those that have not."""
        self.say(what, "")
        self._await(what, ranks or self.ranks)

    def deadline(self) -> float:
        return time.monotonic() + self.timeout

    def fail(self, reason: str) -> bool:
        """Give up, for all ranks. False if all have agreed already: then this one has to go through with it."""
        if self._said is None and self._epoch:
            with contextlib.suppress(RuntimeError):  # The store's own process is gone; the others will notice.
                self._said = self.store.compare_set("vote", "", f"rank {self.rank} failed: {reason}").decode()
        self._leave()
        return self._said != _AGREED

    def wait(self, deadline: float, what: Callable[[], str]) -> None:
        """Let a moment pass. Raises QTensorError if a rank has failed, or it is too late, saying what is missing."""
        self.raise_if_failed()
        if time.monotonic() > deadline:
            raise QTensorError(f"the ranks did not agree within {self.timeout:g} s: {what()}")
        time.sleep(_POLL_SECONDS)

    def raise_if_failed(self) -> None:
        """Raises QTensorError if a rank has failed, with what it said."""
        if self.store.check(["vote"]) and (said := self.store.get("vote").decode()) != _AGREED:
            raise QTensorError(said)

    def say(self, key: str, value: str) -> None:
        self._all_epochs.set(f"{key}/{self.rank}", json.dumps([self._epoch, value]))

    def uses(self, key: str) -> None:
        """This epoch has that key, which is of no use when all ranks have left."""
        used = _used.setdefault(self._place, [])
        if used and used[-1][0] > self._epoch:  # torch.distributed was initialised again: its store is another.
            used.clear()
        used.append((self._epoch, key))

    def union(self, key: str, names: Collection[str]) -> set[str]:
        """The names that any rank gives. Waits for all."""
        self.say(key, json.dumps(sorted(names)))
        self._await(key, self.ranks)
        return {name for rank in self.ranks for name in json.loads(self._heard(key, rank)[1])}

    def settle(self) -> None:
        """This rank has succeeded: return when all have. Raises QTensorError naming the rank that did not."""
        self.meet("finished")
        self._said = self.store.compare_set("vote", "", _AGREED).decode()
        if self._said != _AGREED:
            raise QTensorError(self._said)
        self._leave()
        self._forget_what_was_used()
        if self.leads:
            self._forget_older_epochs()

    @property
    def _all_epochs(self) -> Any:
        members, depth = self._place
        default: Any = dist.distributed_c10d._get_default_store()
        return dist.distributed_c10d.PrefixStore(f"qtensor/{members}/{depth}", default)

    def _undecided_epoch(self) -> int:
        store, (was_in, _) = self._all_epochs, self._heard("opened this session", self.rank)
        epoch = int(store.compare_set("epoch", "", "1"))
        while True:
            if epoch == was_in:
                store.compare_set(f"{epoch}/vote", "", f"rank {self.rank} failed: its session was dropped")
            elif not store.check([f"{epoch}/vote"]):
                return epoch
            epoch = int(store.compare_set("epoch", str(epoch), str(epoch + 1)))

    def _await(self, key: str, ranks: Sequence[int]) -> None:
        deadline = self.deadline()
        while missing := [r for r in ranks if self._heard(key, r)[0] < self._epoch]:
            late = ", ".join(map(str, missing))
            self.wait(deadline, lambda late=late: f"rank {late} has not {key}")  # type: ignore[misc]

    def _heard(self, key: str, rank: int) -> tuple[int, str]:
        """The newest epoch in which a rank said something, and what; 0 before that."""
        store, key = self._all_epochs, f"{key}/{rank}"
        epoch, value = json.loads(store.get(key)) if store.check([key]) else (0, "")
        return epoch, value

    def _leave(self) -> None:
        if _open.get(self._place) is self:
            del _open[self._place]

    def _forget_what_was_used(self) -> None:
        """All ranks are in this epoch, and need it still."""
        used = _used.get(self._place, [])
        while used and used[0][0] < self._epoch:
            epoch, key = used[0]
            self._all_epochs.delete_key(f"{epoch}/{key}")
            used.pop(0)

    def _forget_older_epochs(self) -> None:
        """All ranks are in this epoch: how those before it ended is of no use."""
        epoch = self._epoch - 1
        while epoch and self._all_epochs.delete_key(f"{epoch}/vote"):
            epoch -= 1


def name_of(ranks: Sequence[int]) -> str:
    return "-".join(map(str, ranks))


def require_distributed() -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise QTensorError("process_group: torch.distributed is not initialised; call init_process_group first")


def describe(error: BaseException) -> str:
    """For the other ranks: an interrupt has no words of its own."""
    return str(error) or type(error).__name__
