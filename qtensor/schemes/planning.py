"""Planning: the best schemes for a model's weights that fit into a number of bytes, from their shapes alone.

The rule. Quantizing a weight adds to the loss its sensitivity times the scheme's relative squared error: to first order
the errors of layers add up like this (the linearity theorem of HIGGS, arXiv 2411.17525). The error is that of normally
distributed weights (`EXPECTED_SQNR`). The sensitivity does not depend on a weight's size; it follows the layer's kind
(`SENSITIVITY`) and position: the first and the last eighth of the layers count twice, as they get more bits in
llama.cpp's mixtures. Weights that an engine fuses (q, k, v; gate, up), and the experts of a layer, get one scheme. From
the smallest form of everything, each step takes what saves the most loss per byte, and fits, until nothing does. Equal
steps are taken in the model's order, so the same shapes give the same plan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from ..kernels import SOURCE_DTYPES
from .plan import Plan, PlannedWeight, Tensor, in_gb
from .scheme import SCHEMES, Scheme, SchemeLike, as_scheme
from .selection import NORMS, ROUTERS, Selection, ignoring

Engine = Literal["pytorch", "vllm"]
Size = int | str
"""Bytes, or a text as "10GB" (10^9 bytes) or "9.5GiB" (2^30)."""

DEFAULT_SCHEMES: tuple[Scheme, ...] = (SCHEMES["nvfp4"], SCHEMES["fp8"])
EXPECTED_SQNR = {
    "fp8_per_tensor": 31.5,
    "fp8_per_channel": 31.5,
    "fp8_per_block": 31.5,
    "mxfp8": 31.5,
    "mxfp4": 19.0,
    "nvfp4": 20.4,
    "int8_per_channel": 40.8,
    "int4_per_group": 18.6,
    "int4_per_group_32": 20.3,
    "int4_asymmetric": 19.9,
    "fp8_per_channel:searched": 31.7,
    "fp8_per_block:searched": 31.6,
    "mxfp8:searched": 31.5,
    "mxfp4:searched": 19.1,
    "nvfp4:searched": 21.7,
    "int8_per_channel:searched": 40.9,
    "int4_per_group:searched": 19.9,
    "int4_per_group_32:searched": 21.6,
}
"""In dB, of normally distributed weights (`tests/test_planning.py` measures them)."""
SENSITIVITY = {
    "embedding": 4.0,
    "attention in": 2.0,  # q, k and v
    "attention out": 1.0,
    "MLP in": 2.0,  # gate and up
    "MLP out": 2.0,
    "experts": 4.0,  # of a layer: as its MLP would
    "head": 4.0,
    "other": 1.0,
}
"""Of all weights of a kind in one layer together: rounded from what `bench/fit.py --sensitivities` measures."""
EDGE = 2.0
_EDGE_PART = 8
_UNITS = {"": 1, "B": 1} | {p + u: b**i for i, p in enumerate("KMGT", 1) for u, b in (("B", 1000), ("iB", 1024))}

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|block|decoder|encoder|transformer_blocks)\.(\d+)(?:\.|$)")
_KINDS = (
    ("experts", re.compile(r"(.*\.)?(experts|block_sparse_moe\.experts)(\.|$)")),
    ("head", re.compile(r"(.*\.)?(lm_head|embed_out|output_projection)$")),
    ("embedding", re.compile(r"(.*\.)?(wte|wpe|\w*embed(ding)?s?(_tokens|_in|_out)?|\w*_embeddings)$")),
    (
        "attention out",
        re.compile(r".*(attn|attention)\w*\.(.*\.)?(o_proj|out_proj|wo|dense|c_proj|proj|to_out(\.0)?)$"),
    ),
    (
        "attention in",
        re.compile(
            r".*(attn|attention)\w*\.(.*\.)?(\w*[qkv]+(_[ab])?_proj\w*|qkv|wqkv|w[qkv]|c_attn|in_proj|query_key_value|"
            r"query|key|value|to_[qkv])$",
            re.IGNORECASE,
        ),
    ),
    ("MLP out", re.compile(r"(.*\.)?(down_proj|w2|fc2|fc_out|dense_4h_to_h|c_proj|linear_2|wo|output\.dense)$")),
    (
        "MLP in",
        re.compile(
            r"(.*\.)?(gate_proj|up_proj|gate_up_proj|w1|w3|fc1|fc_in|dense_h_to_4h|c_fc|linear_1|wi(_\d)?"
            r"|intermediate\.dense)$"
        ),
    ),
)


def tensors_of(parameters: Iterable[tuple[str, Any]], buffers: Iterable[tuple[str, Any]] = ()) -> list[Tensor]:
    """The parameters of a model, tied ones once under all of their names, and its buffers."""
    names: dict[int, list[str]] = {}
    held: dict[int, Any] = {}
    for name, param in parameters:
        names.setdefault(id(param), []).append(name)
        held[id(param)] = param
    found = [
        Tensor(tuple(names[key]), tuple(p.shape), p.dtype.itemsize, p.dtype in SOURCE_DTYPES) for key, p in held.items()
    ]
    return found + [Tensor((name,), tuple(b.shape), b.dtype.itemsize, False) for name, b in buffers]


def read_size(key: str, value: Size) -> int:
    """Bytes. Raises ConfigError for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B|)\s*", value) if isinstance(value, str) else None
    if found is not None:
        return int(float(found[1]) * _UNITS[found[2]])
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ConfigError(f'{key} is a number of bytes, or a text as "10GB" or "9.5GiB", not {value!r}')


