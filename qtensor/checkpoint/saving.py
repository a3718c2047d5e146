"""save_checkpoint: a live model's quantized weights, as other tools read them."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..extras import require
from ..lazy.lazy_tensor import LAZY
from ..modules import module_of
from ..schemes.scheme import Scheme
from ..tensor.qtensor import QTensor
from ..text import printable
from .files import CONFIG_BYTES, read_json
from .fused import fused_group, refuse_misaligned, refuse_short_groups
from .layouts import (
    COMPRESSED_TENSORS,
    Spec,
    layout_of,
    quantization_config,
    require_format,
)
from .mapping import Part, is_transformers, matrix, parts_of, tensors_of
from .reading import CONFIG, DTYPE_NAMES, SINGLE
from .verify import require_sound
from .writing import Names, Records, ShardWriter, Staging, carry_over, write_json, write_manifest


@dataclass(frozen=True)
class Stored:
    """A tensor to be written, and where its values come from."""

    spec: Spec
    values: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.spec[0].itemsize * int(torch.Size(self.spec[1]).numel())


def save_checkpoint(
    model: nn.Module, folder: str | Path, format: str = COMPRESSED_TENSORS, *, max_shard_size: int | str = "5GB"
) -> Path:
    """Write a model's weights, quantized ones as they are, for vLLM, transformers and `load_checkpoint` to read.

    The files are read back and compared before the folder appears. A folder that an earlier save wrote is replaced in
    one step; any other that is not empty is refused.

    Args:
        model: Any module that holds QTensors. For a transformers model, config.json, the generation settings and, if it
            was loaded from a folder, that folder's tokenizer and small files come along; names and expert matrices are
            those of its original checkpoint.
        folder: Where to.
        format: "compressed-tensors", or "fp8" (per block only), which transformers and DeepSeek call fine-grained.
        max_shard_size: Of one file, in bytes or as "5GB".

    Returns:
        The folder.

    Raises:
        CheckpointError: The format cannot express a weight, which is named; the folder is another's; the disk is full.
        ConfigError: The format or the size of shards is none.
    """
    require_format(format)
    hub = require("huggingface_hub", "checkpoint", "save_checkpoint")
    contents, config = checkpoint_tensors(model, format)
    shards = _shards(hub, contents, max_shard_size)
    staging = Staging(folder)
    with staging.building() as path:
        staging.require_space(sum(tensor.nbytes for tensor in contents.values()))
        _write_side_files(model, path, config)
        records: Records = {}
        for file, names in shards.items():
            writer = ShardWriter(path / file, {name: contents[name].spec for name in names})
            with writer.open() as handle:
                for name in names:
                    writer.write(handle, name, contents[name].values())
            records |= writer.finish()
        write_manifest(path, format, records)
        require_sound(path)
        staging.publish()
    return Path(os.path.abspath(folder))


def checkpoint_tensors(model: nn.Module, format: str) -> tuple[dict[str, Stored], dict[str, Any] | None]:
    """What a model's checkpoint holds, and what its config.json says of quantized weights, if there are any."""
    contents, schemes, plain = _contents(model, tensors_of(model), format)
    _warn_of_scales(contents, schemes, format)
    return contents, quantization_config(format, schemes, plain) if schemes else None


def _contents(
    model: nn.Module, tensors: dict[str, torch.Tensor], format: str
) -> tuple[dict[str, Stored], dict[str, Scheme], list[str]]:
    """What goes to disk; the scheme of each quantized module; the linear modules that are not quantized."""
    contents: dict[str, Stored] = {}
    names = Names()
    schemes: dict[str, Scheme] = {}
    shapes: dict[str, tuple[int, int]] = {}
    plain: set[str] = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name}
    for name, part in sorted(parts_of(model, tensors).items(), key=lambda item: _natural(item[0])):
        tensor = tensors[part.name]
        if isinstance(tensor, LAZY):
            raise CheckpointError(f"{part.name} is still being loaded; leave the `with online_quant(...)` block first")
        if tensor.is_meta:
            raise CheckpointError(f"{part.name} is on the meta device and has no values to save")
        if not isinstance(tensor, QTensor):
            if tensor.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{name} is {tensor.dtype}, which safetensors cannot hold")
            names.claim(name, name)
            contents[name] = Stored((tensor.dtype, part.view.size), _plain_values(tensor, part))
            module = module_of(name)
            if module and len(part.view.size) == 2:
                plain.add(module)
            continue
        layout = layout_of(tensor.scheme, format, name)
        if len(part.view.size) == 3 and is_transformers(model):
            raise CheckpointError(
                f"{name}: {type(model).__name__}'s checkpoint has these experts in one tensor, and no other tool has a "
                "quantized form for that. Add it to `ignore`."
            )
        for module, box in _matrices(name, tensor, part):
            weight = _cut(name, tensor, box)
            n, k = shapes[module] = (weight.shape[0], weight.shape[1])
            prefix = f"{module}." if module else ""
            specs = layout.specs((n, k))
            for suffix, entry in layout.entries.items():
                names.claim(prefix + suffix, f"{name} ({tensor.scheme})")
                contents[prefix + suffix] = Stored(specs[suffix], partial(entry.encode, weight, n))
            schemes[module] = tensor.scheme
    refuse_short_groups({module: k for module, (_, k) in shapes.items()}, schemes)
    if is_transformers(model):
        refuse_misaligned({module: n for module, (n, _) in shapes.items()}, schemes)
    return contents, schemes, sorted(plain - schemes.keys())


