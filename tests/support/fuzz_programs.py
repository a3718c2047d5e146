"""Random programs of views, writes and reads, and the machine that runs one on a lazy weight and a plain tensor.

A program is data: numbers that each operation reduces to legal arguments (or, rarely, illegal ones) for the tensor it
meets. Both sides, and a mask of what was written so far, go through the same function, so they must agree: on shapes
and strides of views, on every value read, on which calls raise, and at the end on the weight, byte for byte.

Values are 0 and ±448·2^-j: each is a multiple of any unit's fp8 step, whatever its amax. Quantizing loses nothing, so
that even reads of quantized elements have one right answer. Arithmetic that leaves this set ends a program; none
compares 0 with -0, whose order is the kernel's choice. It is one file because steps, what they do and who compares
are changed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import nn

from qtensor import IncompleteLoadError
from qtensor.lazy import staging

Numbers = tuple[int, int, int, int]
New = Callable[..., torch.Tensor]
"""new(shape, dtype=None): fresh values for a write, the same on both sides."""
ILLEGAL = 31
"""The last number of an operation that asks for arguments out of range."""

SHAPES = [(1, 1), (1, 7), (6, 1), (3, 4), (5, 8), (16, 6), (130, 6), (2, 3, 4), (3, 130, 2), (1, 4, 4)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def exact_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(0, 6, shape, generator=generator)
    signs = torch.randint(-1, 2, shape, generator=generator)
    return (signs * 448.0 * torch.exp2(-exponents.float())).to(dtype)


# Views --------------------------------------------------------------------------------------------------------------


def _dim(v: torch.Tensor, n: int) -> tuple[int, int]:
    """A dimension and its size; 0 and 1 for a tensor that has none, where most operations raise."""
    d = n % max(1, v.dim())
    return d, (v.shape[d] if v.dim() else 1)


def _span(v: torch.Tensor, n: Numbers) -> tuple[int, int, int]:
    """A dimension, and the start and length of a part of it."""
    d, size = _dim(v, n[0])
    start = n[1] % max(1, size)
    length = 1 + n[2] % max(1, size - start)
    return (d, start, length + size) if n[3] == ILLEGAL else (d, start, length)


def _index(v: torch.Tensor, n: Numbers) -> tuple[int, int]:
    d, size = _dim(v, n[0])
    i = n[1] % max(1, size)
    return (d, size + i) if n[3] == ILLEGAL else (d, i - size if n[2] % 3 == 2 else i)


def _at(d: int, index: Any) -> tuple[Any, ...]:
    return (*[slice(None)] * d, index)


def _divisor(size: int, n: int) -> int:
    divisors = [k for k in range(1, size + 1) if size % k == 0] or [1]
    return divisors[n % len(divisors)]


def _slice(v: torch.Tensor, n: Numbers) -> torch.Tensor:
    d, start, length = _span(v, n)
    return v[_at(d, slice(start, start + length, 1 + n[3] % 3))]


def _as_strided(v: torch.Tensor, n: Numbers) -> torch.Tensor:
    """A part of the same memory with steps: the view's strides, its sizes shortened, dimensions reversed."""
    size = [1 + k % s if s else 0 for s, k in zip(v.shape, (*n, *n), strict=False)][::-1]
    stride = list(v.stride())[::-1]
    return v.as_strided(size, stride, v.storage_offset() + (10**6 if n[3] == ILLEGAL else 0))


