"""What bench/perplexity.py found, for docs/accuracy.md: table, picture, and what was aimed at."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""label, family ("qtensor", "fit=", "bf16" or a peer's), bits, seconds, perplexity, kl, error."""
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "perplexity.svg"
GAP = ("nvfp4", "int4_per_group", "int4_per_group_32")


def gap_closed(rows: list[Row], name: str, key: str) -> float | None:
    """The part of what rounding costs that searched scales save. None where that cost is no more than chance."""
    bf16, plain, searched = (
        next(row for row in rows if row["label"] == label) for label in ("bf16", name, f"{name}:searched")
    )
    if key == "perplexity" and not lower(bf16, plain, key):
        return None
    return (plain[key] - searched[key]) / (plain[key] - bf16[key])  # type: ignore[no-any-return]


def lower(a: Row, b: Row, key: str) -> bool:
    """Of perplexities: by more than twice the standard error."""
    margin = 2 * math.hypot(a["error"], b["error"]) if key == "perplexity" else 0.0
    return a[key] < b[key] * math.exp(-margin)  # type: ignore[no-any-return]


def is_ours(row: Row) -> bool:
    return row["family"] in ("qtensor", "fit=")


def below_us(rows: list[Row], key: str) -> list[tuple[Row, Row | None]]:
    """Peers that are better than the best of ours that is no larger, and that one."""
    found: list[tuple[Row, Row | None]] = []
    for row in rows:
        if is_ours(row) or row["family"] == "bf16":
            continue
        fits = [r for r in rows if is_ours(r) and r["bits"] <= row["bits"] + 0.005]
        best = min(fits, key=lambda r: r[key], default=None)  # type: ignore[no-any-return]
        if best is None or lower(row, best, key):
            found.append((row, best))
    return found


def name_of(row: Row) -> str:
    if row["family"] in ("bf16", "four-over-six"):
        return str(row["label"])
    return f"`{row['label']}`" if is_ours(row) else f"{row['family']} {row['label']}"


def table(models: dict[str, list[Row]]) -> str:
    """Markdown, by size: perplexity and divergence on each model."""
    lines = ["| | bits per weight | " + " | ".join(f"{name}: perplexity | KL" for name in models) + " | seconds |"]
    lines.append("| --- | ---: |" + " ---: | ---: |" * len(models) + " ---: |")
    first, *more = models.values()
    for at in sorted(range(len(first)), key=lambda i: (round(first[i]["bits"], 2), first[i]["kl"])):
        row = first[at]
        cells = [name_of(row), f"{row['bits']:.2f}"]
        for rows in (first, *more):
            cells += [f"{rows[at]['perplexity']:.2f}", f"{rows[at]['kl']:.5f}"]
        lines.append("| " + " | ".join([*cells, f"{row['seconds']:.2f}" if row["seconds"] else ""]) + " |")
    return "\n".join(lines)


