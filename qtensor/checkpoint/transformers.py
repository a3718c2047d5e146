"""transformers' from_pretrained of a quantized checkpoint, inside `online_quant`: QTensors, bytes unchanged.

While a session is open, the entries of transformers' table of quantizers for the methods of `LAYOUTS` give way to a
quantizer that puts values and scales together as they are read. It builds no other modules than the model's own, and
leaves no trace on the finished model. Threads that no session listens to, and checkpoints with other schemes, get
transformers' own quantizer, as they would without us.

In a session that was told that weights arrive quantized (`source=`), they are decoded instead, whatever known format
they are in: weights by name go to their collectors, those that transformers merges into others are decoded for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import CheckpointError, QTensorError
from ..lazy.lazy_tensor import LAZY
from ..sessions import registration
from ..sources.families import part_names, recognise
from ..sources.source import Spec
from ..tensor.qtensor import QTensor
from .layouts import LAYOUTS, Layout, reader
from .offload import refuse_offload

_SUFFIXES = {m: list(dict.fromkeys(s for row in rows.values() for s in row.entries)) for m, rows in LAYOUTS.items()}
"""What the tensors of a quantized weight may be called, by method; "weight", which all have, is the first."""
_STACKS = ("gate_up_proj", "down_proj")
"""The stacks of experts that gpt-oss stores as blocks and scales."""


@functools.cache
def _part_names() -> dict[str, str]:
    """What transformers may call a part of a weight → the part's name."""
    return {name.replace("*", "weight"): name for name in part_names()}


def _split(pattern: str) -> tuple[str, str]:
    """The pattern of a weight's tensor as that of its module, with the dot, and the tensor's name, which may have dots
    of its own ("weight.absmax")."""
    ends = [name for name in _part_names() if "." in name and (pattern == name or pattern.endswith(f".{name}"))]
    name = max(ends, key=len) if ends else pattern.rpartition(".")[2]
    return pattern.removesuffix(name), name


def choose(original: Callable[..., Any], config: Any, **kwargs: Any) -> Any:
    if registration.listening() is None or not kwargs.get("pre_quantized", True):
        return original(config, **kwargs)
    incoming: Any = getattr(registration.listening(), "incoming", None)
    decodes = incoming is not None and incoming.config is not None
    try:
        find = None if decodes else reader(config.to_dict())
    except CheckpointError:
        return original(config, **kwargs)
    if decodes:
        incoming.config = {**config.to_dict(), **incoming.config}
    if not transformers_asks():
        import transformers

        raise CheckpointError(
            f"transformers {transformers.__version__} casts quantized values as it reads them; from_pretrained of a "
            "quantized checkpoint inside online_quant needs transformers 5.21 or newer. With this one build the model "
            "from its config and call load_checkpoint"
        )
    return _classes()[0](config, find, **kwargs)


def transformers_asks() -> bool:
    """Does transformers ask a quantizer before it casts a tensor that it has read? From 5.21 on."""
    from transformers.quantizers.base import HfQuantizer

    return hasattr(HfQuantizer, "get_new_dtype")


