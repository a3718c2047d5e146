"""What quantizing costs a language model: perplexity and divergence by bits per weight, of every scheme and every peer.

    python bench/perplexity.py [--libggml PATH --built-from WHAT] [--docs]

The model is that of bench/language_model.py (made first, if it is not there). Each row makes all linear layers' weights
as one library does (bench/quantizers.py) and puts their dequantized values into the same fp32 model; embeddings, head
and norms stay, activations are not quantized. On windows of the held-out documents: perplexity per token, and the mean
Kullback-Leibler divergence of the row's predictions from those of the bf16 weights, in nats, which sees what perplexity
averages out. Bits per weight: all that is stored for the linear layers, scales too, over their elements. Seconds: of
the processor, in one thread, to make them all.

Then once more on the same model with outlier channels: where it has none of its own, `with_outliers` multiplies a few
channels of each norm's weight by ALPHA and divides the columns of the linear layers behind it by as much. That is
SmoothQuant's equivalence (arXiv 2211.10438), (X / s) (s W) = X W, taken backwards; ALPHA is a power of two, so the
function stays the same, bit for bit.

The peers: pip install bitsandbytes hqq sinq datasets gguf (torchao is among ours). PATH is libggml-base of llama.cpp,
built on this machine (`cmake --build build --target ggml-base`), WHAT its version. --docs writes the tables and the
picture into docs/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import language_model
import machine
import perplexity_page
import quantizers
import torch
from perplexity_page import Row
from quantizers import Quantizer
from torch import nn

from qtensor import plan
from qtensor.schemes.scheme import as_scheme

PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"
WINDOWS, AT_ONCE = 48, 8
ALPHA, CHANNELS = 8.0, 6
BUDGETS = (4.4, 4.6, 4.75, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5)
CHOICES = (
    "int4_per_group:searched",
    "int4_asymmetric",
    "nvfp4:searched",
    "fp8_per_channel:searched",
    "int8_per_channel:searched",
)
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# Judging --------------------------------------------------------------------------------------------------------------


def windows_of(tokens: torch.Tensor, context: int, count: int) -> torch.Tensor:
    """int64 `[count, context + 1]` at equal distances, so that all documents have their say."""
    whole = tokens.unfold(0, context + 1, context)
    return whole[torch.linspace(0, len(whole) - 1, min(count, len(whole))).long()]


@torch.no_grad()
def predictions(model: Callable[[torch.Tensor], Any], windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Log-probabilities fp32 `[rows, context, vocabulary]`, a few windows at a time."""
    for rows in windows.split(AT_ONCE):
        yield model(rows[:, :-1]).logits.float().log_softmax(-1)


def judge(
    model: Callable[[torch.Tensor], Any], windows: torch.Tensor, reference: list[torch.Tensor]
) -> dict[str, float]:
    """Perplexity per token, the mean divergence from the reference's predictions in nats, and the standard error of the
    difference between the logarithms of both perplexities (each token counted as independent)."""
    nats = divergence = 0.0
    differences = []
    for rows, found, wanted in zip(windows.split(AT_ONCE), predictions(model, windows), reference, strict=True):
        said, once = (p.gather(-1, rows[:, 1:, None]).double() for p in (found, wanted))
        nats -= said.sum().item()
        differences.append((said - once).flatten())
        divergence += (wanted.exp() * (wanted - found)).sum(-1).double().sum().item()
    tokens = windows[:, 1:].numel()
    error = torch.cat(differences).std().item() / math.sqrt(tokens)
    return {"perplexity": math.exp(nats / tokens), "kl": divergence / tokens, "error": error}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Those in the layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}


def quantized(
    layers: dict[str, nn.Linear], weights: dict[str, torch.Tensor], of: Callable[[str], Quantizer | None]
) -> dict[str, float]:
    """Put quantized values into the layers. weights: bf16, by the layer's name. of: None leaves one as it is."""
    stored, seconds, warm = 0, 0.0, set()
    for name, weight in weights.items():
        quantizer = of(name)
        if quantizer is None:
            stored += weight.nbytes
            layers[name].weight.data.copy_(weight)
            continue
        if quantizer.label not in warm:  # Compiles, imports.
            warm.add(quantizer.label)
            quantizer.make(weight)
        began = time.process_time()
        made = quantizer.make(weight)
        seconds += time.process_time() - began
        stored += quantizer.bytes(made)
        layers[name].weight.data.copy_(quantizer.values(made))
    return {"bits": 8 * stored / sum(w.numel() for w in weights.values()), "seconds": seconds}


