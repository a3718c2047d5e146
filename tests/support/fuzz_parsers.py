"""The parsers of outside input under random bytes: scheme configs, safetensors headers, and the three JSON files of a
checkpoint. Each target either accepts an input, and then what it accepted can be used, or refuses it with an error that
says where; anything else is a finding. `test_parser_fuzz` replays the corpus in tests/corpus; `search_parsers` looks
for more.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from qtensor import QTensorError, fp8_per_channel, quantize, quantize_checkpoint
from qtensor.checkpoint.inspecting import inspect_checkpoint
from qtensor.checkpoint.reading import CONFIG, INDEX, MANIFEST, SINGLE, Checkpoint
from qtensor.checkpoint.verify import problems, weights_of
from qtensor.schemes.config import read_config
from qtensor.schemes.scheme import SCHEMES
from qtensor.schemes.selection import matches

CORPUS = Path(__file__).parents[1] / "corpus"
NAMES = [("model.layers.0.mlp.up_proj", "weight"), ("lm_head", "weight"), ("", "w")]
_WORDS = """
    linear moe ignore targets weight activation none re:.* *.mlp.* dtype shape data_offsets __metadata__ F32 BF16
    F8_E4M3 U8 [0,4] w.weight_scale weight_map first.weight second.weight a.safetensors ../a.safetensors
    quantization_config
    quant_method compressed-tensors fp8 weight_block_size [128,128] config_groups group_0 weights input_activations
    num_bits strategy channel symmetric dynamic actorder tensors files file sha256 model.safetensors null true -1 1e999
    NaN {} []
"""
WORDS = (*_WORDS.split(), *SCHEMES)
"""What the formats are written with: hints for the search."""
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 3, 2**63, 10**400, 0.5, math.nan, "", "x", "re:(", "re:a{9999999999}", "../up", "/", "a\0b"),
    *([], {}, [[]], [None], ["up"], {"": {}}, {"weight": None}, [2, 2], [0, 2**62], [128, 128]),
)
"""What stands for a part of an input in `mutated`: mostly of another kind than what belongs there."""
SHARDS = ("a.safetensors", "b.safetensors")


def config(data: bytes) -> None:
    """What a user writes as a scheme: text, or the value that it is as JSON. The patterns are tried on some names."""
    text = data.decode("utf-8", "replace")
    for spec in (text, _json(text)):
        found = read_config(spec)  # type: ignore[arg-type]
        for pattern in (*found.ignore, *(found.targets or ())):
            for module, name in NAMES:
                matches(pattern, module, f"{module}.{name}")


def header(data: bytes) -> None:
    """A safetensors file; its length field is made right, so that the search gets to the header behind it."""
    folder = _folder()
    content = len(data).to_bytes(8, "little") + data + bytes(64)
    (folder / SINGLE).write_bytes(content)
    names = set(Checkpoint(folder).tensors)
    with safe_open(folder / SINGLE, framework="pt") as file:  # What is accepted here is accepted there.
        assert set(file.keys()) == names
    _use(folder)


def index(data: bytes) -> None:
    """model.safetensors.index.json beside two files."""
    folder = _folder()
    for file, name in zip(SHARDS, ("first", "second"), strict=True):
        save_file({f"{name}.weight": torch.ones(2, 3)}, folder / file)
    (folder / INDEX).write_bytes(data)
    _use(folder)


def config_json(data: bytes) -> None:
    """config.json of a quantized checkpoint."""
    folder = _folder()
    (folder / SINGLE).write_bytes(_quantized())
    (folder / CONFIG).write_bytes(data)
    _use(folder)


def manifest(data: bytes) -> None:
    """qtensor.json, the list of contents."""
    folder = _folder()
    (folder / SINGLE).write_bytes(_quantized())
    (folder / CONFIG).write_text(json.dumps(QUANTIZED))
    (folder / MANIFEST).write_bytes(data)
    _use(folder)


TARGETS: dict[str, Callable[[bytes], None]] = {f.__name__: f for f in (config, header, index, config_json, manifest)}


def accepted(target: str, data: bytes) -> bool:
    """Run one input. False if it was refused. Raises whatever is neither: that is a finding, and so is what takes
    gigabytes, as a size that is believed would."""
    try:
        with little_memory():
            TARGETS[target](data)
    except QTensorError as error:
        message = str(error)
        assert target == "config" or ":" in message, f"does not say where: {message}"
        assert target == "config" or message.isprintable()
        return False
    return True


@contextmanager
def little_memory() -> Iterator[None]:
    """Two more gigabytes than the process has, and no more."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (2 << 30), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def damaged(data: bytes, random: Random) -> bytes:
    """Some bytes exchanged, left out, or put in: no JSON any more, mostly, or no UTF-8."""
    for _ in range(random.randint(1, 3)):
        at, more = random.randrange(len(data) + 1), random.randrange(3)
        data = data[:at] + random.randbytes(more) + data[at + random.randrange(3) :]
    return data


def mutated(data: bytes, random: Random) -> bytes:
    """The JSON with one of its parts exchanged, left out, or said twice; as it is if it is no JSON."""
    try:
        whole = [json.loads(data)]
    except (ValueError, RecursionError):
        return data
    places = [(whole, 0)]
    for holder, key in places:
        found = holder[key]
        keys = found if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
        places += [(found, k) for k in keys]
    holder, key = random.choice(places)
    match random.randrange(4):
        case 0 if holder is not whole:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[random.choice(WORDS)] = holder[key]
        case 2:
            holder[key] = copy.deepcopy(random.choice(places)[0])
        case _:
            holder[key] = random.choice(VALUES)
    try:
        return json.dumps(whole[0]).encode()
    except (ValueError, RecursionError):  # an object within itself
        return data


def _use(folder: Path) -> None:
    """Everything that is done with a checkpoint by the command line."""
    _convert(folder)
    checkpoint = Checkpoint(folder)
    for stored in checkpoint.tensors.values():
        assert stored.path.parent == folder
        assert tuple(stored.read().shape) == stored.shape
    weights, _ = weights_of(checkpoint)
    report = inspect_checkpoint(folder)
    assert str(report)
    assert len(report.quantized) == len(weights)
    wrong = problems(folder, workers=1)
    if wrong:
        raise QTensorError(wrong[0])


def _convert(folder: Path) -> None:
    """What can be converted is whole; of what is refused nothing is left."""
    target, refused = folder / "made", ""
    try:
        quantize_checkpoint(folder, target, fp8_per_channel, ignore=("lm_head",), workers=1, progress=False)
    except QTensorError as error:
        refused = str(error)
    if refused:
        assert refused.isprintable()
        assert not target.exists()
        assert not target.with_name("made.partial").exists(), refused
        return
    assert problems(target, workers=1) == []
    shutil.rmtree(target)


QUANTIZED = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"},
                "input_activations": None,
            }
        },
    }
}


@functools.cache
def _quantized() -> bytes:
    weight = quantize(torch.ones(4, 8, dtype=torch.bfloat16), fp8_per_channel)
    return save({"up.weight": weight.qdata, "up.weight_scale": weight.scale, "norm.weight": torch.ones(8)})


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@functools.cache
def _root() -> Path:
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="qtensor-fuzz-", dir=memory if memory.is_dir() else None))


def _folder() -> Path:
    """An empty folder, the same for every input: the search runs thousands a second."""
    folder = _root()
    for file in folder.iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    return folder
