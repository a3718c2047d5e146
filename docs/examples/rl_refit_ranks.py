"""Refit between ranks: two processes train a policy, two others serve it in fp8, each half of every layer.

    python docs/examples/rl_refit_ranks.py [--rounds 3]

The engine's ranks write completions; the trainer's ranks reward even tokens, each on half of the batch, and take
policy-gradient steps on one layer after another. Then a refit: the trainer sends checksums of what it has, the engine
names the weights that differ, and the trainers send those alone, each the half that it owns, in packed buckets. The
engine's ranks take them all or none: in the second version a rank fails as it loads, both go on serving what they had,
and the refit is repeated. Roots are compared after each. At the end both ranks save snapshots, and fresh processes give
the same answers from those. Needs qtensor alone; runs on a CPU, over gloo.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from qtensor import (
    QTensorError,
    Sharding,
    changed_weights,
    fp8,
    load_snapshot,
    online_quant,
    online_reload,
    quantize,
    save_snapshot,
    weight_checksums,
    weight_root,
)

TRAINERS, ENGINES = [0, 1], [2, 3]
HALVES = len(ENGINES)
VOCABULARY, HIDDEN, INNER, LAYERS = 64, 32, 128, 4
PROMPTS, NEW_TOKENS, BUCKET_BYTES = 16, 8, 8 << 10
SPLIT = {"*.up": 0, "*.down": 1}  # The rows of up, the columns of down: its scales span the engine's ranks.
Weights = dict[str, torch.Tensor]


class Policy(nn.Module):
    """A model of the next token. With a group this is one rank's part of it."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group
        inner = INNER // (1 if group is None else HALVES)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(HIDDEN, inner, bias=False), "down": nn.Linear(inner, HIDDEN, bias=False)})
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.to(torch.bfloat16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[B, VOCABULARY]` of what follows each of `tokens` `[B]`."""
        x = self.embedding(tokens)
        for layer in self.layers:
            y = layer["down"](layer["up"](x).relu()).float()
            if self.group is not None:
                dist.all_reduce(y, group=self.group)
            x = x + y.to(x.dtype)
        return self.head(x).float()

    def complete(self, prompts: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        """`[B, NEW_TOKENS]`: the likeliest tokens, or (seed) drawn ones."""
        random = torch.Generator().manual_seed(seed or 0)
        tokens = [prompts]
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                logits = self(tokens[-1])
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]
                tokens.append(logits.argmax(-1) if seed is None else drawn)
        return torch.stack(tokens[1:], dim=1)


def part_of(name: str, weight: torch.Tensor, half: int) -> torch.Tensor:
    """What an engine's rank holds of a weight, quantized or not."""
    for pattern, dim in SPLIT.items():
        if name.endswith(f"{pattern[1:]}.weight"):
            size = weight.shape[dim] // HALVES
            part: torch.Tensor = weight.narrow(dim, half * size, size)
            return part
    return weight


# The trainer's ranks --------------------------------------------------------------------------------------------------


def train(groups: Groups, rank: int, rounds: int) -> None:
    torch.manual_seed(0)
    policy = Policy()
    dist.broadcast_object_list([policy.state_dict()], src=0)  # The engine loads the first version.
    for version in range(1, rounds + 1):
        prompts, completions = groups.told(None, ENGINES[0])
        improve(policy, groups, rank, prompts, completions, layer=version % LAYERS)
        weights = {name: param.detach() for name, param in policy.named_parameters()}
        groups.told(checksums_of_parts(weights) if rank == 0 else None, 0)
        names = groups.told(None, ENGINES[0])
        while True:  # Until the engine has it.
            for sender in TRAINERS:
                send(weights, names, sender, rank)
            if groups.told(None, ENGINES[0]):
                break


def improve(policy: Policy, groups: Groups, rank: int, prompts: Any, completions: Any, layer: int) -> None:
    """Policy-gradient steps for one layer, each rank on its half of the batch. Even tokens are good."""
    trained = list(policy.layers[layer].parameters())
    reward = (completions % 2 == 0).float()
    advantage = reward - reward.mean()
    before = torch.cat([prompts[:, None], completions[:, :-1]], dim=1)
    mine = [half.chunk(len(TRAINERS))[rank].flatten() for half in (before, completions, advantage)]
    for _ in range(4):
        likely = policy(mine[0]).log_softmax(-1).gather(1, mine[1][:, None])[:, 0]
        grads = torch.autograd.grad(-(mine[2] * likely).mean(), trained)
        for param, grad in zip(trained, grads, strict=True):
            total = grad.float()
            dist.all_reduce(total, group=groups.trainers)
            param.data.sub_(total.to(param.dtype), alpha=0.5)


def checksums_of_parts(weights: Weights) -> list[dict[str, str]]:
    """For each of the engine's ranks: what it has to hold if it has exactly these weights."""
    whole = {name: quantize(w, fp8) if name.startswith("layers") else w for name, w in weights.items()}
    return [weight_checksums({n: part_of(n, w, half) for n, w in whole.items()}) for half in range(HALVES)]


# Buckets: each of the trainer's ranks sends the weights it owns, packed ----------------------------------------------


def owned(names: list[str], sender: int) -> list[str]:
    return sorted(names)[TRAINERS.index(sender) :: len(TRAINERS)]


def buckets(shapes: dict[str, torch.Size], names: list[str]) -> Iterator[list[str]]:
    """Names whose weights fit into a bucket together."""
    bucket: list[str] = []
    used = 0
    for name in names:
        size = 2 * shapes[name].numel()
        if bucket and used + size > BUCKET_BYTES:
            yield bucket
            bucket, used = [], 0
        bucket.append(name)
        used += size
    if bucket:
        yield bucket


def send(weights: Weights, names: list[str], sender: int, rank: int) -> None:
    """All ranks take part in a broadcast, the other trainer too."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    for bucket in buckets(shapes, owned(names, sender)):
        if rank == sender:
            packed = torch.cat([weights[name].reshape(-1) for name in bucket])
        else:
            packed = torch.empty(sum(shapes[name].numel() for name in bucket), dtype=torch.bfloat16)
        dist.broadcast(packed.view(torch.uint8), src=sender)


def receive(shapes: dict[str, torch.Size], names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight where it lies in its bucket. A bucket's memory is used again for the next one."""
    memory = torch.empty(max(BUCKET_BYTES // 2, max(shape.numel() for shape in shapes.values())), dtype=torch.bfloat16)
    for sender in TRAINERS:
        for bucket in buckets(shapes, owned(names, sender)):
            sizes = [shapes[name].numel() for name in bucket]
            packed = memory[: sum(sizes)]
            dist.broadcast(packed.view(torch.uint8), src=sender)
            for name, values in zip(bucket, packed.split(sizes), strict=True):
                yield name, values.view(shapes[name])


# The engine's ranks ---------------------------------------------------------------------------------------------------


def serve(groups: Groups, rank: int, rounds: int, folder: Path, found: Any) -> None:
    half = ENGINES.index(rank)
    first: list[Any] = [None]
    dist.broadcast_object_list(first, src=0)
    shapes = {name: weight.shape for name, weight in first[0].items()}
    with torch.device("meta"):
        policy = Policy(groups.engines)
    with online_quant(fp8, policy, ignore=["head"], process_group=Sharding(groups.engines, SPLIT)):
        policy.load_state_dict({name: part_of(name, weight, half) for name, weight in first[0].items()})
    prompts = torch.arange(PROMPTS) * 3 % VOCABULARY
    for version in range(1, rounds + 1):
        completions = policy.complete(prompts, seed=version)
        groups.told((prompts, completions), ENGINES[0])
        sums = groups.told(None, 0)
        names = groups.told(groups.of_all_engines(changed_weights(policy, sums[half])), ENGINES[0])
        before, failures = weight_root(policy), []
        while True:
            # Once, the second rank fails after its second weight: what a lost connection or a full disk would do.
            fails_at = 2 if version == 2 and half == 1 and not failures else None
            problem = refit(policy, receive(shapes, names), names, half, fails_at)
            groups.told(problem is None, ENGINES[0])
            if problem is None:
                break
            failures.append(problem)
            assert weight_root(policy) == before, "a refit that failed has changed something"
        if weight_root(policy) != weight_root(sums[half]):
            raise RuntimeError(f"these differ from the trainer's: {changed_weights(policy, sums[half])}")
        note = {
            "version": version,
            "names": names,
            "of": len(shapes),
            "failures": failures,
            "root": weight_root(policy),
        }
        found.put((rank, note | {"reward": float((completions % 2 == 0).float().mean())}))
    save_snapshot(policy, folder / f"half-{half}")
    found.put((rank, {"answers": policy.complete(prompts).tolist(), "root": weight_root(policy)}))


def refit(policy: Policy, sent: Any, names: list[str], half: int, fails_at: int | None) -> str | None:
    """Take what is sent, all or nothing on both ranks. Returns what went wrong, if something did."""
    params, problem = dict(policy.named_parameters()), None
    sharding = Sharding(policy.group, SPLIT)
    try:
        with online_reload(policy, only=names, on_missing="error", process_group=sharding):
            for count, (name, weight) in enumerate(sent, start=1):
                params[name].data.copy_(part_of(name, weight, half))
                if count == fails_at:
                    raise ConnectionError("the connection was lost")
    except (QTensorError, ConnectionError) as error:
        problem = str(error)
    for _ in sent:  # What is still on its way.
        pass
    return problem


def restart(rank: int, world: int, port: int, folder: Path, found: Any) -> None:
    """A fresh process for each of the engine's ranks: nothing is sent, read or quantized."""
    with joined(rank, world, port):
        with torch.device("meta"):
            policy = Policy(dist.group.WORLD)
        load_snapshot(policy, folder / f"half-{rank}")
        prompts = torch.arange(PROMPTS) * 3 % VOCABULARY
        answers = policy.complete(prompts).tolist()
        found.put((ENGINES[rank], {"answers": answers, "root": weight_root(policy)}))


# Processes ------------------------------------------------------------------------------------------------------------


class Groups:
    """The trainer's ranks, the engine's, and all."""

    def __init__(self) -> None:
        self.trainers = dist.new_group(TRAINERS)
        self.engines = dist.new_group(ENGINES)

    @staticmethod
    def told(value: Any, source: int) -> Any:
        """What rank `source` has, for all."""
        held = [value]
        dist.broadcast_object_list(held, src=source)
        return held[0]

    def of_all_engines(self, names: list[str]) -> list[str]:
        """What any of the engine's ranks names."""
        gathered: list[Any] = [None] * len(ENGINES)
        dist.all_gather_object(gathered, names, group=self.engines)
        return sorted({name for part in gathered for name in part})


@contextlib.contextmanager
def joined(rank: int, world: int, port: int) -> Iterator[None]:
    """In the block this process is a rank of a gloo group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    yield
    dist.barrier()  # The first rank keeps what the others meet by.
    dist.destroy_process_group()


def play(rank: int, world: int, port: int, rounds: int, folder: Path, found: Any) -> None:
    with joined(rank, world, port):
        groups = Groups()
        if rank in TRAINERS:
            train(groups, rank, rounds)
        else:
            serve(groups, rank, rounds, folder, found)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def run(rounds: int = 3, start_method: str = "spawn") -> dict[int, list[dict[str, Any]]]:
    """What each of the engine's ranks noted: of every version, of its end, and of its restart."""
    notes: dict[int, list[dict[str, Any]]] = {rank: [] for rank in ENGINES}
    world = len(TRAINERS) + len(ENGINES)
    with tempfile.TemporaryDirectory() as folder:
        found = multiprocessing.get_context(start_method).SimpleQueue()
        for work, count, args in ((play, world, (rounds,)), (restart, len(ENGINES), ())):
            arguments = (count, free_port(), *args, Path(folder), found)
            multiprocessing.start_processes(work, arguments, nprocs=count, start_method=start_method)
            while not found.empty():
                rank, note = found.get()
                notes[rank].append(note)
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    for rank, (*versions, end, again) in run(parser.parse_args().rounds).items():
        for note in versions:
            print(
                f"rank {rank}, version {note['version']}: share of even tokens before it {note['reward']:.2f}; "
                f"{len(note['names'])} of {note['of']} weights sent; root {note['root'][:8]} is the trainer's"
                + "".join(f"; a refit failed and changed nothing ({why.splitlines()[0]})" for why in note["failures"])
            )
        print(f"rank {rank}, restarted from its snapshot: answers and root {'equal' if again == end else 'DIFFER'}")


if __name__ == "__main__":
    main()