def shape_table(shapes: dict[str, dict[str, dict[str, float]]]) -> str:
    head = " | ".join(f"{name}: weights | inputs | largest channel" for name in shapes)
    lines = [f"| excess kurtosis | {head} |", "| --- |" + " ---: | ---: | ---: |" * len(shapes)]
    for kind in next(iter(shapes.values())):
        cells = [
            f"{found[kind]['weights']:.2f} | {found[kind]['inputs']:.1f} | {found[kind]['channel']:.1f} ×"
            for found in shapes.values()
        ]
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def kind_table(models: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """Markdown: what searched scales do to the squared error of weights and of answers."""
    columns = [(model, name) for model, found in models.items() for name in found]
    head = " | ".join(f"`{name}`, {model}: weights | answers" for model, name in columns)
    lines = [f"| searched over plain | {head} |", "| --- |" + " ---: | ---: |" * len(columns)]
    for kind in next(iter(next(iter(models.values())).values())):
        pairs = [models[model][name][kind] for model, name in columns]
        cells = " | ".join(f"{weights:.2f} | {answers:.2f}" for weights, answers in pairs)
        lines.append(f"| `{kind}` | {cells} |")
    return "\n".join(lines)


def goals(models: dict[str, list[Row]]) -> str:
    """Markdown: what was aimed at, and whether it is so."""
    lines = ["| aimed at | model | measured | |", "| --- | --- | --- | --- |"]
    for model, rows in models.items():
        for name in GAP:
            parts = {key: gap_closed(rows, name, key) for key in ("perplexity", "kl")}
            said = "no more than chance" if parts["perplexity"] is None else f"{parts['perplexity']:.0%}"
            measured = f"of KL {parts['kl']:.0%}, of perplexity {said}"
            known = [part >= 0.25 for part in parts.values() if part is not None]
            held = "yes" if all(known) else "in part" if any(known) else "no"
            lines.append(f"| `{name}:searched` closes a quarter of the gap to bf16 | {model} | {measured} | {held} |")
        for key, said in (("perplexity", "perplexity"), ("kl", "KL")):
            better = below_us(rows, key)
            each = ", ".join(
                f"{name_of(row)} ({row['bits']:.2f} bits, "
                + ("no form of ours is as small" if best is None else f"ours: {name_of(best)}")
                + ")"
                for row, best in better
            )
            held = "no" if better else "yes"
            lines.append(f"| no peer of a size has a lower {said} | {model} | {each or 'none has'} | {held} |")
    return "\n".join(lines)


STYLES = {
    "torchao": ("#c2571a", "^"),
    "bitsandbytes": ("#6b9e3f", "D"),
    "HQQ": ("#8a5fc0", "v"),
    "SINQ": ("#c24f8f", "P"),
    "llama.cpp": ("#3b424b", "s"),
    "four-over-six": ("#b8a11c", "X"),
}
FOUR = (4.05, 5.6)
"""Bits per weight that the left half of the picture shows."""


def draw(models: dict[str, list[Row]], path: Path = PICTURE) -> None:
    """Left: perplexity around four bits. Right: divergence over all sizes, in logarithms."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "perplexity", "font.size": 9})
    figure = Figure(figsize=(9.6, 3.9 * len(models) + 0.5), layout="constrained", facecolor="white")
    grid = figure.subplots(len(models), 2, squeeze=False)
    for (left, right), (name, rows) in zip(grid, models.items(), strict=True):
        for axes, key, kept in (
            (left, "perplexity", [r for r in rows if FOUR[0] <= r["bits"] <= FOUR[1]]),
            (right, "kl", [r for r in rows if r["family"] != "bf16"]),
        ):
            curve = sorted((r["bits"], r[key]) for r in kept if is_ours(r))
            lowest = [point for i, point in enumerate(curve) if point[1] <= min(p[1] for p in curve[: i + 1])]
            if axes is right:  # On the left most of what lies lowest does by chance.
                axes.plot(*zip(*lowest, strict=True), color="#2f74d0", linewidth=1.2, zorder=1)
            marks = {
                "qtensor, plain": (
                    "#2f74d0",
                    "o",
                    "white",
                    lambda r: r["family"] == "qtensor" and ":" not in r["label"],
                ),
                "qtensor, searched": ("#2f74d0", "o", "#2f74d0", lambda r: ":searched" in r["label"]),
                "qtensor, fit=": ("#2f74d0", "*", "#2f74d0", lambda r: r["family"] == "fit="),
            } | {
                family: (color, mark, color, lambda r, family=family: r["family"] == family)
                for family, (color, mark) in STYLES.items()
            }
            for label, (edge, mark, face, belongs) in marks.items():
                points = [(r["bits"], r[key]) for r in kept if belongs(r)]
                if points:
                    axes.scatter(
                        *zip(*points, strict=True),
                        s=34,
                        marker=mark,
                        edgecolors=edge,
                        facecolors=face,
                        label=label,
                        zorder=2,
                    )
            axes.set_xlabel("bits per weight")
            axes.set_axisbelow(True)
            axes.grid(color="#e3e7ec")
            axes.spines[["top", "right"]].set_visible(False)
        left.axhline(rows[0]["perplexity"], color="#9aa5b1", linestyle="--", linewidth=1)
        left.set_title(f"{name}: perplexity (dashed: bf16)", loc="left", fontsize=9)
        right.set_yscale("log")
        right.set_title(f"{name}: KL to bf16, nats a token", loc="left", fontsize=9)
    figure.legend(*grid[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def page_text(results: dict[str, Any]) -> str:
    """All that stands between the marks of docs/accuracy.md."""
    made, versions = results["training"], results["versions"] | results["peers"]
    known = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    bf16 = results["rows"]["as trained"][0]["perplexity"]
    error = next(row["error"] for row in results["rows"]["as trained"] if row["label"] == "nvfp4")
    text = (
        f"A Llama of {made['parameters'] / 1e6:.1f} M parameters, embeddings included, after {made['steps']} steps of "
        f"a schedule of {made['recipe']['steps'][1]}: {made['tokens'] / 1e6:.2f} M tokens, "
        f"{made['seconds'] / 60:.0f} minutes by the clock of one core of a busy machine. Held out: "
        f"{results['tokens']:,} tokens of {made['held_out_documents']} documents, on which bf16 has a perplexity of "
        f"{bf16:.1f} per token of {results['characters_per_token']:.1f} characters. The standard error of a four-bit "
        f"row's perplexity, against bf16's, is {100 * error:.2f} %. {results['date']}, {results['cpu']}, Python "
        f"{results['python']}; {known}"
        + (f"; llama.cpp's formats by its own code, {results['libggml']}" if results["libggml"] else "")
        + "."
        + (f" Not installed, so not here: {', '.join(results['absent'])}." if results["absent"] else "")
    )
    return "\n\n".join(
        [
            f"```sh\n{results['command']}\n```",
            text,
            f"![Bits per weight and perplexity of everyone](images/{PICTURE.name})",
            table(results["rows"]),
            goals(results["rows"]),
            shape_table(results["shapes"]),
            kind_table(results["by_kind"]),
        ]
    )
