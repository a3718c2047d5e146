"""Vote: one decision for all ranks of a session, whether it has succeeded everywhere or is given up everywhere.

The ranks speak through the key-value store of torch.distributed, so that nobody waits in a collective for a rank that
is gone. The vote itself is one key that can be set once: whoever comes first, a rank that failed or one that saw all
succeed, decides for all.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch.distributed as dist

from ..errors import QTensorError

_POLL_SECONDS = 0.002
_AGREED = "agreed"
_opened: Counter[str] = Counter()  # votes of each set of ranks, in the order that all of them open them
_settled: dict[str, Any] = {}  # the store in which the last vote of a set of ranks still stands


class Vote:
    """What the ranks (of the default group) decide about one session.

    timeout: seconds to wait for other ranks before giving up.
    """

    def __init__(self, ranks: Sequence[int], timeout: float) -> None:
        require_distributed()
        self.ranks, self.timeout = list(ranks), timeout
        self.rank = dist.get_rank()
        members = "-".join(map(str, self.ranks))
        _opened[members] += 1
        self._members = members
        default: Any = dist.distributed_c10d._get_default_store()
        self.store = dist.distributed_c10d.PrefixStore(f"qtensor/{members}/{_opened[members]}", default)
        self._own: list[str] = []  # keys of this rank that nobody reads once all have agreed

    @property
    def leads(self) -> bool:
        return self.rank == self.ranks[0]

    def deadline(self) -> float:
        return time.monotonic() + self.timeout

    def fail(self, reason: str) -> bool:
        """Give up, for all ranks. False if all have agreed already: then this one has to go through with it."""
        try:
            return self.store.compare_set("vote", "", f"rank {self.rank} failed: {reason}") != _AGREED.encode()
        except RuntimeError:
            return True  # the store's own process is gone; the others will notice

    def wait(self, deadline: float, what: Callable[[], str]) -> None:
        """Let a moment pass. Raises QTensorError if a rank has failed, or it is too late, saying what is missing."""
        if self.store.check(["vote"]) and (said := self.store.get("vote").decode()) != _AGREED:
            raise QTensorError(said)
        if time.monotonic() > deadline:
            raise QTensorError(f"the ranks did not agree within {self.timeout:g} s: {what()}")
        time.sleep(_POLL_SECONDS)

    def say(self, key: str, value: str) -> None:
        self._own.append(f"{key}/{self.rank}")
        self.store.set(f"{key}/{self.rank}", value)

    def union(self, key: str, names: Collection[str]) -> set[str]:
        """The names that any rank gives. Waits for all."""
        self.say(key, json.dumps(sorted(names)))
        self._await(key)
        return {name for rank in self.ranks for name in json.loads(self.store.get(f"{key}/{rank}"))}

    def settle(self) -> None:
        """This rank has succeeded: return when all have. Raises QTensorError naming the rank that did not."""
        self.say("done", "yes")
        self._await("done")
        said = self.store.compare_set("vote", "", _AGREED).decode()
        if said != _AGREED:
            raise QTensorError(said)
        for key in self._own:
            self.store.delete_key(key)
        before, _settled[self._members] = _settled.get(self._members), self.store
        if before is not None and self.leads:  # All have left the session before this one.
            before.delete_key("vote")

    def _await(self, key: str) -> None:
        deadline = self.deadline()
        while missing := [r for r in self.ranks if not self.store.check([f"{key}/{r}"])]:
            if self.store.check(["vote"]) and self.store.get("vote").decode() == _AGREED:
                return
            self.wait(deadline, lambda missing=missing: f"no word of rank {', '.join(map(str, missing))}")  # type: ignore[misc]


def require_distributed() -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise QTensorError("process_group: torch.distributed is not initialised; call init_process_group first")


def describe(error: BaseException) -> str:
    """For the other ranks: an interrupt has no words of its own."""
    return str(error) or type(error).__name__
