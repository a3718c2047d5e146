"""Layouts: how a quantized weight lies in a checkpoint, and how config.json says so.

`LAYOUTS` has one row per format and scheme: the names of the tensors a weight becomes, and the arguments that other
tools read it by. Adding a scheme is adding a row. Everything else in this package goes through the row's methods.

Sources: the compressed-tensors schema (`compressed_tensors.quantization.QuantizationConfig`), and what vLLM and
transformers accept. As few fields as they need: older readers refuse unknown ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError
from ..quantized import QTensor
from ..scheme import Scheme, fp8_per_block, fp8_per_channel, fp8_per_tensor
from ..selection import matches

COMPRESSED_TENSORS, FP8 = "compressed-tensors", "fp8"
Spec = tuple[torch.dtype, tuple[int, ...]]
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
_PER_TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
_PER_GROUP = {**_PER_TOKEN, "strategy": "group", "group_size": 128}

# Matrices that serving systems keep as one. Per tensor they share a scale; per block each but the last has to end on
# a block's border.
FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


@dataclass(frozen=True)
class Layout:
    """One scheme in one format.

    data, scale: what the weight's two tensors are called, below the module's name.
    weights, activations: compressed-tensors' arguments; activations None where the scheme has no quantized ones.
    packing: compressed-tensors' name of the layout, for quantized and for plain activations.
    """

    scheme: Scheme
    weights: Mapping[str, Any]
    activations: Mapping[str, Any]
    data: str = "weight"
    scale: str = "weight_scale"
    packing: tuple[str, str] = ("float-quantized", "naive-quantized")

    def specs(self, shape: tuple[int, int]) -> dict[str, Spec]:
        """dtype and shape of each tensor that a weight `[N, K]` becomes."""
        fmt = self.scheme.format
        return {self.data: (fmt.dtype, shape), self.scale: (torch.float32, fmt.scale_shape(shape))}

    def tensors(self, qdata: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that a quantized matrix becomes."""
        return {self.data: qdata, self.scale: scale}

    def weight(self, module: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> QTensor:
        """The quantized matrix of those tensors. Raises CheckpointError where they do not belong together."""
        qdata, scale = tensors[self.data], tensors[self.scale]
        fmt = self.scheme.format
        if qdata.dtype != fmt.dtype or qdata.dim() != 2:
            raise CheckpointError(
                f"{module}.{self.data} is {qdata.dtype} {list(qdata.shape)}; "
                f"{self.scheme.name} stores a {fmt.dtype} matrix"
            )
        wanted = fmt.scale_shape(tuple(qdata.shape))
        if scale.dtype not in (torch.float32, torch.bfloat16, torch.float16) or scale.numel() != _count(wanted):
            raise CheckpointError(
                f"{module}.{self.scale} is {scale.dtype} {list(scale.shape)}; a {self.scheme.name} weight "
                f"{list(qdata.shape)} has fp32 {list(wanted)}"
            )
        return QTensor(qdata, scale.to(torch.float32).reshape(wanted), self.scheme, dtype)


_FP8_LAYOUTS = (
    Layout(fp8_per_tensor, {**_FLOAT8, "strategy": "tensor"}, _PER_TOKEN),
    Layout(fp8_per_channel, {**_FLOAT8, "strategy": "channel"}, _PER_TOKEN),
    Layout(fp8_per_block, {**_FLOAT8, "strategy": "block", "block_structure": [128, 128]}, _PER_GROUP),
)

LAYOUTS: dict[str, dict[str, Layout]] = {
    COMPRESSED_TENSORS: {layout.scheme.name: layout for layout in _FP8_LAYOUTS},
    # transformers' fine-grained fp8, which DeepSeek-V3 introduced. Other scales mean different things to vLLM and to
    # transformers there, so they have no row.
    FP8: {fp8_per_block.name: Layout(fp8_per_block, {}, {}, scale="weight_scale_inv")},
}


def layout_of(scheme: Scheme, format: str, name: str) -> Layout:
    """The row for a scheme. Raises CheckpointError that says which rows there are."""
    if format not in LAYOUTS:
        raise CheckpointError(f"unknown checkpoint format {format!r}: use one of {', '.join(LAYOUTS)}")
    rows = LAYOUTS[format]
    if scheme.name not in rows:
        others = [f for f, table in LAYOUTS.items() if scheme.name in table]
        advice = f'pass format="{others[0]}"' if others else "it can be used, but not saved"
        raise CheckpointError(
            f"{name}: the checkpoint format {format!r} has no place for {scheme.name} (it takes "
            f"{', '.join(rows)}); {advice}"
        )
    if scheme.activation == "none" and format == FP8:
        raise CheckpointError(
            f'{name}: the checkpoint format "fp8" cannot say that activations are not quantized; pass '
            f'format="{COMPRESSED_TENSORS}"'
        )
    return rows[scheme.name]


def quantization_config(format: str, schemes: Mapping[str, Scheme], plain: Iterable[str]) -> dict[str, Any]:
    """config.json's "quantization_config".

    schemes: the quantized modules. plain: the modules that could be taken for quantized linear layers, and are not.
    """
    if format == FP8:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": sorted(plain),
        }
    distinct = sorted(set(schemes.values()), key=str)
    # vLLM's mixtures of experts take per-tensor weights with per-tensor activations only.
    experts = any(".experts." in name for name in schemes)
    groups: dict[str, Any] = {}
    packings: list[str] = []
    for i, scheme in enumerate(distinct):
        layout = LAYOUTS[COMPRESSED_TENSORS][scheme.name]
        activations: dict[str, Any] | None = None
        if scheme.activation == "dynamic":
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
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": packings[0] if len(set(packings)) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(plain),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
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
        return lambda module: layout
    if method != COMPRESSED_TENSORS:
        raise CheckpointError(
            f"config.json: checkpoints quantized with {method!r} cannot be read; there is {', '.join(LAYOUTS)}"
        )
    groups = [(group.get("targets", ()), _layout_of_group(group)) for group in config["config_groups"].values()]

    def find(module: str) -> Layout | None:
        for targets, layout in groups:
            if _targeted(module, targets, len(groups) == 1):
                return layout
        return None

    return find


