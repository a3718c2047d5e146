"""save_snapshot, load_snapshot: a model's state exactly as it is held, mapped by the next start instead of loaded.

A checkpoint is for every reader and every model of an architecture; a snapshot is one model's memory, in files that are
mapped as they are. So it fits the very model alone: same modules, names, shapes, dtypes, configuration and version of
qtensor, or it is refused by what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError, SnapshotError
from ..interrupts import in_spite_of_interrupts
from ..modules import named_modules
from ..tensor.checksums import weight_root
from ..tensor.qtensor import QTensor
from ..version import __version__
from .mapping import is_transformers
from .reading import MANIFEST, read_manifest
from .snapshot_file import MappedFile, file_bytes, write_file
from .snapshot_tensors import Packed, pack, require_bytes, require_how, unpack
from .writing import Staging, write_json

VERSION = 1
FORMAT = "snapshot"
# Of a transformers model's configuration: what says where it came from, not what it is.
ORIGIN = ("_name_or_path", "transformers_version", "architectures", "quantization_config", "dtype", "torch_dtype")
_ANEW = "Load the model in the ordinary way, and save a new snapshot of it"
Verify = Literal["sums", "sha256", "header"]
_Place = tuple[nn.Module, str]


def save_snapshot(model: nn.Module, folder: str | Path) -> Path:
    """Write a model's parameters and buffers as they are held, for `load_snapshot` to map.

    The file is read back and compared before the folder appears. A folder that an earlier save wrote is replaced in one
    step; any other that is not empty is refused. Values on a GPU come to the host one by one.

    Args:
        model: Any module, quantized by qtensor or not, that is not being loaded. What is no parameter and no buffer
            (plain attributes, extra state) is not in a snapshot; a module with extra state is refused.
        folder: Where to.

    Returns:
        The folder.

    Raises:
        SnapshotError: A tensor cannot be in a snapshot; it is named.
        CheckpointError: The folder is another's; the disk is full.
    """
    held = _held(model)
    packed = pack({name: state.tensor for name, state in held.items()})
    for name, state in held.items():
        packed.about[name] |= {
            "names": state.names,
            "parameter": state.parameter,
            "requires_grad": state.tensor.requires_grad,
        }
    publish(folder, {file_name(0, 1): (packed, {"root": _root(packed.about), "fits": fits(model)})})
    return Path(os.path.abspath(folder))


def load_snapshot(
    model: nn.Module, folder: str | Path, *, device: torch.device | str | None = None, verify: Verify = "sums"
) -> str:
    """Give a model the parameters and buffers of a snapshot, whose memory is the mapped file.

    Processes that load the same snapshot share its pages in the page cache; what one of them writes (a reload, say) is
    a copy of its own, and never reaches the file. The model is not changed by what is found to be wrong. Its parameters
    are new objects with the old ones' attributes.

    Args:
        model: As the one that was saved when it was new: on the meta device, or with values, which it loses.
        folder: Of the snapshot.
        device: Where to; None: mapped memory of the CPU. Anything else is a copy.
        verify: What is compared before the model is touched. "sums": a digest of sums of every tensor's words, which
            takes as long as reading them; "sha256": the SHA-256 of every tensor, in a few threads; "header": nothing
            but the header, so that pages are read when they are used.

    Returns:
        The `weight_root` of the model.

    Raises:
        SnapshotError: The snapshot is missing or damaged, or is of another model, configuration or version.
        ConfigError: An option has a value it cannot have.
    """
    require_how(verify)
    try:
        place = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r} is none: {error}") from None
    file = open_file(folder, 0, 1)
    require_fit(file, fits(model))
    about = file.about["tensors"]
    held = _held(model)
    _require_same_names(file.path, about, held)
    found = {name: _unpacked(file, name, about[name], state) for name, state in held.items()}
    require_bytes(found, about, file.path, verify)
    made = {id(held[name].tensor): _made(tensor, held[name], about[name], place) for name, tensor in found.items()}
    _require_no_other(model, made)
    in_spite_of_interrupts(lambda: _place(held, made, model))
    root: str = file.about["root"]
    return root


def verify_snapshot(folder: str | Path) -> list[str]:
    """Everything that is wrong with the files of a snapshot, in words; none if it is whole."""
    problems = []
    try:
        names = sorted(name for name in read_manifest(Path(folder))["files"] if name != MANIFEST)
    except CheckpointError as error:
        return [str(error)]
    for name in names:
        try:
            file = MappedFile(Path(folder) / name)
            _require_kind(file)
            require_bytes(unpacked(file), file.about["tensors"], file.path, "sha256")
        except SnapshotError as error:
            problems.append(str(error))
    return problems


def snapshot_roots(folder: str | Path) -> list[str]:
    """The root of each rank's weights, by rank. Raises SnapshotError for a damaged header."""
    try:
        names = sorted(name for name in read_manifest(Path(folder))["files"] if name != MANIFEST)
    except CheckpointError as error:
        raise SnapshotError(str(error)) from None
    files = [MappedFile(Path(folder) / name) for name in names]
    for file in files:
        _require_kind(file)
    return [file.about["root"] for file in sorted(files, key=lambda file: int(file.about["rank"]))]


