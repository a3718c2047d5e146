"""The league table: qtensor beside everyone who quantizes without calibration, one run, one machine, one checkpoint.

    python bench/league.py [--size-mb 1000] [--repeat 5] [--vllm-python PYTHON] [--peers-python PYTHON] [--docs]

A generated bf16 Llama is loaded by each contender (`bench/contenders.py`), each time in a fresh process that has done
the same with a tiny model, and by all in turns. Seconds: of the load alone, files in the page cache. Peak and "stays":
anonymous memory above what the warm process held before, sampled from outside every 2 ms, and after the load. Error:
of the logits after 23 fixed tokens, relative, from the same bf16 weights computed in fp32 by transformers; measured in
the first round. Reload: all weights of a second checkpoint into the model that was loaded, in place. In the first
round the answers are compared with that checkpoint's; a contender that took the weights and answers otherwise has no
reload time.

vLLM and the peers (optimum-quanto, bitsandbytes) have environments of their own, which need qtensor too, for the
measuring: `pip install optimum-quanto bitsandbytes transformers accelerate .`. What is not installed is named in the
table. --docs writes table and picture into docs/; --render makes them again from bench/results/league.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from contenders import BASELINES, CONTENDERS, Contender
from load_memory import checkpoint
from safetensors.torch import load_file

from qtensor.report.memory import Measurement, measure

ROOT = Path(__file__).parent.parent
PAGE, PICTURE = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images" / "league.svg"
PROGRAM = str(Path(__file__).parent / "contenders.py")
Row = dict[str, Any]


# Running --------------------------------------------------------------------------------------------------------------


def run(names: list[str], pythons: dict[str, str | None], size_mb: float, repeat: int) -> Row:
    """All measurements, contenders in turns, and the rows made of them."""
    rows, runs, pythons_of = {}, {}, {}
    for name in names:
        contender = CONTENDERS[name]
        rows[name], python = found_packages(contender, pythons[contender.environment])
        if python:
            runs[name], pythons_of[name] = [], python
        else:
            print(f"{contender.label}: not installed: {rows[name]['missing']}", flush=True)
    folder, newer = checkpoint(size_mb / 1000), checkpoint(size_mb / 1000, seed=1)
    into_page_cache(folder, newer)
    with tempfile.TemporaryDirectory() as scratch:
        answers = Path(scratch)
        (answers / "reference").mkdir()
        command = [sys.executable, PROGRAM, "reference", str(folder), str(newer), "--out", str(answers / "reference")]
        subprocess.run(command, check=True, capture_output=True)
        for name, python in pythons_of.items():
            if "qtensor-online" in CONTENDERS[name].packages:
                own_cache(name)
                measure([python, PROGRAM, name, str(folder), str(newer)])  # Not counted: it compiles the loops.
        for turn in range(repeat):
            for name, python in list(pythons_of.items()):
                own_cache(name)
                command = [python, PROGRAM, name, str(folder), str(newer)]
                if turn == 0:
                    (answers / name).mkdir()
                    command += ["--out", str(answers / name)]
                started = time.perf_counter()
                try:
                    runs[name].append(measure(command))
                except RuntimeError as error:
                    rows[name]["failed"] = str(error).strip().splitlines()[-1]
                    del pythons_of[name]
                    print(f"{CONTENDERS[name].label}: failed: {error}", flush=True)
                    continue
                took = time.perf_counter() - started
                print(f"{turn + 1}/{repeat} {CONTENDERS[name].label}: {runs[name][-1].seconds:.2f} s", end="")
                print(f" ({took:.0f} s in all)", flush=True)
        for name in pythons_of:
            rows[name] |= summarize(runs[name]) | errors(answers / name, answers / "reference")
    return {
        "checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "repeat": repeat,
        "rows": rows,
        "runs": {name: [vars(sample) for sample in found] for name, found in runs.items()},
    }


def found_packages(contender: Contender, python: str | None) -> tuple[Row, str | None]:
    """The versions of what a contender needs, and the Python to run it with, or None if something is missing."""
    versions = machine.versions(python, *contender.packages) if python else {}
    missing = [package for package in contender.packages if package not in versions]
    return {"versions": versions} | ({"missing": ", ".join(missing)} if missing else {}), None if missing else python


def own_cache(name: str) -> None:
    """Keep what numba compiles apart: environments that share one source tree, and have different versions of numba,
    overwrite each other's. This one's is where it always is."""
    environment = CONTENDERS[name].environment
    os.environ.pop("NUMBA_CACHE_DIR", None)
    if environment != "main":
        os.environ["NUMBA_CACHE_DIR"] = str(ROOT / "build" / "numba" / environment)


def into_page_cache(*folders: Path) -> None:
    """Read once, so that the first contender does not pay for the disk."""
    for folder in folders:
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def summarize(runs: list[Measurement]) -> Row:
    """Medians, and the lowest and highest, of one contender's processes."""
    row: Row = {}
    figures = {
        "seconds": [sample.result["seconds"] for sample in runs],
        "peak_bytes": [sample.peak for sample in runs],
        "stays_bytes": [sample.final for sample in runs],
        "reload_seconds": [s.result["reload_seconds"] for s in runs if "reload_seconds" in s.result],
    }
    for name, values in figures.items():
        if values:
            row[name], row[f"{name}_range"] = statistics.median(values), [min(values), max(values)]
    refused = next((s.result["reload_error"] for s in runs if "reload_error" in s.result), None)
    return row | ({"reload_refused": f"raises {refused}"} if refused else {})


