"""LinearRegex: `re.match` as a yes or no, in time that grows with the text and never explodes.

`re` tries one way after the other, and a pattern such as (a+)+$ has exponentially many. Patterns that a checkpoint
brings are therefore run on all ways at once: the tree that `re` parses becomes an automaton whose set of states moves
along the text. What needs more than states (backreferences, looking ahead or behind, atomic groups) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_parser: Any = re._parser  # type: ignore[attr-defined]
_compiler: Any = re._compiler  # type: ignore[attr-defined]

LENGTH = 1024
"""Of a pattern, in characters."""
STATES = 2048
"""Of its automaton: a{1000} has 2000."""
_KEPT = 4096  # Steps that are remembered: names of weights repeat each other.
_ONE_CHARACTER = {_parser.LITERAL, _parser.NOT_LITERAL, _parser.ANY, _parser.IN}
_ENDS = {_parser.AT_BEGINNING, _parser.AT_BEGINNING_STRING, _parser.AT_END, _parser.AT_END_STRING}
_TYPES = re.ASCII.value | re.LOCALE.value | re.UNICODE.value
_Test = Callable[..., Any] | None


class _Place(dict[Any, "_Place"]):
    """A set of states, and the places that characters led to from it so far."""

    def __init__(self, states: frozenset[int]) -> None:
        super().__init__()
        self.states = states


_MATCHED, _DEAD = _Place(frozenset()), _Place(frozenset())


class LinearRegex:
    """A pattern that matches in at most a constant for each character of a text.

    Raises ValueError, that says what of it is too long, too large, no regular expression, or needs backtracking.

    Attributes:
        work: The states that were looked at so far; steps that are remembered cost none.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > LENGTH:
            raise ValueError(f"it has {len(pattern)} characters, and at most {LENGTH} are read")
        # By state: a state to go to without a character, at a spot that passes the test; or with one that does.
        self._empty: list[list[tuple[_Test, int]]] = []
        self._one: list[list[tuple[Any, int]]] = []
        self._looks_back = False
        self._places: dict[frozenset[int], _Place] = {}
        self._kept = self.work = 0
        try:
            tree = _parser.parse(pattern)
            self._end = self._sequence(tree, tree.state.flags, self._state())
        except (re.error, OverflowError, RecursionError, FutureWarning) as error:
            raise ValueError(f"it is no regular expression: {error}") from None

    def match(self, text: str) -> bool:
        """Does it match at the beginning of the text?"""
        place, last = _Place(frozenset((0,))), len(text) - 1
        place = self._places.setdefault(place.states, place)
        for i, here in enumerate(text):
            # What `$` sees in a line break, and \\b everywhere, are the characters beside.
            key: Any = (text[i - 1 : i], here, i < last) if self._looks_back or here == "\n" else here
            after = place.get(key)
            if after is None:
                after = self._step(place, key, text[i - 1 : i] if i else "", here, i < last)
            if not after.states:
                return after is _MATCHED
            place = after
        before = text[-1:] if self._looks_back else ""
        after = place.get((before, ""))
        return (self._step(place, (before, ""), before, "", False) if after is None else after) is _MATCHED

    def _step(self, place: _Place, key: Any, before: str, here: str, more: bool) -> _Place:
        """Where the character `here` leads to, or the end of the text; to be remembered under the key."""
        around, found, todo = before + here + ("x" if more else ""), set(place.states), list(place.states)
        while todo:
            for test, state in self._empty[todo.pop()]:
                if state not in found and (test is None or test(around, len(before))):
                    found.add(state)
                    todo.append(state)
        self.work += len(found)
        if self._kept >= _KEPT:
            self._places.clear()
            self._kept = 0
        self._kept += 1
        if self._end in found:
            after = _MATCHED
        else:
            states = frozenset(s for state in found for test, s in self._one[state] if here and test(here))
            after = self._places.setdefault(states, _Place(states)) if states else _DEAD
        place[key] = after
        return after

    # From the tree to the automaton: each method adds what leads on from the state `at`, and returns where to.

    def _state(self) -> int:
        if len(self._empty) >= STATES:
            raise ValueError(f"it needs more than {STATES} states; a repetition in it is too large")
        self._empty.append([])
        self._one.append([])
        return len(self._empty) - 1

    def _then(self, at: int, test: _Test = None) -> int:
        state = self._state()
        self._empty[at].append((test, state))
        return state

    def _sequence(self, items: Any, flags: int, at: int) -> int:
        for kind, given in items:
            at = self._item(kind, given, flags, at)
        return at

    def _item(self, kind: Any, given: Any, flags: int, at: int) -> int:
        if kind in _ONE_CHARACTER:
            state = self._state()
            self._one[at].append((_alone(kind, given, flags), state))
            return state
        if kind is _parser.AT:
            self._looks_back |= given not in _ENDS or bool(flags & re.MULTILINE)
            return self._then(at, _alone(kind, given, flags))
        if kind is _parser.SUBPATTERN:
            _, add, remove, items = given
            return self._sequence(items, ((flags & ~_TYPES if add & _TYPES else flags) | add) & ~remove, at)
        if kind is _parser.BRANCH:
            ends = [self._sequence(items, flags, self._then(at)) for items in given[1]]
            state = self._state()
            for end in ends:
                self._empty[end].append((None, state))
            return state
        if kind in (_parser.MAX_REPEAT, _parser.MIN_REPEAT):  # Which of all matches it finds is not asked.
            least, most, items = given
            return self._repeat(least, most, items, flags, at)
        raise ValueError(f"it needs backtracking ({str(kind).lower().replace('_', ' ')})")

    def _repeat(self, least: int, most: Any, items: Any, flags: int, at: int) -> int:
        for _ in range(least):
            at = self._sequence(items, flags, self._then(at))
        if most is _parser.MAXREPEAT:
            loop = self._then(at)
            self._empty[self._sequence(items, flags, self._then(loop))].append((None, loop))
            return loop
        end = self._state()
        for _ in range(most - least):
            self._empty[at].append((None, end))
            at = self._sequence(items, flags, self._then(at))
        self._empty[at].append((None, end))
        return end


def _alone(kind: Any, given: Any, flags: int) -> Any:
    """`re`'s own judgement of one character, or of one place."""
    state = _parser.State()
    state.flags = flags
    return _compiler.compile(_parser.SubPattern(state, [(kind, given)]), flags).match
