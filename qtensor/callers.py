"""Who is calling? Every look at the call stack, with the foreign function it recognises and why.

Some callers mean something else by an operation, or by assigning a Parameter, than a loader does, and there is no other
way to tell. Each question here walks outwards from the code that called qtensor, over no more frames than it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch.nn import Module

FSDP = "torch.distributed.fsdp"
_OWN = "qtensor."
_INIT_MODULES = ("torch.nn.init", "transformers.initialization")
_TRANSFORMING_MODULES = (
    "torch.nn.utils.parametrize",
    "torch.nn.utils.parametrizations",
    "torch.nn.utils.weight_norm",
    "torch.nn.utils.spectral_norm",
)
_INIT_FUNCTIONS = ("reset_parameters", "_reset_parameters", "_init_weights", "init_weights")
_COMPARE_ADDRESSES = ("accelerate", "transformers", "diffusers", "peft", "huggingface_hub")
_ALL = sys.maxsize
"""As many frames as there are: a module's `__init__` may be any number of calls away from what it constructs."""


def copied_by_init() -> bool:
    """Is torch.nn.init copying (`trunc_normal_`, `orthogonal_`, `dirac_`)? Its copies are initialisation, not a load.

    Each TorchDispatchMode that is active puts four frames between the two.
    """
    return any(frame.f_globals.get("__name__") == "torch.nn.init" for frame in _callers(12))


def called_by_init() -> bool:
    """The same, asked by the method that was called, where no TorchDispatchMode is active: every copy of a loader does,
    so this is one look at that method's caller."""
    return sys._getframe(2).f_globals.get("__name__") == "torch.nn.init"


def initialising() -> bool:
    """Is a model being made, rather than loaded? By torch.nn.init, transformers' counterpart, a method by one of the
    names that libraries give to initialisers, a module's own `__init__`, or what PyTorch has to give a weight another
    form (weight_norm and its like)."""
    for frame in _callers(40):
        name, module = frame.f_code.co_name, frame.f_globals.get("__name__")
        if name in _INIT_FUNCTIONS or module in _INIT_MODULES or module in _TRANSFORMING_MODULES:
            return True
        if name == "__init__" and isinstance(_first_argument(frame), Module):
            return True
    return False


def is_constructing(module: Module) -> bool:
    """Is the module's own `__init__` running? A parameter assigned there is being created, not loaded."""
    return any(frame.f_code.co_name == "__init__" and _first_argument(frame) is module for frame in _callers(_ALL))


def replaced_by_module() -> bool:
    """Is `nn.Module._apply` making what takes the place of a parameter or buffer? `.to()`, `.half()`, `.cuda()`,
    `to_empty()` and their like all end there, and what they compute is the weight from then on.

    Each TorchDispatchMode that is active, or a DTensor, puts some frames between the two.
    """
    return any(
        frame.f_code.co_name == "_apply" and frame.f_globals.get("__name__") == "torch.nn.modules.module"
        for frame in _callers(16)
    )


def makes_parameter() -> bool:
    """Is `nn.Parameter(tensor)` asking the tensor for what will be the Parameter?"""
    frame = _caller()
    return (
        frame is not None
        and frame.f_code.co_name == "__new__"
        and frame.f_globals.get("__name__") == "torch.nn.parameter"
    )


def outermost_under_construction() -> Module | None:
    """The outermost module whose `__init__` is running: the model, where vLLM asks for the quantization method of a
    layer and gives no handle on the model."""
    outermost = None
    for frame in _callers(_ALL):
        if frame.f_code.co_name == "__init__" and isinstance(module := _first_argument(frame), Module):
            outermost = module
    return outermost


def builds_adapter() -> bool:
    """Is peft constructing a module? What it builds is trained. The models that it loads are built by other libraries'
    code, which then is nearer."""
    return _library().startswith("peft.")


def changes_base() -> bool:
    """Is peft's own code, rather than an initialiser that it calls, changing a weight of the model? OLoRA takes the
    adapter's part out of it while the adapter is being made."""
    return _nearest().startswith("peft.")


def copies_to_train() -> bool:
    """Is peft copying a module of the model, to train the copy (`modules_to_save`)?"""
    return _library() == "peft.utils.other"


def _library() -> str:
    """The module of the nearest frame that is neither PyTorch's nor of what stands between PyTorch and a library."""
    for frame in _callers(_ALL):
        name = frame.f_globals.get("__name__") or ""
        if not name.startswith(("torch.", "accelerate.", "copy")):
            return str(name)
    return ""


def puts_placeholder() -> bool:
    """Is transformers assigning an uninitialised tensor, to be initialised later, for a key its checkpoint lacks? That
    is `PreTrainedModel._move_missing_keys_from_meta_to_device`."""
    return any(frame.f_code.co_name == "_move_missing_keys_from_meta_to_device" for frame in _callers(5))


def compares_addresses() -> bool:
    """Does a library that looks for ties ask for a tensor's address? It reads no memory there, as a kernel would."""
    return _nearest().partition(".")[0] in _COMPARE_ADDRESSES


def writes_to_disk() -> bool:
    """Is accelerate writing a tensor into its offload folder?"""
    return _nearest() == "accelerate.utils.offload"


def keys_a_program() -> bool:
    """Is torch.compile pickling what a program is made for, for the key of its cache on disk? torch before 2.13 makes
    keys so; to others that pickle or copy a tensor, it is a tensor."""
    return any(frame.f_globals.get("__name__") == "torch._inductor.codecache" for frame in _callers(8))


def distributing() -> bool:
    """Is torch.distributed.tensor splitting a tensor for `distribute_tensor`? The clone it makes of its piece is the
    shard of the weight, not a copy of values."""
    return any(frame.f_globals.get("__name__") == "torch.distributed.tensor.placement_types" for frame in _callers(8))


def scatters() -> bool:
    """Is it doing so on one rank, to send each rank its piece? With `src_data_rank=None` each takes its own."""
    return any(
        frame.f_code.co_name == "_shard_tensor" and frame.f_locals.get("src_data_rank") is not None
        for frame in _callers(8)
    )


def asked_by_fsdp() -> bool:
    """Is FSDP calling the operation whose handler asks? What it does to pad a shard has a meaning of its own."""
    return any((frame.f_globals.get("__name__") or "").startswith(FSDP) for frame in _callers(3))


def _nearest() -> str:
    """The module that called qtensor."""
    frame = _caller()
    return str(frame.f_globals.get("__name__")) if frame is not None else ""


def _caller() -> FrameType | None:
    """The frame that called qtensor: the innermost that is not the package's own."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (frame.f_globals.get("__name__") or "").startswith(_OWN):
        frame = frame.f_back
    return frame


def _callers(limit: int) -> Iterator[FrameType]:
    """The frames of whoever called qtensor, innermost first: at most `limit`."""
    frame = _caller()
    while frame is not None and limit:
        yield frame
        frame, limit = frame.f_back, limit - 1


def _first_argument(frame: FrameType) -> object:
    """`self`, of a method."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
