"""Snapshots of engines: each rank's weights as a file that the next start maps, in place of reading a checkpoint.

What is written are the weights row-major, as layers get them before any kernel packs them: so the bytes depend on no
chip, and what vLLM packs for itself (its unquantized layers on a CPU, qtensor's int8 products) is packed again at each
start. A quantized weight that the kernel reads as it is stored, as almost all of them on a CPU, is served from the
mapped file. All ranks take their file, or none does and the model is loaded in the ordinary way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from qtensor.checkpoint import snapshots
from qtensor.checkpoint.snapshot_tensors import pack, require_bytes
from qtensor.checkpoint.writing import Staging, build_folder
from qtensor.errors import CheckpointError, QTensorError, SnapshotError
from qtensor.lazy.lazy_tensor import LazyWeight, LiveQTensor
from qtensor.lazy.weight import ArmedWeight
from qtensor.tensor.qtensor import QTensor
from qtensor.version import __version__

from . import compat
from .layers import aliases, read_back
from .served import Filling, ServedModel

_T = TypeVar("_T")


def folder_of(folder: str, ranks: int) -> Path:
    """A snapshot for each number of ranks may be in one folder."""
    return Path(folder) / f"ranks-{ranks}"


# Saving --------------------------------------------------------------------------------------------------------------


def save(served: ServedModel, folder: str, root: str) -> None:
    """Write this rank's file, and let the snapshot appear when all ranks have. root: of this rank's weights, as the
    engine says it.

    Raises SnapshotError on all ranks, with what is wrong on any.
    """
    rank, ranks = compat.place_among_ranks()
    target = folder_of(folder, ranks)
    with ExitStack() as stack:

        def begin() -> None:
            if rank == 0:
                target.parent.mkdir(parents=True, exist_ok=True)
                staging.append(Staging(target))
                stack.enter_context(staging[0].building())

        def write() -> None:
            packed = pack(state_of(served))
            more = {"root": root, "fits": fits(served)}
            snapshots.write_rank(build_folder(target) / snapshots.file_name(rank, ranks), packed, more)

        def end() -> None:
            if rank == 0:
                snapshots.seal_folder(staging[0].files)
                staging[0].publish()

        staging: list[Staging] = []
        for step in (begin, write, end):
            _together(step)


def _together(step: Callable[[], _T]) -> _T:
    """What one step of all ranks gives on this one. Raises on all of them if it fails on any."""
    found: list[_T] = []
    problem = None
    try:
        found.append(step())
    except (QTensorError, OSError) as error:
        problem = str(error) or type(error).__name__
    if problems := compat.tell_all_ranks(problem):
        refused = SnapshotError("no snapshot was saved: " + "; ".join(problems))
        refused.told_all_ranks = True  # type: ignore[attr-defined]
        raise refused
    return found[0]


def state_of(served: ServedModel) -> dict[str, torch.Tensor]:
    """Every weight of this rank by the name of vLLM's layer, as it was before layers processed it.

    Raises SnapshotError that names one which a kernel has packed, and nobody can read back.
    """
    found: dict[str, torch.Tensor] = {}
    for published in served.published:
        weight = published.read()
        if weight is None:
            raise _packed_away(published.slot.full_name)
        found[published.slot.full_name] = weight
    for name in served.plain:
        prefix, _, own = name.rpartition(".")
        found[name] = _plain(served, served.root.get_submodule(prefix), own, name)
    return found


def _plain(served: ServedModel, module: nn.Module, own: str, name: str) -> torch.Tensor:
    live = module._parameters.get(own)
    if live is None and (buffer := module._buffers.get(own)) is not None:
        return buffer.detach()
    like = compat.load_time_parameters(module).get(own, live)
    if like is None:
        raise _packed_away(name)
    alias = served.aliases.get((id(module), own))
    repacked = live is None or live.shape != like.shape or (live.dim() == 3 and compat.processing_method(module))
    if repacked and alias is not None and alias.dtype == like.dtype:
        return alias.view(like.shape).detach()
    if repacked or live is None:
        back = read_back(module, tuple(like.shape), like.dtype) if own == "weight" else None
        if back is None:
            raise _packed_away(name)
        return back
    return live.detach().as_subclass(torch.Tensor)


def _packed_away(name: str) -> SnapshotError:
    return SnapshotError(f"{name}: vLLM has packed this weight for its kernel, and it cannot be read back")


def fits(served: ServedModel) -> dict[str, Any]:
    """What has to be the same at the start that takes the snapshot, besides each weight's shape, dtype and scheme."""
    config = getattr(served.setting.model_config, "hf_config", None)
    text = json.loads(config.to_json_string(use_diff=False)) if config is not None else {}
    return {
        "qtensor": __version__,
        "vllm": compat.vllm_version(),
        "model": f"{type(served.root).__module__}.{type(served.root).__qualname__}",
        "config": {key: value for key, value in text.items() if key not in snapshots.ORIGIN},
        "dtype": str(served.setting.dtype),
    }


