"""peft's own tests, which nobody here wrote, on base models that qtensor quantized: which of them pass, and why not.

    pip download --no-deps --no-binary :all: peft==VERSION && tar xf peft-VERSION.tar.gz
    python tests/libraries/peft_suite.py peft-VERSION [--files custom_models ...] [--scheme fp8] [-- PYTEST ARGUMENTS]

Every file is run by pytest, in processes of their own: as it is; with each model that a test makes or loads in a block
of `online_quant`; and, of the latter, what failed once more with comparisons that allow for rounding (a merge into a
quantized weight rounds, where peft asks for 1e-4). Printed is what passes plainly and fails quantized, in the end by
test and by error. Nothing is fetched:
tests that load a model by its name find a tiny random one of the same class in a hub cache made here (`MODELS`), and
those that ask for a data set, a tokenizer or another model fail both times, so that they do not count.

This file is also the plugin of those runs; it changes what tests get, never what they ask.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import linecache
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SCHEME, OUTCOMES, SAMPLE = "QTENSOR_SUITE_SCHEME", "QTENSOR_SUITE_OUTCOMES", "QTENSOR_SUITE_SAMPLE"
ROUNDED = "QTENSOR_SUITE_ROUNDED"
ROUNDING = 0.15
"""The distance, as a part of what is compared, that the third run allows for."""
FILES = (
    "custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "initialization", "mixed",
    "low_level_api", "tuners_utils", "other", "target_parameters", "lora_variants", "helpers", "seq_classifier",
    "multitask_prompt_tuning", "trainable_tokens", "lora_conversion", "vera", "randlora", "shira", "vblora", "bdlora",
    "mapping", "osf", "cpt", "arrow", "xlora", "shadow",
)  # fmt: skip
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"vocab_size": 1024}
KV = {"num_key_value_heads": 2}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
DEBERTA: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", SIZES | OPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", SIZES | OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", GPT | {"rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", SIZES),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("BloomForCausalLM", SIZES),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", SIZES),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", SIZES),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", SIZES),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", SIZES),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", SIZES | KV),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", SIZES | KV),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", SIZES | KV | {"head_dim": 8}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", SIZES | KV),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", SIZES),
    "hf-internal-testing/tiny-random-BertModel": ("BertModel", SIZES),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", SIZES),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", SIZES),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", SIZES),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", SIZES | DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", SIZES | DEBERTA),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration", BART | BART_HEADS,
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", T5),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOssForCausalLM", SIZES | KV | {"head_dim": 8, "num_local_experts": 4},
    ),
}  # fmt: skip


def main() -> None:
    own, pytest_arguments = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, pytest_arguments = own[:cut], own[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="peft's source, of the version that is installed")
    parser.add_argument("--files", nargs="+", default=FILES, metavar="NAME", help="test_NAME.py (default: FILES)")
    parser.add_argument("--scheme", default="fp8")
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="one test of N, the same ones each time")
    parser.add_argument("--out", type=Path, help="also as JSON; files that are there already are not run again")
    args = parser.parse_args(own)
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(args.source / "tests", folder / "tests")
        (folder / "tests" / "__init__.py").touch()
        (folder / "pytest.ini").write_text("[pytest]\n")
        hub = make_hub(folder / "hub")
        for file in args.files:
            if file not in found:
                found[file] = one_file(folder, hub, file, args.scheme, args.sample, pytest_arguments)
                print(summary(file, found[file]), flush=True)
                if args.out:
                    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(summary("all", total(found.values())))
    for error, tests in sorted(total(found.values())["failed"].items(), key=lambda item: -sum(item[1].values())):
        print(f"\n{sum(tests.values())}: {error}")
        for test, count in Counter(tests).most_common():
            print(f"    {count:4} {test}")


def one_file(folder: Path, hub: Path, file: str, scheme: str, sample: int, arguments: list[str]) -> dict[str, Any]:
    plain = run(folder, hub, file, arguments, "", sample)
    quantized = run(folder, hub, file, arguments, scheme, sample)
    failed = [test for test in plain if plain[test][0] == "passed" and quantized.get(test, [""])[0] == "failed"]
    return compared(plain, quantized, run(folder, hub, file, arguments, scheme, only=failed) if failed else {})


def make_hub(folder: Path) -> Path:
    """A cache as huggingface_hub keeps it, with a tiny random model for each name."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name, (kind, sizes) in MODELS.items():
        torch.manual_seed(0)
        model_class = getattr(transformers, kind)
        model = model_class(model_class.config_class(**WORDS | sizes))
        place = folder / f"models--{name.replace('/', '--')}"
        model.save_pretrained(place / "snapshots" / "0")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0")
    return folder


def run(
    folder: Path, hub: Path, file: str, arguments: list[str], scheme: str, sample: int = 1, only: Sequence[str] = ()
) -> dict[str, list[str]]:
    """[outcome, error] of every test of one file; of `only` these, allowing for rounding."""
    outcomes, rounded = folder / "outcomes.json", folder / "rounded.json"
    outcomes.unlink(missing_ok=True)
    rounded.write_text(json.dumps(list(only)))
    environment = os.environ | {SCHEME: scheme, OUTCOMES: str(outcomes), SAMPLE: str(sample), ROUNDED: str(rounded)}
    environment |= {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # The models are tiny.
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *arguments, f"tests/test_{file}.py"],
        cwd=folder,
        env=environment | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    result: dict[str, list[str]] = json.loads(outcomes.read_text()) if outcomes.exists() else {}
    if not result:
        sys.exit(f"No test ran: pip install parameterized?\n{done.stdout[-4000:]}")
    return result