@functools.cache
def _classes() -> tuple[Any, Any]:
    """The quantizer and its operation; their bases are only there once transformers is."""
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.quantizers.base import HfQuantizer

    class Pair(ConversionOps):  # type: ignore[misc]
        """Lists of a weight's tensors, by pattern, become lists of QTensors under the pattern of the weight."""

        def __init__(self, hf_quantizer: Any) -> None:
            self.hf_quantizer = hf_quantizer

        def convert(  # type: ignore[override]
            self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **_: Any
        ) -> Any:
            dtype = model.get_parameter(full_layer_name).dtype
            weights: dict[str, dict[str, list[Any]]] = {}
            for pattern, tensors in input_dict.items():
                prefix, suffix = _split(pattern.removesuffix("$"))
                weights.setdefault(prefix, {})[suffix] = _listed(tensors)
            out: dict[str, Any] = {}
            for prefix, given in weights.items():
                if given.keys() == {"weight"}:
                    out[prefix + "weight"] = [tensor.to(dtype) for tensor in given["weight"]]
                    continue
                if self.hf_quantizer.decodes:
                    target = model.get_parameter(full_layer_name)
                    alone = len(weights) == 1 and not prefix and all(len(each) == 1 for each in given.values())
                    each = [dict(zip(given, parts, strict=True)) for parts in zip(*given.values(), strict=True)]
                    if alone and collected(target, full_layer_name, each[0]):
                        return {full_layer_name: target}
                    config = self.hf_quantizer.quantization_config.to_dict()
                    out[prefix + "weight"] = [decoded(full_layer_name, parts, dtype, config) for parts in each]
                    continue
                layout = self.hf_quantizer.layout_of(full_layer_name, input_dict)
                each = [dict(zip(given, parts, strict=True)) for parts in zip(*given.values(), strict=True)]
                out[prefix + "weight"] = [layout.weight(full_layer_name, tensors, dtype) for tensors in each]
            return {full_layer_name: out["weight"]} if out.keys() == {"weight"} else out

        @property
        def reverse_op(self) -> ConversionOps:
            raise NotImplementedError("save_checkpoint writes quantized weights")

    class Quantizer(HfQuantizer):  # type: ignore[misc]
        """Loads a quantized checkpoint into QTensors."""

        requires_calibration = True

        def __init__(self, config: Any, find: Callable[[str], Layout | None] | None, **kwargs: Any) -> None:
            """find: the layout of a module; None: weights are decoded."""
            super().__init__(config, **kwargs)
            self._find, self.decodes = find or (lambda module: None), find is None
            by_method = _SUFFIXES.get(config.to_dict()["quant_method"], [])
            self._suffixes = list(dict.fromkeys(["weight", *_part_names()])) if self.decodes else by_method
            self._replaced: dict[int, Any] = {}

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            """transformers copies the conversions, which hold this, for each weight; a load is one."""
            return self

        def layout_of(self, weight: str, patterns: Iterable[str]) -> Layout:
            """By the module's name; of experts that are merged into one weight, by that of the first of them."""
            parent = weight.rpartition(".")[0]
            experts = [f"{parent}.0.{p.split('.')[-2]}" for p in patterns if ".*." in p]
            found = (self._find(name) for name in [weight.removesuffix(".weight"), *experts, ""])
            layout = next((f for f in found if f is not None), None)
            if layout is None:
                raise CheckpointError(f"{weight}: config.json does not say how it is quantized")
            return layout

        def update_weight_conversions(self, conversions: list[Any], model: Any = None) -> list[Any]:
            updated = []
            for entry in conversions:
                sources = entry.source_patterns if isinstance(entry, WeightConverter) else []
                paired = entry
                if sources and all(s.endswith(".weight") for s in sources):
                    parts = [source.removesuffix("weight") + suffix for source in sources for suffix in self._suffixes]
                    paired = WeightConverter(parts, list(entry.target_patterns), [Pair(self), *entry.operations])
                updated.append(paired)
                self._replaced[id(paired)] = entry
            if self.decodes:
                updated += [
                    WeightConverter([f"{stack}{ending}$" for ending in ("_blocks", "_scales")], stack, [Pair(self)])
                    for stack in _STACKS
                ]
            return [*updated, WeightConverter([f"{s}$" for s in self._suffixes], "weight", [Pair(self)])]

        def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
            """`Pair` casts what has no scales; before it nothing may be cast."""
            paired = any(isinstance(op, Pair) for op in getattr(converter, "operations", ()))
            return None if paired else dtype

        def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
            refuse_offload(device_map, stored=True)

        def preprocess_model(self, model: Any, dtype: Any = None, **_: Any) -> None:
            pass

        def postprocess_model(self, model: Any, **_: Any) -> None:
            self.settle(model)
            self.remove_quantization_config(model)

        def settle(self, model: Any) -> None:
            """The loaded model is as a session leaves one."""
            for param in model.parameters():
                if type(param) is QTensor:
                    param.requires_grad_(False)
            # What a save reverts: the model's own conversions, as an unquantized checkpoint would have left them.
            used = [self._replaced.get(id(entry)) for entry in model._weight_conversions]
            model._weight_conversions = [entry for entry in used if entry is not None]

        def is_serializable(self, *_: Any) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    return Quantizer, Pair


def quantizer() -> Any:
    """The quantizer of quantized checkpoints, whose base is only there once transformers is."""
    return _classes()[0]


def _parts_of(weight: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors by part name, from their names in the module."""
    leaf = weight.rpartition(".")[2]
    found = {}
    for name, tensor in tensors.items():
        ending = name.removeprefix(leaf)
        found[_part_names().get(name) or (f"*{ending}" if name.startswith(leaf) else name)] = tensor
    return found


def collected(target: Any, weight: str, tensors: dict[str, Any]) -> bool:
    """Let a weight that is being loaded take its parts. False if it is none."""
    if not isinstance(target, LAZY):
        return False
    collector = target._armed.host.collector(target._armed, make=True)
    assert collector is not None
    parts = _parts_of(weight, tensors)
    # transformers makes one error of its own of all that are raised here; the session ends with the first of these.
    with contextlib.suppress(QTensorError):
        collector.expect({part: Spec(t.dtype, tuple(t.shape)) for part, t in parts.items()})
        for part, tensor in sorted(parts.items(), key=lambda item: int(item[1].nbytes)):
            collector.write(part, tensor)
    return True


def decoded(weight: str, tensors: dict[str, Any], dtype: Any, config: dict[str, Any]) -> Any:
    """One of the matrices that transformers makes a weight of, in high precision."""
    parts = _parts_of(weight, tensors)
    specs = {part: Spec(t.dtype, tuple(t.shape)) for part, t in parts.items()}
    try:
        source = recognise(specs, config)
        if source is None:
            raise CheckpointError(f"{', '.join(tensors)} are of no known format")
        shape = source.shape(specs)
        needed = {part: parts[part] for part, spec in source.parts(shape).items() if spec.needed}
        source.check(needed, shape)
    except KeyError as error:
        raise CheckpointError(f"{weight}: has no {error.args[0]}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{weight}: {error}") from None
    return source.decode(needed, shape, dtype)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
