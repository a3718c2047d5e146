"""LoadReport: what a session did, in exact numbers: a table, a page, a picture, and JSON for programs."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..regions.coverage import Box
from ..text import joined, printable
from ..version import __version__
from .plot import plot_load
from .timeline import MemoryPoint

_SHOWN_BOXES = 4
_SHOWN_NAMES = 3


@dataclass(frozen=True)
class LayerReport:
    """One quantized weight.

    Attributes:
        name: As its model calls it.
        scheme: What it became.
        shape: Its logical shape.
        bytes: Values and scales.
        source_bytes: What it would take in its logical dtype.
        sqnr: Signal-to-quantization-noise ratio in dB, where it was measured; infinite where nothing was lost.
        note: What was unusual.
        cast_from: The dtype of the values that were quantized, where the model was cast to another since then, in which
            they would have been rounded ("float32"); else empty.
        lossy_reads: How often a loader read elements that were quantized already.
        began: Seconds after the session began when its first element came; None for a weight that no loader wrote to.
        done: Seconds after the session began when it was complete.
        source: The quantized format that it arrived in, and whether its numbers are those of that ("lossless") or were
            quantized a second time ("requantized"); empty where it arrived in high precision.
    """

    name: str
    scheme: str
    shape: tuple[int, ...]
    bytes: int
    source_bytes: int
    sqnr: float | None = None
    note: str = ""
    lossy_reads: int = 0
    began: float | None = None
    done: float | None = None
    cast_from: str = ""
    source: str = ""


@dataclass
class LoadReport:
    """The outcome of a session so far.

    Attributes:
        state: "open", "finished" or "aborted".
        scheme: What weights become, by name.
        layers: The quantized weights.
        quantized_bytes: Their values and scales.
        passthrough_bytes: Parameters and buffers that stay as they are.
        passthrough: Names of such parameters with the reason, where there is one beyond not being selected.
        untouched: Weights nobody wrote to.
        missing: The unwritten boxes of every incomplete weight, one `(start, stop)` per dimension.
        peak_staged_bytes: The most bytes that waited for the rest of their unit at any time: in high precision, or as
            parts of a quantized source.
        peak_second_copy_bytes: Of a reload, the most bytes that new or saved values took beside the live ones.
        collectives: How many all-reduces ranks agreed on scales by.
        collective_bytes: What they reduced.
        lossy_reads: Reads of already quantized elements.
        seconds: From arming to the end of the session.
        warnings: What a person should know.
        timeline: Bytes over time, at most some hundred points; the last one and the staging peak are exact.
        settings: What the session was told, and the versions that carried it out.
    """

    state: str = "open"
    scheme: str = ""
    layers: list[LayerReport] = field(default_factory=list)
    quantized_bytes: int = 0
    passthrough_bytes: int = 0
    passthrough: dict[str, str] = field(default_factory=dict)
    untouched: list[str] = field(default_factory=list)
    missing: dict[str, list[Box]] = field(default_factory=dict)
    peak_staged_bytes: int = 0
    peak_second_copy_bytes: int = 0
    collectives: int = 0
    collective_bytes: int = 0
    lossy_reads: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    timeline: list[MemoryPoint] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def written(self) -> list[str]:
        """The weights that a loader wrote to, all of them or a part; of a reload, what moved. `untouched` is the
        rest."""
        left = set(self.untouched)
        return [name for name in (*(layer.name for layer in self.layers), *self.passthrough) if name not in left]

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as a JSON text, also written to `path` if given. An SQNR that is not finite (infinite: nothing was
        lost; NaN: the source held some) is null."""
        data = asdict(self)
        for layer in data["layers"]:
            if layer["sqnr"] is not None and not math.isfinite(layer["sqnr"]):
                layer["sqnr"] = None
        text = json.dumps(data, indent=2, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one page that needs no network and no other file, also written to `path` if given.

        Memory over time, a table of all weights to sort and filter, a histogram of SQNR where it was measured, what
        was missing, and the settings. Names come from checkpoints, and are shown as text whatever they hold.
        """
        from .page import page  # here, because it takes time to import and is needed only now

        data = _shown(json.loads(self.to_json()))
        for layer, found in zip(data["layers"], self.layers, strict=True):
            layer["lossless"] = found.sqnr == math.inf
        text = page(f"qtensor load report: {self.scheme}", str(self), data)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def plot(self, path: str | Path) -> None:
        """Draw memory over time, and SQNR where it was measured.

        Args:
            path: A file of any kind that matplotlib writes (PNG, SVG, PDF), by the name's ending.

        Raises:
            MissingExtraError: There is no matplotlib; the message names the extra.
        """
        plot_load(
            path,
            title=f"Memory while loading ({self.scheme})",
            seconds=[point.seconds for point in self.timeline],
            held={
                "quantized": [point.quantized_bytes for point in self.timeline],
                "left as they are": [point.passthrough_bytes for point in self.timeline],
                "staging": [point.staged_bytes for point in self.timeline],
            },
            unquantized=sum(layer.source_bytes for layer in self.layers) + self.passthrough_bytes,
            sqnr=[layer.sqnr for layer in self.layers if layer.sqnr is not None and not math.isinf(layer.sqnr)],
        )

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("weight", "shape", "scheme", "bytes", "ratio", "SQNR dB", "note")]
        for layer in self.layers:
            ratio = f"{layer.bytes / layer.source_bytes:.3f}" if layer.source_bytes else "-"
            sqnr = "-" if layer.sqnr is None else f"{layer.sqnr:.1f}"
            shape = "×".join(map(str, layer.shape))
            name, note = printable(layer.name), printable(layer.note)
            rows.append((name, shape, layer.scheme, f"{layer.bytes:,}", ratio, sqnr, note))
        if not any(layer.sqnr is not None for layer in self.layers):
            rows = [(*row[:5], row[6]) for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths).rstrip())
        total = self.quantized_bytes + self.passthrough_bytes
        share = f" ({self.quantized_bytes / total:.0%} of all bytes)" if total else ""
        lines += [
            "",
            f"{len(self.layers)} weights quantized to {self.quantized_bytes:,} bytes{share}; "
            f"{self.passthrough_bytes:,} bytes passed through",
            f"peak staging {self.peak_staged_bytes:,} bytes; lossy reads {self.lossy_reads}; {self.seconds:.2f} s; "
            f"session {self.state}",
        ]
        for why in dict.fromkeys(filter(None, self.passthrough.values())):
            names = [name for name, other in self.passthrough.items() if other == why]
            more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
            lines.append(f"not quantized: {', '.join(names[:_SHOWN_NAMES])}{more}: {why}")
        lines += [f"never written: {name}" for name in self.untouched]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return joined(lines)


def _shown(value: Any) -> Any:
    """JSON whose texts, keys included, are those that a person reads."""
    if isinstance(value, dict):
        return {printable(key): _shown(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_shown(held) for held in value]
    return printable(value) if isinstance(value, str) else value


def versions() -> dict[str, str]:
    """Versions that a reader of a report may ask for."""
    return {"qtensor": __version__, "torch": torch.__version__, "python": platform.python_version()}


def describe_boxes(shape: Sequence[int], boxes: Sequence[Box]) -> str:
    """ "11008 of 22016 rows never written: rows 11008:22016", or elements where the boxes are not whole rows."""
    total = prod(shape)
    if len(shape) == 2 and all(box[1] == (0, shape[1]) for box in boxes):
        count = sum(stop - start for (start, stop), _ in boxes)
        where = ", ".join(f"{start}:{stop}" for (start, stop), _ in boxes[:_SHOWN_BOXES])
        return f"{count} of {shape[0]} rows never written: rows {where}{_more(boxes)}"
    count = sum(prod(stop - start for start, stop in box) for box in boxes)
    shown = "; ".join("[" + ", ".join(f"{a}:{b}" for a, b in box) + "]" for box in boxes[:_SHOWN_BOXES])
    return f"{count} of {total} elements never written: {shown}{_more(boxes)}"


def describe_missing(name: str, shape: Sequence[int], boxes: Sequence[Box], *, reopened: bool = False) -> str:
    """One incomplete weight, for an error message, with a guess at the cause where there is one.

    reopened: the weight was complete once, and then rewritten in part when its other values were quantized already.
    """
    text = f"{name}: {describe_boxes(shape, boxes)}"
    if reopened:
        return f"{text} again, after a part of what shares their scales was rewritten; deliver these once more"
    hint = _fused_part(name, shape, boxes)
    return f"{text} (the checkpoint may lack '{hint}')" if hint else text


def _fused_part(name: str, shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """The half of a fused gate_up_proj that is exactly what is missing."""
    if "gate_up_proj" not in name or len(shape) != 2 or len(boxes) != 1:
        return None
    half = shape[0] // 2
    return {(0, half): "gate_proj", (half, shape[0]): "up_proj"}.get(boxes[0][0])


def _more(boxes: Sequence[Box]) -> str:
    return f" and {len(boxes) - _SHOWN_BOXES} more" if len(boxes) > _SHOWN_BOXES else ""
