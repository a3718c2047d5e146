"""A model whose reloads are drawn at random, and what its weights must be after each step."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from qtensor import QTensor, online_quant, online_reload, quantize
from qtensor.sessions.reload import ReloadSession
from support.helpers import copy_unit, holder, same_bytes

MODES: dict[str, dict[str, Any]] = {"shadow": {}, "undo": {"shadow": "host"}, "per_weight": {"atomic": False}}
SHAPES = [(40, 24), (300, 40), (2, 150, 24)]
Where = tuple[Any, ...]


class Subject:
    """A model of one weight and its bias. `expected` holds what the weight must be now; `full` the high-precision
    values that the open session has been given, `seen` where it has."""

    session: ReloadSession | None = None
    only: str | None = None
    """The open session is for this parameter alone; None: for both."""

    def __init__(self, scheme: Any, shape: tuple[int, ...], mode: str, seed: int) -> None:
        self.scheme, self.mode = scheme, mode
        self.random = torch.Generator().manual_seed(seed)
        first = self.values(shape)
        self.model, name = holder(first)
        self.name = name
        self.model.register_parameter("bias", torch.nn.Parameter(torch.zeros(shape[-2]).bfloat16()))
        with online_quant(scheme, self.model):
            getattr(self.model, name).data.copy_(first)
            self.model.bias.data.copy_(torch.ones(shape[-2]))
        self.param, self.bias = getattr(self.model, name), self.model.bias
        self.expected, self.expected_bias = quantize(first, scheme), torch.ones(shape[-2]).bfloat16()
        self.addresses = [self.param.qdata.data_ptr(), self.param.scale.data_ptr(), self.bias.data_ptr()]
        self.unit = scheme.format.unit_rows(shape[-2])

    def values(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.random).bfloat16()

    def begin(self, on_missing: str, only: str | None = None) -> None:
        self.only = {None: None, "weight": self.name, "bias": "bias"}[only]
        patterns = None if self.only is None else [self.only]
        self.session = online_reload(
            self.model, on_missing=on_missing, assert_identity=True, only=patterns, **MODES[self.mode]  # type: ignore[arg-type]
        )  # fmt: skip
        self.full = self.expected.dequantize().clone()
        self.seen = torch.zeros(self.full.shape, dtype=torch.bool)
        self.partial: list[Where] = []
        self.new_bias: torch.Tensor | None = None

    def units(self, data: st.DataObject) -> Where:
        """An index of some whole units: a run of rows, of one expert."""
        *lead, rows, _ = self.full.shape
        count = -(-rows // self.unit)
        a = data.draw(st.integers(0, count - 1))
        b = data.draw(st.integers(a + 1, count))
        run = slice(a * self.unit, min(b * self.unit, rows))
        return (data.draw(st.integers(0, lead[0] - 1)), run) if lead else (run,)

    def write(self, where: Where, source: torch.Tensor) -> None:
        self.note(where, source)
        self.param.data[where].copy_(source)
        source.fill_(float("nan"))

    def note(self, where: Where, source: torch.Tensor) -> None:
        self.full[where], self.seen[where] = source, True
        if self.mode == "per_weight":
            self.commit(require_whole=True)

    def zero_the_rest(self) -> None:
        """What finishing does with on_missing="zero"."""
        if self.takes_weight:
            self.full[~self.seen] = 0
            self.seen[...] = True
        if self.takes_bias and self.new_bias is None:
            self.new_bias = torch.zeros_like(self.expected_bias)

    @property
    def takes_weight(self) -> bool:
        return self.session is not None and self.only in (None, self.name)

    @property
    def takes_bias(self) -> bool:
        return self.session is not None and self.only in (None, "bias")

    @property
    def is_complete(self) -> bool:
        weight, bias = bool(self.seen.all()), self.new_bias is not None
        return (weight or not self.takes_weight) and (bias or not self.takes_bias)

    def over(self, committed: bool) -> None:
        self.session = None
        if committed:
            self.commit(require_whole=False)
            self.expected_bias = self.expected_bias if self.new_bias is None else self.new_bias

    def commit(self, require_whole: bool) -> None:
        """Units that were written to become the quantized `full`; all of a matrix, or (require_whole) none of it."""
        for e, new in self.whole_matrices() if require_whole else self.matrices():
            rows, seen = self.full.shape[-2], self.seen.reshape(-1, *self.full.shape[-2:])[e]
            for first in range(0, rows, self.unit):
                last = min(first + self.unit, rows)
                if seen[first:last].any():
                    copy_unit(self.expected, new, e if self.full.dim() == 3 else None, first, last)

    def matrices(self) -> list[tuple[int, QTensor]]:
        new = quantize(self.full, self.scheme)
        return [(e, new) for e in range(self.full.shape[0] if self.full.dim() == 3 else 1)]

    def whole_matrices(self) -> list[tuple[int, QTensor]]:
        seen = self.seen.reshape(-1, *self.full.shape[-2:])
        return [(e, new) for e, new in self.matrices() if seen[e].all()]

    def stopped(self) -> None:
        """An interrupt ended the session. It says how: with `atomic=False` what was whole by then is new, or is not."""
        assert self.session is not None
        state = self.session.report().state
        assert state in ("finished", "aborted")
        self.over(committed=state == "finished")
        if self.mode == "per_weight" and state == "aborted":
            if self.new_bias is not None and torch.equal(self.bias, self.new_bias):
                self.expected_bias = self.new_bias
            for e, new in self.whole_matrices():
                there, wanted = self.matrix(self.param, e), self.matrix(new, e)
                if all(map(same_bytes, there, wanted)):
                    for old, part in zip(self.matrix(self.expected, e), wanted, strict=True):
                        old.copy_(part)

    def matrix(self, weight: QTensor, e: int) -> tuple[torch.Tensor, ...]:
        return weight.parts().matrix(e) if self.full.dim() == 3 else weight.parts()

    def check(self) -> None:
        if self.session is None:
            assert type(self.param) is QTensor
            assert type(self.bias) is torch.nn.Parameter
            now = [self.param.qdata.data_ptr(), self.param.scale.data_ptr(), self.bias.data_ptr()]
            assert now == self.addresses
        elif self.mode == "undo":
            return  # an undo log writes in place; its promise is for the end
        assert all(map(same_bytes, self.param.parts(), self.expected.parts()))
        bias = self.bias.clone() if self.session is not None else self.bias
        assert torch.equal(bias, self.expected_bias)
        if self.param.dim() == 2:
            x = torch.ones(2, self.param.shape[1]).bfloat16()
            assert self.expected.scheme.format == self.param.scheme.format
            assert torch.equal(torch.nn.functional.linear(x, self.param), torch.nn.functional.linear(x, self.expected))
