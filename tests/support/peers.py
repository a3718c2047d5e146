"""What other libraries make of a tiny model: their checkpoint in a folder, the weights that their decoders see in it,
and the logits that their own layers give; and what has to hold of such a folder here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import qtensor
from qtensor import QTensor, load_checkpoint, verify_checkpoint
from qtensor.convert import quantize_checkpoint
from support.helpers import assert_oracle, same_bytes

SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
}
IDS = torch.arange(16)[None]


@dataclass
class Made:
    """A folder that a peer wrote.

    weights: what its decoder sees, by name, in the model's dtype. logits: of its own layers, where they run here.
    """

    folder: Path
    weights: Mapping[str, torch.Tensor]
    logits: torch.Tensor | None = None


def plain_model(dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(dtype).eval()


def plain_folder(folder: Path, tokens: bool = False) -> Path:
    """tokens: with a tokenizer, which some libraries ask for whether they have text or not."""
    plain_model().save_pretrained(folder)
    if tokens:
        from tokenizers import Tokenizer, models

        made = Tokenizer(models.WordLevel({str(i): i for i in range(SIZES["vocab_size"])}, unk_token="0"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0").save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()  # type: ignore[no-any-return]


def empty_model(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def load(folder: Path, scheme: str, **options: Any) -> tuple[Any, Any]:
    model = empty_model(folder)
    return model, load_checkpoint(model, folder, scheme=scheme, **options)


def assert_decoded_as_theirs(made: Made) -> None:
    """All in high precision: their numbers, and logits no further from exact ones than theirs."""
    model, _ = load(made.folder, "fp8", ignore=["*"])
    assert len(made.weights) >= 7
    for name, wanted in made.weights.items():
        assert same_bytes(model.get_parameter(name), wanted), name
    if made.logits is not None:
        exact = logits(copy.deepcopy(model).float())
        mine, theirs = ((found - exact).norm() for found in (logits(model), made.logits))
        assert mine <= 1.2 * theirs + 1e-3 * exact.norm(), (mine, theirs, exact.norm())


def assert_becomes(made: Made, scheme: str, shared: bool = False, source: Any = None) -> set[str]:
    """Every way to another scheme gives the same bytes: of the decoded weight, or the same numbers. Returns which.

    shared: matrices that are fused share a scale file to file; then that way is not compared. source: as
    `QTensorConfig` takes it.
    """
    model, report = load(made.folder, scheme)
    outcomes = {layer.name: layer.source.rpartition(": ")[2] for layer in report.layers if layer.source}
    for name, wanted in made.weights.items():
        found = model.get_parameter(name)
        if not isinstance(found, QTensor):
            continue
        if outcomes[name] == "requantized":
            assert_oracle(found, wanted, found.scheme)
        else:  # Owners may round to the scale's dtype on the way.
            torch.testing.assert_close(found.dequantize().float(), wanted.float(), rtol=2**-7, atol=0)
    given = qtensor.QTensorConfig(scheme, source=source)
    assert_same(from_pretrained(made.folder, given), model, made)
    out = made.folder.parent / f"{made.folder.name}-{scheme}"
    quantize_checkpoint(made.folder, out, scheme)
    assert verify_checkpoint(out) == []
    again = empty_model(out)
    load_checkpoint(again, out)
    if not shared:
        assert_same(again, model, made)
    return set(outcomes.values())


def from_pretrained(folder: Path, config: Any) -> Any:
    from qtensor.checkpoint import quantizer

    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16
        )
    finally:
        quantizer.unregister()


def assert_same(model: Any, other: Any, made: Made) -> None:
    for name in made.weights:
        a, b = model.get_parameter(name), other.get_parameter(name)
        if isinstance(b, QTensor):
            assert all(same_bytes(x, y) for x, y in zip(a.parts(), b.parts(), strict=True)), name
        else:
            assert same_bytes(a, b), name


def linear_weights(model: Any, decode: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the projections of a model, as `decode` sees them."""
    return {
        f"{name}.weight": decode(module).detach().to(torch.bfloat16)
        for name, module in model.named_modules()
        if name.endswith("_proj")
    }
