"""Tables of operations: one handler for each, a word where one replaces another, and a rule for all that have none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qtensor import fp8_per_channel, quantize
from qtensor.lazy import ops as lazy_ops
from qtensor.lazy.lazy_tensor import LIVE_OPS
from qtensor.lazy.lazy_tensor import OPS as LAZY_OPS
from qtensor.tensor import ops, ops_products
from qtensor.tensor.qtensor import OPS
from qtensor.tensor.table import Handler, OpTable

aten = torch.ops.aten


def first(func: Any, *args: Any, **kwargs: Any) -> Any:
    return "first", func, args, kwargs


def second(func: Any, *args: Any, **kwargs: Any) -> Any:
    return "second", func, args, kwargs


@pytest.fixture
def table() -> OpTable:
    table = OpTable()
    table.add(first, aten.mm.default, aten.bmm.default)
    return table


def test_a_handler_is_called_as_the_operation_is(table: OpTable) -> None:
    assert table.dispatch(aten.mm.default, (1, 2), {"out": 3}) == ("first", aten.mm.default, (1, 2), {"out": 3})
    assert table.dispatch(aten.bmm.default, [1], None) == ("first", aten.bmm.default, (1,), {})


def test_a_second_handler_is_refused(table: OpTable) -> None:
    with pytest.raises(ValueError, match=r"aten\.mm\.default has the handler .*first.*second"):
        table.implements(aten.mm.default)(second)
    assert table.handler(aten.mm.default) is first


def test_the_same_handler_again_is_no_second_one(table: OpTable) -> None:
    table.add(first, aten.mm.default)
    assert table.handler(aten.mm.default) is first


def test_a_handler_may_say_which_one_it_replaces(table: OpTable) -> None:
    @table.implements(aten.mm.default, replaces=first)
    def mm(func: Any, *args: Any) -> str:
        return "mm"

    assert table.dispatch(aten.mm.default, (), None) == "mm"
    assert table.handler(aten.bmm.default) is first


@pytest.mark.parametrize("op", [aten.mm.default, aten.addmm.default], ids=["another", "none"])
def test_what_it_says_has_to_be_true(table: OpTable, op: Any) -> None:
    with pytest.raises(ValueError, match="replaces"):
        table.add(second, op, replaces=test_what_it_says_has_to_be_true)


def test_tables_with_a_handler_each_do_not_go_together(table: OpTable) -> None:
    other = OpTable()
    other.add(second, aten.bmm.default)
    with pytest.raises(ValueError, match=r"aten\.bmm\.default"):
        OpTable().fill(table, other, otherwise=lambda op: first)


def test_an_unknown_operation_is_asked_for_once(table: OpTable) -> None:
    asked = []

    def otherwise(op: Any) -> Handler:
        asked.append(op)
        return second

    filled = OpTable()
    filled.fill(table, otherwise=otherwise)
    assert [filled.dispatch(op, (), None)[0] for op in (aten.mm.default, aten.addmm.default)] == ["first", "second"]
    assert filled.dispatch(aten.addmm.default, (), None)[0] == "second"
    assert asked == [aten.addmm.default]
    with pytest.raises(NotImplementedError, match=r"aten\.addmm\.default.*import qtensor"):
        table.dispatch(aten.addmm.default, (), None)


def test_the_tables_may_be_filled_again() -> None:
    """As `importlib.reload(qtensor)` does."""
    ops.install()
    lazy_ops.install()
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    assert quantize(weight, fp8_per_channel).sum().isfinite()


def test_an_operation_without_an_entry_is_computed_on_dequantized_values() -> None:
    weight = quantize(torch.randn(4, 8, dtype=torch.bfloat16), fp8_per_channel)
    assert torch.equal(weight.cumsum(1), weight.dequantize().cumsum(1))


def entries(table: OpTable) -> Iterator[Any]:
    return iter(table._handlers)


def test_a_live_weight_answers_products_as_a_quantized_one_and_all_else_as_a_lazy_one() -> None:
    transposes = {aten.t.default, aten.transpose.int}  # a matrix for products, the weight for writes
    for op in entries(ops_products.OPS):
        assert (LIVE_OPS.handler(op) is OPS.handler(op)) == (op not in transposes)
        assert LAZY_OPS.handler(op) is not OPS.handler(op)
    for op in (aten.copy_.default, aten.slice.Tensor, aten.detach.default, aten.stack.default, aten.add.Tensor):
        assert LIVE_OPS.handler(op) is LAZY_OPS.handler(op)
        assert LIVE_OPS.handler(op) is not OPS.handler(op)
