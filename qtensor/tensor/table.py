"""OpTable: which function carries out a PyTorch operation on a tensor class of this package.

A handler is called as PyTorch calls the operation: `handler(func, *args, **kwargs)`, where `func` is the operation, for
handlers of several. QTensor, LazyWeight and LiveQTensor have one table each, which `tensor.ops.install` and
`lazy.ops.install` fill with the tables of single files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

Handler = Callable[..., Any]


class OpTable:
    """Operation → handler. An operation has one handler; giving it another says which one that `replaces`."""

    def __init__(self) -> None:
        self._handlers: dict[Any, Handler] = {}
        self.otherwise: Callable[[Any], Handler] = _not_filled

    def implements(self, *ops: Any, replaces: Handler | None = None) -> Callable[[Handler], Handler]:
        """Decorates the handler of `ops`."""

        def register(handler: Handler) -> Handler:
            self.add(handler, *ops, replaces=replaces)
            return handler

        return register

    def add(self, handler: Handler, *ops: Any, replaces: Handler | None = None) -> None:
        """Make `handler` the one of `ops`, which had none before, or all had `replaces`. Raises ValueError else."""
        for op in ops:
            present = self._handlers.get(op)
            if present is not replaces and present is not handler:
                raise ValueError(f"{op} has the handler {present}; {handler} says that it replaces {replaces}")
            self._handlers[op] = handler

    def fill(self, *parts: OpTable, otherwise: Callable[[Any], Handler]) -> None:
        """Take the entries of other tables. `otherwise` gives the handler of an operation that has no entry; it is
        asked once, when the operation is first met."""
        for part in parts:
            for op, handler in part._handlers.items():
                self.add(handler, op)
        self.otherwise = otherwise

    def handler(self, op: Any) -> Handler:
        """The handler of an operation."""
        handler = self._handlers.get(op)
        if handler is None:
            handler = self._handlers[op] = self.otherwise(op)
        return handler

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Carry out an operation with what `__torch_dispatch__` is given."""
        handler = self._handlers.get(func) or self.handler(func)
        return handler(func, *args, **(kwargs or {}))


def _not_filled(op: Any) -> NoReturn:
    raise NotImplementedError(f"{op} met a table of operations that is not in use: `import qtensor` fills them")