# Loading -------------------------------------------------------------------------------------------------------------


def plain_names(root: nn.Module) -> list[str]:
    """The parameters and buffers that a load fills and does not quantize, each by the first of its names."""
    names = [n for n, p in root.named_parameters() if not isinstance(p, (LazyWeight, LiveQTensor)) and _has_values(p)]
    for prefix, module in root.named_modules():
        for own, buffer in module._buffers.items():
            if buffer is not None and own not in module._non_persistent_buffers_set and _has_values(buffer):
                names.append(f"{prefix}.{own}" if prefix else own)
    return names


def _has_values(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() > 0


def load(filling: Filling) -> set[str] | None:
    """Give a model that is being loaded the weights of the snapshot that the option names: the names of all parameters.
    None if there is no such option, the model is the draft of the one that was saved, or a rank's snapshot does not
    fit, which the log says."""
    folder = filling.served.choice.options.snapshot
    if folder is None or filling.served.setting.draft:
        return None
    found, problem = None, None
    try:
        found = _Found(filling, folder)
    except CheckpointError as error:
        problem = str(error)
    if problems := compat.tell_all_ranks(problem):
        said = "; ".join(problems)
        compat.logger().warning("qtensor: the snapshot is not used, and the checkpoint is loaded instead: %s", said)
        return None
    assert found is not None
    found.place()
    file = found.file
    compat.logger().info("qtensor: weights are those of the snapshot %s, root %s", file.path, file.about["root"])
    return {name for name, _ in filling.served.root.named_parameters(remove_duplicate=False)}


class _Found:
    """A rank's file, compared with the model and verified. Raises SnapshotError."""

    def __init__(self, filling: Filling, folder: str) -> None:
        rank, ranks = compat.place_among_ranks()
        served = filling.served
        self.file = snapshots.open_file(folder_of(folder, ranks), rank, ranks)
        snapshots.require_fit(self.file, fits(served))
        self._root = served.root
        self._armed = {slot.full_name: weight for weight, slot in filling.slots.items()}
        self._plain = plain_names(served.root)
        about = self.file.about["tensors"]
        for name in (*self._armed, *self._plain, *about):
            if name not in about or (name not in self._armed and name not in self._plain):
                who = "snapshot" if name not in about else "model"
                raise SnapshotError(f"{self.file.path}: the {who} has no {name}. Save a new snapshot.")
        self._tensors = snapshots.unpacked(self.file)
        for name, wanted in self._wanted():
            if (given := _kind(self._tensors[name])) != wanted:
                raise SnapshotError(f"{self.file.path}: {name} is {given}, and here {wanted}. Save a new snapshot.")
        require_bytes(self._tensors, about, self.file.path, "sums")

    def _wanted(self) -> Iterator[tuple[str, str]]:
        for name, weight in self._armed.items():
            yield name, _described(weight.shape, weight.dtype, weight.scheme.name)
        for name in self._plain:
            yield name, _kind(self._target(name)[1])

    def _target(self, name: str) -> tuple[nn.Module, torch.Tensor]:
        prefix, _, own = name.rpartition(".")
        module = self._root.get_submodule(prefix)
        held = module._parameters.get(own)
        return module, module._buffers[own] if held is None else held  # type: ignore[return-value]

    def place(self) -> None:
        """Each weight becomes the mapped memory; what other tensors view is copied to, and so is another device's."""
        viewed = aliases(self._root)
        for name, weight in self._armed.items():
            _give(weight, self._tensors[name])
        for name in self._plain:
            module, target = self._target(name)
            own = name.rpartition(".")[2]
            values = self._tensors[name]
            alone = (id(module), own) not in viewed and own in module._parameters
            if alone and target.device.type == "cpu" and target.is_contiguous() and values.is_contiguous():
                target.data = values
            else:
                target.data.copy_(values)


def _give(weight: ArmedWeight, values: torch.Tensor) -> None:
    assert isinstance(values, QTensor)
    weight.discard()  # Layers write zeros where sizes are padded; the snapshot has them.
    if not weight.take(values.to(weight.device)):  # type: ignore[arg-type]
        raise SnapshotError(f"{weight.name}: cannot become {values}")


def _kind(tensor: torch.Tensor) -> str:
    if isinstance(tensor, QTensor):
        return _described(tuple(tensor.shape), tensor.dtype, tensor.scheme.name)
    return _described(tuple(tensor.shape), tensor.dtype)


def _described(shape: tuple[int, ...], dtype: torch.dtype, scheme: str = "") -> str:
    return f"{dtype} {list(shape)}" + (f" as {scheme}" if scheme else "")