def is_snapshot(folder: str | Path) -> bool:
    """Whether a folder's list of contents says that it is one."""
    path = Path(folder)
    try:
        return (path / MANIFEST).is_file() and read_manifest(path).get("format") == FORMAT
    except CheckpointError:
        return False


# Files of ranks, for any engine --------------------------------------------------------------------------------------


def file_name(rank: int, ranks: int) -> str:
    return f"rank-{rank}-of-{ranks}.safetensors"


def publish(folder: str | Path, files: Mapping[str, tuple[Packed, Mapping[str, Any]]]) -> None:
    """Write the files of a snapshot and let the folder appear in one step. files: by name, what is in each, and what
    else its header says."""
    staging = Staging(folder)
    with staging.building() as path:
        for name, (packed, more) in files.items():
            staging.require_space(file_bytes(packed.tensors))
            write_rank(path / name, packed, more)
        seal_folder(path)
        staging.publish()


def write_rank(path: Path, packed: Packed, more: Mapping[str, Any]) -> None:
    """Write one file, read it back and compare it."""
    rank, _, ranks = path.stem.removeprefix("rank-").partition("-of-")
    about = {"version": VERSION, "rank": int(rank), "ranks": int(ranks), **more, "tensors": packed.about}
    write_file(path, packed.tensors, about)
    again = MappedFile(path)
    require_bytes(unpacked(again), again.about["tensors"], path, "sha256")


def seal_folder(path: Path) -> None:
    """The list of contents, by which a later save knows what it may replace."""
    files = sorted({p.name for p in path.iterdir()} | {MANIFEST})
    write_json(path / MANIFEST, {"version": 1, "format": FORMAT, "files": files, "tensors": {}})


def open_file(folder: str | Path, rank: int, ranks: int) -> MappedFile:
    """A rank's file. Raises SnapshotError if there is none for as many ranks, or it is damaged."""
    path = Path(folder) / file_name(rank, ranks)
    if not path.exists():
        there = sorted(p.name for p in Path(folder).glob("rank-*-of-*.safetensors"))
        held = f"it has {there[0]}" if there else "it is no snapshot"
        raise SnapshotError(f"{folder}: has no {path.name}; {held}. {_ANEW}.")
    file = MappedFile(path)
    _require_kind(file)
    if (file.about["rank"], file.about["ranks"]) != (rank, ranks):
        raise SnapshotError(f"{path}: is of rank {file.about['rank']} of {file.about['ranks']}. {_ANEW}.")
    return file


def require_fit(file: MappedFile, now: Mapping[str, Any]) -> None:
    """Raises SnapshotError naming the first thing that is not as it was."""
    was = file.about["fits"]
    for key in sorted({*was, *now}):
        if (difference := _difference(key, was.get(key), now.get(key))) is not None:
            raise SnapshotError(f"{file.path}: {difference}. {_ANEW}.")


def unpacked(file: MappedFile) -> dict[str, torch.Tensor]:
    """All tensors of a file. Raises SnapshotError."""
    return {name: _unpacked(file, name, about) for name, about in file.about["tensors"].items()}


def _unpacked(file: MappedFile, name: str, about: Mapping[str, Any], model: _Held | None = None) -> torch.Tensor:
    try:
        tensor = unpack(name, about, file.tensor)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise SnapshotError(f"{file.path}: {name} is not as this version writes it ({error}). {_ANEW}.") from None
    if model is not None and (tensor.shape, tensor.dtype) != (model.tensor.shape, model.tensor.dtype):
        raise SnapshotError(
            f"{file.path}: {name} is {tensor.dtype} {list(tensor.shape)}, and in the model {model.tensor.dtype} "
            f"{list(model.tensor.shape)}. {_ANEW}."
        )
    return tensor


def _require_kind(file: MappedFile) -> None:
    about = file.about
    kinds = {"version": int, "rank": int, "ranks": int, "root": str, "fits": dict, "tensors": dict}
    if not isinstance(about, dict) or about.get("version") != VERSION:
        raise SnapshotError(f"{file.path}: is a snapshot of another version than {VERSION}. {_ANEW}.")
    if not all(type(about.get(key)) is kind for key, kind in kinds.items()) or not all(
        isinstance(tensor, dict) and isinstance(tensor.get("sha256"), str) for tensor in about["tensors"].values()
    ):
        raise SnapshotError(f"{file.path}: is no snapshot that qtensor writes. {_ANEW}.")


