"""How each library makes a quantized weight: what bench/perplexity.py and bench/search.py compare.

A `Quantizer` makes its own form of a bf16 weight `[N, K]`; `values` are then what the library says the weight is, and
`bytes` all that it keeps: codes, scales, zero points. Only what needs no data and runs on a CPU. A library that is not
installed is left out, and `absent` says so; so is what its own package cannot do without a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qtensor import quantize
from qtensor.kernels import SEARCHES
from qtensor.schemes.scheme import SCHEMES, SchemeLike

Made = Any


@dataclass(frozen=True)
class Quantizer:
    """One way. family: whose it is. make: bf16 `[N, K]` to the library's form, which is what takes the time."""

    label: str
    family: str
    make: Callable[[torch.Tensor], Made]
    values: Callable[[Made], torch.Tensor]
    bytes: Callable[[Made], int]


def ours() -> list[Quantizer]:
    """Every scheme, and again with searched scales where there is a search."""
    names = [name for scheme in dict.fromkeys(SCHEMES.values()) for name in (scheme.name, f"{scheme.name}:searched")]
    return [of_scheme(name) for name in names if ":" not in name or name.partition(":")[0] in SEARCHES]


def of_scheme(scheme: SchemeLike) -> Quantizer:
    return Quantizer(
        str(scheme),
        "qtensor",
        lambda weight: quantize(weight, scheme),
        lambda made: made.dequantize(torch.float32),
        lambda made: sum(part.nbytes for part in made.parts()),
    )


# Published rules ------------------------------------------------------------------------------------------------------


def four_over_six() -> Quantizer:
    """By the published rule (arXiv 2512.02010; the package needs CUDA to be installed)."""
    return Quantizer(
        "four-over-six",
        "four-over-six",
        four_over_six_values,
        lambda made: made,
        lambda made: made.numel() * 9 // 16 + 4,
    )


def four_over_six_values(weight: torch.Tensor) -> torch.Tensor:
    """The largest block scale is 256, so that there is room for 384; the largest element of each block of nvfp4 becomes
    6, or 4 if that leaves the smaller squared error."""
    groups = weight.float().view(-1, 16)
    whole = weight.abs().max().float() / (6 * 256)
    amax = groups.abs().amax(1, keepdim=True)
    found = []
    for largest in (6.0, 4.0):
        step = (amax / (largest * whole)).clamp_max(448).to(torch.float8_e4m3fn).float() * whole
        scaled = torch.where(step > 0, groups / step, 0.0).clamp(-6, 6)
        m = scaled.abs()
        code = torch.where(m < 2, (m * 2).round() / 2, torch.where(m < 4, m.round(), (m / 2).round() * 2))
        found.append(code * scaled.sign() * step)
    losses = [(groups - values).double().square().sum(1, keepdim=True) for values in found]
    return torch.where(losses[0] <= losses[1], *found).view(weight.shape)


def _nested(found: Any) -> int:
    """Bytes of the tensors in tuples."""
    return (
        found.nbytes if isinstance(found, torch.Tensor) else sum(map(_nested, found)) if isinstance(found, tuple) else 0
    )


# torchao --------------------------------------------------------------------------------------------------------------


def _stored(made: Made) -> int:
    """Bytes of a tensor subclass's parts."""
    return sum(getattr(made, name).nbytes for name in made.__tensor_flatten__()[0])


def torchao() -> Iterator[Quantizer]:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerRow, quantize_
    from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

    def of_config(label: str, config: Any, values: Callable[[Made], torch.Tensor]) -> Quantizer:
        def make(weight: torch.Tensor) -> Made:
            linear = nn.Linear(1, 1, bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            quantize_(linear, config)
            return linear.weight

        return Quantizer(label, "torchao", make, values, _stored)

    def by_product(made: Made) -> torch.Tensor:
        """What products with it say it is: it has no way back of its own."""
        return F.linear(torch.eye(made.shape[1], dtype=torch.bfloat16), made).float().t().contiguous()

    def whole(made: Made) -> torch.Tensor:
        return made.dequantize(torch.float32)  # type: ignore[no-any-return]

    for group in (128, 32):
        for name in ("TINYGEMM", "HQQ"):
            config = PrototypeInt4WeightOnlyConfig(group, Int4ChooseQParamsAlgorithm[name], False)
            yield of_config(f"int4, groups of {group}" + (", HQQ" if name == "HQQ" else ""), config, by_product)
    yield of_config("int8 per row", Int8WeightOnlyConfig(set_inductor_config=False), whole)
    yield of_config("fp8 per row", Float8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False), whole)

    def nvfp4(weight: torch.Tensor) -> Made:
        return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))

    yield Quantizer("nvfp4", "torchao", nvfp4, whole, lambda made: made.qdata.nbytes + made.scale.nbytes + 4)
    for label, dtype in (("mxfp4", torch.float4_e2m1fn_x2), ("mxfp8", torch.float8_e4m3fn)):
        for mode in (ScaleCalculationMode.FLOOR, ScaleCalculationMode.RCEIL):

            def mx(weight: torch.Tensor, dtype: torch.dtype = dtype, mode: Any = mode) -> Made:
                return MXTensor.to_mx(weight, dtype, 32, scaling_mode=mode)

            yield Quantizer(
                label + (", rounded up" if mode is ScaleCalculationMode.RCEIL else ""),
                "torchao",
                mx,
                whole,
                lambda made: made.qdata.nbytes + made.scale.nbytes,
            )


