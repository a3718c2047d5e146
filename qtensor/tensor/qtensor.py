"""QTensor: a quantized weight that behaves as the high-precision tensor it stands for.

It reports the logical dtype and shape, holds `qdata` and `scale`, and answers operations from one table, which `ops`
fills. Operations that have no entry are computed on the dequantized values, so that results are right first and fast
where it matters: linear and matrix products, slices of whole scale groups, embedding lookups.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .. import kernels
from ..callers import compares_addresses, copies_to_train, keys_a_program, replaced_by_module, writes_to_disk
from ..errors import ConfigError, NonFiniteWeightError, QTensorError, WeightDtypeError, WeightShapeError
from ..kernels import SOURCE_DTYPES, Audit, NonFinite, Parts
from ..schemes.scheme import Scheme, SchemeLike, as_scheme
from .table import OpTable

OPS = OpTable()
"""What operations do to quantized weights."""


class QTensor(torch.Tensor):
    """A weight `[N, K]` or `[E, N, K]` in quantized form.

    Attributes:
        qdata: The quantized values, row-major `[..., N, K]`; `[..., N, K/2]` (rounded up) where two share a byte.
        scale: `scheme.format.scale_shape` of `[..., N, K]`, in `scheme.format.scale_dtype`.
        global_scale: fp32 `[..., 1]`, the second scale of each matrix, for formats with one (nvfp4); else None.
        scheme: The `Scheme` that made them.
        cols: K; told apart from `qdata`, which cannot know it is odd.
        transposed: The logical shape is `[..., K, N]`; `qdata` and `scale` keep their layout.
        whole_units: False for a slice that shares scales with elements outside of it; a write to one is a write to all
            of the weight.
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None
    scheme: Scheme
    cols: int
    transposed: bool
    whole_units: bool
    # A shard of `fully_shard` that is smaller than others: the padded tensor that it is the first rows of, and, on that
    # tensor, the mark of being one.
    _padded: QTensor | None = None
    _is_room: bool = False
    # Of a slice that shares scales: the weight it was taken from, the dimension, and which part.
    _part_of: tuple[QTensor, int, slice] | None = None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        scheme: Scheme,
        dtype: torch.dtype = torch.bfloat16,
        transposed: bool = False,
        whole_units: bool = True,
        global_scale: torch.Tensor | None = None,
        cols: int | None = None,
    ) -> QTensor:
        fmt = scheme.format
        if fmt.has_global_scale != (global_scale is not None):
            needs = "needs" if fmt.has_global_scale else "has no"
            raise QTensorError(f"QTensor: {fmt.name} {needs} global_scale beside scale")
        stored = (*qdata.shape[:-1], qdata.shape[-1] * fmt.per_byte if cols is None else cols)
        # The strides of what the elements would be side by side; those of qdata itself unless they share bytes.
        strides = qdata.stride() if fmt.per_byte == 1 else torch.empty(stored, dtype=dtype, device="meta").stride()
        if transposed:
            stored, strides = ((*t[:-2], t[-1], t[-2]) for t in (stored, strides))
        self = torch.Tensor._make_wrapper_subclass(cls, stored, strides=strides, dtype=dtype, device=qdata.device)
        self.become(qdata, scale, scheme, global_scale, transposed, whole_units)
        return self

    def become(
        self,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        scheme: Scheme,
        global_scale: torch.Tensor | None = None,
        transposed: bool = False,
        whole_units: bool = True,
    ) -> None:
        """Set the parts of a quantized weight on a tensor that is already of the right logical shape and dtype."""
        self.qdata, self.scale, self.scheme, self.global_scale = qdata, scale, scheme, global_scale
        self.transposed, self.whole_units = transposed, whole_units
        self.cols = self.shape[-2 if transposed else -1]

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight in high precision (`dtype`, by default the logical dtype): qdata × scale in fp32, rounded once."""
        parts = self.parts()
        values = kernels.serving(*parts).dequantize(parts, self.scheme.format, dtype or self.dtype)
        values = values[..., : self.cols]
        return values.mT if self.transposed else values

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes held: quantized values and scales."""
        return self.parts().nbytes

    def parts(self) -> Parts:
        """The tensors it is made of: quantized values, scales, and the global scale of formats with one."""
        return Parts(self.qdata, self.scale, self.global_scale)

    def parts_by_rows(self) -> list[torch.Tensor]:
        """Those parts of which each row (expert, of a stack) has its own; the others belong to the whole weight."""
        if self.dim() == 3:
            return list(self.parts())
        return [self.qdata] if self.scheme.format.granularity == "tensor" else [self.qdata, self.scale]

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[torch.Tensor, ...], None]:
        """What `fully_shard` gathers of this shard: quantized values and scales, as bytes.

        The signature is the older of the two FSDP knows: with the newer one it insists that scales, too, have the
        padded size of the weight. Where one rank has all rows, FSDP takes no more than one tensor.
        """
        shard = self if self._padded is None else self._padded
        parts = shard.parts_by_rows()[: 1 if mesh.size() == 1 else None]
        return tuple(part.view(torch.uint8) for part in parts), None

    def fsdp_post_all_gather(
        self, gathered: tuple[torch.Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Any = None
    ) -> tuple[QTensor, tuple[()]] | None:
        """The weight of which this is a shard, followed by padding. With `out` it is there already: its parts are the
        memory that was gathered into."""
        if out is not None:
            return None
        of_all = dict(zip(map(id, self.parts_by_rows()), gathered, strict=False))
        whole = [of_all[id(part)].view(part.dtype) if id(part) in of_all else part for part in self.parts()]
        return self.with_parts(*whole, dtype=dtype, whole_units=True), ()

    def detach(self) -> Any:
        """Where `module.to()` makes a Parameter of it, as of any quantized weight, the old one's attributes stay."""
        return self.replaced_by(super().detach())

    def replaced_by(self, new: Any) -> Any:
        """What a user has put on this weight, put on another that takes its place by `module.to()`, too."""
        if not torch.compiler.is_compiling() and replaced_by_module():
            own = {*QTensor.__annotations__, "_is_param"}
            new.__dict__.update({k: v for k, v in self.__dict__.items() if k not in own})
        return new

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        values: torch.Tensor = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return values

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        OPS.dispatch(torch.Tensor.data, (self, value), None)

    def __setitem__(self, index: Any, value: Any) -> None:
        OPS.dispatch(torch.Tensor.__setitem__, (self, index, value), None)

    def data_ptr(self) -> int:
        """For libraries that tell tied weights by their addresses: that of the values. No other code may read it, since
        there are no elements of the logical dtype: it gets 0, as of any tensor without storage."""
        return self.qdata.data_ptr() if compares_addresses() else super().data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        if writes_to_disk():
            refuse_disk(self)
        return self.detach().dequantize().numpy(force=force)

    def tolist(self) -> Any:
        return self.dequantize().tolist()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"QTensor({list(self.shape)}, {self.dtype}, scheme={self.scheme}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if copies_to_train():
            memo[id(self)] = torch.nn.Parameter(self.dequantize())
            return memo[id(self)]
        other = self.with_parts(*(part.clone() for part in self.parts()))
        other.__dict__.update(
            {k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in other.__dict__ and k[0] != "_"}
        )
        if isinstance(self, torch.nn.Parameter):
            other._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = other
        return other

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.detach().dequantize().__dlpack__(**kwargs)

    def share_memory_(self) -> QTensor:
        """Move the parts into shared memory, where other processes see them without a copy."""
        for part in self.parts():
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        return all(part.is_shared() for part in self.parts())

    def storage(self) -> NoReturn:
        """What safetensors, and whoever saves through it, asks of a tensor first."""
        raise QTensorError(
            f"QTensor {list(self.shape)} ({self.scheme}): a quantized weight is several tensors, and safetensors "
            "cannot store it as one. Save the model with qtensor.save_checkpoint(model, folder), or a transformers "
            "model with model.save_pretrained(folder); torch.save takes quantized weights as they are."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        if isinstance(self.qdata, FakeTensor) and keys_a_program():
            return str, (self._stable_hash_for_caching(),)
        scheme, is_param = self.scheme, isinstance(self, torch.nn.Parameter)
        how = (scheme.name, scheme.activation, self.dtype, self.transposed, is_param)
        # As bytes: pickle, unlike torch.save, asks PyTorch for storages of the dtype, and float8 has none.
        parts = [part.view(torch.uint8) if part.dtype.itemsize == 1 else part for part in self.parts()]
        return rebuild, (*parts[:2], *how, *(parts[2:] or (None,)), self.cols)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        context = (self.scheme, self.dtype, self.transposed, self.whole_units, self.cols)
        return ["qdata", "scale", "global_scale"][: len(self.parts())], context

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> QTensor:
        scheme, dtype, transposed, whole_units, cols = context
        qdata, scale, global_scale = inner["qdata"], inner["scale"], inner.get("global_scale")
        return QTensor(qdata, scale, scheme, dtype, transposed, whole_units, global_scale, cols)

    def _stable_hash_for_caching(self) -> str:
        """What torch.compile's cache on disk needs to tell two kinds of QTensor apart, and two versions of this code:
        the cached program holds what its operations did when it was made."""
        how = (self.scheme, self.dtype, self.transposed, self.whole_units, tuple(self.shape), self.requires_grad)
        parts = [(tuple(p.shape), p.stride(), p.dtype, p.device) for p in self.parts()]
        return hashlib.sha256(repr((how, parts, code_digest())).encode()).hexdigest()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return OPS.dispatch(func, args, kwargs)

    def with_parts(
        self, qdata: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor | None = None, **changes: Any
    ) -> QTensor:
        parts: dict[str, Any] = {
            "dtype": self.dtype,
            "transposed": self.transposed,
            "whole_units": self.whole_units,
            "global_scale": global_scale,
            "cols": self.cols,
        } | changes
        if torch.is_inference_mode_enabled() and not self.is_inference():
            # A view of a normal tensor has to be a normal tensor; autograd's bookkeeping insists.
            with torch.inference_mode(False):
                return QTensor(qdata, scale, self.scheme, **parts)
        return QTensor(qdata, scale, self.scheme, **parts)


def quantize(weight: torch.Tensor, scheme: SchemeLike, *, on_nonfinite: str = "error") -> QTensor:
    """Quantize a whole weight.

    This is the oracle: every session, whatever the loader did, ends with exactly these bytes.

    Args:
        weight: `[N, K]` or `[E, N, K]`, bf16, fp16 or fp32, any strides, any device.
        scheme: A `Scheme` or its name.
        on_nonfinite: "error" refuses NaN and infinity; "keep" stores NaN as NaN (as 0 where the format has none: e2m1
            and integers) and saturates infinities; neither enters a scale.

    Returns:
        The quantized weight, on the weight's device, with its dtype as logical dtype.

    Raises:
        WeightShapeError: It is neither a matrix nor a stack of them.
        WeightDtypeError: Its dtype is none of those.
        NonFiniteWeightError: An element is not finite; the message has the index of the first.
        ConfigError: The scheme is unknown, or `on_nonfinite` is neither.
    """
    scheme = as_scheme(scheme)
    if on_nonfinite not in ("error", "keep"):
        raise ConfigError(f"on_nonfinite is 'error' or 'keep', not {on_nonfinite!r}")
    if weight.dim() not in (2, 3):
        raise WeightShapeError(f"quantize: a weight is [N, K] or [E, N, K], not {list(weight.shape)}")
    if weight.dtype not in SOURCE_DTYPES:
        raise WeightDtypeError(f"quantize: cannot quantize {weight.dtype}; convert to bfloat16, float16 or float32")
    result = empty(weight.shape, scheme, weight.dtype, weight.device)
    try:
        audit = Audit(refuse_nonfinite=on_nonfinite == "error")
        kernels.choose(weight.device).quantize_into(weight.detach(), result.parts(), scheme.format, audit)
    except NonFinite as error:
        raise NonFiniteWeightError(nonfinite_message("weight", weight.shape, error)) from None
    return result


def empty(shape: Sequence[int], scheme: Scheme, dtype: torch.dtype, device: Any) -> QTensor:
    """A QTensor whose storage is allocated and not yet written."""
    shape = tuple(shape)
    parts = Parts.of(shape, scheme.format, device)
    return QTensor(parts.qdata, parts.scale, scheme, dtype, global_scale=parts.global_scale, cols=shape[-1])


def nonfinite_message(name: str, shape: Sequence[int], error: NonFinite) -> str:
    index, flat = [], error.index
    for n in reversed(shape):
        index.append(flat % n)
        flat //= n
    return (
        f"{name}: {error.value} at index {index[::-1]} of {list(shape)}. The source is corrupt or the wrong file; "
        'pass on_nonfinite="keep" to store non-finite elements as they are.'
    )


def rebuild(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    scheme: str,
    activation: Any,
    dtype: torch.dtype,
    transposed: bool,
    is_param: bool,
    global_scale: torch.Tensor | None = None,
    cols: int | None = None,
) -> QTensor:
    """What a pickled QTensor calls: made of tensors and strings alone, so that weights_only loading accepts it."""
    fmt = as_scheme(scheme).format
    qdata, scale = qdata.view(fmt.dtype), scale.view(fmt.scale_dtype)
    made = Scheme(fmt, activation)
    result = QTensor(qdata, scale, made, dtype, transposed, global_scale=global_scale, cols=cols)
    if is_param:
        result._is_param = True  # type: ignore[attr-defined]
    return result


# Files saved by version 0.1 have the second name.
torch.serialization.add_safe_globals([rebuild, (rebuild, "qtensor.quantized._rebuild")])


@functools.cache
def code_digest() -> str:
    """A digest of the source that computes with QTensors: this package, and the kernels."""
    return digest_of(Path(__file__).parent, Path(kernels.__file__).parent)


def digest_of(*packages: Path) -> str:
    """A digest of all Python files of some packages, by name and content."""
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def refuse_mutation(func: Any, weight: QTensor) -> NoReturn:
    raise QTensorError(
        f"{func} would modify a quantized weight {list(weight.shape)} in place. Assign new values with copy_, "
        "or work on .dequantize()."
    )


def refuse_traced(target: torch.Tensor) -> NoReturn:
    raise QTensorError(
        f"A write to a quantized weight, or a part of one, {list(target.shape)}, in a function that is recorded "
        "(torch.compile, torch.export, make_fx), which cannot quantize, or in memory of a tensor class that is not "
        "PyTorch's own: it would be lost. Write outside of the function, or assign all of the weight."
    )


def refuse_disk(weight: QTensor) -> NoReturn:
    raise QTensorError(
        f"QTensor {list(weight.shape)} ({weight.scheme}): accelerate's offload folder holds plain values and no "
        'scales, so a quantized weight cannot be offloaded to the disk. Keep it on the CPU ("cpu" in the device_map, '
        "or cpu_offload), where it takes its quantized bytes."
    )


def written_by(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """What an operation writes to, among its arguments."""
    found = []
    for i, spec in enumerate(func._schema.arguments):
        if spec.alias_info is not None and spec.alias_info.is_write:
            found += torch.utils._pytree.tree_leaves(args[i] if i < len(args) else kwargs.get(spec.name))
    return found


def on_dequantized(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Any other operation, on the dequantized values. A mutation of the weight is refused: it would be lost."""
    for weight in written_by(func, args, kwargs):
        if isinstance(weight, QTensor):
            refuse_mutation(func, weight)
    args, kwargs = torch.utils._pytree.tree_map_only(QTensor, lambda w: w.dequantize(), (args, kwargs))
    return func(*args, **kwargs)
