"""Layouts: how a quantized weight lies in a checkpoint, and how config.json says so.

`LAYOUTS` has one row per format and scheme: the tensors a weight becomes, and the arguments that other tools read it
by. Adding a scheme is adding a row. Everything else in this package goes through the row's methods.

Sources: the compressed-tensors package (its `QuantizationConfig`, and the compressor of each packing), and what vLLM
and transformers accept. As few fields as they need: older readers refuse unknown ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..kernels import RECIPES, SEARCHES, Parts
from ..schemes.scheme import (
    Scheme,
    fp8_per_block,
    fp8_per_channel,
    fp8_per_tensor,
    int4_asymmetric,
    int4_per_group,
    int4_per_group_32,
    int8_per_channel,
    mxfp4,
    mxfp8,
    nvfp4,
)
from ..tensor.qtensor import QTensor, empty
from .entries import ELEMENTS, GAIN, ONE_SCALE, SCALE, SHAPE, STEP, WORDS, ZERO, Entry, require_held, word
from .targets import Targets

COMPRESSED_TENSORS, FP8 = "compressed-tensors", "fp8"
PRODUCER = {"name": "qtensor"}
"""Says in config.json who wrote the folder, in the form that vLLM looks into; other readers pass over the key."""
Spec = tuple[torch.dtype, tuple[int, ...]]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layout:
    """One scheme in one format.

    entries: the weight's tensors by their names below the module's; the first two hold values and scales.
    weights, activations: compressed-tensors' arguments; activations None where the scheme has no quantized ones.
    packing: compressed-tensors' name of the layout, for quantized and for plain activations.
    """

    scheme: Scheme
    entries: Mapping[str, Entry]
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None = None
    packing: tuple[str, str] = ("float-quantized", "naive-quantized")

    @property
    def data(self) -> str:
        return next(iter(self.entries))

    @property
    def scale(self) -> str:
        return list(self.entries)[1]

    @property
    def rows(self) -> int:
        """Bands of a matrix begin at multiples of so many rows."""
        return lcm(self.scheme.format.block[0], *(entry.rows for entry in self.entries.values()))

    def specs(self, shape: tuple[int, int]) -> dict[str, Spec]:
        """dtype and shape of each tensor that a weight `[N, K]` becomes."""
        outline = empty(shape, self.scheme, torch.bfloat16, "meta")
        made = {name: entry.encode(outline, shape[0]) for name, entry in self.entries.items()}
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}

    def shape(self, tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
        """The shape `(N, K)` of the weight with those tensors; the values may be on the meta device."""
        for name, entry in self.entries.items():
            if entry is SHAPE:
                rows, cols = tensors[name].tolist()
                return rows, cols
        rows, items = tensors[self.data].shape
        return rows, items * self.scheme.format.per_byte

    def weight(self, module: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> QTensor:
        """The quantized matrix of those tensors. Raises CheckpointError where they do not belong together."""
        for name, (wanted, _) in self.specs((1, 1)).items():
            if name not in tensors:
                raise CheckpointError(f"{module}: is quantized, and the checkpoint has no {module}.{name}")
            held = tensors[name]
            wide = _FLOATS if wanted in (torch.float32, torch.bfloat16) else (wanted,)
            if held.dtype not in wide or (name == self.data and held.dim() != 2):
                raise CheckpointError(
                    f"{module}.{name} is {held.dtype} {list(held.shape)}; {self.scheme.name} stores {wanted}"
                    + (" matrices" if name == self.data else "")
                )
            if self.entries[name] is SHAPE and (tuple(held.shape) != (2,) or min(held.tolist()) < 0):
                found = held.tolist() if held.numel() == 2 else f"{held.numel()} numbers"
                raise CheckpointError(f"{module}.{name} is {found}, and should be the shape of a matrix")
        shape, fmt = self.shape(tensors), self.scheme.format
        data = tensors[self.data]
        if shape[0] != data.shape[0] or shape[1] > data.shape[1] * data.element_size() * fmt.per_byte:
            raise CheckpointError(
                f"{module}: is said to be {list(shape)}, and {module}.{self.data} is {data.dtype} {list(data.shape)}"
            )
        for name, (_, expected) in self.specs(shape).items():
            held = tensors[name]
            if held.numel() != _count(expected) or (name == self.data and tuple(held.shape) != expected):
                raise CheckpointError(
                    f"{module}.{name} is {held.dtype} {list(held.shape)}; a {self.scheme.name} weight "
                    f"{list(shape)} has {list(expected)}"
                )
        decoded = ((entry.decode, tensors[name]) for name, entry in self.entries.items())
        found = [decode(tensor, fmt, shape) for decode, tensor in decoded if decode is not None]
        require_held(module, tensors[self.scale], found[1], fmt)
        parts = Parts(found[0], word(module, found[1], found[2], fmt)) if fmt.has_zero_point else Parts(*found)
        return QTensor(parts.qdata, parts.scale, self.scheme, dtype, global_scale=parts.global_scale, cols=shape[1])


_STATIC = {"symmetric": True, "dynamic": False}
_FLOAT8 = {"num_bits": 8, "type": "float", **_STATIC}
_FLOAT4 = {"num_bits": 4, "type": "float", **_STATIC}
_PER_TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
_PER_GROUP = {**_PER_TOKEN, "strategy": "group", "group_size": 128}
# vLLM tells mxfp8 by the scales' dtype.
_OF_32 = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}

_PLAIN = {"weight": ELEMENTS, "weight_scale": SCALE}
_PACKED = {"weight_packed": ELEMENTS, "weight_scale": SCALE}
_PACKED_INT = {"weight_packed": WORDS, "weight_scale": SCALE, "weight_shape": SHAPE}
_PACKED_ZERO = {"weight_packed": WORDS, "weight_scale": STEP, "weight_zero_point": ZERO, "weight_shape": SHAPE}
_INT4_GROUPS = {"num_bits": 4, "type": "int", **_STATIC, "strategy": "group", "group_size": 128}


def _rows(*layouts: Layout) -> dict[str, Layout]:
    return {layout.scheme.name: layout for layout in layouts}


LAYOUTS: dict[str, dict[str, Layout]] = {
    COMPRESSED_TENSORS: _rows(
        Layout(
            fp8_per_tensor,
            {"weight": ELEMENTS, "weight_scale": ONE_SCALE},
            {**_FLOAT8, "strategy": "tensor"},
            _PER_TOKEN,
        ),
        Layout(fp8_per_channel, _PLAIN, {**_FLOAT8, "strategy": "channel"}, _PER_TOKEN),
        Layout(fp8_per_block, _PLAIN, {**_FLOAT8, "strategy": "block", "block_structure": [128, 128]}, _PER_GROUP),
        Layout(mxfp8, _PLAIN, {**_FLOAT8, **_OF_32}, {**_PER_TOKEN, **_OF_32}, ("mxfp8-quantized",) * 2),
        Layout(
            mxfp4,
            _PACKED,
            {**_FLOAT4, "strategy": "group", "group_size": 32},
            packing=("mxfp4-pack-quantized",) * 2,
        ),
        Layout(
            nvfp4,
            {**_PACKED, "weight_global_scale": GAIN},
            {**_FLOAT4, "strategy": "tensor_group", "group_size": 16},
            packing=("nvfp4-pack-quantized",) * 2,
        ),
        # Not "int-quantized": that is for quantized activations, and vLLM refuses it without.
        Layout(
            int8_per_channel,
            _PACKED_INT,
            {"num_bits": 8, "type": "int", **_STATIC, "strategy": "channel"},
            packing=("pack-quantized",) * 2,
        ),
        Layout(
            int4_per_group,
            _PACKED_INT,
            _INT4_GROUPS,
            packing=("pack-quantized",) * 2,
        ),
        Layout(
            int4_per_group_32,
            _PACKED_INT,
            {**_INT4_GROUPS, "group_size": 32},
            packing=("pack-quantized",) * 2,
        ),
        Layout(
            int4_asymmetric,
            _PACKED_ZERO,
            {**_INT4_GROUPS, "symmetric": False},
            packing=("pack-quantized",) * 2,
        ),
    ),
    # transformers' fine-grained fp8, which DeepSeek-V3 introduced. Other scales mean different things to vLLM and to
    # transformers there, so they have no row.
    FP8: _rows(Layout(fp8_per_block, {"weight": ELEMENTS, "weight_scale_inv": SCALE}, {})),
}


def require_format(format: str) -> None:
    """Raises ConfigError for an unknown format."""
    if not isinstance(format, str) or format not in LAYOUTS:
        raise ConfigError(f"unknown checkpoint format {format!r}: use one of {', '.join(LAYOUTS)}")


def layout_of(scheme: Scheme, format: str, name: str) -> Layout:
    """The row for a scheme. Raises CheckpointError that says which rows there are."""
    rows = LAYOUTS[format]
    stored = scheme.format.name
    if stored not in rows:
        others = [f for f, table in LAYOUTS.items() if stored in table]
        advice = f'pass format="{others[0]}"' if others else "it can be used, but not saved"
        raise CheckpointError(
            f"{name}: the checkpoint format {format!r} has no place for {stored} (it takes {', '.join(rows)}); {advice}"
        )
    if scheme.activation == "none" and format == FP8:
        raise CheckpointError(
            f'{name}: the checkpoint format "fp8" cannot say that activations are not quantized; pass '
            f'format="{COMPRESSED_TENSORS}"'
        )
    return rows[stored]


def quantization_config(format: str, schemes: Mapping[str, Scheme], plain: Iterable[str]) -> dict[str, Any]:
    """config.json's "quantization_config".

    schemes: the quantized modules. plain: the modules that could be taken for quantized linear layers, and are not.
    """
    if format == FP8:
        tools = {scheme.recipe for scheme in schemes.values()}
        return {
            "quant_method": FP8,
            "producer": {**PRODUCER},
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": sorted(plain),
            **({"searched": True} if any(s.is_searched for s in schemes.values()) else {}),
            **({"recipe": tools.pop()} if len(tools) == 1 and None not in tools else {}),
        }
    distinct = sorted(set(schemes.values()), key=str)
    # vLLM's mixtures of experts take per-tensor weights with per-tensor activations only.
    experts = any(".experts." in name for name in schemes)
    groups: dict[str, Any] = {}
    packings: list[str] = []
    for i, scheme in enumerate(distinct):
        layout = LAYOUTS[COMPRESSED_TENSORS][scheme.format.name]
        activations: dict[str, Any] | None = None
        # The file's one word for "auto" and "dynamic": whoever reads it quantizes activations if it can.
        if scheme.activation != "none" and layout.activations is not None:
            activations = dict(layout.activations)
            if experts and layout.weights["strategy"] == "tensor":
                activations["strategy"] = "tensor"
        packings.append(layout.packing[scheme.activation == "none"])
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(distinct) == 1 else sorted(n for n, s in schemes.items() if s == scheme),
            "weights": dict(layout.weights),
            "input_activations": activations,
            "output_activations": None,
        }
    if len(set(packings)) > 1:
        for group, packing in zip(groups.values(), packings, strict=True):
            group["format"] = packing
    searched = [name for name, scheme in zip(groups, distinct, strict=True) if scheme.is_searched]
    recipes = {name: scheme.recipe for name, scheme in zip(groups, distinct, strict=True) if scheme.recipe}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "producer": {**PRODUCER},
        "format": packings[0] if len(set(packings)) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(plain),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        # For us alone: a reload quantizes as the load did. No reader needs to know how a scale was found.
        **({"searched": searched} if searched else {}),
        **({"recipes": recipes} if recipes else {}),
    }


def reader(config: Mapping[str, Any]) -> Callable[[str], Layout | None]:
    """Which layout a quantized module has, by its name, as a "quantization_config" says. None: not quantized.

    Raises CheckpointError for a method, or arguments, that are in no row of `LAYOUTS`.
    """
    method = config.get("quant_method")
    if method == FP8:
        if config.get("weight_block_size") != [128, 128]:
            raise CheckpointError(
                'config.json: of "fp8" checkpoints only those with weight_block_size [128, 128] can be read'
            )
        layout = LAYOUTS[FP8][fp8_per_block.name]
        layout = replace(layout, scheme=layout.scheme.searched()) if config.get("searched") is True else layout
        layout = _by_recipe(layout, config.get("recipe"))
        return lambda module: layout
    if method != COMPRESSED_TENSORS:
        raise CheckpointError(
            f"config.json: checkpoints quantized with {method!r} cannot be read; there is {', '.join(LAYOUTS)}"
        )
    named = _object(config, "config_groups")
    groups = {name: group for name in named if (group := _object(named, name))}
    searched: list[Any] = found if isinstance(found := config.get("searched"), list) else []
    recipes: Mapping[str, Any] = found if isinstance(found := config.get("recipes"), Mapping) else {}
    read = [
        (
            Targets(f"{name}.targets", group.get("targets"), only=len(groups) == 1),
            _layout_of_group(group, name in searched, recipes.get(name)),
        )
        for name, group in groups.items()
    ]

    def find(module: str) -> Layout | None:
        return next((layout for targets, layout in read if targets.select(module)), None)

    return find


def _object(holder: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under a key of config.json; empty if there is none. Raises CheckpointError for anything else."""
    found = holder.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise CheckpointError(f"config.json: {key} is {found!r}, not an object")
    return found or {}


