"""Which code multiplies with a quantized weight, by device, scheme, activations, shape and chip.

On a CPU weight-only products are qtensor's loops, for every scheme, shape and number of rows: bench/vllm_products.py
measures vLLM's compiled operators beside them. int8 weights with int8 activations are oneDNN's. On a GPU vLLM chooses
among its kernels, and what none of them multiplies is refused while the model is built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from qtensor.errors import ConfigError
from qtensor.schemes.scheme import Scheme, fp8_per_block, fp8_per_channel, fp8_per_tensor
from qtensor.text import printable

from . import compat
from .gpu import Fp8Linear, GroupedLinear, Int8Int8Linear, IntegerLinear
from .int8 import Int8Linear
from .options import Options
from .products import CpuLinear, LinearCompute

_FP8 = (fp8_per_tensor, fp8_per_channel, fp8_per_block)
_NO_INT8_FROM = 100


def linear_compute(
    scheme: Scheme,
    options: Options,
    shape: tuple[int, int],
    dtype: torch.dtype,
    name: str = "this layer",
    *,
    packs: bool = True,
    all_columns: int | None = None,
) -> LinearCompute:
    """What multiplies with weights `[N, K]` of this scheme on the device that vLLM is building the model for.

    packs: the weight may be published in another order of its bytes. all_columns: of the layer on all ranks; K if not
    given. Raises ConfigError, with the layer's name, where nothing multiplies.
    """
    if compat.on_cpu():
        compat.permit_amx()
        if options.activation == "int8":
            return Int8Linear(packed=packs and compat.has_int8_product())
        return CpuLinear(scheme, options.activation == "dynamic")
    if scheme.format.has_zero_point:
        raise ConfigError(
            f"qtensor: {name}: on a GPU the vLLM plugin does not serve {scheme.name}, on a CPU it does. Use "
            "int4_per_group, or leave the layer alone with `ignore`."
        )
    by_int8 = options.activation == "int8"
    _require_whole_groups(scheme, shape[1], name)
    if dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"qtensor: {name}: vLLM's kernels for {scheme.name} on a GPU compute in bfloat16 and float16, and this "
            f"model is {str(dtype).removeprefix('torch.')}: start it with dtype='bfloat16'."
        )
    if scheme in _FP8:
        _require_e4m3fn(name)
    others = ", ".join(s.name for s in _FP8) if compat.amd_problem() is None else "int4_per_group"
    if scheme.format.element == "int8" and not by_int8:
        others += ', or this one with the option activation="int8"'
    with kernel_errors(scheme, name, others):
        if scheme in _FP8:
            return Fp8Linear(scheme, shape, dtype)
        if by_int8:
            if compat.capability() >= _NO_INT8_FROM:
                raise ValueError("its int8 kernels are for sm_75 to sm_90. Leave the option `activation` out")
            return Int8Int8Linear(scheme, shape, dtype)
        if scheme.format.granularity == "group" and scheme.format.element != "int4":
            return GroupedLinear(scheme, shape, dtype)
        return IntegerLinear(scheme, shape, all_columns or shape[1], dtype)


def _require_whole_groups(scheme: Scheme, columns: int, name: str) -> None:
    across = scheme.format.block[1] if scheme.format.granularity in ("block", "group") else 1
    if scheme.format.element == "int8":
        across = 4  # To an int32.
    if columns % across:
        raise ConfigError(
            f"qtensor: {name}: its {columns} input columns are no multiple of {across}, which vLLM's kernels for "
            f"{scheme.name} on a GPU ask for. Give it another scheme with the option `targets`, such as "
            "fp8_per_channel, or leave it alone with `ignore`."
        )


@contextlib.contextmanager
def kernel_errors(scheme: Scheme, name: str, others: str) -> Iterator[None]:
    """That vLLM finds no kernel is a ConfigError that names the layer and what to try instead."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"qtensor: {name}: vLLM has no kernel for {scheme.name} here: {printable(str(error))}. Try another scheme "
            f"({others}), or leave the layer alone with `ignore`."
        ) from error


def _require_e4m3fn(name: str) -> None:
    """Raise ConfigError on a GPU that has no kernel for the fp8 that is stored."""
    problem = compat.amd_problem()
    if problem is not None:
        raise ConfigError(f"qtensor: {name}: {problem}; or use int4_per_group for linear layers.")


def require_fp8_experts(scheme: Scheme, name: str) -> None:
    """Raise ConfigError for experts of a scheme that has no fused kernel of vLLM's behind it here."""
    problem = compat.amd_problem()
    if problem is not None:
        raise ConfigError(f"qtensor: {name}: {problem}.")
    if scheme not in _FP8:
        served = ", ".join(s.name for s in _FP8)
        raise ConfigError(
            f"qtensor: {name}: on a GPU the vLLM plugin serves experts in {served}; in {scheme.name} on a CPU only. "
            "Give experts one of these by the option `moe`; linear layers may keep their scheme."
        )
