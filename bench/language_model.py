"""Trains the language model that the benches of quality measure, on text that is installed anyway.

    python bench/language_model.py [--steps N] [--stop N] [--threads 1] [--data bench/.data]

A Llama of 11 M parameters (embeddings included, tied to the head), with a byte-level BPE of 4096 tokens that is trained
on the same text: the documentation strings of the standard library and of torch, numpy, sympy and networkx, and the
reference topics that Python ships. A twentieth of the documents, chosen by the hashes of their names, is held out. The
seed is fixed; one thread gives the same bits again on the same machine. Every few minutes the state is saved, so that a
run that was stopped goes on from there. It ends as a checkpoint in bf16 with its tokenizer and the held-out text, in a
folder named after what it was made from; one that is complete is not made again. Its `training.json` says what it took.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import platform
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch import nn

DATA = Path(__file__).parent / ".data"
PACKAGES = ("networkx", "numpy", "sympy", "torch")
SHORTEST = 200
"""Characters: a string of a source file is documentation from this length on."""

VOCABULARY, CONTEXT, BATCH = 4096, 256, 2
STEPS, STOP = 3600, 2593
"""Of the schedule, and taken of it."""
RATE, WARMUP, SEED = 1.5e-3, 200, 0
SHAPE: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
END = "<end>"


# The text -------------------------------------------------------------------------------------------------------------


def strings(source: str) -> Iterator[str]:
    """The long strings of a Python source in its order: docstrings, and what `add_docstr` and others are given."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset)):
        text = inspect.cleandoc(str(node.value))
        if len(text) >= SHORTEST and text.count(" ") > len(text) / 12:  # Others are tables and encoded data.
            yield text


def documents(folders: dict[str, Path]) -> dict[str, str]:
    """Name → text of each module below the folders, what was said before left out, in the order of the names."""
    found, seen = {}, set()
    for package, folder in sorted(folders.items()):
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).parts
            if any(part in ("site-packages", "test", "tests", "idle_test") for part in parts):
                continue
            try:
                texts = list(strings(file.read_text("utf-8")))
            except (SyntaxError, UnicodeDecodeError, ValueError):
                continue
            fresh = [text for text in dict.fromkeys(texts) if text not in seen]
            seen.update(fresh)
            if fresh:
                found["/".join((package, *parts))] = "\n\n".join(fresh)
    return found


def corpus() -> dict[str, str]:
    """Name → text of all documents. Other versions of Python and the packages say other things."""
    from pydoc_data.topics import topics

    folders = {"python": Path(sysconfig.get_paths()["stdlib"])}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{name} is not installed: its documentation is a part of the text")
        folders[name] = Path(spec.origin).parent
    return {f"topics/{name}": topics[name] for name in sorted(topics)} | documents(folders)


def is_held_out(name: str) -> bool:
    """A twentieth of all names, always the same."""
    return hashlib.sha256(name.encode()).digest()[0] * 20 < 256


# The model ------------------------------------------------------------------------------------------------------------


def recipe(steps: int, stop: int) -> dict[str, Any]:
    """All that decides what comes out."""
    versions = {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers", *PACKAGES)}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "shape": SHAPE,
        "vocabulary": VOCABULARY,
        "context": CONTEXT,
        "batch": BATCH,
        "steps": [stop, steps],
        "rate": RATE,
        "warmup": WARMUP,
        "seed": SEED,
    }


def folder_of(steps: int = STEPS, stop: int = STOP, data: Path = DATA) -> Path:
    key = hashlib.sha256(json.dumps(recipe(steps, stop), sort_keys=True).encode()).hexdigest()[:12]
    return data / f"language-model-{key}"


def trained_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE with an end token, which stands between documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encoded(tokenizer: Any, texts: Iterable[str]) -> torch.Tensor:
    """int64 `[tokens]`: each text after an end token."""
    end = tokenizer.token_to_id(END)
    return torch.tensor([token for text in texts for token in (end, *tokenizer.encode(text).ids)])