def _difference(key: str, was: Any, now: Any) -> str | None:
    if was == now:
        return None
    if isinstance(was, dict) and isinstance(now, dict):
        nested = (_difference(f"{key}.{k}", was.get(k), now.get(k)) for k in sorted({*was, *now}))
        return next(filter(None, nested))
    if key == "modules":
        return "the model has other modules than the one it was saved of"
    return f"{key} is {now!r:.200} now, and was {was!r:.200} when it was saved"


# Models of PyTorch ---------------------------------------------------------------------------------------------------


@dataclass
class _Held:
    """A tensor of a model, all of its names, and where it is."""

    tensor: torch.Tensor
    names: list[str]
    parameter: bool
    places: list[_Place]


def _held(model: nn.Module) -> dict[str, _Held]:
    """Parameters and buffers, each once, by the first of its names."""
    found: dict[int, _Held] = {}
    for module_name, module in named_modules(model, distinct=True):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise SnapshotError(f"{module_name or type(module).__name__} has extra state, which a snapshot cannot hold")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            state = found.setdefault(id(tensor), _Held(tensor, [], name in module._parameters, []))
            state.names.append(f"{module_name}.{name}" if module_name else name)
            state.places.append((module, name))
    return {state.names[0]: state for state in found.values()}


def fits(model: nn.Module) -> dict[str, Any]:
    """What has to be the same for a snapshot of this model to be loaded, as JSON."""
    kinds = [f"{name}={type(m).__module__}.{type(m).__qualname__}" for name, m in named_modules(model, distinct=True)]
    found: dict[str, Any] = {
        "qtensor": __version__,
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "modules": hashlib.sha256("\n".join(kinds).encode()).hexdigest(),
        "config": None,
    }
    if is_transformers(model):
        config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[operator, union-attr]
        found["config"] = {key: value for key, value in config.items() if key not in ORIGIN}
    return found


def _root(about: Mapping[str, Mapping[str, Any]]) -> str:
    """As `weight_root` of the model."""
    return weight_root({name: a["sha256"] for a in about.values() if a["parameter"] for name in a["names"]})


def _require_same_names(path: Path, about: Mapping[str, Any], held: Mapping[str, _Held]) -> None:
    was = {name: (a.get("names"), a.get("parameter")) for name, a in about.items()}
    now = {name: (state.names, state.parameter) for name, state in held.items()}
    for name in (*now, *was):
        if was.get(name) == now.get(name):
            continue
        what = f"{name} has other names, or is no parameter, or is one, in the model"
        if name not in was or name not in now:
            what = f"the {'snapshot' if name not in was else 'model'} has no {name}"
        raise SnapshotError(f"{path}: {what}. {_ANEW}.")


def _made(tensor: torch.Tensor, state: _Held, about: Mapping[str, Any], place: torch.device | None) -> torch.Tensor:
    """What takes the place of a model's tensor."""
    old = state.tensor
    tensor = tensor if place is None else tensor.to(place)
    if not state.parameter:
        return tensor
    wants_grad = about["requires_grad"] is True and (tensor.is_floating_point() or tensor.is_complex())
    made: Any = nn.Parameter(tensor, requires_grad=wants_grad)
    own = {*QTensor.__annotations__, "_is_param"}
    made.__dict__.update({key: value for key, value in old.__dict__.items() if key not in own})
    return made


def _attributes(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Tensors that modules hold as plain attributes."""
    for _, module in named_modules(model, distinct=True):
        for key, value in module.__dict__.items():
            if isinstance(value, torch.Tensor):
                yield module, key, value


def _require_no_other(model: nn.Module, made: Mapping[int, torch.Tensor]) -> None:
    for module, key, value in _attributes(model):
        if value.is_meta and id(value) not in made:
            raise SnapshotError(
                f"{type(module).__name__}.{key} is a tensor on the meta device that is neither a parameter nor a "
                "buffer, and a snapshot has no values for it; build the model outside of `torch.device('meta')`"
            )


def _place(held: Mapping[str, _Held], made: Mapping[int, torch.Tensor], model: nn.Module) -> None:
    """May be repeated."""
    for state in held.values():
        new = made[id(state.tensor)]
        for module, name in state.places:
            set_tensor(module, name, new, state.parameter)
    for module, key, value in list(_attributes(model)):
        if id(value) in made:
            module.__dict__[key] = made[id(value)]


def set_tensor(module: nn.Module, name: str, tensor: torch.Tensor, parameter: bool) -> None:
    """As a user would, so that modules which keep lists of their weights (LSTM) hear of it."""
    if parameter:
        module._parameters[name] = None
        setattr(module, name, tensor)
    else:
        module._buffers[name] = tensor