def errors(found: Path, wanted: Path) -> Row:
    """Relative errors of the answers after the load and after the reload, and whether the reload's are the new ones."""
    row: Row = {}
    for name, key in (("loaded", "error"), ("reloaded", "reload_error")):
        if (found / f"{name}.safetensors").exists():
            theirs, right = (load_file(folder / f"{name}.safetensors")["logits"] for folder in (found, wanted))
            row[key] = ((theirs - right).norm() / right.norm()).item()
    # Both checkpoints are of a kind, so their errors are; an unrelated model's answers are off by about 1.4.
    if row.get("reload_error", 0) > 2 * row["error"]:
        row["reload_refused"] = "takes them, answers are wrong"
    return row


# The tables -----------------------------------------------------------------------------------------------------------


def table(rows: dict[str, Row]) -> str:
    """Markdown, one line per contender, ratios to plain bf16 of the same engine."""
    lines = [
        "| | version | load, s | of bf16 | peak, MB | of bf16 | stays, MB | error | reload, s | of bf16 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        contender = CONTENDERS[name]
        own = contender.packages[0]
        cells = [contender.label, f"{own} {row['versions'].get(own, '')}".strip()]
        if "seconds" not in row:
            why = f"not installed: {row['missing']}" if "missing" in row else f"failed: {row.get('failed')}"
            lines.append("| " + " | ".join([*cells, why.replace("|", " "), *[""] * 7]) + " |")
            continue
        plain = rows.get(BASELINES[contender.engine], {})
        cells += [_spread(row, "seconds", 1, 2), _ratio(row, plain, "seconds")]
        cells += [_spread(row, "peak_bytes", 1e6, 0), _ratio(row, plain, "peak_bytes")]
        cells += [f"{row['stays_bytes'] / 1e6:.0f}", f"{row['error']:.1%}"]
        if "reload_refused" in row:
            cells += [f"– ({row['reload_refused']})", ""]
        else:
            cells += [_spread(row, "reload_seconds", 1, 2), _ratio(row, plain, "reload_seconds")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(row: Row, key: str, unit: float, digits: int) -> str:
    low, high = row[f"{key}_range"]
    middle, low, high = (f"{value / unit:.{digits}f}" for value in (row[key], low, high))
    return middle if low == high else f"{middle} ({low}–{high})"


def _ratio(row: Row, plain: Row, key: str) -> str:
    return f"{row[key] / plain[key]:.2f}" if key in plain else "–"


def goals(rows: dict[str, Row]) -> str:
    """Markdown: what was to be reached, and what was measured. A goal whose contenders are missing is left out."""
    lines = ["| goal | measured | met |", "| --- | --- | --- |"]

    def say(goal: str, measured: str, met: bool) -> None:
        lines.append(f"| {goal} | {measured} | {'yes' if met else 'no'} |")

    def ratio(name: str, other: str, limit: float) -> None:
        if "seconds" in rows.get(name, {}) and "seconds" in rows.get(other, {}):
            value = rows[name]["seconds"] / rows[other]["seconds"]
            say(f"{CONTENDERS[name].label}: load ≤ {limit} × {CONTENDERS[other].label}", f"{value:.2f}", value <= limit)

    for name in ("qtensor", "vllm-qtensor"):
        if "seconds" not in rows.get(name, {}):
            continue
        ours = rows[name]
        engine = CONTENDERS[name].engine
        others = {
            other: row["peak_bytes"]
            for other, row in rows.items()
            if CONTENDERS[other].engine == engine and other not in (name, "bf16-mapped") and "peak_bytes" in row
        }
        if others:
            lowest = min(others, key=lambda other: others[other])
            say(
                f"{CONTENDERS[name].label}: the lowest peak of {engine}",
                f"{ours['peak_bytes'] / 1e6:.0f} MB; next {CONTENDERS[lowest].label}, {others[lowest] / 1e6:.0f} MB",
                ours["peak_bytes"] < others[lowest],
            )
        share = ours["peak_bytes"] / ours["stays_bytes"]
        say(f"{CONTENDERS[name].label}: peak ≤ 1.02 × what stays", f"{share:.3f}", share <= 1.02)
    ratio("vllm-qtensor", "vllm-fp8", 0.7)
    ratio("vllm-qtensor", "vllm-bf16", 1.3)
    ratio("qtensor", "bf16", 1.3)
    return "\n".join(lines)


def page_text(results: Row) -> str:
    """All that stands between the marks of docs/benchmarks.md."""
    versions: dict[str, str] = {}
    for row in results["rows"].values():
        versions |= row["versions"]
    size, repeat = results["checkpoint_bytes"] / 1e6, results["repeat"]
    facts = (
        f"{results['date']}, {results['cores']} cores of {results['cpu']}, Python {results['python']}, "
        f"torch {results['versions']['torch']}. A checkpoint of {size:.0f} MB, "
        + (f"medians of {repeat} processes (lowest–highest)." if repeat > 1 else "one process each.")
    )
    others = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return "\n\n".join(
        [
            f"```sh\n{results['command']}\n```",
            facts,
            table(results["rows"]),
            f"Versions: {others}.",
            goals(results["rows"]),
            f"![Peak memory and load time of each contender](images/{PICTURE.name})",
        ]
    )


def draw(rows: dict[str, Row], path: Path) -> None:
    """Bars: peak memory with a mark at what stays, and seconds with their spread."""
    import matplotlib
    from matplotlib.figure import Figure

    known = {name: row for name, row in rows.items() if "seconds" in row}
    matplotlib.rcParams.update({"svg.hashsalt": "league", "font.size": 9})
    figure = Figure(figsize=(9.6, 0.42 * len(known) + 1.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    colors = ["#2f74d0" if name.endswith("qtensor") else "#9aa5b1" for name in known]
    places = list(range(len(known)))
    peaks, seconds = ([row[key] for row in known.values()] for key in ("peak_bytes", "seconds"))
    left.barh(places, [peak / 1e6 for peak in peaks], color=colors, height=0.62)
    stays = [row["stays_bytes"] / 1e6 for row in known.values()]
    left.plot(stays, places, "|", color="#3b424b", markersize=13, markeredgewidth=1.6, label="stays")
    left.set_yticks(places, [CONTENDERS[name].label.replace("`", "") for name in known])
    left.invert_yaxis()
    left.set_title("anonymous MB: peak, and a mark at what stays", loc="left", fontsize=9)
    spread = [[abs(row["seconds_range"][end] - row["seconds"]) for row in known.values()] for end in (0, 1)]
    right.barh(places, seconds, xerr=spread, color=colors, height=0.62, error_kw={"ecolor": "#3b424b", "capsize": 2})
    right.set_title("load, seconds: median, lowest to highest", loc="left", fontsize=9)
    for axes in (left, right):
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="#e3e7ec")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=float, default=1000, help="bytes of the checkpoint, 10^6 (default 1000)")
    parser.add_argument("--repeat", type=int, default=5, help="processes per contender (default 5)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--vllm-python", metavar="PYTHON", help="default: .venv-vllm/bin/python, if it is there")
    parser.add_argument("--peers-python", metavar="PYTHON", help="default: .venv-peers/bin/python, if it is there")
    parser.add_argument("--docs", action="store_true", help="write table and picture into docs/")
    parser.add_argument("--render", action="store_true", help="measure nothing, write them from the last results")
    args = parser.parse_args()
    if args.render:
        results = json.loads((machine.RESULTS / "league.json").read_text())
    else:
        pythons: dict[str, str | None] = {"main": sys.executable}
        for environment, given in (("vllm", args.vllm_python), ("peers", args.peers_python)):
            usual = ROOT / f".venv-{environment}" / "bin" / "python"
            pythons[environment] = given or (str(usual) if usual.exists() else None)
        load, started = os.getloadavg(), time.perf_counter()
        results = machine.facts("torch") | {"load_average": {"before": load}}
        for python in (args.vllm_python, args.peers_python):
            results["command"] = results["command"].replace(python or "PYTHON", "PYTHON")
        results |= run(args.only, pythons, args.size_mb, args.repeat)
        results["load_average"]["after"] = os.getloadavg()
        results["minutes"] = (time.perf_counter() - started) / 60
        print(f"\nwritten: {os.path.relpath(machine.save('league', results))}")
    print(f"\n{page_text(results)}")
    if args.docs or args.render:
        draw(results["rows"], PICTURE)
        machine.into_page(PAGE, "league", page_text(results))


if __name__ == "__main__":
    main()
