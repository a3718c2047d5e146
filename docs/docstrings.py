"""For the API page: fields of a docstring ("name: what it is", one per line) become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"^(\w+(?:, \w+)*): ", re.MULTILINE)


class Fields(griffe.Extension):
    """Loaded by mkdocstrings; see mkdocs.yml."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(_as_list(text) for text in paragraphs)


def _as_list(paragraph: str) -> str:
    """Each field is an item; what continues it stays in it."""
    if not _FIELD.match(paragraph):
        return paragraph
    return _FIELD.sub(lambda m: "- " + ", ".join(f"`{name}`" for name in m[1].split(", ")) + ": ", paragraph)
