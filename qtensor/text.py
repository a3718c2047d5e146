"""Text for people: names and values come from checkpoints, and some characters are obeyed by a terminal, not shown.

Control characters, line separators, bidirectional overrides and halves of surrogate pairs set colours and titles,
overwrite lines and turn text around. `printable` writes them as Python does in a string: \\x1b, \\u202e.
"""

from __future__ import annotations

from collections.abc import Iterable


def printable(text: str, keep: str = "") -> str:
    """The text, each character that does something instead of being seen escaped. May be repeated."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """The same for a text whose line breaks and tabs are meant: names in it have been through `printable`."""
    return printable(text, "\n\t")


def joined(lines: Iterable[str], between: str = "\n") -> str:
    """Lines that hold names, one below the other."""
    return between.join(map(printable, lines))