def read_schemes(key: str, value: Any) -> tuple[Scheme, ...]:
    """The schemes a plan may choose from. Raises ConfigError."""
    given = [value] if isinstance(value, str | Scheme) else value
    if not isinstance(given, Sequence) or not given:
        raise ConfigError(f"{key} is a list of schemes to choose from, not {value!r}")
    schemes = tuple(dict.fromkeys(as_scheme(scheme) for scheme in given))
    if recipes := [scheme.name for scheme in schemes if scheme.recipe]:
        raise ConfigError(f"{key} are compared by what our own formulas lose, and {recipes[0]} has another")
    return schemes


def kind_of(name: str) -> tuple[str, int | None]:
    """The kind of layer that a weight's name tells, one of `plan.KINDS`, and the layer's number."""
    module = name.removesuffix(".weight")
    layer = _LAYER.search(module)
    kind = next((kind for kind, names in _KINDS if names.match(module)), "other")
    return kind, int(layer[1]) if layer is not None else None


def make_plan(
    tensors: Iterable[Tensor],
    fit: Size,
    *,
    reserve: Size = 0,
    schemes: Sequence[SchemeLike] = DEFAULT_SCHEMES,
    ignore: Sequence[str] = (),
    engine: Engine = "pytorch",
) -> Plan:
    """The best schemes that fit; see the module's documentation.

    Args:
        tensors: All of the model.
        fit: Bytes that the model may take.
        reserve: Bytes of them to leave free, for a KV cache and activations.
        schemes: To choose from.
        ignore: Patterns of weights to leave as they are, besides expert routers.
        engine: "vllm" leaves embeddings as they are, quantizes a head to fp8 or not at all, and names weights so that
            its layers find them.

    Returns:
        The plan.

    Raises:
        ConfigError: Nothing fits; the error says the smallest size that does. Or an option has no such value.
    """
    budget, kept = read_size("fit", fit), read_size("reserve", reserve)
    if engine not in ("pytorch", "vllm"):
        raise ConfigError(f"engine is one of 'pytorch', 'vllm', not {engine!r}")
    choices = read_schemes("schemes", schemes)
    tensors = list(tensors)
    last = max((layer for t in tensors for layer in (kind_of(t.names[0])[1],) if layer is not None), default=0)
    groups: dict[str, _Group] = {}
    stay = []
    for tensor in tensors:
        kind, layer = kind_of(tensor.names[0])
        options = _options(tensor, kind, choices, ignore, engine)
        if len(options) < 2:
            stay.append(tensor)
            continue
        group = groups.setdefault(_group_name(tensor.names[0], kind), _Group(kind, layer, last))
        group.add(tensor, options)
    room, taken = budget - kept, sum(_plain(t) for t in stay) + sum(g.size for g in groups.values())
    if taken > room:
        raise ConfigError(
            f"the model does not fit into {in_gb(room)}: with {', '.join(map(str, choices))} to choose from it takes "
            f"{in_gb(taken)} at least. Give more, reserve less, or add a smaller scheme"
        )
    while steps := [(g.gain(), -i, g) for i, g in enumerate(groups.values()) if g.next_size() <= room - taken]:
        best = max(steps, key=lambda step: step[:2])[2]
        taken += int(best.next_size())
        best.rise()
    return _plan(tensors, budget, kept, {id(t): g.scheme for g in groups.values() for t in g.tensors}, engine)