def _targeted(module: str, targets: Sequence[str], only_group: bool) -> bool:
    classes = [t for t in targets if not t.startswith("re:") and "." not in t and t[:1].isupper()]
    return (bool(classes) and only_group) or any(matches(t, module, module) for t in targets if t not in classes)


def _layout_of_group(group: Mapping[str, Any]) -> Layout:
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    for layout in LAYOUTS[COMPRESSED_TENSORS].values():
        if all(weights.get(key) == value for key, value in layout.weights.items()):
            if activations is None:
                return Layout(**{**layout.__dict__, "scheme": layout.scheme.weight_only()})
            if activations.get("dynamic"):
                return layout
    known = ", ".join(LAYOUTS[COMPRESSED_TENSORS])
    raise CheckpointError(
        f"config.json: weights {dict(weights)} with activations {activations} are none of the schemes that can be read "
        f"({known}, with dynamic activations or none)"
    )


def fused_group(module: str) -> tuple[str, ...]:
    """The modules that are kept as one matrix with this one, in order, itself included."""
    parent, _, leaf = module.rpartition(".")
    for group in FUSED:
        if leaf in group:
            return tuple(f"{parent}.{name}" if parent else name for name in group)
    return (module,)


def refuse_misaligned(rows: Mapping[str, int], schemes: Mapping[str, Scheme]) -> None:
    """Blocks of fused matrices are those of their parts only if the parts end on block borders.

    rows: of every quantized module. Raises CheckpointError that names those that do not.
    """
    bad = []
    for module, scheme in schemes.items():
        group = [name for name in fused_group(module) if name in schemes]
        if scheme.format.granularity == "block" and module in group[:-1] and rows[module] % scheme.format.block[0]:
            bad.append(f"{module} has {rows[module]} rows")
    if bad:
        shown = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise CheckpointError(
            f"{shown}: not a multiple of 128, so its 128 × 128 blocks are not those of the fused matrix that servers "
            "build of it. Add it and its partners to `ignore`, or use fp8_per_channel."
        )


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