def _unflatten(v: torch.Tensor, n: Numbers) -> torch.Tensor:
    d, size = _dim(v, n[0])
    k = _divisor(size, n[1])
    return v.unflatten(d, (k, size // k + (n[3] == ILLEGAL)))


def _view_sizes(v: torch.Tensor, n: Numbers) -> torch.Tensor:
    k = _divisor(v.numel(), n[0])
    return v.view(k, -1) if n[3] != ILLEGAL else v.view(v.numel() + 1)


def _pick(parts: tuple[torch.Tensor, ...] | list[torch.Tensor], n: int) -> torch.Tensor:
    return parts[n % len(parts)]


VIEWS: dict[str, Callable[[torch.Tensor, Numbers], torch.Tensor]] = {
    "narrow": lambda v, n: v.narrow(*_span(v, n)),
    "torch.narrow": lambda v, n: torch.narrow(v, *_span(v, n)),
    "select": lambda v, n: v.select(*_index(v, n)),
    "index": lambda v, n: v[_at(*_index(v, n))],
    "ellipsis": lambda v, n: v[..., n[0] % max(1, v.shape[-1] if v.dim() else 1)],
    "none": lambda v, n: v[None],
    "slice": _slice,
    "t": lambda v, n: v.t(),
    "mT": lambda v, n: v.mT,
    "transpose": lambda v, n: v.transpose(_dim(v, n[0])[0], _dim(v, n[1])[0] + 9 * (n[3] == ILLEGAL)),
    "permute": lambda v, n: v.permute(torch.randperm(v.dim(), generator=torch.Generator().manual_seed(n[0])).tolist()),
    "movedim": lambda v, n: v.movedim(_dim(v, n[0])[0], _dim(v, n[1])[0]),
    "view": _view_sizes,
    "view(-1)": lambda v, n: v.view(-1),
    "view_as": lambda v, n: v.view_as(torch.empty(v.shape[::-1])),
    "reshape": lambda v, n: v.reshape(-1, _divisor(v.numel(), n[0])),
    "flatten": lambda v, n: v.flatten(*sorted((_dim(v, n[0])[0], _dim(v, n[1])[0]))),
    "unflatten": _unflatten,
    "unsqueeze": lambda v, n: v.unsqueeze(n[0] % (v.dim() + 1)),
    "squeeze": lambda v, n: v.squeeze(),
    "squeeze(d)": lambda v, n: v.squeeze(_dim(v, n[0])[0]),
    "chunk": lambda v, n: _pick(v.chunk(1 + n[1] % 3, _dim(v, n[0])[0]), n[2]),
    "split": lambda v, n: _pick(v.split(1 + n[1] % 4, _dim(v, n[0])[0]), n[2]),
    "tensor_split": lambda v, n: _pick(v.tensor_split(1 + n[1] % 3, _dim(v, n[0])[0]), n[2]),
    "split_sizes": lambda v, n: _pick(
        v.split([n[1] % (_dim(v, n[0])[1] + 1), _dim(v, n[0])[1] - n[1] % (_dim(v, n[0])[1] + 1)], _dim(v, n[0])[0]),
        n[2],
    ),
    "unbind": lambda v, n: _pick(v.unbind(_dim(v, n[0])[0]), n[1]),
    "diagonal": lambda v, n: v.diagonal(n[1] % 3 - 1),
    "unfold": lambda v, n: v.unfold(_dim(v, n[0])[0], 1 + n[1] % max(1, _dim(v, n[0])[1]), 1 + n[2] % 3),
    "expand": lambda v, n: v.unsqueeze(0).expand(2, *v.shape),
    "as_strided": _as_strided,
    "detach": lambda v, n: v.detach(),
    "data": lambda v, n: v.data,
    "alias": lambda v, n: torch.ops.aten.alias(v),
    "contiguous": lambda v, n: v.contiguous(),
    "clone": lambda v, n: v.clone(),
    "to": lambda v, n: v.to(v.dtype),
}

# Writes -------------------------------------------------------------------------------------------------------------


def _some(size: int, n: Numbers) -> torch.Tensor:
    """Different positions in a dimension of `size`, in any order."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(n[1]))
    index = order[: 1 + n[2] % max(1, size)]
    return index + size if n[3] == ILLEGAL else index


def _mask(v: torch.Tensor, n: Numbers) -> torch.Tensor:
    shape = (*v.shape, 2) if n[3] == ILLEGAL else tuple(v.shape)
    return torch.rand(shape, generator=torch.Generator().manual_seed(n[1])) < 0.4


def _indexed(v: torch.Tensor, n: Numbers) -> tuple[int, torch.Tensor, tuple[int, ...]]:
    """A dimension, positions in it, and the shape of what is there."""
    d, size = _dim(v, n[0])
    index = _some(size, n)
    return d, index, (*v.shape[:d], len(index), *v.shape[d + 1 :])


def _misfit(v: torch.Tensor, n: Numbers) -> tuple[int, ...]:
    """A shape that `copy_` into `v` has to broadcast (dimensions missing or of size 1), or cannot."""
    if n[3] == ILLEGAL:
        return (*v.shape, 3) if v.dim() == 0 or v.shape[-1] != 3 else (*v.shape, 5)
    return tuple(1 if n[0] >> d & 1 else s for d, s in enumerate(v.shape))[n[1] % (v.dim() + 1) :]


def _set_index(v: torch.Tensor, new: New, n: Numbers) -> None:
    d, index, shape = _indexed(v, n)
    v[_at(d, index)] = new(shape)


def _set_pairs(v: torch.Tensor, new: New, n: Numbers) -> None:
    """Two index tensors at once: element by element."""
    rows, cols = _some(v.shape[0], n), _some(v.shape[1], n)
    count = min(len(rows), len(cols))
    v[rows[:count], cols[:count]] = new((count, *v.shape[2:]))


def _index_copy(v: torch.Tensor, new: New, n: Numbers, dtype: torch.dtype | None = None) -> None:
    d, index, shape = _indexed(v, n)
    v.index_copy_(d, index - v.shape[d] if n[3] == ILLEGAL - 1 else index, new(shape, dtype))


def _scatter_index(v: torch.Tensor, n: Numbers) -> tuple[int, torch.Tensor]:
    d, index, shape = _indexed(v, n)
    return d, index.view([-1 if k == d else 1 for k in range(v.dim())]).expand(shape)


def _scatter(v: torch.Tensor, new: New, n: Numbers) -> None:
    d, index = _scatter_index(v, n)
    v.scatter_(d, index, new(tuple(index.shape)))


def _foreach_copy(v: torch.Tensor, new: New, n: Numbers) -> None:
    parts = list(v.unbind(0))
    torch._foreach_copy_(parts, [new(tuple(part.shape)) for part in parts])


def _rows_from_rows(v: torch.Tensor, new: New, n: Numbers) -> None:
    i, j = n[0] % v.shape[0], n[1] % v.shape[0]
    if i != j:
        v[i].copy_(v[j])


def _fill_diagonal(v: torch.Tensor, new: New, n: Numbers) -> None:
    v.fill_diagonal_(True if v.dtype == torch.bool else 28.0)


def _put(v: torch.Tensor, new: New, n: Numbers) -> None:
    index = _some(v.numel(), n)
    v.put_(index, new((len(index),)))


def _one(v: torch.Tensor) -> Any:
    """A scalar to fill with."""
    return True if v.dtype == torch.bool else 56.0


@dataclass(frozen=True)
class Write:
    """apply(view, new, numbers) writes. reads: whether its result depends on what the view held. marked: applied to the
    mask of written elements it marks what it writes (otherwise: all of the view). ends: values leave the exact set."""

    apply: Callable[[torch.Tensor, New, Numbers], Any]
    reads: bool = False
    marked: bool = False
    ends: bool = False


WRITES: dict[str, Write] = {
    "copy_": Write(lambda v, new, n: v.copy_(new(tuple(v.shape)))),
    "copy_ wide": Write(lambda v, new, n: v.copy_(new(tuple(v.shape), torch.float64))),
    "copy_ broadcast": Write(lambda v, new, n: v.copy_(new(_misfit(v, n)))),
    "set all": Write(lambda v, new, n: v.__setitem__(..., new(_misfit(v, n)))),
    "set int": Write(lambda v, new, n: v.__setitem__(_at(*_index(v, n)), new(())), marked=True),
    "set slice": Write(
        lambda v, new, n: v.__setitem__(_at(_dim(v, n[0])[0], slice(n[1] % 7, None, 1 + n[2] % 3)), new(())),
        marked=True,
    ),
    "set mask": Write(lambda v, new, n: v.__setitem__(_mask(v, n), new((int(_mask(v, n).sum()),))), marked=True),
    "set mask scalar": Write(lambda v, new, n: v.__setitem__(_mask(v, n), _one(v)), marked=True),
    "set index": Write(_set_index, marked=True),
    "set pairs": Write(_set_pairs, marked=True),
    "fill_": Write(lambda v, new, n: v.fill_(_one(v))),
    "fill_ tensor": Write(lambda v, new, n: v.fill_(new(()))),
    "zero_": Write(lambda v, new, n: v.zero_()),
    "index_copy_": Write(_index_copy, marked=True),
    "index_copy_ wide": Write(lambda v, new, n: _index_copy(v, new, n, torch.float64), marked=True),
    "index_fill_": Write(lambda v, new, n: v.index_fill_(*_indexed(v, n)[:2], _one(v)), marked=True),
    "index_put_": Write(lambda v, new, n: v.index_put_((_some(v.shape[0], n),), new(())), marked=True),
    "scatter_": Write(_scatter, marked=True),
    "scatter_ value": Write(lambda v, new, n: v.scatter_(*_scatter_index(v, n), _one(v)), marked=True),
    "masked_scatter_": Write(lambda v, new, n: v.masked_scatter_(_mask(v, n), new((v.numel(),))), marked=True),
    "masked_fill_": Write(lambda v, new, n: v.masked_fill_(_mask(v, n), _one(v)), marked=True),
    "masked_fill_ tensor": Write(lambda v, new, n: v.masked_fill_(_mask(v, n), new(())), marked=True),
    "put_": Write(_put, marked=True),
    "fill_diagonal_": Write(_fill_diagonal, marked=True),
    "foreach_copy_": Write(_foreach_copy),
    "foreach_zero_": Write(lambda v, new, n: torch._foreach_zero_(list(v.unbind(0)))),
    "foreach_neg_": Write(lambda v, new, n: torch._foreach_neg_(list(v.unbind(0))), reads=True),
    "add out": Write(lambda v, new, n: torch.add(new(tuple(v.shape)), 0, out=v)),
    "stack out": Write(lambda v, new, n: torch.stack([new(tuple(v.shape[1:])) for _ in range(v.shape[0])], out=v)),
    "cat out": Write(lambda v, new, n: torch.cat([new((1, *v.shape[1:])) for _ in range(v.shape[0])], out=v)),
    "where out": Write(
        lambda v, new, n: torch.where(new(tuple(v.shape)) > 0, new(tuple(v.shape)), new(tuple(v.shape)), out=v),
    ),
    "where assign": Write(lambda v, new, n: v.copy_(torch.where(_mask(v, n), new(tuple(v.shape)), v)), reads=True),
    "neg_": Write(lambda v, new, n: v.neg_(), reads=True),
    "abs_": Write(lambda v, new, n: v.abs_(), reads=True),
    "mul_ -1": Write(lambda v, new, n: v.mul_(-1), reads=True),
    "mul_ signs": Write(lambda v, new, n: v.mul_(new(tuple(v.shape)).sign()), reads=True),
    "clamp_": Write(lambda v, new, n: v.clamp_(min=-448.0, max=14.0), reads=True),
    "maximum out": Write(
        lambda v, new, n: torch.maximum(v, new(tuple(v.shape)).abs().clamp(min=14.0), out=v), reads=True
    ),
    "flip": Write(lambda v, new, n: v.copy_(v.flip(0)), reads=True),
    "swap rows": Write(lambda v, new, n: v.__setitem__([0, -1], v[[-1, 0]]), reads=True),
    "row from row": Write(_rows_from_rows, reads=True),
    "tril_": Write(lambda v, new, n: v.tril_(), reads=True),
    "roll": Write(lambda v, new, n: v.copy_(torch.roll(v, 1, 0)), reads=True),
    "add_": Write(lambda v, new, n: v.add_(new(_misfit(v, n)), alpha=0.5), reads=True, ends=True),
    "addcmul_": Write(
        lambda v, new, n: v.addcmul_(new(tuple(v.shape)), new(tuple(v.shape)), value=0.001), reads=True, ends=True
    ),
    "lerp_": Write(lambda v, new, n: v.lerp_(new(tuple(v.shape)), 0.25), reads=True, ends=True),
    "index_add_": Write(
        lambda v, new, n: v.index_add_(*_indexed(v, n)[:2], new(_indexed(v, n)[2])), reads=True, ends=True
    ),
    "scatter_add_": Write(
        lambda v, new, n: v.scatter_add_(*_scatter_index(v, n), new(tuple(_scatter_index(v, n)[1].shape))),
        reads=True,
        ends=True,
    ),
    "index_put_ add": Write(
        lambda v, new, n: v.index_put_((_some(v.shape[0], n),), new(()), accumulate=True), reads=True, ends=True
    ),
    "foreach_mul_": Write(lambda v, new, n: torch._foreach_mul_(list(v.unbind(0)), 0.3), reads=True, ends=True),
}

READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "clone": lambda v: v.clone(),
    "float": lambda v: v.float().clone(),
    "add": lambda v: v + 1,
    "tolist": lambda v: torch.tensor(v.tolist()),
    "numpy": lambda v: torch.from_numpy(v.float().numpy()),
    "contiguous": lambda v: v.contiguous().clone(),
    "sum": lambda v: v.double().sum(),
    "mask": lambda v: v[torch.ones(v.shape, dtype=torch.bool)],
    "cat": lambda v: torch.cat([v.unsqueeze(0), v.unsqueeze(0)]),
    "equal": lambda v: torch.tensor(torch.equal(v, v.clone())),
    "empty_like": lambda v: torch.zeros_like(v),
}
METADATA = frozenset({"empty_like"})
"""Reads that ask for shape and dtype only."""

WHOLE: dict[str, Callable[[nn.Module, str, torch.Tensor], Any]] = {
    "set data": lambda m, name, value: setattr(getattr(m, name), "data", value),
    "assign Parameter": lambda m, name, value: setattr(m, name, nn.Parameter(value, requires_grad=False)),
    "load_state_dict": lambda m, name, value: m.load_state_dict({name: value}),
    "load_state_dict assign": lambda m, name, value: m.load_state_dict({name: value}, assign=True),
    "set_": lambda m, name, value: getattr(m, name).data.set_(value),
    "misfit": lambda m, name, value: m.load_state_dict({name: value[..., :-1]}),
}
"""Writes of the whole weight through its module. Of a plain tensor: copy_."""

# Programs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Take handle `base`, apply `views`, keep the outcome if `keep`, then write, read, or replace the whole weight."""

    base: int
    views: tuple[tuple[str, Numbers], ...]
    action: str
    numbers: Numbers
    seed: int
    keep: bool


numbers = st.tuples(st.integers(0, 7), st.integers(0, 15), st.integers(0, 15), st.integers(0, ILLEGAL))
actions = st.one_of(st.sampled_from(sorted(WRITES)), st.sampled_from([*sorted(WRITES), *sorted(READS), *sorted(WHOLE)]))
steps = st.builds(
    Step,
    st.integers(0, 3),
    st.lists(st.tuples(st.sampled_from(sorted(VIEWS)), numbers), max_size=4).map(tuple),
    actions,
    numbers,
    st.integers(0, 2**16),
    st.booleans(),
)
programs = st.lists(steps, min_size=1, max_size=10)


@contextmanager
def small_limits() -> Iterator[None]:
    """Staging groups and chunks of a few rows, so that small weights meet their borders."""
    with mock.patch.object(staging, "_GROUP_BYTES", 64), mock.patch.object(staging, "CHUNK_BYTES", 128):
        yield


@dataclass
class Machine:
    """One weight, lazy and plain, and the mask of what was written. `trouble`: an illegal write was refused."""

    module: nn.Module
    name: str
    plain: torch.Tensor
    written: torch.Tensor
    trouble: bool = False
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def run(self, program: list[Step]) -> None:
        with torch.no_grad():
            for step in program:
                if not self._step(step):
                    return

    def _step(self, step: Step) -> bool:
        """Run one step on both sides. False ends the program."""
        if step.action in WHOLE:
            self._whole(step)
            return True
        handles: Any = [(getattr(self.module, self.name).data, self.plain, self.written), *self.kept]
        lazy, plain, written = handles[step.base % len(handles)]
        for name, n in step.views:
            view = VIEWS[name]
            outcome = _both(lambda t, view=view, n=n: view(t, n), lazy, plain)
            if outcome is None:
                return True
            # A copy (reshape, contiguous) of elements that were never written is a read of them.
            mask = view(written, n)
            if isinstance(outcome[0], IncompleteLoadError):
                assert not _aliases(outcome[1], self.plain), f"{name} is a view, yet it raised {outcome[0]}"
                assert not mask.all(), f"{name} raised {outcome[0]}"
                return True
            lazy, plain = outcome
            written = mask
            assert (lazy.shape, lazy.stride(), lazy.dtype) == (plain.shape, plain.stride(), plain.dtype), name
            if _aliases(plain, self.plain):
                assert lazy.storage_offset() == plain.storage_offset(), name
            else:
                assert mask.all() or not mask.numel(), f"{name} copied what was never written"
        if step.keep:
            self.kept = [*self.kept, (lazy, plain, written)][-3:]
        write = WRITES.get(step.action)
        if write is None or (_overlaps(plain) and (write.reads or write.marked)):
            self._read(step.action if step.action in READS else "clone", lazy, plain, written)
            return True
        return self._write(step, lazy, plain, written)

    def _read(self, action: str, lazy: torch.Tensor, plain: torch.Tensor, written: torch.Tensor) -> None:
        known = bool(written.all()) or action in METADATA
        outcome = _both(READS[action], lazy, plain)
        if outcome is None:
            return
        assert isinstance(outcome[0], IncompleteLoadError) == (not known), (action, outcome)
        if known:
            got, want = outcome
            assert got.dtype == want.dtype
            if action in METADATA and plain.numel() and not _overlaps(plain):
                assert _steps(got) == _steps(want)
            assert torch.equal(got, want), f"{action} read\n{got}\nnot\n{want}"
            assert torch.equal(got.signbit(), want.signbit())

    def _write(self, step: Step, lazy: torch.Tensor, plain: torch.Tensor, written: torch.Tensor) -> bool:
        write = WRITES[step.action]
        if write.reads and not written.all() and (error := _outcome(lambda: _with_sources(write, lazy, step))[0]):
            # It needs elements that nobody wrote (or is illegal); nothing has been changed.
            assert (
                isinstance(error, IncompleteLoadError) or _outcome(lambda: _with_sources(write, plain.clone(), step))[0]
            )
            self.trouble |= not isinstance(error, IncompleteLoadError)
            return True
        if write.reads and not written.all():
            _with_sources(write, plain, step)
            return not write.ends
        if _both(lambda t: _with_sources(write, t, step), lazy, plain) is None:
            self.trouble = True
        elif write.marked:
            write.apply(written, lambda shape, dtype=None: torch.ones(shape, dtype=torch.bool), step.numbers)
        else:
            written.fill_(True)
        return not write.ends

    def _whole(self, step: Step) -> None:
        value = exact_values(tuple(self.plain.shape), self.plain.dtype, step.seed)
        if step.action == "misfit":
            error, _ = _outcome(lambda: WHOLE[step.action](self.module, self.name, value))
            assert isinstance(error, RuntimeError)
            self.trouble = True
            return
        self.plain.copy_(value)
        self.written.fill_(True)
        WHOLE[step.action](self.module, self.name, value)
        value.fill_(float("nan"))


def _with_sources(write: Write, target: torch.Tensor, step: Step) -> None:
    """Write, then scribble over what was written from, as a loader that reuses its buffer does."""
    sources: list[torch.Tensor] = []

    def new(shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        sources.append(exact_values(shape, dtype or target.dtype, step.seed + len(sources)))
        return sources[-1]

    write.apply(target, new, step.numbers)
    for source in sources:
        source.fill_(float("nan"))


def _outcome(call: Callable[[], Any]) -> tuple[Exception | None, Any]:
    """What a call raises, and what it returns."""
    try:
        return None, call()
    except Exception as error:
        return error, None


def _both(call: Callable[[torch.Tensor], Any], lazy: torch.Tensor, plain: torch.Tensor) -> tuple[Any, Any] | None:
    """What both sides answer; the lazy one's IncompleteLoadError counts as an answer. None if both refuse."""
    refusal, want = _outcome(lambda: call(plain))
    error, got = _outcome(lambda: call(lazy))
    if refusal is not None:
        assert isinstance(error, type(refusal)), f"{refusal!r} of a plain tensor, {error!r} of a lazy weight"
        return None
    if error is not None and not isinstance(error, IncompleteLoadError):
        raise error
    return (got if error is None else error), want


def _overlaps(view: torch.Tensor) -> bool:
    """Does it reach an element twice? What becomes of it is undefined, unless all of it is set."""
    last = sum((n - 1) * step for n, step in zip(view.shape, view.stride(), strict=True) if n)
    if 0 in view.shape:
        return False
    positions = torch.arange(last + 1).as_strided(view.shape, view.stride())
    return positions.unique().numel() < view.numel()


def _steps(tensor: torch.Tensor) -> list[int]:
    return [step for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]


def _aliases(tensor: torch.Tensor, base: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
