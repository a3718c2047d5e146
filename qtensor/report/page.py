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
import math
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import LoadReport

_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}


def page(report: LoadReport) -> str:
    """The whole page. All of it is ASCII where names are concerned, whatever they hold."""
    parts = files("qtensor.report") / "assets"
    style, script = ((parts / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}"
    return Template((parts / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"qtensor load report: {report.scheme}"),
        policy=policy,
        style=style,
        script=script,
        text=html.escape(str(report)).encode("ascii", "xmlcharrefreplace").decode(),
        data=json.dumps(_data(report), allow_nan=False).translate(_ESCAPES),
    )


def _data(report: LoadReport) -> dict[str, Any]:
    """The report's JSON; what JSON has no number for, an infinite SQNR, becomes `lossless`."""
    data: dict[str, Any] = json.loads(report.to_json())
    for layer, found in zip(data["layers"], report.layers, strict=True):
        layer["lossless"] = found.sqnr is not None and math.isinf(found.sqnr)
    return data


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