def compared(
    plain: dict[str, list[str]], quantized: dict[str, list[str]], again: dict[str, list[str]]
) -> dict[str, Any]:
    """Counts, and of what passes plainly and fails quantized, allowing for rounding: {error: {test: count}}."""
    passing = [test for test, (outcome, _) in plain.items() if outcome == "passed"]
    counts = Counter(quantized.get(test, ["lost"])[0] for test in passing)
    failed: dict[str, Counter[str]] = {}
    rounded = 0
    for test in passing:
        outcome, error = quantized.get(test, ["lost", "not run"])
        if outcome not in ("passed", "skipped"):
            if again.get(test, [""])[0] == "passed":
                rounded += 1
            else:
                error = again.get(test, ["", error])[1]
                failed.setdefault(error, Counter())[test.partition("[")[0].rpartition("::")[2]] += 1
    return {
        "pass plainly": len(passing),
        "of these passed": counts["passed"],
        "passed but for rounding": rounded,
        "skipped": counts["skipped"],
        "fail plainly": sum(outcome == "failed" for outcome, _ in plain.values()),
        "failed": {error: dict(tests) for error, tests in failed.items()},
    }


def total(parts: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {"failed": {}}
    for part in parts:
        for key, value in part.items():
            if key != "failed":
                whole[key] = whole.get(key, 0) + value
        for error, tests in part["failed"].items():
            whole["failed"][error] = dict(Counter(whole["failed"].get(error, {})) + Counter(tests))
    return whole


def summary(name: str, found: dict[str, Any]) -> str:
    failed = sum(sum(tests.values()) for tests in found["failed"].values())
    return f"{name}: {failed} failed; " + ", ".join(f"{key} {value}" for key, value in found.items() if key != "failed")


# The plugin of those runs

_outcomes: dict[str, list[str]] = {}
_open = False


def pytest_configure(config: Any) -> None:
    if OUTCOMES not in os.environ:
        return
    for mark in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", mark)
    no_data = types.ModuleType("datasets")
    no_data.load_dataset = _no_data  # type: ignore[attr-defined]
    no_data.Dataset = no_data.IterableDataset = type("Dataset", (), {})  # type: ignore[attr-defined]
    no_data.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    sys.modules.setdefault("datasets", no_data)
    from tests import testing_utils

    testing_utils._HUB_MODEL_ACCESSES = _Everything()
    if os.environ[SCHEME]:
        import transformers

        base = transformers.PreTrainedModel
        base.from_pretrained = classmethod(_in_block(base.from_pretrained.__func__))  # type: ignore[attr-defined]


class _Everything(dict[str, int]):
    """Whatever it is, it has been loaded before: nothing asks the network."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 1


def _no_data(*args: Any, **options: Any) -> Any:
    raise FileNotFoundError("data sets are not here")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Models that a file of tests defines are quantized as they are made."""
    from torch import nn

    if OUTCOMES not in os.environ:
        return
    sample = int(os.environ[SAMPLE])
    items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % sample == 0]
    if only := json.loads(Path(os.environ[ROUNDED]).read_text()):
        items[:] = [item for item in items if item.nodeid in only]
        _allow_for_rounding()
    if not os.environ[SCHEME]:
        return
    done = set()
    for module in {item.module for item in items}:
        for value in vars(module).values():
            own = isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
            if own and "__init__" in vars(value) and value not in done:
                done.add(value)
                value.__init__ = _in_block(value.__init__)


def _allow_for_rounding() -> None:
    import torch

    exactly = torch.allclose

    def allclose(found: Any, wanted: Any, *args: Any, **options: Any) -> bool:
        caller = sys._getframe(1)
        differs = "not torch.allclose" in linecache.getline(caller.f_code.co_filename, caller.f_lineno)
        if differs or exactly(found, wanted, *args, **options):
            return bool(exactly(found, wanted, *args, **options))
        difference = torch.linalg.vector_norm(found.double() - wanted.double())
        return bool(difference <= ROUNDING * torch.linalg.vector_norm(wanted.double()))

    torch.allclose = allclose


def _in_block(function: Callable[..., Any]) -> Callable[..., Any]:
    """What it makes is quantized: what it loads, and what no checkpoint has, from its initial values."""
    import functools

    @functools.wraps(function)
    def within(*args: Any, **options: Any) -> Any:
        global _open
        if _open:
            return function(*args, **options)
        from qtensor import online_quant

        _open = True
        try:
            with online_quant(os.environ[SCHEME], on_missing="init", progress=False):
                return function(*args, **options)
        finally:
            _open = False

    return within


def pytest_runtest_logreport(report: Any) -> None:
    if OUTCOMES not in os.environ:
        return
    before = _outcomes.get(report.nodeid, ["passed"])[0]
    if report.when == "call" or report.outcome != "passed":
        outcome = report.outcome if before == "passed" else before
        _outcomes[report.nodeid] = [outcome, _general(report.longreprtext) if outcome == "failed" else ""]


def _general(text: str) -> str:
    """The error, or the condition that was not met, without numbers, names and addresses, so that equal ones are
    counted together."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    asked = [line[1:].strip() for line in text.splitlines() if line.startswith(">")]
    line = errors[0] if errors else text.strip().rpartition("\n")[2]
    if asked and line.startswith(("assert", "AssertionError")):
        line = asked[-1]
    line = re.sub(r"'[^']*'", "'…'", line)
    return re.sub(r"0x[0-9a-f]+|-?\d+(\.\d+)?(e-?\d+)?", "#", line)[:160]


def pytest_sessionfinish() -> None:
    if OUTCOMES in os.environ:
        Path(os.environ[OUTCOMES]).write_text(json.dumps(_outcomes))


if __name__ == "__main__":
    main()
