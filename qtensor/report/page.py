"""The report as one HTML page: the parts in `assets/`, put together with the report's data, without a foreign request.

Names in a report come from checkpoints, and a page is opened with a click. So the data stands in the page as JSON in
which no character can end the element, the script only ever sets text, and a content security policy admits that one
script and that one style, by their hashes, and no network at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from string import Template
from typing import Any

_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}


def page(title: str, text: str, data: dict[str, Any]) -> str:
    """The whole page. text: the report for readers without scripts. data: its JSON, in which each layer says beside its
    SQNR, for which JSON has no infinity, whether it is `lossless`. All is ASCII where names are concerned."""
    parts = files("qtensor.report") / "assets"
    style, script = ((parts / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}"
    return Template((parts / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        policy=policy,
        style=style,
        script=script,
        text=html.escape(text).encode("ascii", "xmlcharrefreplace").decode(),
        data=json.dumps(data, allow_nan=False).translate(_ESCAPES),
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