def _by_recipe(layout: Layout, tool: Any) -> Layout:
    """A layout whose weights follow the recipe that is noted, if it is one we know; the bytes are the same form."""
    scheme = layout.scheme
    known = isinstance(tool, str) and scheme.format.name in RECIPES.get(tool, ()) and not scheme.is_searched
    return replace(layout, scheme=scheme.by_recipe(tool)) if known else layout


def _layout_of_group(group: Mapping[str, Any], searched: bool, recipe: Any) -> Layout:
    weights, activations = _object(group, "weights"), _object(group, "input_activations") or None
    for layout in LAYOUTS[COMPRESSED_TENSORS].values():
        if not all(weights.get(key) == value for key, value in layout.weights.items()):
            continue
        if weights.get("actorder") in ("group", "dynamic"):
            break  # columns in another order, which a further tensor gives
        if searched and layout.scheme.format.name in SEARCHES:
            layout = replace(layout, scheme=layout.scheme.searched())
        layout = _by_recipe(layout, recipe)
        if activations is None:
            return replace(layout, scheme=layout.scheme.weight_only())
        if activations.get("dynamic") and layout.activations is not None:
            return layout
    known = ", ".join(LAYOUTS[COMPRESSED_TENSORS])
    raise CheckpointError(
        f"config.json: weights {dict(weights)} with activations {activations} are none of the schemes that can be read "
        f"({known}; of those with 8-bit floats, with dynamic activations or none, of the others with none)"
    )


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
