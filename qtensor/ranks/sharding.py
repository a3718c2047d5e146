"""Sharded weights: scales that several ranks agree on, so that the shards hold the bytes of the unsharded weight.

A unit that is split across ranks (a whole per-tensor weight, the rows of a per-channel weight whose columns are split)
has one scale, from the largest magnitude on any rank. Each rank stages such a weight until all of its shard is there.
The first rank of the group collects finished weights into buckets and publishes, through the group's key-value store,
which weights make the next one; every rank joins one all-reduce (MAX) per bucket, in that order, while it goes on
loading. The same store carries bad news: a rank that fails says so there, and all others raise what it said.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import nn

from ..errors import QTensorError
from ..interrupts import unless_taken
from ..kernels import WeightFormat
from ..kernels.formats import ceil_div
from ..lazy.quant_store import QuantStore
from ..lazy.weight import ArmedWeight
from ..modules import Owner, Split, full_name, is_dtensor, parameters, splits
from ..schemes.selection import matches
from . import connections
from .vote import Vote, name_of, require_distributed

BUCKET_BYTES = 64 << 20


@dataclass(frozen=True)
class Sharding:
    """How a model's weights are split over the ranks of a process group.

    Attributes:
        group: The ranks; None is all of them. Every rank opens its sessions in the same order, and waits there for the
            others.
        dims: Pattern → the dimension that is split: 0 for rows (or experts, of a stack `[E, N, K]`), the last one for
            columns. Patterns as for `ignore`. A Parameter that says so itself (`partition_dim`, as Megatron's do) needs
            none, nor does a 2-d per-tensor weight, which has one scale however it is split.
        timeout: Seconds to wait for other ranks before giving up.
    """

    group: dist.ProcessGroup | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    timeout: float = 300.0

    def splits(self, owners: Sequence[Owner], param: torch.Tensor, fmt: WeightFormat) -> list[Split]:
        """How a weight `[N, K]` or `[E, N, K]` is split. Raises QTensorError if that has to be known and is not."""
        group = cast(dist.ProcessGroup, self.group or dist.group.WORLD)
        for owner in owners:
            for pattern, dim in self.dims.items():
                if matches(pattern, owner[0], full_name(owner)):
                    return [(dim % param.dim(), group)]
        said = getattr(param, "partition_dim", None)
        if isinstance(said, int) and said >= 0:
            return [(said, group)]
        if fmt.granularity == "tensor" and param.dim() == 2:
            return [(0, group)]
        name = full_name(owners[0])
        raise QTensorError(
            f"{name}: process_group is given, but not how this weight is split over it. Pass "
            f'process_group=Sharding(group, dims={{"{name}": 0}}) with 0 for rows, 1 for columns.'
        )


def sharing_group(
    name: str, splits: Sequence[Split], shape: Sequence[int], fmt: WeightFormat, whole: Sequence[int] | None = None
) -> dist.ProcessGroup | None:
    """The ranks that have to agree on the scales of a weight whose part on this rank has `shape`; None if no scale is
    split. Raises QTensorError where a scale's elements are split in a way that no rank can hold: on every rank, if the
    shape of the `whole` weight is known, and it is split evenly."""
    found: list[dist.ProcessGroup] = []
    part = list(whole or shape)
    for dim, group in splits:
        axis, ranks = dim - (len(shape) - 2), dist.get_world_size(group)  # 0 rows, 1 columns, -1 experts
        part[dim] = ceil_div(part[dim], ranks) if whole else part[dim]
        if axis < 0 or ranks == 1:
            continue
        block = fmt.block[axis]
        goes_on = part[dim] < whole[dim] if whole else dist.get_rank(group) < ranks - 1
        if block > 1 and part[dim] % block and goes_on:
            refuse_split_group(name, "a rank's" if whole else "this rank's", part[dim], dim, block, fmt)
        if fmt.needs_whole_matrix or (fmt.granularity == "channel" and axis == 1):
            if fmt.search is not None and fmt.granularity == "channel":
                refuse_split_search(name, fmt)
            found.append(group)
    if len(found) > 1:
        raise QTensorError(
            f"{name}: its {fmt.name} scales are split over {len(found)} dimensions of the device mesh; split them over "
            "one, or choose a scheme with a scale per row or block"
        )
    return found[0] if found else None


def refuse_split_group(name: str, whose: str, size: int, dim: int, block: int, fmt: WeightFormat) -> NoReturn:
    """Raise QTensorError: a part of a weight has `size` rows or columns, and so a scale's elements are on two ranks."""
    raise QTensorError(
        f"{name}: {whose} {size} of dimension {dim} end inside a group of {block} with one {fmt.name} scale. Split at "
        f"multiples of {block}, or choose another scheme for this weight."
    )


def refuse_split_search(name: str, fmt: WeightFormat) -> NoReturn:
    """Raise QTensorError: a scale is to be searched, and its elements are on several ranks."""
    raise QTensorError(
        f"{name}: a searched {fmt.name} scale is chosen by the error of all elements that share it, and they are split "
        f"over ranks. Split the weight by rows, or use {fmt.name} without the search for it."
    )


class Agreement:
    """The scales that the ranks of one group agree on in one session."""

    def __init__(self, group: dist.ProcessGroup | None, timeout: float, vote: Vote | None = None) -> None:
        """vote: of the session, where more than these ranks decide whether it has succeeded."""
        require_distributed()
        self._group, self._timeout = group, timeout
        self._ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self._own = Vote(self._ranks, timeout) if vote is None else None
        self.vote = vote or cast(Vote, self._own)
        self._rank, self._leads = self.vote.rank, self.vote.rank == self._ranks[0]
        self._keys: Any = None
        self._gloo: Any = None
        self._lock = threading.RLock()
        self._complete: dict[str, ArmedWeight] = {}
        self._waiting: list[str] = []  # the leader's next bucket
        self._waiting_bytes = 0
        self._buckets = 0  # published (leader) or joined (others)
        self._flying: list[tuple[Any, torch.Tensor, list[ArmedWeight]]] = []
        self._reducing = False
        self.collectives = self.bytes = 0

    def open(self) -> None:
        """Connect to the other ranks. Returns when all are there."""
        if self._gloo is not None:
            return
        connections.close_those_left()
        if self._own is not None:
            self._own.open()
        else:
            self.vote.meet(f"come to the weights of ranks {name_of(self._ranks)}", self._ranks)
        self._keys = dist.distributed_c10d.PrefixStore(name_of(self._ranks), self.vote.store)
        # Connections of its own, on the CPU: the values are few, and nobody else's collectives can come in between.
        # Not by `new_group`, which keeps a group for the life of the process and knows it by the number of groups.
        try:
            position, wait = dist.get_rank(self._group), timedelta(seconds=self._timeout)
            self._gloo = dist.ProcessGroupGloo(self._keys, position, len(self._ranks), wait)
        except RuntimeError as error:
            raise QTensorError(
                f"rank {self._rank}: no connections to ranks {name_of(self._ranks)} within {self._timeout:g} s: {error}"
            ) from error
        connections.keep(self._gloo)
        if self._leads:
            for i in range(len(self._ranks)):  # where gloo says how a rank is reached
                self._uses(f"0/{i}")

    def submit(self, name: str, weight: ArmedWeight) -> None:
        """All of this rank's shard of a weight, known by one name on all ranks, is there. Called under the weight's
        lock, so nothing is waited for here."""
        with self._lock:
            if name in self._complete:
                return
            self._complete[name] = weight
            self._waiting.append(name)
            self._waiting_bytes += weight.coverage.numel * weight.dtype.itemsize

    def advance(self) -> None:
        """Do what can be done without waiting: publish or join buckets, quantize what has been agreed on."""
        if self._waiting or self._flying:
            unless_taken(self._lock, self._advance)

    def _advance(self) -> None:
        if self._leads:
            if self._waiting_bytes >= BUCKET_BYTES:
                self._publish()
        else:
            self._join()
        self._land()

    def finish(self) -> None:
        """Agree on all scales. Raises QTensorError naming the rank that did not."""
        deadline = self.vote.deadline()
        with self._lock:
            if self._leads:
                self._publish()
                self._say("end")
            while not self._joined_all() or self._flying:
                self._land()
                self.vote.wait(deadline, lambda: f"rank {self._rank} waits for {self._pending()}")
            for weight in self._complete.values():
                weight.verify()
                if weight.shared is not None:
                    raise weight.error or QTensorError(
                        f"{weight.name}: an interrupt kept its scales from being agreed on; load it in a new session"
                    )

    def settle(self) -> None:
        """Agree on having succeeded, unless that is the session's to say. Raises QTensorError naming the rank that has
        not."""
        if self._own is not None:
            self._own.settle()

    def close(self) -> None:
        """All ranks have agreed: connections end."""
        connections.close(self._gloo)
        self._gloo = None

    def fail(self, reason: str) -> bool:
        """Tell the other ranks that this one has given up. False if all have agreed already."""
        return self.vote.fail(reason)

    def leave(self) -> None:
        """The session has failed, and the other ranks know. May be repeated."""
        connections.leave(self._gloo, None if self._reducing else [work for work, _, _ in self._flying])
        self._gloo = None

    def _publish(self) -> None:
        names, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if names:
            self._say(json.dumps(names))
            self._reduce([self._complete[name] for name in names])

    def _say(self, bucket: str) -> None:
        """Which weights make the next one."""
        self._uses(f"bucket/{self._buckets}")
        self._keys.set(f"bucket/{self._buckets}", bucket)

    def _uses(self, key: str) -> None:
        self.vote.uses(f"{name_of(self._ranks)}/{key}")

    def _join(self) -> bool:
        """Join published buckets as far as this rank's weights are there. True if there will be no more."""
        while self._keys.check([f"bucket/{self._buckets}"]):
            text = self._keys.get(f"bucket/{self._buckets}").decode()
            if text == "end":
                return True
            names = json.loads(text)
            if not all(name in self._complete for name in names):
                return False
            self._waiting = [name for name in self._waiting if name not in names]
            self._reduce([self._complete[name] for name in names])
        return False

    def _joined_all(self) -> bool:
        if self._leads:
            return True
        if not self._join():
            return False
        if self._waiting:
            raise QTensorError(
                f"rank {self._rank} quantizes weights that rank 0 does not: {', '.join(self._waiting[:5])}. Open the "
                "session on the same model, with the same scheme, on every rank."
            )
        return True

    def _reduce(self, weights: list[ArmedWeight]) -> None:
        if (gloo := self._gloo) is None:
            raise QTensorError(f"rank {self._rank}: this session has been given up")
        amax = torch.cat([weight.close_for_agreement() for weight in weights])
        self._reducing = True  # and stays so if an interrupt comes before it is known what is waited for
        work = gloo.allreduce([amax], dist.ReduceOp.MAX)
        self._flying.append((work, amax, weights))
        self._reducing = False
        self._buckets += 1
        self.collectives, self.bytes = self.collectives + 1, self.bytes + amax.nbytes

    def _land(self) -> None:
        while self._flying and self._flying[0][0].is_completed():
            work, amax, weights = self._flying[0]
            try:
                work.wait()
            except RuntimeError as error:
                self.vote.raise_if_failed()
                raise QTensorError(f"another rank was lost while {weights[0].name} was agreed on: {error}") from error
            at = 0
            for weight in weights:
                assert isinstance(weight.store, QuantStore)
                size = weight.store.shared_units
                weight.agree(amax[at : at + size])
                at += size
            self._flying.pop(0)  # after all, which may be repeated

    def _pending(self) -> str:
        names = [weights[0].name for _, _, weights in self._flying] or ["the next bucket of rank 0"]
        return ", ".join(names[:5])


class Agreements:
    """The weights of one session whose scales are split, and the groups of ranks that agree on them.

    process_group: as the session was given it; parameters that are DTensors say themselves how they are split.
    vote: of the session, where one decides for all groups together.
    """

    def __init__(self, process_group: dist.ProcessGroup | Sharding | None = None, vote: Vote | None = None) -> None:
        sharding = process_group if isinstance(process_group, Sharding | None) else Sharding(process_group)
        self._sharding, self._vote = sharding, vote
        self._by_ranks: dict[tuple[int, ...], Agreement] = {}
        self._lock = threading.RLock()
        self.weights: dict[ArmedWeight, Agreement] = {}

    def open(self) -> None:
        """Wait for the other ranks of the process group, unless the session's vote has."""
        if self._sharding is not None and self._vote is None:
            self._with(self._sharding.group)

    def share(self, weight: ArmedWeight, owners: Sequence[Owner], param: torch.Tensor, fmt: WeightFormat) -> bool:
        """Let a weight's scales be agreed on, if they are split. `param` is its Parameter, perhaps a DTensor."""
        found = splits(param) if is_dtensor(param) else []
        if self._sharding is not None and not is_dtensor(param):
            found = self._sharding.splits(owners, param, fmt)
        known = tuple(param.shape) if is_dtensor(param) else None
        group = sharing_group(full_name(owners[0]), found, weight.shape, fmt, known) if found else None
        if group is None:
            return False
        weight.shared = True
        self.weights[weight] = self._with(group)
        return True

    def submit(self, weight: ArmedWeight) -> None:
        self.weights[weight].submit(weight.name, weight)

    def advance(self) -> None:
        if self._by_ranks:  # asked at each write
            for agreement in list(self._by_ranks.values()):
                agreement.advance()

    def finish(self) -> None:
        for agreement in self._by_ranks.values():
            agreement.finish()

    def settle(self) -> None:
        for agreement in self._by_ranks.values():
            agreement.settle()

    def close(self) -> None:
        """The session's vote is that all have succeeded."""
        for agreement in self._by_ranks.values():
            agreement.close()

    def leave(self) -> None:
        """The session has failed, and the other ranks know."""
        for agreement in self._by_ranks.values():
            agreement.leave()

    def fail(self, reason: str) -> bool:
        """False if all ranks have agreed that all is well."""
        told = [agreement.fail(reason) for agreement in self._by_ranks.values()]
        return all(told)

    @property
    def collectives(self) -> int:
        return sum(a.collectives for a in self._by_ranks.values())

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self._by_ranks.values())

    def _with(self, group: dist.ProcessGroup | None) -> Agreement:
        require_distributed()
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        with self._lock:
            if ranks not in self._by_ranks:
                timeout = (self._sharding or Sharding()).timeout
                self._by_ranks[ranks] = Agreement(group, timeout, self._vote)
            self._by_ranks[ranks].open()
            return self._by_ranks[ranks]


def session_vote(model: nn.Module, process_group: dist.ProcessGroup | Sharding | None) -> Vote | None:
    """The vote of all ranks that hold parts of a model: those of the process group, or of the largest device mesh
    of its DTensors. None if there is nobody else."""
    sharding = process_group if isinstance(process_group, Sharding) else Sharding(process_group)
    meshes = {tuple(sorted(p.device_mesh.mesh.flatten().tolist())) for *_, p in parameters(model) if is_dtensor(p)}
    if process_group is not None:
        require_distributed()
        ranks = tuple(dist.get_process_group_ranks(sharding.group or dist.group.WORLD))
    else:
        ranks = max(meshes, key=len, default=())
    for mesh in meshes:
        if not set(mesh) <= set(ranks):
            raise QTensorError(
                f"online_reload: parameters are split over ranks {list(mesh)}, others over {list(ranks)}; pass "
                "process_group, the group of all ranks that reload together"
            )
    return Vote(ranks, sharding.timeout) if len(ranks) > 1 else None
