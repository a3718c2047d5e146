"""What quantizing libraries do in the situations that loads go wrong in, found by doing it, side by side.

    python bench/features.py [--docs]

Each cell of the table is an outcome, not a claim: the script brings about the situation with each library that is
installed (a tiny Llama on the CPU, fp8 or int8 weights) and says what happened. --docs writes the table into
docs/comparison.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from safetensors.torch import load_file, save_file
from torch import nn

PAGE = Path(__file__).parent.parent / "docs" / "comparison.md"
NAME = "model.layers.0.mlp.up_proj.weight"
Loader = Callable[[Path], nn.Module]


def with_qtensor(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    from qtensor import fp8, online_quant

    with online_quant(fp8.weight_only(), progress=False):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def with_torchao(folder: Path) -> nn.Module:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    quantize_(model, Float8WeightOnlyConfig())
    return model


def with_transformers(folder: Path) -> nn.Module:
    from torchao.quantization import Float8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    config = TorchAoConfig(Float8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


def with_bitsandbytes(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )


# column → (packages it needs, how it loads)
SYSTEMS: dict[str, tuple[tuple[str, ...], Loader]] = {
    "qtensor": (("qtensor-online", "transformers"), with_qtensor),
    "torchao `quantize_`": (("torchao", "transformers"), with_torchao),
    "transformers, TorchAoConfig": (("transformers", "torchao"), with_transformers),
    "transformers, bitsandbytes nf4": (("transformers", "bitsandbytes"), with_bitsandbytes),
}


# The situations. Each makes a change to the checkpoint, or does something to the loaded model, and says what it saw.


def missing_weight(load: Loader, folder: Path) -> str:
    _change(folder, lambda state: state.pop(NAME))
    values = _values(load(folder))
    return "loads, the weight is random" if values.float().std() > 0 else "loads, the weight is constant"


def nan_in_a_weight(load: Loader, folder: Path) -> str:
    _change(folder, lambda state: state[NAME][3].fill_(float("nan")))
    values = _values(load(folder))
    return "loads, with NaN in the weight" if values.isnan().any() else "loads, and the NaN is gone"


def missing_half(load: Loader, folder: Path) -> str:
    """A weight of half as many rows, as a fused weight of which one part is missing."""
    _change(folder, lambda state: state.update({NAME: state[NAME][: len(state[NAME]) // 2].clone()}))
    known, values = load_file(folder / "model.safetensors")[NAME], _values(load(folder))
    if len(values) == len(known):
        return "loads, the weight has half the rows"
    kept = torch.allclose(values[: len(known)].float(), known.float(), atol=0.05 * known.abs().max().item())
    return "loads, the other half is random" if kept else "loads, all of the weight is random"


def new_values(load: Loader, folder: Path) -> str:
    """`weight.copy_(new bf16 values)` into the loaded model: are the new values there, at the same address?"""
    model, new = load(folder), load_file(folder / "model.safetensors")[NAME] * 2 + 0.01
    weight = _weight(model)
    before = _address(weight)
    with torch.no_grad():
        weight.data.copy_(new)
    same = "same address" if _address(_weight(model)) == before else "another address"
    values = _values(model)
    if values.shape != new.shape or (values.float() - new.float()).abs().max() > 0.1 * new.abs().max():
        return "accepted, but the values are not the new ones"
    return f"quantized again, {same}"


def new_rows(load: Loader, folder: Path) -> str:
    """The same for some rows: how sharded and chunked loaders write."""
    model, new = load(folder), load_file(folder / "model.safetensors")[NAME][8:16] * 2 + 0.01
    weight = _weight(model)
    with torch.no_grad():
        weight.data[8:16].copy_(new)
    values = _values(model)[8:16]
    if values.shape != new.shape or (values.float() - new.float()).abs().max() > 0.1 * new.abs().max():
        return "accepted, but the values are not the new ones"
    return "quantized again"


SITUATIONS = {
    "a weight is missing in the checkpoint": missing_weight,
    "half the rows of a weight are missing": missing_half,
    "a weight holds NaN": nan_in_a_weight,
    "bf16 values are copied into a quantized weight": new_values,
    "... into some of its rows": new_rows,
}


def outcome(situation: Callable[[Loader, Path], str], load: Loader) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _checkpoint(folder)
        try:
            return situation(load, folder)
        except Exception as error:
            return f"raises {type(error).__name__}"


def _checkpoint(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def _change(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _weight(model: nn.Module) -> Any:
    return model.get_parameter(NAME)


def _values(model: nn.Module) -> torch.Tensor:
    """The weight in high precision, whatever it is kept as."""
    weight = _weight(model)
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        found: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return found
    return weight.dequantize() if hasattr(weight, "dequantize") else weight.detach()


def _address(weight: Any) -> int:
    return int(getattr(weight, "qdata", weight).data_ptr())


def installed(packages: tuple[str, ...]) -> bool:
    try:
        return all(importlib.metadata.version(package) for package in packages)
    except importlib.metadata.PackageNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/comparison.md")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    systems = {name: load for name, (packages, load) in SYSTEMS.items() if installed(packages)}
    for name in SYSTEMS.keys() - systems.keys():
        print(f"not installed: {name}")
    rows = {
        label: {name: outcome(situation, load) for name, load in systems.items()}
        for label, situation in SITUATIONS.items()
    }
    lines = ["| | " + " | ".join(systems) + " |", "| --- |" + " --- |" * len(systems)]
    lines += ["| " + " | ".join([label, *row.values()]) + " |" for label, row in rows.items()]
    text = "\n".join(lines)
    print(text)
    if args.docs:
        machine.into_page(PAGE, "outcomes", text)
    packages = sorted({package for name in systems for package in SYSTEMS[name][0]})
    print(f"\nwritten: {os.path.relpath(machine.save('features', machine.facts('torch', *packages) | {'rows': rows}))}")


if __name__ == "__main__":
    main()
