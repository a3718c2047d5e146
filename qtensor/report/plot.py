"""Pictures by matplotlib: a report's memory and SQNR, and several loads' memory side by side. An optional extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..extras import require

_QUANTIZED, _PLAIN, _STAGED, _INK, _GRID = "#2f74d0", "#9aa5b1", "#e07b00", "#3b424b", "#e3e7ec"
_LINES = (_PLAIN, _STAGED, _QUANTIZED, "#7a4fbf", "#1a7f4b")

Samples = Sequence[tuple[float, int]]
"""(seconds, bytes), in the order of time."""


def plot_load(
    path: str | Path,
    *,
    title: str,
    seconds: Sequence[float],
    held: Mapping[str, Sequence[int]],
    unquantized: int,
    sqnr: Sequence[float],
) -> None:
    """`LoadReport.plot`: bytes over time as stacked areas, and a histogram of SQNR where it was measured."""
    figure, axes = _figure((11 if sqnr else 7.5, 3.8), columns=2 if sqnr else 1)
    stack = [[n / 1e6 for n in series] for series in held.values()]
    axes[0].stackplot(seconds, stack, step="post", labels=list(held), colors=(_QUANTIZED, _PLAIN, _STAGED))
    axes[0].axhline(unquantized / 1e6, color=_INK, linestyle="--", linewidth=1, label="the same weights unquantized")
    _label(axes[0], title, "seconds", "MB")
    axes[0].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.94))
    if sqnr:
        axes[1].hist(sqnr, bins=20, color=_QUANTIZED, rwidth=0.92)
        axes[1].yaxis.get_major_locator().set_params(integer=True)
        _label(axes[1], f"SQNR of {len(sqnr)} weights", "dB", "weights")
    figure.savefig(path)


def plot_loads(loads: Mapping[str, Samples], path: str | Path, title: str) -> None:
    """Memory over time of several ways to load the same model: one line each, dotted once the load is over."""
    end = max(samples[-1][0] for samples in loads.values())
    figure, (axes,) = _figure((7.8, 4.2))
    for (label, samples), color in zip(loads.items(), _LINES, strict=False):
        seconds, held = [s for s, _ in samples], [n / 1e6 for _, n in samples]
        peak = f"{label}: peak {max(held):,.0f} MB"
        axes.plot(seconds, held, color=color, linewidth=2.2, label=peak, solid_joinstyle="round")
        axes.plot([seconds[-1], end], [held[-1]] * 2, color=color, linewidth=1.4, linestyle=":")
        axes.plot(seconds[-1], held[-1], "o", color=color, markersize=6, clip_on=False)
    _label(axes, title, "seconds", "MB above what the process held before")
    axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(0, 1.0))
    axes.set_ylim(0, 1.32 * axes.get_ylim()[1])
    figure.savefig(path)


def _figure(size: tuple[float, float], columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure of its own, without pyplot: no window, no global state, any thread."""
    matplotlib_figure = require("matplotlib.figure", "plot", "a picture")
    canvas = require("matplotlib.backends.backend_agg", "plot", "a picture")
    figure = matplotlib_figure.Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    canvas.FigureCanvasAgg(figure)
    ratios = [1.7, 1.0][:columns]
    axes = figure.subplots(1, columns, squeeze=False, gridspec_kw={"width_ratios": ratios})
    return figure, list(axes[0])


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0)
    axes.set_ylim(bottom=0)
    axes.tick_params(colors=_INK)
