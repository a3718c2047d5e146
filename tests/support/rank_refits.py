"""Refits on several ranks, drawn at random, and what each rank's weights must be after each.

What all ranks have to do alike is drawn from dice that begin alike on all of them (`common`); what each is free to do,
as the order and the pieces it writes in, from dice of its own (`own`). Expected bytes come from the ranks' values put
together and quantized, as if there were one rank.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qtensor import (
    QTensor,
    QTensorError,
    Sharding,
    changed_weights,
    online_quant,
    online_reload,
    quantize,
    weight_checksums,
    write_low_rank,
)
from support.helpers import assert_no_hooks, holder, same_bytes
from support.interrupts import InOperation
from support.programs import SCHEMES, WRITERS, Box, slices, write
from support.rank_weights import Weight
from support.ranks import split
from support.refits import by_offsets, packed

WAIT = 60.0  # Seconds for other ranks to come.
LAYERS = {"attention": ("qkv", "out"), "mlp": ("experts", "down")}
FAULTS = ("raises", "nan", "swallowed", "interrupt", "excluded")
"""What makes a refit fail on all ranks."""
MENDED = ("mended", "cut")
"""What a loader swallows, and writes the weight again: the refit succeeds."""
Boxes = list[Box]


@dataclass(frozen=True)
class Plan:
    """Of one refit, alike on all ranks. writes: how much of which weights is written. faults: of each rank."""

    atomic: bool
    shadow: Any
    on_missing: Any
    only: list[str] | None
    writes: dict[str, str]
    faults: list[str | None]

    def fails(self) -> bool:
        incomplete = self.on_missing == "error" and set(self.writes.values()) != {"all"}
        return incomplete or any(fault in FAULTS for fault in self.faults)


Call = Callable[[], object]


class RandomRefits:
    """A model of four weights of any schemes and splits, and refits of it."""

    def __init__(self, rank: int, world: int, seed: int) -> None:
        self.rank, self.world, self.count = rank, world, seed
        self.common, self.own = random.Random(seed), random.Random(seed * world + rank)
        self.tally: Counter[str] = Counter()
        torch.manual_seed(seed * world + rank)  # `WRITERS` draw orders.
        self.model, self.weights = nn.Module(), list[Weight]()
        for layer, names in LAYERS.items():
            self.model.add_module(layer, nn.Module())
            for name in names:
                weight = self._drawn(f"{layer}.{name}", stack=name == "experts")
                self.model.get_submodule(layer).add_module(name, weight.module)
                self.weights.append(weight)
        dims = {weight.full_name: weight.dim for weight in self.weights}
        self.sharing = Sharding(dims=dims, timeout=WAIT)
        schemes: Any = {weight.full_name: weight.scheme for weight in self.weights}
        with online_quant(schemes, self.model, process_group=self.sharing):
            for weight in self.weights:
                weight.param.data.copy_(weight.part(weight.values(seed)))
        for weight in self.weights:
            weight.full = weight.part(weight.values(seed))
            weight.seen = torch.ones(weight.full.shape, dtype=torch.bool)
            weight.expected = quantize(weight.full, weight.scheme)
            weight.expected = weight.after(self._gathered(weight))
        self.addresses = self._addresses()
        self.check()

    def _drawn(self, name: str, stack: bool) -> Weight:
        dice, scheme = self.common, self.common.choice(SCHEMES)
        shape = [dice.randint(self.world, 4)] * stack + [dice.randint(16, 200), dice.randint(16, 200)]
        dim = dice.randrange(len(shape))
        if scheme.is_searched and scheme.format.granularity == "channel" and dim == len(shape) - 1:
            dim -= 1  # A row's scale is searched where the row is.
        step = scheme.format.block[dim - len(shape) + 2] if dim >= len(shape) - 2 else 1
        if scheme.format.element in ("e2m1", "int4") and dim == len(shape) - 1:
            step = max(step, 2)
        if step > 1:
            shape[dim] = step * dice.randint(self.world, self.world + 1) + dice.randint(0, step - 1)
        span = split(shape[dim], self.world, step, dice)[self.rank]
        part = torch.empty([span[1] - span[0] if d == dim else n for d, n in enumerate(shape)], dtype=torch.bfloat16)
        return Weight(name, holder(part)[0], scheme, tuple(shape), dim, span)

    def _gathered(self, weight: Weight) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, (weight.full, weight.seen))
        return found

    def _addresses(self) -> list[int]:
        return [part.data_ptr() for weight in self.weights for part in weight.param.parts()]

    # One refit

    def once(self, _: int = 0) -> None:
        self.count += 1
        plan = self._plan()
        new = {weight.name: weight.values(self.count) for weight in self.weights}
        boxes = {}
        for weight in self.weights:
            boxes[weight.name] = self._boxes(weight, plan.writes.get(weight.name, "none"))
            weight.full = weight.expected.dequantize()
            weight.seen = torch.zeros(weight.full.shape, dtype=torch.bool)
            for box in boxes[weight.name]:
                where = slices(box)
                weight.full[where], weight.seen[where] = weight.part(new[weight.name])[where], True
            if plan.on_missing == "zero" and weight.name in plan.writes:
                weight.full[~weight.seen] = 0
                weight.seen[...] = True
        after = {weight.name: weight.after(self._gathered(weight)) for weight in self.weights}
        error: BaseException | None = None
        try:
            with warnings.catch_warnings(), online_reload(
                self.model,
                atomic=plan.atomic,
                shadow=plan.shadow,
                on_missing=plan.on_missing,
                only=plan.only,
                assert_identity=True,
                process_group=self.sharing,
            ):  # fmt: skip
                warnings.simplefilter("ignore")  # that something was quantized a second time
                self._load(plan, boxes)
        except (QTensorError, ZeroDivisionError, KeyboardInterrupt) as found:
            error = found
        try:
            assert (error is not None) == plan.fails()
            fault = plan.faults[self.rank]
            mine = {"raises": ZeroDivisionError, "interrupt": KeyboardInterrupt}.get(str(fault), QTensorError)
            assert error is None or isinstance(error, (mine, ZeroDivisionError, QTensorError))
            for weight in self.weights:
                if error is None:
                    weight.expected = after[weight.name]
                elif not plan.atomic and weight.name in plan.writes:
                    self._take_what_is_whole(weight, after[weight.name])
            self.check()
        except AssertionError as wrong:
            raise AssertionError(self.count, plan, [str(w.scheme) for w in self.weights], str(error)) from wrong
        self.tally["failed" if error else "succeeded"] += 1
        if error is not None:  # Its traceback has the session.
            error.__traceback__ = error.__context__ = error.__cause__ = None

    def _plan(self) -> Plan:
        dice, names = self.common, [weight.name for weight in self.weights]
        way = dice.choice(["all", "all", "names", "layers", "digests"])
        chosen, only = names, None
        if way == "layers":
            layer = dice.choice(list(LAYERS))
            chosen, only = [f"{layer}.{name}" for name in LAYERS[layer]], [layer]
        elif way != "all":
            chosen = dice.sample(names, dice.randint(1, len(names)))
            only = [weight.full_name for weight in self.weights if weight.name in chosen]
        if way == "digests":
            only = self._that_differ(chosen)
        faults = [dice.choice([None] * 5 + [*FAULTS, *MENDED]) for _ in range(self.world)]
        if dice.random() < 0.4:
            faults = [None] * self.world
        if only is None or len(chosen) == len(names):
            faults = ["raises" if fault == "excluded" else fault for fault in faults]
        amounts = ["all"] if dice.random() < 0.4 else ["all", "all", "some", "none"]
        on_missing = dice.choice(["keep", "zero", "error"])
        if on_missing == "error" and dice.random() < 0.7:
            amounts = ["all"]
        writes = {name: dice.choice(amounts) for name in chosen}
        return Plan(dice.random() < 0.6, dice.choice(["device", "host"]), on_missing, only, writes, faults)

    def _that_differ(self, chosen: list[str]) -> list[str]:
        """As a trainer finds them: by the checksums of what it has, on any rank."""
        have = {}
        for weight in self.weights:
            have[weight.full_name] = weight.expected
            if weight.name in chosen:
                new = quantize(weight.part(weight.values(self.count)), weight.scheme)
                for target, source in zip(
                    new.parts(), weight.part_of(quantize(weight.values(self.count), weight.scheme), new), strict=True
                ):
                    target.copy_(source)
                have[weight.full_name] = new
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, changed_weights(self.model, weight_checksums(have)))
        assert {name for names in found for name in names} == {w.full_name for w in self.weights if w.name in chosen}
        return sorted({name for names in found for name in names})

    def _boxes(self, weight: Weight, amount: str) -> Boxes:
        """This rank's part cut at random; of "some", some of the pieces."""
        boxes: Boxes = [tuple((0, n) for n in weight.full.shape)]
        for _ in range(self.own.randint(0, 5)):
            at, d = self.own.randrange(len(boxes)), self.own.randrange(weight.full.dim())
            box = boxes[at]
            start, stop = box[d]
            if stop - start > 1:
                cut = self.own.randint(start + 1, stop - 1)
                boxes[at : at + 1] = [(*box[:d], span, *box[d + 1 :]) for span in ((start, cut), (cut, stop))]
        self.own.shuffle(boxes)
        if amount == "all":
            return boxes
        if amount == "some" and len(boxes) == 1:  # Half of the rows, or all of one.
            box = boxes[0]
            return [(*box[:-2], (0, -(-box[-2][1] // 2)), box[-1])] if box[-2][1] > 1 else []
        return boxes[: self.own.randint(1, len(boxes) - 1)] if amount == "some" else []

    def _load(self, plan: Plan, boxes: dict[str, Boxes]) -> None:
        """What this rank's loader does; its fault comes at any of its calls, or at the end."""
        fault, calls = plan.faults[self.rank], self._calls(plan, boxes)
        written = [w for w in self.weights if plan.writes.get(w.name) == "all"]
        if fault in MENDED:  # What ranks have agreed on cannot be written again.
            written = [w for w in written if not w.is_shared]
        target = self.own.choice(written) if written else None
        if target is None and fault is not None:
            fault = "raises" if fault in FAULTS else None
        at = self.own.randint(0, len(calls))
        swallows = contextlib.suppress(QTensorError) if fault in ("swallowed", "mended") else contextlib.nullcontext()
        for n, call in enumerate([*calls, None]):
            with swallows:
                if n == at and fault is not None:
                    self._fail(fault, target, plan)
            with swallows:
                if call is not None:
                    call()
        if fault in MENDED and target is not None:
            target.param.data.copy_(target.full)
        elif fault == "swallowed":
            with swallows:
                self._fail(fault, target, plan)

    def _fail(self, fault: str, target: Weight | None, plan: Plan) -> None:
        if fault == "raises" or target is None:
            raise ZeroDivisionError
        if fault in ("nan", "swallowed", "mended"):
            bad = target.full.clone()
            bad[tuple(self.own.randrange(n) for n in bad.shape)] = self.own.choice([float("nan"), float("inf")])
            target.param.data.copy_(bad)
            raise AssertionError("a value that is not finite was taken")
        if fault in ("interrupt", "cut"):
            with contextlib.suppress(KeyboardInterrupt), InOperation(self.own.randint(1, 8), KeyboardInterrupt):
                target.param.data.copy_(target.full)
            if fault == "interrupt":
                raise KeyboardInterrupt
        if fault == "excluded":
            other = self.own.choice([w for w in self.weights if w.name not in plan.writes])
            with contextlib.suppress(QTensorError) if self.own.random() < 0.5 else contextlib.nullcontext():
                other.param.data.copy_(other.full)

    def _calls(self, plan: Plan, boxes: dict[str, Boxes]) -> list[Call]:
        """Every piece in one of a loader's ways, in any order, and some whole units twice, but of weights whose scales
        ranks agree on. With `atomic`, the first of two may have other values: without it they may be live at once."""
        pieces = [(w, box) for w in self.weights for box in boxes[w.name]]
        self.own.shuffle(pieces)
        calls: list[Call] = []
        while pieces:
            count = self.own.choice([1, 1, 2, 4])
            taken, pieces = pieces[:count], pieces[count:]
            if count > 1:
                calls.append(partial(self._write_bucket, taken))
            else:
                calls.append(self._one(*taken[0], plan))
            weight, box = self.own.choice(taken)
            if self.own.random() < 0.3 and not weight.is_shared and weight.has_whole_units(box):
                source = -weight.full if plan.atomic and self.own.random() < 0.5 else weight.full
                before = partial(write, weight.param, box, source, torch.bfloat16, WRITERS[0])
                calls.insert(self.own.randrange(len(calls)), before)
        return calls

    def _one(self, weight: Weight, box: Box, plan: Plan) -> Call:
        where, part = slices(box), weight.full
        all_of_it = all(span == (0, n) for span, n in zip(box, part.shape, strict=True))
        chance = self.own.random()
        if all_of_it and not weight.is_shared and chance < 0.5:
            return lambda: weight.param.data.copy_(quantize(part, weight.scheme))
        if part.dim() == 2 and box[1] == (0, part.shape[1]) and chance < 0.7:
            rows = box[0][1] - box[0][0]
            b, a = torch.zeros(rows, 2), torch.ones(2, part.shape[1])  # Their product is zero, and its sums exact.
            return lambda: write_low_rank(weight.param.data[where], part[where], b, a)
        of = self.own.choice([torch.bfloat16, torch.float32])
        return partial(write, weight.param, box, part, of, self.own.choice(WRITERS))

    @staticmethod
    def _write_bucket(taken: list[tuple[Weight, Box]]) -> None:
        parts = {str(n): weight.full[slices(box)].contiguous() for n, (weight, box) in enumerate(taken)}
        bucket = packed(parts)
        for (weight, box), (_, part) in zip(taken, by_offsets(bucket, parts), strict=True):
            weight.param.data[slices(box)].copy_(part)
        bucket.fill_(0xFF)

    # What must hold

    def _take_what_is_whole(self, weight: Weight, new: QTensor) -> None:
        """With `atomic=False` a refit that failed leaves each matrix all old or all new."""
        for held, old, wanted in zip(*map(weight.matrices, (weight.param, weight.expected, new)), strict=True):
            if not all(map(same_bytes, held, old)):
                assert all(map(same_bytes, held, wanted)), f"{weight.name} is neither old nor new"
                for target, source in zip(old, wanted, strict=True):
                    target.copy_(source)

    def check(self) -> None:
        for weight in self.weights:
            assert type(weight.param) is QTensor
            for held, wanted in zip(weight.param.parts(), weight.expected.parts(), strict=True):
                assert same_bytes(held, wanted), f"{weight.name}: other bytes"
        assert self._addresses() == self.addresses
        assert_no_hooks()


def random_refits(rank: int, world: int, models: int, each: int, seed: int) -> None:
    """`each` refits of each of `models` models."""
    tally: Counter[str] = Counter()
    for program in range(models):
        refits = RandomRefits(rank, world, seed * 1_000_000 + program * 1000)
        for _ in range(each):
            refits.once()
        tally += refits.tally
    assert tally.total() == models * each
    assert min(tally["failed"], tally["succeeded"]) > models * each / 10, tally
