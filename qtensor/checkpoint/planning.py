"""plan: which scheme each weight of a model, or of a checkpoint, gets so that all of it fits; nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..extras import require
from ..kernels import SOURCE_DTYPES
from ..modules import full_name, local_tensor, parameters
from ..schemes.plan import Plan, Tensor
from ..schemes.planning import DEFAULT_SCHEMES, Engine, Size, make_plan, tensors_of
from ..schemes.scheme import SchemeLike
from .files import CONFIG_BYTES, read_json
from .reading import CONFIG, INDEX, SINGLE, Checkpoint

_HEAD, _EMBEDDING = "lm_head.weight", ".embed_tokens.weight"


def plan(
    model: nn.Module | str | Path,
    fit: Size,
    *,
    reserve: Size = 0,
    schemes: Sequence[SchemeLike] = DEFAULT_SCHEMES,
    ignore: Sequence[str] = (),
    engine: Engine = "pytorch",
) -> Plan:
    """Choose a scheme for each weight so that the model fits, from shapes alone (`qtensor.schemes.planning`: the rule).

    Args:
        model: A model, also on the meta device; or a folder with a checkpoint, of which headers are read, or with a
            config.json alone, from which transformers makes the model on the meta device.
        fit: Bytes that the model may take, as a number or as "10GB" (10^9 bytes each) or "9.5GiB" (2^30).
        reserve: Bytes of them to leave free, for a KV cache and activations.
        schemes: To choose from, beside high precision.
        ignore: Patterns of weights to leave as they are, besides norms and expert routers.
        engine: "vllm" makes a plan for vLLM's plugin: embeddings stay as they are, and a head becomes fp8 or stays.

    Returns:
        The plan, which `online_quant`, `QTensorConfig` and `quantize_checkpoint` take as their scheme.

    Raises:
        ConfigError: Nothing fits, and the smallest size that would; or an option has no such value.
        CheckpointError: The folder cannot be read, or its weights are quantized already.
    """
    found = _tensors_of(model) if isinstance(model, nn.Module) else _tensors_in(Path(model))
    return make_plan(found, fit, reserve=reserve, schemes=schemes, ignore=ignore, engine=engine)


def _tensors_of(model: nn.Module) -> list[Tensor]:
    named = [(full_name((module, owner, name)), local_tensor(p)) for module, owner, name, p in parameters(model)]
    return tensors_of(named, model.named_buffers())


def _tensors_in(folder: Path) -> list[Tensor]:
    if not (folder / INDEX).exists() and not (folder / SINGLE).exists() and (folder / CONFIG).exists():
        return _tensors_of(_on_meta(folder))
    checkpoint = Checkpoint(folder)
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"{folder}: its weights are quantized already; a plan is made for high-precision ones. Plan for the model "
            "itself, built on the meta device"
        )
    return list(_with_ties(checkpoint))


def _with_ties(checkpoint: Checkpoint) -> Iterator[Tensor]:
    """A checkpoint has tied weights once, by one of their names."""
    tied = checkpoint.config.get("tie_word_embeddings") and _HEAD not in checkpoint.tensors
    for name, stored in checkpoint.tensors.items():
        names = (name, _HEAD) if tied and name.endswith(_EMBEDDING) else (name,)
        yield Tensor(names, stored.shape, stored.dtype.itemsize, stored.dtype in SOURCE_DTYPES)


def _on_meta(folder: Path) -> nn.Module:
    transformers: Any = require("transformers", "demo", "a plan from a config.json")
    read_json(folder / CONFIG, CONFIG_BYTES)
    config = transformers.AutoConfig.from_pretrained(folder)
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText, transformers.AutoModel):
        if type(config) in kind._model_mapping:
            with torch.device("meta"):
                model: Any = kind.from_config(config, dtype=getattr(config, "dtype", None) or torch.bfloat16)
            model.tie_weights()  # transformers 5.0 leaves that to from_pretrained.
            return cast(nn.Module, model)
    raise ConfigError(f"{folder / CONFIG}: transformers knows no model of the type {config.model_type!r}")
