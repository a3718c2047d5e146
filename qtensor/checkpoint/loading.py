"""load_checkpoint: a checkpoint's quantized weights into a model, bytes unchanged, or in another scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..interrupts import without_grad
from ..lazy.lazy_tensor import LAZY, LazyWeight, LiveQTensor
from ..modules import Owner, full_name, module_of
from ..regions.views import View
from ..report.progress import ProgressLike
from ..report.report import LoadReport
from ..schemes.config import SchemeSpec
from ..schemes.scheme import Scheme
from ..schemes.selection import DEFAULT_IGNORE, Selection
from ..sessions.online import open_load
from ..sessions.options import LoadOptions, StrictSource
from ..tensor.qtensor import QTensor
from .gguf import GGUF, open_checkpoint
from .mapping import Part, is_transformers, parts_of, tensors_of
from .reading import Checkpoint
from .requantizing import Buffer, collectors, copy_in_pieces, fill, groups_of
from .saving import expert_names
from .verify import Weight, require_written, weights_of


def load_checkpoint(
    model: nn.Module,
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    progress: ProgressLike = None,
    scheme: SchemeSpec | None = None,
    ignore: Sequence[str] = DEFAULT_IGNORE,
    strict_source: StrictSource = "any",
    verify: bool = False,
) -> LoadReport:
    """Fill a model from a folder of safetensors files, or from a `.gguf` file.

    Without a scheme, from one that `save_checkpoint`, `qtensor quantize` or llm-compressor wrote: quantized weights
    become QTensors with the bytes of the file; all others are copied as load_state_dict would. With a scheme, from any:
    weights become that, whether the folder holds them in high precision or in another format (docs/sources.md), which
    is decoded as it is read. Tensors are read one at a time. The model is not changed by what is found before the first
    write.

    Args:
        model: May be on the meta device, and may be a transformers model built from the folder's config.
        folder: Of the checkpoint; or, with a scheme, a `.gguf` file of one of the architectures in docs/sources.md.
        device: Where the weights go; by default where the model's are.
        progress: As `online_quant` takes it.
        scheme: What weights become, as `online_quant` takes it; None: what the folder says.
        ignore: Only with a scheme: patterns of weights that stay in, or are decoded to, high precision.
        strict_source: With a scheme, "lossless" refuses a quantized weight that would be quantized a second time.
        verify: Compare each tensor's bytes with the SHA-256 that `save_checkpoint` and `qtensor quantize` leave in the
            folder, or each file with the one that the Hub's cache calls it by, before anything is loaded. Where there
            is neither it is an error.

    Returns:
        The report of the load.

    Raises:
        CheckpointError: The checkpoint is damaged, unsafe, or has what the model lacks.
        ConfigError: An option has a value it cannot have.
        IncompleteLoadError: The model has what the checkpoint lacks.
        LossySourceError: As `strict_source` says.
    """
    if not isinstance(verify, bool):
        raise ConfigError(f"verify is True or False, not {verify!r}")
    if scheme is not None:
        options = LoadOptions(device=device, progress=progress, strict_source=strict_source)  # type: ignore[arg-type]
        if verify:
            require_written(Path(folder), open_checkpoint(folder).tensors.values())
        return _load_in(Selection(scheme, ignore, None), model, open_checkpoint(folder), options)
    if ignore is not DEFAULT_IGNORE and ignore != DEFAULT_IGNORE:
        raise ConfigError(f"ignore={ignore!r} needs a scheme: without one the folder says what is quantized")
    options = LoadOptions(device=device, on_nonfinite="keep", progress=progress, strict_source=strict_source)  # type: ignore[arg-type]
    place, checkpoint = options.device, open_checkpoint(folder)
    if checkpoint.method == GGUF:
        raise ConfigError(f"{folder}: a scheme is needed: what {GGUF} files hold is decoded, and becomes that")
    if verify:
        require_written(checkpoint.folder, checkpoint.tensors.values())
    weights, plain = weights_of(checkpoint)
    parts = parts_of(model, tensors_of(model))
    places = _matrices(parts)
    extra = [name for name in plain if name not in parts] + [module for module in weights if module not in places]
    if extra:
        raise CheckpointError(
            f"{checkpoint.folder}: {type(model).__name__} has no {extra[0]} ({len(extra)} such tensors)"
        )
    shapes = [(name, stored.shape, parts[name]) for name, stored in plain.items()]
    shapes += [(module, weight.shape, places[module]) for module, weight in weights.items()]
    for name, shape, part in shapes:
        if tuple(shape) != tuple(part.view.size):
            raise CheckpointError(f"{name}: is {list(shape)}, and {part.name} needs {list(part.view.size)}")
    schemes = {places[module].name: weight.layout.scheme for module, weight in weights.items()}
    # A model whose weights wait for a loader already belongs to an `online_quant` block, which ends its load.
    outer = next(
        (t._armed.host for t in tensors_of(model).values() if isinstance(t, LAZY) and not t._armed.host.closed), None
    )
    session: Any = outer or open_load(_ByName(schemes), model, options)

    def fill() -> None:
        if is_transformers(model):
            _compute_buffers(model, place)
        targets: dict[str, Any] = tensors_of(model)
        for name, stored in plain.items():
            part = parts[name]
            targets[part.name].as_strided(*part.view).copy_(stored.read())
        for module, weight in weights.items():
            accept(targets[places[module].name], places[module].view, weight)

    with session if outer is None else nullcontext():
        without_grad(fill)
    report: LoadReport = session.report()
    return report


def _load_in(selection: Selection, model: nn.Module, checkpoint: Checkpoint, options: LoadOptions) -> LoadReport:
    """Fill a model with weights in a scheme, from whatever the checkpoint holds."""
    options = replace(options, source=checkpoint.quantization or {})
    places = parts_of(model, tensors_of(model))
    groups, plain = groups_of(checkpoint.tensors, places)
    if extra := [name for name in plain if name not in places]:
        raise CheckpointError(
            f"{checkpoint.folder}: {type(model).__name__} has no {extra[0]} ({len(extra)} such tensors)"
        )
    for name, stored in plain.items():
        part = places[name]
        if stored.shape != tuple(part.view.size):
            raise CheckpointError(f"{name}: is {list(stored.shape)}, and {part.name} needs {list(part.view.size)}")
    with open_load(selection, model, options) as session:

        def fill_all() -> None:
            if is_transformers(model):
                _compute_buffers(model, options.device)
            targets: dict[str, Any] = tensors_of(model)
            takers, buffer = collectors(targets, places, groups), Buffer()
            for name, stored in plain.items():
                part = places[name]
                copy_in_pieces(targets[part.name], part.view, stored, buffer)
            for name, group in groups.items():
                fill(takers[name], group, buffer)

        without_grad(fill_all)
    return session.report()


def accept(target: LazyWeight | LiveQTensor, view: View, weight: Weight) -> None:
    """Store a quantized matrix as the part `view`, of its shape, of a weight that is being loaded."""
    armed = target._armed
    values: QTensor = weight.read(armed.dtype)
    if not armed.accept(values, view):
        raise CheckpointError(
            f"{weight.module}: its rows and scales are not those of {armed.name} {list(armed.shape)} as {values.scheme}"
        )


def _matrices(parts: Mapping[str, Part]) -> dict[str, Part]:
    """Where each module's matrix goes: a weight of its own, or one of a stack that is kept apart on disk."""
    places = {}
    for name, part in parts.items():
        size, stride, offset = part.view
        module = module_of(name)
        if len(size) == 2 and module is not None:
            places[module] = part
        elif len(size) == 3:
            for e, expert in enumerate(expert_names(name, size[0])):
                places[expert] = Part(part.name, View(size[1:], stride[1:], offset + e * stride[0]))
    return places


def _compute_buffers(model: Any, device: torch.device | None) -> None:
    """Buffers that no checkpoint has and that a model on the meta device lacks, such as rotary frequencies:
    transformers' own initialiser computes them. It fills weights too, so it is kept to modules that have none."""
    for module in model.modules():
        lacking = [n for n, b in module._buffers.items() if b is not None and b.is_meta and not module._parameters]
        lacking = [n for n in lacking if n in module._non_persistent_buffers_set]
        for name in lacking:
            module._buffers[name] = torch.zeros_like(module._buffers[name], device=device or "cpu")
        if lacking:
            model._init_weights(module)


class _ByName(Selection):
    """The rule of a load whose schemes are known by weight."""

    def __init__(self, schemes: Mapping[str, Scheme]) -> None:
        super().__init__(next(iter(schemes.values()), "fp8"), (), None)
        self._schemes = schemes

    def candidate(self, module: nn.Module, name: str, param: torch.Tensor) -> bool:
        return True

    def scheme_for(self, owners: Sequence[Owner], param: torch.Tensor) -> Scheme | None:
        return next((self._schemes[name] for name in map(full_name, owners) if name in self._schemes), None)