def _natural(name: str) -> list[Any]:
    """Layer 10 comes after layer 9, so that the same model gives the same files however it was built."""
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in name.split(".")]


def _plain_values(tensor: torch.Tensor, part: Part) -> Callable[[], torch.Tensor]:
    return lambda: tensor.detach().contiguous().as_strided(*part.view)


def _matrices(name: str, tensor: QTensor, part: Part) -> Iterator[tuple[str, Any]]:
    """The matrices of a quantized weight, each with the module it is the weight of: one, or one per expert."""
    if tensor.transposed:
        raise CheckpointError(f"{name}: is a transposed view of a quantized weight; save the weight itself")
    box = matrix(name, tuple(tensor.shape), part.view)
    module = module_of(name)
    if len(part.view.size) == 2:
        if module is None:
            raise CheckpointError(f'{name}: a quantized matrix is called "weight" in a checkpoint; rename it')
        yield module, box
        return
    for e, stored in enumerate(expert_names(name, part.view.size[0])):
        yield stored, ((e, e + 1), *box[1:])


def expert_names(name: str, count: int) -> list[str]:
    """The modules that a stack of matrices becomes: "experts.w1" → "experts.0.w1", and so on."""
    parent, _, leaf = name.rpartition(".")
    middle = [] if leaf == "weight" else [leaf]
    return [".".join([*filter(None, [parent]), str(e), *middle]) for e in range(count)]


def _cut(name: str, weight: QTensor, box: Any) -> QTensor:
    """Whole rows of one matrix."""
    matrix: Any = weight[box[0][0]] if weight.dim() == 3 else weight
    (start, stop), unit = box[-2], weight.scheme.format.block[0]
    if start % unit or (stop % unit and stop != matrix.shape[0]):
        raise CheckpointError(
            f"{name}: is rows {start}:{stop} of a fused {weight.scheme.name} weight, and its scales are per {unit} "
            "rows. Add it to `ignore`, or use fp8_per_channel."
        )
    rows: QTensor = matrix[start:stop]
    return rows


def _warn_of_scales(contents: dict[str, Stored], schemes: dict[str, Scheme], format: str) -> None:
    """Parts that servers fuse should share the scale that is one for a whole matrix; a model whose parts are apart has
    one for each."""
    apart = []
    for module, scheme in schemes.items():
        group = [name for name in fused_group(module) if schemes.get(name) == scheme]
        if not scheme.format.needs_whole_matrix or module != group[0]:
            continue
        shared = [name for name, entry in layout_of(scheme, format, module).entries.items() if entry.shared]
        scales = [[contents[f"{name}.{s}" if name else s].values() for s in shared] for name in group]
        if any(not torch.equal(a, b) for others in scales[1:] for a, b in zip(scales[0], others, strict=True)):
            apart.append(module)
    if apart:
        scheme = schemes[apart[0]]
        fate = (
            "rounds to the largest scale"
            if scheme.format.granularity == "tensor"
            else "decodes all of them with one part's scale, which is wrong for the others"
        )
        first = printable(apart[0])
        warnings.warn(
            f"save_checkpoint: {first} and its partners, and {len(apart) - 1} other groups, are quantized "
            f"to {scheme.name} with a scale for each part. vLLM fuses them and {fate}. `qtensor quantize`, from the "
            "high-precision checkpoint, writes shared scales; fp8_per_channel needs none.",
            stacklevel=4,
        )


def _shards(hub: Any, contents: dict[str, Stored], max_shard_size: int | str) -> dict[str, list[str]]:
    if not contents:
        raise CheckpointError("the model has no tensors to save")
    size, whole = max_shard_size, isinstance(max_shard_size, int) and not isinstance(max_shard_size, bool)
    try:
        if not ((whole and cast(int, size) > 0) or isinstance(size, str)):
            raise ValueError("neither a whole number nor a text")
        split = hub.split_state_dict_into_shards_factory(
            contents,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=SINGLE.replace(".", "{suffix}.", 1),
            max_shard_size=size,
        )
    except ValueError as error:
        raise ConfigError(f'max_shard_size is a number of bytes or a text as "5GB", not {size!r}: {error}') from None
    return split.filename_to_tensors


def _write_side_files(model: Any, folder: Path, quantization: dict[str, Any] | None) -> None:
    config: dict[str, Any] = {}
    if is_transformers(model):
        settings = copy.deepcopy(model.config)
        settings.architectures = [type(model).__name__]
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config
        source = Path(getattr(model.config, "name_or_path", "") or "/nowhere")
        if source.is_dir():
            carry_over(source, folder)
        settings.save_pretrained(folder)
        if model.can_generate() and getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        config = read_json(folder / CONFIG, CONFIG_BYTES)
    if quantization is not None:
        config["quantization_config"] = quantization
    write_json(folder / CONFIG, config)