def load_plan(path: str | Path) -> Plan:
    """Read what `Plan.save` wrote. Of weights whose `targets` were edited, schemes and bytes follow these.

    Raises:
        ConfigError: The file cannot be read, or is no plan.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        known, targets = given["plan"], given["targets"]
        selection = Selection({"targets": targets}, (), None)
        weights = tuple(_weight(entry, selection) for entry in known["weights"])
        head, sizes = given.get("lm_head", False) is True, (int(known["fit"]), int(known["reserve"]))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: no plan, as `qtensor plan` writes it: {type(error).__name__}: {error}") from None
    return Plan(*sizes, weights, dict(selection.targets or {}), head)


def _weight(entry: Mapping[str, Any], selection: Selection) -> PlannedWeight:
    names, shape = tuple(map(str, entry["names"])), tuple(map(int, entry["shape"]))
    tensor = Tensor(names, shape, int(entry["itemsize"]), entry["is_weight"] is True)
    kind, layer = str(entry["kind"]), entry["layer"]
    chosen = selection.of_matrix(names[0].removesuffix(".weight"), names[0], shape[-2])[0] if kind else None
    return PlannedWeight(tensor, chosen, bytes_of(tensor, chosen), kind, None if layer is None else int(layer))


class _Group:
    """Weights that get one scheme: forms on the lower hull of bytes and error, of which one after another is taken."""

    def __init__(self, kind: str, layer: int | None, last: int) -> None:
        self.tensors: list[Tensor] = []
        edge = layer is not None and min(layer, last - layer) < (last + 1) / _EDGE_PART
        self._sensitivity = SENSITIVITY[kind] * (EDGE if edge else 1.0)
        self._forms: dict[Scheme | None, int] = {}
        self._hull: list[tuple[int, float, Scheme | None]] = []

    def add(self, tensor: Tensor, options: Sequence[Scheme | None]) -> None:
        common = [s for s in options if not self.tensors or s in self._forms]
        self._forms = {s: self._forms.get(s, 0) + bytes_of(tensor, s) for s in common}
        self.tensors.append(tensor)
        self._hull = _hull([(size, _error(scheme), scheme) for scheme, size in self._forms.items()])

    @property
    def size(self) -> int:
        return self._hull[0][0]

    @property
    def scheme(self) -> Scheme | None:
        return self._hull[0][2]

    def next_size(self) -> float:
        """How many bytes more the next form takes."""
        return self._hull[1][0] - self._hull[0][0] if len(self._hull) > 1 else float("inf")

    def gain(self) -> float:
        """Of the next form: loss saved per byte."""
        return self._sensitivity * (self._hull[0][1] - self._hull[1][1]) / self.next_size()

    def rise(self) -> None:
        self._hull.pop(0)


def _hull(forms: list[tuple[int, float, Scheme | None]]) -> list[tuple[int, float, Scheme | None]]:
    """Of forms (bytes, error, scheme): those that are best for some price of a byte, the smallest first."""
    hull: list[tuple[int, float, Scheme | None]] = []
    for form in sorted(forms, key=lambda form: form[:2]):
        if hull and form[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], form) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(form)
    return hull


def _slope(a: tuple[int, float, Scheme | None], b: tuple[int, float, Scheme | None]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0])


def _error(scheme: Scheme | None) -> float:
    return 0.0 if scheme is None else 10 ** (-EXPECTED_SQNR[scheme.name] / 10)


def _options(
    tensor: Tensor, kind: str, schemes: Sequence[Scheme], ignore: Sequence[str], engine: Engine
) -> list[Scheme | None]:
    """What a tensor may become."""
    if not tensor.is_weight or len(tensor.shape) not in (2, 3) or 0 in tensor.shape or tensor.names[0].endswith("bias"):
        return [None]
    rows, cols = tensor.shape[-2:]
    for name in tensor.names:
        if ignoring((ROUTERS, NORMS, *ignore), name.removesuffix(".weight"), name, rows):
            return [None]
    if engine == "vllm" and (kind in ("embedding", "other") or (kind != "experts" and len(tensor.shape) == 3)):
        return [None]
    if engine == "vllm" and kind == "head":
        schemes = [scheme for scheme in schemes if scheme == SCHEMES["fp8"]]
    # A last group that is short, or a block that a fused weight's parts share, is not for every reader.
    whole = [s for s in schemes if cols % max(1, s.format.block[1]) == 0 and rows % max(1, s.format.block[0]) == 0]
    return [None, *whole]


def _group_name(name: str, kind: str) -> str:
    """Weights with the same have one scheme."""
    module = name.removesuffix(".weight")
    if kind == "experts":
        return _experts(module)
    return f"{module.rpartition('.')[0]}: {kind}" if kind in ("attention in", "MLP in") else module


def _experts(module: str) -> str:
    """The module that holds the experts: "…mlp.experts" """
    before, found, _ = module.partition("experts.")
    return before + "experts" if found else module


def bytes_of(tensor: Tensor, scheme: Scheme | None) -> int:
    """Of a tensor in a scheme: values and scales."""
    if scheme is None:
        return _plain(tensor)
    fmt, shape = scheme.format, tensor.shape
    scales = prod(fmt.scale_shape(shape)) * fmt.scale_dtype.itemsize + 4 * prod(fmt.global_scale_shape(shape) or (0,))
    return prod(fmt.qdata_shape(shape)) * fmt.dtype.itemsize + scales


def _plain(tensor: Tensor) -> int:
    return prod(tensor.shape) * tensor.itemsize


def _plan(
    tensors: Sequence[Tensor], budget: int, kept: int, chosen: Mapping[int, Scheme | None], engine: Engine
) -> Plan:
    weights, targets, head = [], {}, False
    for tensor in tensors:
        scheme = chosen.get(id(tensor))
        kind, layer = kind_of(tensor.names[0])
        quantizable = id(tensor) in chosen
        weights.append(PlannedWeight(tensor, scheme, bytes_of(tensor, scheme), kind if quantizable else "", layer))
        if scheme is None:
            continue
        if engine == "vllm" and kind == "head":
            head = True
            continue
        for name in tensor.names:
            module = name.removesuffix(".weight")
            numbered = re.search(r"experts\.\d+\.", module) is not None
            targets[_experts(module) if kind == "experts" and (numbered or engine == "vllm") else module] = scheme
    return Plan(budget, kept, tuple(weights), targets, head)