# bitsandbytes, HQQ, SINQ ----------------------------------------------------------------------------------------------


def bitsandbytes() -> Iterator[Quantizer]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def stored(made: Made) -> int:
        codes, state = made
        nested = state.state2.absmax.nbytes + state.offset.nbytes if state.nested else 0
        return int(codes.nbytes + state.absmax.nbytes + nested)

    for label, kind, nested in (("nf4", "nf4", False), ("nf4, double", "nf4", True), ("fp4", "fp4", False)):

        def make(weight: torch.Tensor, kind: str = kind, nested: bool = nested) -> Made:
            return quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)

        yield Quantizer(label, "bitsandbytes", make, lambda made: dequantize_4bit(*made).float(), stored)


def hqq() -> Iterator[Quantizer]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for group in (64, 128):

        def make(weight: torch.Tensor, group: int = group) -> Made:
            linear = nn.Linear(1, 1, bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            config = BaseQuantizeConfig(nbits=4, group_size=group, axis=1)
            return HQQLinear(linear, config, compute_dtype=torch.bfloat16, device="cpu", del_orig=False)

        def stored(made: Made) -> int:
            return int(made.W_q.nbytes + made.meta["scale"].nbytes + made.meta["zero"].nbytes)

        yield Quantizer(f"4 bits, groups of {group}", "HQQ", make, lambda made: made.dequantize().float(), stored)


def sinq() -> Iterator[Quantizer]:
    """As transformers' SinqConfig makes it: scales and zero points in eight bits, and a scale for each column."""
    with contextlib.redirect_stdout(io.StringIO()):
        from sinq.sinqlinear_hf import SINQLinear, sinq_base_quant_config

    for group in (64, 128):

        def make(weight: torch.Tensor, group: int = group) -> Made:
            config = sinq_base_quant_config(nbits=4, group_size=group, method="sinq")
            rows, cols = weight.shape
            linear = SINQLinear(cols, rows, quant_config=config, compute_dtype=torch.bfloat16, device="cpu")
            linear.quantize(weight)
            return linear

        def stored(made: Made) -> int:
            return int(made.W_q.nbytes + sum(_nested(made.meta[key]) for key in ("scale", "zero", "scale2")))

        yield Quantizer(f"4 bits, groups of {group}", "SINQ", make, lambda made: made.dequantize().float(), stored)


# llama.cpp ------------------------------------------------------------------------------------------------------------

GGML = ("Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL")
PYTHON = ("Q8_0", "Q5_0", "Q4_1", "Q4_0")
"""What the gguf package quantizes without the library."""


def gguf(library: Path | None) -> Iterator[Quantizer]:
    """llama.cpp's formats. library: its own code, built on this machine (libggml-base); without it, what gguf's Python
    has. Super-blocks of 256 run on from row to row where a row is no multiple of them; llama.cpp itself would take
    another format for such matrices."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    native = None if library is None else ctypes.CDLL(str(library))
    if native is not None:
        native.ggml_quantize_chunk.restype = ctypes.c_size_t
    for name in GGML if native is not None else PYTHON:
        kind = GGMLQuantizationType[name]
        block, size = GGML_QUANT_SIZES[kind]

        def make(weight: torch.Tensor, kind: Any = kind, block: int = block, size: int = size) -> Made:
            values = weight.float().contiguous()
            if native is None:
                return torch.from_numpy(quants.quantize(values.numpy(), kind)), weight.shape
            out = torch.empty(weight.numel() // block * size, dtype=torch.uint8)
            rows, cols = ctypes.c_int64(1), ctypes.c_int64(weight.numel())
            source, target = ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr())
            native.ggml_quantize_chunk(int(kind), source, target, ctypes.c_int64(0), rows, cols, None)
            return out, weight.shape

        def values(made: Made, kind: Any = kind) -> torch.Tensor:
            return torch.from_numpy(quants.dequantize(made[0].view(-1).numpy(), kind)).view(made[1])

        yield Quantizer(name, "llama.cpp", make, values, lambda made: made[0].nbytes)


def peers(library: Path | None = None) -> tuple[list[Quantizer], list[str]]:
    """Those that are installed, and the names of the packages that are not."""
    found, absent = [four_over_six()], []
    packages: dict[str, Callable[[], Iterator[Quantizer]]] = {
        "torchao": torchao,
        "bitsandbytes": bitsandbytes,
        "hqq": hqq,
        "sinq": sinq,
        "gguf": lambda: gguf(library),
    }
    for package, made in packages.items():
        if importlib.util.find_spec(package) is None:
            absent.append(package)
        else:
            found += made()
    return found, absent


def versions() -> dict[str, str]:
    """Of the peers' packages that are installed."""
    names = ("torchao", "bitsandbytes", "hqq", "sinq", "gguf")
    return {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name) is not None}