def new_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    end = {"bos_token_id": 0, "eos_token_id": 0}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **end, **SHAPE))
    return model


def rate(step: int, steps: int) -> float:
    """Up in a straight line, level, and down in one to a fiftieth over the last 55 %."""
    return RATE * min((step + 1) / WARMUP, 1.0, max(0.02, (steps - step) / (0.55 * steps)))


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, nats a token, of int64 `[batch, time + 1]`."""
    return F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())


def train(folder: Path, steps: int, stop: int, save_every: float = 240.0) -> None:
    """Into the folder, from where the last run stopped. stop: of all steps, which the schedule is for, take so many."""
    began = time.perf_counter()
    texts = corpus()
    learn = [text for name, text in texts.items() if not is_held_out(name)]
    held_out = {name: text for name, text in texts.items() if is_held_out(name)}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = trained_tokenizer(learn)
    tokens = encoded(tokenizer, learn)
    facts: dict[str, Any] = machine.facts("torch", "transformers", "tokenizers")
    facts |= {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1), "recipe": recipe(steps, stop)}
    facts |= {"documents": len(learn), "characters": sum(map(len, learn)), "corpus_tokens": len(tokens)}
    digest = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in texts.items()).encode())
    facts |= {"corpus_sha256": digest.hexdigest(), "held_out_documents": len(held_out)}
    print(f"{len(learn)} documents, {facts['characters']:,} characters, {len(tokens):,} tokens", flush=True)

    model = new_model()
    shown = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": shown, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, RATE, betas=(0.9, 0.98), fused=True)
    state, first, spent = folder / "state.pt", 0, time.perf_counter() - began
    if state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        first, spent = kept["step"], kept["seconds"]
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    print(f"{facts['parameters'] / 1e6:.2f} M parameters, from step {first}", flush=True)
    began, saved, mean = time.perf_counter() - spent, time.perf_counter(), math.nan
    for step in range(first, stop):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        # A generator of its own for each step: a run that goes on takes what the other would have taken.
        at = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(step))
        loss = loss_of(model, torch.stack([tokens[i : i + CONTEXT + 1] for i in at.tolist()]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if math.isnan(mean) else 0.95 * mean + 0.05 * loss.item()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {steps}: {mean:.3f} nats, {time.perf_counter() - began:.0f} s", flush=True)
        if time.perf_counter() - saved > save_every:
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(kept | {"seconds": time.perf_counter() - began}, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
            saved = time.perf_counter()
    facts |= {"seconds": time.perf_counter() - began, "steps": stop, "tokens": stop * BATCH * CONTEXT}
    if not math.isnan(mean):
        facts["last_loss"] = mean
    finish(folder, model, tokenizer, held_out, facts)
    state.unlink(missing_ok=True)


def finish(folder: Path, model: Any, tokenizer: Any, held_out: dict[str, str], facts: dict[str, Any]) -> None:
    """Write the checkpoint; training.json comes last and says that it is complete."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END).save_pretrained(folder)
    model.bfloat16().save_pretrained(folder)
    (folder / "held_out.json").write_text(json.dumps(held_out, indent=0))
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def made(steps: int = STEPS, stop: int = STOP, data: Path = DATA) -> Path:
    """The checkpoint's folder; trains what is not there."""
    folder = folder_of(steps, stop, data)
    if not (folder / "training.json").exists():
        train(folder, steps, stop)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the schedule (default {STEPS})")
    parser.add_argument("--stop", type=int, default=STOP, help=f"steps to take of it (default {STOP})")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--data", type=Path, default=DATA, help="where it goes (default bench/.data)")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(args.threads)
    folder = made(args.steps, args.stop, args.data)
    facts = json.loads((folder / "training.json").read_text())
    size = (folder / "model.safetensors").stat().st_size
    print(f"{os.path.relpath(folder)}: {size / 1e6:.1f} MB, trained in {facts['seconds']:.0f} s")


if __name__ == "__main__":
    main()
