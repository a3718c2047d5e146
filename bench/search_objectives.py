"""Which error a search of scales should lower, judged by a language model: weighted measures against the plain square.

    python bench/search_objectives.py [--orders 8] [--windows 16] [--docs]

The scales of nvfp4 and int4_per_group are chosen among the same candidates by several measures that need no data, by
others among more or fewer candidates, and of nvfp4 with the best of four global scales. Each choice is judged by the
Kullback-Leibler divergence of bench/perplexity.py, on its two models: by how much of the plain scales' divergence is
gone. Which columns share a scale is chance to the model, and moves that share by more than most measures do. So the
columns of every layer are put in a random order before they are quantized, and back after it, which no function sees;
a measure is compared with the square order by order, and what is reported is the mean of the differences and its
standard error. One row takes the squared inputs of the very text it is judged on as weights: what data could add to it.

Everything is in plain torch and fp32; `agreement` says in how many groups the squares' choice is the library's own.
Results are written after each order, so that an interrupted run keeps what it has. --docs writes the table into
docs/accuracy.md; --render does so from the last results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import language_model
import machine
import perplexity
import torch
from search import GAINS

from qtensor import quantize
from qtensor.kernels import SEARCHES
from qtensor.schemes.scheme import SCHEMES

PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"
SQUARES = "squares"
ORDERS, WINDOWS = 8, 16


# Measures -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """What a measure may look at: elements `[G, size]`, the root mean square of each one's row `[G, 1]`, and the mean
    square of what each one's column reads `[G, size]`, which only the row called `data` does."""

    elements: torch.Tensor
    row: torch.Tensor
    reads: torch.Tensor


Measure = Callable[[torch.Tensor, Group], torch.Tensor]
"""Errors `[G, size]` to what is to be least, `[G]`."""

MEASURES: dict[str, Measure] = {
    SQUARES: lambda d, g: d.square().sum(1),
    "squares times |w|": lambda d, g: (d.square() * g.elements.abs()).sum(1),
    "squares times w²": lambda d, g: (d.square() * g.elements.square()).sum(1),
    "squares times √(row² + w²)": lambda d, g: (d.square() * (g.row.square() + g.elements.square()).sqrt()).sum(1),
    "power of 1.5": lambda d, g: d.abs().pow(1.5).sum(1),
    "power of 2.4": lambda d, g: d.abs().pow(2.4).sum(1),
    "power of 3": lambda d, g: d.abs().pow(3).sum(1),
    "squares + ¼ (sum)²": lambda d, g: d.square().sum(1) + d.sum(1).square() / 4,
    "squares + (sum)²": lambda d, g: d.square().sum(1) + d.sum(1).square(),
    "data": lambda d, g: (d.square() * g.reads).sum(1),
}


@dataclass(frozen=True)
class Way:
    """How a row chooses. within: of candidates whose measure is at most so many times the least, the one whose errors
    add up to the least; margin: what a candidate must stay below, in units of the plain scale's error."""

    measure: str
    candidates: tuple[float, ...]
    gains: tuple[float, ...] = (1.0,)
    within: float = 1.0
    margin: float = 1.0


def ways(scheme: str) -> dict[str, Way]:
    """By label; the first is what the library does."""
    own = SEARCHES[scheme].candidates
    found = {name: Way(name, own) for name in MEASURES}
    found["squares; within 5 %, the least sum"] = Way(SQUARES, own, within=1.05)
    found["squares, if a tenth less"] = Way(SQUARES, own, margin=0.9)
    if scheme == "nvfp4":
        wide = tuple(float(at) for at in (0, *(at for at in range(-8, 9) if at)))
        found["squares, none that clips"] = Way(SQUARES, (0, 1, 4, 5))
        found["squares, 17 scales"] = Way(SQUARES, wide)
        found["squares, 4 global scales"] = Way(SQUARES, own, GAINS)
        found["squares, 17 scales, 4 global scales"] = Way(SQUARES, wide, GAINS)
        found["data, 17 scales"] = Way("data", wide)
    else:
        more = (1.0, 0.97, -0.93, -0.9, -0.875, -0.86, -0.84875, -0.82)
        found["squares, none that clips"] = Way(SQUARES, (1.0, -0.875))
        found["squares, 8 scales"] = Way(SQUARES, more)
        found["data, 8 scales"] = Way("data", more)
    return found


