"""Which code multiplies with a quantized weight, by device, scheme, activations, shape and chip.

On a CPU weight-only products are qtensor's loops, for every scheme, shape and number of rows: bench/vllm_products.py
measures vLLM's compiled operators beside them. int8 weights with int8 activations are oneDNN's. On a GPU vLLM chooses
among its fp8 kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from qtensor.errors import ConfigError
from qtensor.schemes.scheme import Scheme, fp8_per_block, fp8_per_channel, fp8_per_tensor
from qtensor.text import printable

from . import compat
from .int8 import Int8Linear
from .options import Options
from .products import CpuLinear, GpuLinear, LinearCompute

_SERVED_ON_GPUS = (fp8_per_tensor, fp8_per_channel, fp8_per_block)


def linear_compute(
    scheme: Scheme,
    options: Options,
    shape: tuple[int, int],
    dtype: torch.dtype,
    name: str = "this layer",
    *,
    packs: bool = True,
) -> LinearCompute:
    """What multiplies with weights `[N, K]` of this scheme on the device that vLLM is building the model for.

    packs: the weight may be published in another order of its bytes. Raises ConfigError, with the layer's name, where
    nothing multiplies.
    """
    if torch.get_default_device().type == "cpu":
        compat.permit_amx()
        if options.activation == "int8":
            return Int8Linear(packed=packs and compat.has_int8_product())
        return CpuLinear(scheme, options.activation == "dynamic")
    require_served_on_gpus(scheme, name)
    across = scheme.format.block[1]
    if scheme is fp8_per_block and shape[1] % across:
        raise ConfigError(
            f"qtensor: {name}: its {shape[1]} input columns are no multiple of {across}, which vLLM's kernels for "
            f"{scheme.name} on a GPU ask for. Give it another scheme with the option `targets`, such as "
            "fp8_per_channel, or leave it alone with `ignore`."
        )
    with kernel_errors(scheme, name, "fp8_per_channel, fp8_per_tensor, fp8_per_block"):
        return GpuLinear(scheme, shape, dtype)


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


def require_served_on_gpus(scheme: Scheme, name: str) -> None:
    """Raise ConfigError for a scheme that has no kernel of vLLM's behind it here, and on a GPU that has none at all."""
    problem = compat.amd_problem()
    if problem is not None:
        raise ConfigError(f"qtensor: {name}: {problem}.")
    if scheme not in _SERVED_ON_GPUS:
        served = ", ".join(s.name for s in _SERVED_ON_GPUS)
        raise ConfigError(
            f"qtensor: {name}: on a GPU the vLLM plugin serves {served}; {scheme.name} it serves on a CPU only. Use "
            "one of these, or vLLM's own method of that format where it has one."
        )
