"""Targets: which modules a group of a checkpoint's config.json speaks of. A stranger may have written them.

So no pattern may take longer the longer one waits: regular expressions run in linear time, all of them within a budget,
and names are looked up, since a mixed checkpoint lists each of its modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..schemes.config import split_patterns
from ..schemes.linear import LENGTH, LinearRegex

PATTERNS = 256
"""Globs and regular expressions of one group. Names may be as many as there are modules."""
WORK = 2_000_000
"""States that the expressions of a group may look at in all: a second or so. Real ones look at thousands."""


class Targets:
    """The names, globs and "re:..." patterns under a key of config.json, which `select` modules.

    A name of a class ("Linear") stands for every module if the group is the only one. Raises CheckpointError that names
    the key for what is no list of patterns, and for an expression that is no regular one or could run for ever.
    """

    def __init__(self, key: str, given: Any, only: bool) -> None:
        self._key = f"config.json: {key}"
        try:
            patterns = split_patterns(key, given or ())
        except ConfigError as error:
            raise CheckpointError(f"config.json: {error}") from None
        classes = {p for p in patterns if not p.startswith("re:") and "." not in p and p[:1].isupper()}
        self._all = bool(classes) and only
        self._names = {p for p in patterns if not p.startswith("re:")} - classes
        self._globs = [p for p in self._names if any(c in p for c in "*?[")]
        self._regexes = [self._regex(p) for p in dict.fromkeys(patterns) if p.startswith("re:")]
        if len(self._globs) + len(self._regexes) > PATTERNS or any(len(glob) > LENGTH for glob in self._globs):
            raise CheckpointError(f"{self._key}: at most {PATTERNS} patterns of {LENGTH} characters are read")

    def select(self, module: str) -> bool:
        """Is the module one of them, or below one?"""
        if self._all or any(name in self._names for name in _and_above(module)):
            return True
        if any(fnmatchcase(module, glob) for glob in self._globs):
            return True
        found = any(regex.match(module) for regex in self._regexes)
        if sum(regex.work for regex in self._regexes) > WORK:
            raise CheckpointError(f"{self._key}: its regular expressions take too long; give simpler ones")
        return found

    def _regex(self, pattern: str) -> LinearRegex:
        try:
            return LinearRegex(pattern[3:])
        except ValueError as error:
            raise CheckpointError(
                f"{self._key}: {pattern!r} is not used: {error}. A checkpoint's pattern has to be one that any name "
                "passes in one go."
            ) from None


def _and_above(module: str) -> Iterator[str]:
    """a.b.c, a.b, a"""
    while module:
        yield module
        module = module.rpartition(".")[0]