# Quantizing -----------------------------------------------------------------------------------------------------------


def nearest_e2m1(x: torch.Tensor) -> torch.Tensor:
    m = x.abs()
    codes = torch.where(m < 2, (m * 2).round() / 2, torch.where(m < 4, m.round(), (m / 2).round() * 2))
    return codes.clamp_max(6.0).copysign(x)


def restored(scheme: str, groups: torch.Tensor, candidate: float, gain: float) -> torch.Tensor:
    """fp32 elements `[G, size]` to what they are with that candidate; `gain`: on the matrix's largest, of nvfp4."""
    amax = groups.abs().amax(1, keepdim=True)
    if scheme == "nvfp4":
        fmt = SCHEMES[scheme].format
        matrix = fmt.gain_from_amax(amax.max() * gain)
        codes = fmt.scale_from_amax(amax, matrix).view(torch.uint8).int() + int(candidate)
        step = codes.clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).float() / matrix
        return nearest_e2m1(groups / step) * step
    step = amax / 7 * abs(candidate)
    if candidate < 0:
        highest, lowest = groups.amax(1, keepdim=True), groups.amin(1, keepdim=True)
        step = torch.where(highest + lowest > 0, -step, step)
    return torch.where(step == 0, 0.0, groups / step).round().clamp(-8, 7) * step