# Outliers -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def with_outliers(model: Any, alpha: float = ALPHA, channels: int = CHANNELS) -> None:
    """Make channels of what the norms say larger by alpha, and the weights that read them smaller: in place."""
    hidden = model.config.hidden_size
    at = torch.randperm(hidden, generator=torch.Generator().manual_seed(1))[:channels]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, behind in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[at] *= alpha
            for linear in behind:
                linear.weight[:, at] /= alpha


def inputs_of(model: nn.Module, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Linear layer → what it reads on a few windows, `[tokens, K]`."""
    read: dict[str, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda _, given, name=name: read.update({name: given[0].flatten(0, -2)}))
        for name, linear in linears(model).items()
    ]
    next(predictions(model, windows))
    for hook in hooks:
        hook.remove()
    return read


@torch.no_grad()
def shape_of(model: nn.Module, windows: torch.Tensor) -> dict[str, dict[str, float]]:
    """Kind of layer → means over the layers: excess kurtosis of its weights and of what it reads, and the largest
    channel of that over the median one (root mean squares)."""
    read = inputs_of(model, windows)
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        rows = []
        for name, linear in linears(model).items():
            if name.endswith(kind):
                channel = read[name].square().mean(0).sqrt()
                rows.append((kurtosis(linear.weight), kurtosis(read[name]), (channel.max() / channel.median()).item()))
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        found[kind] = dict(zip(("weights", "inputs", "channel"), means, strict=True))
    return found


def kurtosis(values: torch.Tensor) -> float:
    """Excess, over all elements: 0 for a normal distribution."""
    centred = values.double() - values.double().mean()
    return (centred.pow(4).mean() / centred.square().mean().square() - 3).item()


@torch.no_grad()
def by_kind(model: nn.Module, windows: torch.Tensor) -> dict[str, dict[str, list[float]]]:
    """Scheme → kind of layer → the squared error with searched scales over that without: of weights, and of what the
    layers answer."""
    read, found = inputs_of(model, windows), {}
    for name in perplexity_page.GAP:
        pair = [quantizers.of_scheme(name), quantizers.of_scheme(f"{name}:searched")]
        errors = {kind: torch.zeros(2, 2, dtype=torch.float64) for kind in KINDS}
        for layer, linear in linears(model).items():
            for at, quantizer in enumerate(pair):
                error = quantizer.values(quantizer.make(linear.weight.bfloat16())) - linear.weight
                both = torch.stack([error.square().sum(), (read[layer] @ error.t()).square().sum()])
                errors[layer.rpartition(".")[2]][at] += both
        found[name] = {kind: (searched / plain).tolist() for kind, (plain, searched) in errors.items()}
    return found


# The rows -------------------------------------------------------------------------------------------------------------


def rows_of(model: Any, folder: Path, windows: torch.Tensor, others: list[Quantizer]) -> list[Row]:
    """Everyone on one model, whose weights are as in bf16."""
    layers = linears(model)
    weights = {name: linear.weight.detach().bfloat16() for name, linear in layers.items()}
    reference = list(predictions(model, windows))
    rows: list[Row] = [
        {"label": "bf16", "family": "bf16", "bits": 16.0, "seconds": 0.0, **judge(model, windows, reference)}
    ]

    def add(label: str, family: str, of: Callable[[str], Quantizer | None]) -> None:
        found = quantized(layers, weights, of)
        rows.append({"label": label, "family": family, **found, **judge(model, windows, reference)})
        row = rows[-1]
        print(f"  {family:14} {label:28} {row['bits']:.3f} {row['perplexity']:.3f} {row['kl']:.5f}", flush=True)

    for quantizer in [*quantizers.ours(), *others]:
        add(quantizer.label, quantizer.family, lambda name, q=quantizer: q)  # type: ignore[misc]
    elements = sum(w.numel() for w in weights.values())
    tied = {p.data_ptr(): 2 * p.numel() for p in model.parameters()}
    rest = sum(tied.values()) - 2 * elements
    for bits in BUDGETS:
        made = plan(folder, int(rest + bits * elements / 8), schemes=CHOICES, ignore=["*embed_tokens*", "*lm_head*"])
        chosen = {w.name.removesuffix(".weight"): w.scheme for w in made.weights}
        by_name = {name: None if s is None else quantizers.of_scheme(as_scheme(s)) for name, s in chosen.items()}
        add(f"fit= {bits:g} bits", "fit=", lambda name, by_name=by_name: by_name[name])  # type: ignore[misc]
    for name, weight in weights.items():
        layers[name].weight.data.copy_(weight)
    return rows


def held_out(folder: Path) -> tuple[torch.Tensor, int]:
    """Tokens, int64, and of how many characters."""
    from transformers import AutoTokenizer

    texts: dict[str, str] = json.loads((folder / "held_out.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return language_model.encoded(tokenizer.backend_tokenizer, texts.values()), sum(map(len, texts.values()))


def models_of(folder: Path) -> Iterator[tuple[str, Any]]:
    """The model in fp32, as it is and with outliers."""
    from transformers import AutoModelForCausalLM

    for name in ("as trained", "with outliers"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if name != "as trained":
            with_outliers(model)
        yield name, model


def measured(folder: Path, windows_wanted: int, library: Path | None) -> dict[str, Any]:
    tokens, characters = held_out(folder)
    windows = windows_of(tokens, language_model.CONTEXT, windows_wanted)
    others, absent = quantizers.peers(library)
    training = json.loads((folder / "training.json").read_text())
    training.pop("command", None)  # Whoever asked for the model first.
    results: dict[str, Any] = {"training": training}
    results |= {"tokens": windows[:, 1:].numel(), "characters_per_token": characters / len(tokens)}
    results |= {"absent": absent, "peers": quantizers.versions(), "rows": {}, "shapes": {}, "by_kind": {}}
    for name, model in models_of(folder):
        print(name, flush=True)
        results["by_kind"][name] = by_kind(model, windows)
        results["shapes"][name] = shape_of(model, windows)
        results["rows"][name] = rows_of(model, folder, windows, others)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=language_model.STEPS, help="as of bench/language_model.py")
    parser.add_argument("--stop", type=int, default=language_model.STOP, help="as of bench/language_model.py")
    parser.add_argument("--data", type=Path, default=language_model.DATA, help="where the model is kept")
    parser.add_argument(
        "--windows", type=int, default=WINDOWS, help=f"of {language_model.CONTEXT} tokens (default {WINDOWS})"
    )
    parser.add_argument("--libggml", type=Path, help="libggml-base of llama.cpp, for its K formats")
    parser.add_argument("--built-from", default="", help="which version that is")
    parser.add_argument("--docs", action="store_true", help="write table and picture into docs/")
    parser.add_argument("--render", action="store_true", help="measure nothing, write them from the last results")
    parser.add_argument("--by-kind", action="store_true", help="only what searching does by kind of layer, in seconds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = language_model.folder_of(args.steps, args.stop, args.data)
    if args.render or args.by_kind:
        results = json.loads((machine.RESULTS / "perplexity.json").read_text())
        if args.by_kind:
            windows = windows_of(held_out(folder)[0], language_model.CONTEXT, args.windows)
            results["by_kind"] = {name: by_kind(model, windows) for name, model in models_of(folder)}
            machine.save("perplexity", results)
    else:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        results = machine.facts("torch", "transformers", "numba") | {"libggml": args.built_from}
        if args.libggml is not None:
            results["command"] = results["command"].replace(str(args.libggml), "PATH").replace(args.built_from, "WHAT")
        results |= measured(language_model.made(args.steps, args.stop, args.data), args.windows, args.libggml)
        results["minutes"] = (time.perf_counter() - began) / 60
        print(f"\nwritten: {os.path.relpath(machine.save('perplexity', results))}")
    print(f"\n{perplexity_page.page_text(results)}")
    if args.docs or args.render or args.by_kind:
        perplexity_page.draw(results["rows"])
        machine.into_page(PAGE, "by size", perplexity_page.page_text(results))


if __name__ == "__main__":
    main()