def chosen(
    scheme: str, weight: torch.Tensor, reads: torch.Tensor, wanted: dict[str, Way]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Of a matrix `[N, K]` each way's values, and "plain"; reads `[K]`."""
    size = SCHEMES[scheme].format.block[1]
    groups = weight.float().view(-1, size)
    row = weight.float().square().mean(1, keepdim=True).sqrt().repeat_interleave(weight.shape[1] // size, 0)
    group = Group(groups, row, reads.view(-1, size).repeat(weight.shape[0], 1))
    best: dict[str, tuple[float, torch.Tensor]] = {}
    for gain in sorted({gain for way in wanted.values() for gain in way.gains}):
        here = {label: way for label, way in wanted.items() if gain in way.gains}
        candidates = list(dict.fromkeys(c for way in here.values() for c in way.candidates))
        found = [restored(scheme, groups, candidate, gain) for candidate in candidates]
        if gain == 1.0:
            yield "plain", found[0].view(weight.shape)
        wanted_here = dict.fromkeys((way.measure, candidates.index(c)) for way in here.values() for c in way.candidates)
        errors = {(name, i): MEASURES[name](found[i] - groups, group) for name, i in wanted_here}
        for label, way in here.items():
            at = [candidates.index(c) for c in way.candidates]
            measured = torch.stack([errors[way.measure, i] for i in at])
            measured[0] *= way.margin
            if way.within > 1:
                close = measured <= way.within * measured.amin(0)
                sums = torch.stack([(found[i] - groups).sum(1).abs() for i in at])
                measured = torch.where(close, sums, float("inf"))
            which = measured.argmin(0)
            values = torch.stack([found[i] for i in at])[which, torch.arange(len(groups))]
            total = float((values - groups).square().sum())
            if label not in best or total < best[label][0]:
                best[label] = total, values
    for label, (_, values) in best.items():
        yield label, values.view(weight.shape)


def agreement(scheme: str, weights: list[torch.Tensor]) -> float:
    """The share of groups in which the squares' choice is what `quantize` makes."""
    same = count = 0
    size = SCHEMES[scheme].format.block[1]
    for weight in weights:
        values = dict(chosen(scheme, weight, torch.ones(weight.shape[1]), {SQUARES: ways(scheme)[SQUARES]}))[SQUARES]
        own = quantize(weight, f"{scheme}:searched").dequantize(torch.float32)
        is_same = ((values - own).abs() <= 1e-6 * own.abs()).view(-1, size).all(1)
        same, count = same + int(is_same.sum()), count + len(is_same)
    return same / count


# Judging --------------------------------------------------------------------------------------------------------------


class Judge:
    """One model, its windows, and what bf16 says to them."""

    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        self.model, self.windows, self.layers = model, windows, perplexity.linears(model)
        self.weights = {name: linear.weight.detach().bfloat16() for name, linear in self.layers.items()}
        reads = perplexity.inputs_of(model, windows)
        self.reads = {name: read.square().mean(0) for name, read in reads.items()}
        self.reference = list(perplexity.predictions(model, windows))

    @torch.no_grad()
    def divergences(self, scheme: str, seed: int) -> dict[str, float]:
        """Of "plain" and each way, with the columns of all layers in an order of that seed."""
        generator = torch.Generator().manual_seed(seed)
        made: dict[str, dict[str, torch.Tensor]] = {}
        for name, weight in self.weights.items():
            order = torch.randperm(weight.shape[1], generator=generator)
            for label, values in chosen(scheme, weight[:, order], self.reads[name][order], ways(scheme)):
                made.setdefault(label, {})[name] = torch.empty_like(values).index_copy_(1, order, values)
        found = {}
        for label, by_name in made.items():
            for name, values in by_name.items():
                self.layers[name].weight.data.copy_(values)
            found[label] = perplexity.judge(self.model, self.windows, self.reference)["kl"]
        return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Model → label → mean and standard error of the share that is gone; of others than squares, of the difference."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for model, orders in runs.items():
        shares = [{label: 1 - kl / order["plain"] for label, kl in order.items()} for order in orders]
        found[model] = {
            label: mean_and_error([s[label] - (0.0 if label == SQUARES else s[SQUARES]) for s in shares])
            for label in shares[0]
            if label != "plain"
        }
    return found


def table(runs: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Scheme → model → orders → divergences, as Markdown."""
    columns = [(s, m) for s, models in runs.items() for m in models]
    found = {scheme: summary(models) for scheme, models in runs.items()}
    labels = list(dict.fromkeys(label for s, m in columns for label in found[s][m]))
    lines = [f"| of the plain KL gone, in points | {' | '.join(f'`{s}`, {m}' for s, m in columns)} |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for label in labels:
        cells = []
        for scheme, model in columns:
            mean, error = found[scheme][model].get(label, (None, None))
            sign = "" if label == SQUARES else "+"
            cells.append("" if mean is None else f"{100 * mean:{sign}.1f} ± {100 * error:.1f}")
        said = label.replace("data", "squares times squared inputs (data)").replace("|", "\\|")
        lines.append(f"| {said} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=ORDERS, help=f"orders of columns (default {ORDERS})")
    parser.add_argument("--windows", type=int, default=WINDOWS, help=f"of the text (default {WINDOWS})")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/accuracy.md")
    parser.add_argument("--render", action="store_true", help="measure nothing, write it from the last results")
    args = parser.parse_args()
    if args.render:
        results = json.loads((machine.RESULTS / "search_objectives.json").read_text())
    else:
        torch.set_num_threads(1)
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        began = time.perf_counter()
        folder = language_model.made(language_model.STEPS, language_model.STOP, language_model.DATA)
        windows = perplexity.windows_of(perplexity.held_out(folder)[0], language_model.CONTEXT, args.windows)
        judges = {name: Judge(model, windows) for name, model in perplexity.models_of(folder)}
        results = machine.facts("torch", "transformers", "numba") | {"tokens": windows[:, 1:].numel()}
        schemes = ("nvfp4", "int4_per_group")
        some = list(next(iter(judges.values())).weights.values())
        results["agreement"] = {scheme: agreement(scheme, some) for scheme in schemes}
        print(results["agreement"], flush=True)
        runs = results["runs"] = {scheme: {name: [] for name in judges} for scheme in schemes}
        for seed in range(args.orders):
            for scheme in schemes:
                for name, judge in judges.items():
                    runs[scheme][name].append(judge.divergences(scheme, seed))
            results["minutes"] = (time.perf_counter() - began) / 60
            machine.save("search_objectives", results)
            print(f"order {seed + 1} of {args.orders}: {results['minutes']:.1f} minutes", flush=True)
            if seed:
                print(table(runs), flush=True)
    if args.docs or args.render:
        machine.into_page(PAGE, "search, measures", table(results["runs"]))


if __name__ == "__main__":
    main()
