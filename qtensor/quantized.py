"""QTensor: a quantized weight that behaves as the high-precision tensor it stands for.

It reports the logical dtype and shape, holds `qdata` and `scale`, and answers operations from one table. Operations
that have no entry are computed on the dequantized values, so that results are right first and fast where it matters:
linear and matrix products, slices of whole scale groups, embedding lookups.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import kernels
from .errors import NonFiniteWeightError, QTensorError, WeightDtypeError, WeightShapeError
from .kernels import FORMATS, SOURCE_DTYPES, Audit, NonFinite
from .kernels.formats import ceil_div
from .scheme import Scheme, SchemeLike, as_scheme

aten = torch.ops.aten
_OPS: dict[Any, Callable[..., Any]] = {}


def _implements(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        _OPS.update(dict.fromkeys(ops, fn))
        return fn

    return register


class QTensor(torch.Tensor):
    """A weight `[N, K]` or `[E, N, K]` in quantized form.

    qdata: the quantized values, row-major `[..., N, K]`.
    scale: fp32, `scheme.format.scale_shape(qdata.shape)`.
    scheme: the `Scheme` that made them.
    transposed: the logical shape is `[..., K, N]`; `qdata` and `scale` keep their layout.
    whole_units: False for a slice that shares scales with elements outside of it; such a slice is read-only.
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    scheme: Scheme
    transposed: bool
    whole_units: bool

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
    ) -> QTensor:
        geometry = qdata.mT if transposed else qdata
        self = torch.Tensor._make_wrapper_subclass(
            cls, geometry.shape, strides=geometry.stride(), dtype=dtype, device=qdata.device
        )
        self.become(qdata, scale, scheme, transposed, whole_units)
        return self

    def become(
        self,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        scheme: Scheme,
        transposed: bool = False,
        whole_units: bool = True,
    ) -> None:
        """Set the parts of a quantized weight on a tensor that is already of the right logical shape and dtype."""
        self.qdata, self.scale, self.scheme = qdata, scale, scheme
        self.transposed, self.whole_units = transposed, whole_units

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight in high precision (`dtype`, by default the logical dtype): qdata × scale in fp32, rounded once."""
        values = kernels.dequantize(self.qdata, self.scale, self.scheme.format, dtype or self.dtype)
        return values.mT if self.transposed else values

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes held: quantized values and scales."""
        return self.qdata.nbytes + self.scale.nbytes

    def parts(self) -> tuple[torch.Tensor, ...]:
        """The tensors it is made of: quantized values, then scales."""
        return tuple(getattr(self, name) for name in self.__tensor_flatten__()[0])

    def numpy(self, *, force: bool = False) -> Any:
        return self.detach().dequantize().numpy(force=force)

    def tolist(self) -> Any:
        return self.dequantize().tolist()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"QTensor({list(self.shape)}, {self.dtype}, scheme={self.scheme}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> QTensor:
        other = self._with(self.qdata.clone(), self.scale.clone())
        other.__dict__.update(
            {k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in other.__dict__ and k[0] != "_"}
        )
        if isinstance(self, torch.nn.Parameter):
            other._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = other
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        scheme, is_param = self.scheme, isinstance(self, torch.nn.Parameter)
        parts = (self.qdata, self.scale, scheme.name, scheme.activation, self.dtype, self.transposed, is_param)
        return _rebuild, parts

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["qdata", "scale"], (self.scheme, self.dtype, self.transposed, self.whole_units)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> QTensor:
        return QTensor(inner["qdata"], inner["scale"], *context)

    def _stable_hash_for_caching(self) -> str:
        """What torch.compile's cache needs to tell two kinds of QTensor apart."""
        parts = (self.scheme, self.dtype, self.transposed, self.whole_units, tuple(self.shape))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _OPS.get(func)
        if handler is not None:
            return handler(func, *args, **(kwargs or {}))
        return _on_dequantized(func, *args, **(kwargs or {}))

    def _with(self, qdata: torch.Tensor, scale: torch.Tensor, **changes: Any) -> QTensor:
        parts: dict[str, Any] = {
            "dtype": self.dtype,
            "transposed": self.transposed,
            "whole_units": self.whole_units,
        } | changes
        if torch.is_inference_mode_enabled() and not self.is_inference():
            # A view of a normal tensor has to be a normal tensor; autograd's bookkeeping insists.
            with torch.inference_mode(False):
                return QTensor(qdata, scale, self.scheme, **parts)
        return QTensor(qdata, scale, self.scheme, **parts)


def quantize(weight: torch.Tensor, scheme: SchemeLike, *, on_nonfinite: str = "error") -> QTensor:
    """Quantize a whole weight `[N, K]` or `[E, N, K]` (bf16, fp16 or fp32, any strides, any device).

    This is the oracle: every session, whatever the loader did, ends with exactly these bytes. `on_nonfinite="keep"`
    stores NaN as NaN and saturates infinities, neither of which enters a scale.

    Raises WeightShapeError, WeightDtypeError, and NonFiniteWeightError with the index of the first bad element.
    """
    scheme = as_scheme(scheme)
    if weight.dim() not in (2, 3):
        raise WeightShapeError(f"quantize: a weight is [N, K] or [E, N, K], not {list(weight.shape)}")
    if weight.dtype not in SOURCE_DTYPES:
        raise WeightDtypeError(f"quantize: cannot quantize {weight.dtype}; convert to bfloat16, float16 or float32")
    result = empty(weight.shape, scheme, weight.dtype, weight.device)
    try:
        audit = Audit(refuse_nonfinite=on_nonfinite == "error")
        kernels.quantize_into(weight.detach(), result.qdata, result.scale, scheme.format, audit)
    except NonFinite as error:
        raise NonFiniteWeightError(nonfinite_message("weight", weight.shape, error)) from None
    return result


def empty(shape: Sequence[int], scheme: Scheme, dtype: torch.dtype, device: Any) -> QTensor:
    """A QTensor whose storage is allocated and not yet written."""
    shape = tuple(shape)
    qdata = torch.empty(shape, dtype=scheme.format.dtype, device=device)
    scale = torch.empty(scheme.format.scale_shape(shape), dtype=torch.float32, device=device)
    return QTensor(qdata, scale, scheme, dtype)


def nonfinite_message(name: str, shape: Sequence[int], error: NonFinite) -> str:
    index, flat = [], error.index
    for n in reversed(shape):
        index.append(flat % n)
        flat //= n
    return (
        f"{name}: {error.value} at index {index[::-1]} of {list(shape)}. The source is corrupt or the wrong file; "
        'pass on_nonfinite="keep" to store non-finite elements as they are.'
    )


def _rebuild(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    scheme: str,
    activation: Any,
    dtype: torch.dtype,
    transposed: bool,
    is_param: bool,
) -> QTensor:
    """What a pickled QTensor calls: made of tensors and strings alone, so that weights_only loading accepts it."""
    result = QTensor(qdata, scale, Scheme(FORMATS[scheme], activation), dtype, transposed)
    if is_param:
        result._is_param = True  # type: ignore[attr-defined]
    return result


torch.serialization.add_safe_globals([_rebuild])


# Aliases, copies and moves ------------------------------------------------------------------------------------------


@_implements(aten.detach.default, aten.alias.default)
def _alias(func: Any, w: QTensor) -> QTensor:
    return w._with(func(w.qdata), func(w.scale))


@_implements(aten.clone.default)
def _clone(func: Any, w: QTensor, *, memory_format: Any = None) -> QTensor:
    return w._with(w.qdata.clone(), w.scale.clone(), whole_units=True)


@_implements(aten._to_copy.default)
def _to_copy(
    func: Any, w: QTensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> Any:
    if dtype is not None and dtype not in SOURCE_DTYPES:
        return func(w.dequantize(), dtype=dtype, device=device)
    move = {"device": device, "non_blocking": non_blocking, "copy": True}
    return w._with(w.qdata.to(**move), w.scale.to(**move), dtype=dtype or w.dtype, whole_units=True)


@_implements(aten.t.default, aten.transpose.int)
def _transpose(func: Any, w: QTensor, d0: int = 0, d1: int = 1) -> Any:
    if {d0 % w.dim(), d1 % w.dim()} != {w.dim() - 2, w.dim() - 1}:
        return func(w.dequantize(), d0, d1)
    return w._with(w.qdata, w.scale, transposed=not w.transposed)


# Slices that take whole scale groups --------------------------------------------------------------------------------


@_implements(aten.select.int)
def _select(func: Any, w: QTensor, dim: int, index: int) -> Any:
    if w.dim() == 3 and dim % 3 == 0:
        return w._with(w.qdata[index], w.scale[index])
    return func(w.dequantize(), dim, index)


@_implements(aten.slice.Tensor)
def _slice(func: Any, w: QTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    dim, part = dim % w.dim(), slice(*slice(start, end, step).indices(w.shape[dim]))
    return _take_slice(w, dim, part) if _sliceable(w, dim, part) else func(w.dequantize(), dim, start, end, step)


@_implements(aten.split.Tensor, aten.unsafe_split.Tensor)
def _split(func: Any, w: QTensor, size: int, dim: int = 0) -> Any:
    sizes = [min(size, w.shape[dim] - at) for at in range(0, max(w.shape[dim], 1), size)]
    return _split_with_sizes(func, w, sizes, dim)


@_implements(aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default)
def _split_with_sizes(func: Any, w: QTensor, sizes: Sequence[int], dim: int = 0) -> Any:
    parts, at = [], 0
    for size in sizes:
        parts.append(_slice(aten.slice.Tensor, w, dim, at, at + size))
        at += size
    return parts


@_implements(aten.unbind.int)
def _unbind(func: Any, w: QTensor, dim: int = 0) -> Any:
    return [_select(aten.select.int, w, dim, i) for i in range(w.shape[dim])]


@_implements(aten.index.Tensor)
def _index(func: Any, w: QTensor, indices: Sequence[Any]) -> Any:
    if w.dim() == 3 and len(indices) == 1 and indices[0].dim() == 1:
        return _gather(w, indices[0])
    return func(w.dequantize(), indices)


@_implements(aten.index_select.default)
def _index_select(func: Any, w: QTensor, dim: int, index: torch.Tensor) -> Any:
    return _gather(w, index) if w.dim() == 3 and dim % 3 == 0 else func(w.dequantize(), dim, index)


def _gather(w: QTensor, experts: torch.Tensor) -> QTensor:
    """The matrices `experts` (indices or mask, 1-d) of a stack, as bytes: CPU has no indexing for float8."""
    return w._with(w.qdata.view(torch.uint8)[experts].view(w.qdata.dtype), w.scale[experts], whole_units=True)


def _sliceable(w: QTensor, dim: int, part: slice) -> bool:
    fmt = w.scheme.format
    if (w.dim() == 3 and dim == 0) or fmt.granularity != "block":
        return True
    block = fmt.block[_stored_dim(w, dim) - w.dim() + 2]
    return part.step == 1 and part.start % block == 0 and (part.stop % block == 0 or part.stop == w.shape[dim])


def _stored_dim(w: QTensor, dim: int) -> int:
    """The dimension of qdata that a logical dimension names."""
    if not w.transposed or dim < w.dim() - 2:
        return dim
    return 2 * w.dim() - 3 - dim


def _take_slice(w: QTensor, dim: int, part: slice) -> QTensor:
    fmt, dim = w.scheme.format, _stored_dim(w, dim)
    qdata = w.qdata[(slice(None),) * dim + (part,)]
    whole, scale = w.whole_units, w.scale
    row_dim = w.dim() - 2
    if dim < row_dim or (fmt.granularity == "channel" and dim == row_dim):
        scale = scale[(slice(None),) * dim + (part,)]
    elif fmt.granularity == "block":
        block = fmt.block[dim - row_dim]
        scale = scale[(slice(None),) * dim + (slice(part.start // block, ceil_div(part.stop, block)),)]
    else:
        whole = whole and qdata.shape == w.qdata.shape
    return w._with(qdata, scale, whole_units=whole)


# Products -----------------------------------------------------------------------------------------------------------


@_implements(aten.linear.default)
def _linear(func: Any, x: Any, w: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(w, QTensor) or isinstance(x, QTensor) or w.transposed:
        return _on_dequantized(func, x, w, bias)
    out = _product(x.reshape(-1, x.shape[-1]), w, bias)
    return out.view(*x.shape[:-1], w.shape[0])


@_implements(aten.mm.default)
def _mm(func: Any, x: Any, w: Any) -> torch.Tensor:
    if isinstance(w, QTensor) and w.transposed and not isinstance(x, QTensor):
        return _product(x, w, None)
    return _on_dequantized(func, x, w)


@_implements(aten.addmm.default)
def _addmm(func: Any, bias: Any, x: Any, w: Any, *, beta: Any = 1, alpha: Any = 1) -> torch.Tensor:
    if isinstance(w, QTensor) and w.transposed and not isinstance(x, QTensor) and beta == 1 and alpha == 1:
        return _product(x, w, bias)
    return _on_dequantized(func, bias, x, w, beta=beta, alpha=alpha)


@_implements(aten.bmm.default)
def _bmm(func: Any, x: Any, w: Any) -> torch.Tensor:
    if isinstance(w, QTensor) and w.transposed and not isinstance(x, QTensor):
        return torch.stack([_mm(aten.mm.default, x[e], w[e]) for e in range(w.shape[0])])
    return _on_dequantized(func, x, w)


@_implements(aten.embedding.default)
def _embedding(func: Any, w: Any, indices: torch.Tensor, *args: Any) -> torch.Tensor:
    """Dequantizes the rows that are looked up, not the table."""
    fmt, rows = w.scheme.format, indices.reshape(-1)
    scale = w.scale
    if fmt.granularity == "channel":
        scale = scale[rows]
    elif fmt.granularity == "block":
        scale = scale[rows // fmt.block[0]].repeat_interleave(fmt.block[1], 1)[:, : w.shape[1]]
    values = w.qdata.view(torch.uint8)[rows].view(w.qdata.dtype).float() * scale
    return values.to(w.dtype).reshape(*indices.shape, w.shape[1])


def _product(x: torch.Tensor, w: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x `[M, K]` times the stored matrix `[N, K]` transposed, plus bias `[N]`."""
    fmt = w.scheme.format
    if w.scheme.activation == "dynamic":
        if has_fp8_matmul(x, w):
            return scaled_mm(x, w, bias)
        x = kernels.round_trip_activation(x, fmt)
    return kernels.linear(x, w.qdata, w.scale, fmt, bias)


def has_fp8_matmul(x: torch.Tensor, w: QTensor) -> bool:
    """Can the device multiply these in fp8? sm_89 and newer, per-token × per-row scales, sizes in steps of 16."""
    return (
        x.is_cuda
        and w.scheme.format.granularity != "block"
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (8, 9)
        and all(n % 16 == 0 for n in w.qdata.shape)
    )


def scaled_mm(x: torch.Tensor, w: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product in fp8: activations quantized per token, the weight's scale per output row."""
    xq, xs = kernels.quantize_activation(x, w.scheme.format)
    row_wise = torch.nn.functional.ScalingType.RowWise
    w_scale = w.scale.reshape(1, -1).expand(1, w.qdata.shape[0]).contiguous()
    return torch.nn.functional.scaled_mm(
        xq, w.qdata.t(), xs, row_wise, w_scale, row_wise, bias=bias, output_dtype=x.dtype
    )


# Writes -------------------------------------------------------------------------------------------------------------


@_implements(aten.copy_.default)
def _copy_(func: Any, dst: Any, src: Any, non_blocking: bool = False) -> Any:
    if not isinstance(dst, QTensor):
        return func(dst, src.dequantize(), non_blocking)
    if isinstance(src, QTensor):
        if src.scheme.format == dst.scheme.format and src.shape == dst.shape and src.transposed == dst.transposed:
            _require_whole_units(dst)
            dst.qdata.copy_(src.qdata)
            dst.scale.copy_(src.scale)
            return dst
        src = src.dequantize()
    _requantize(dst, src)
    return dst


@_implements(aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default)
def _fill_(func: Any, dst: QTensor, value: Any = 0.0) -> QTensor:
    value = torch.as_tensor(value, dtype=dst.dtype, device=dst.device)
    _requantize(dst, value)
    return dst


def _requantize(dst: QTensor, src: torch.Tensor) -> None:
    """Quantize new high-precision values into the same storage."""
    _require_whole_units(dst)
    if not src.is_floating_point() or src.dtype.itemsize < 2:
        raise WeightDtypeError(f"QTensor {list(dst.shape)}: cannot take {src.dtype} values; pass a float tensor")
    try:
        src = src.detach().to(device=dst.device, dtype=dst.dtype).expand(dst.shape)
    except RuntimeError:
        raise WeightShapeError(f"QTensor {list(dst.shape)}: a source of shape {list(src.shape)} does not fit") from None
    try:
        kernels.quantize_into(src.mT if dst.transposed else src, dst.qdata, dst.scale, dst.scheme.format)
    except NonFinite as error:
        raise NonFiniteWeightError(nonfinite_message("QTensor", dst.qdata.shape, error)) from None


def _require_whole_units(dst: QTensor) -> None:
    if not dst.whole_units:
        raise QTensorError(
            f"QTensor slice {list(dst.shape)}: these elements share a {dst.scheme.name} scale with others, so they "
            "cannot be written alone. Write whole rows (per_channel), bands of 128 rows (per_block) or all of it."
        )


# Everything else ----------------------------------------------------------------------------------------------------


@_implements(
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
def _like(func: Any, w: QTensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Only shape, dtype and device matter: a one-element stand-in saves the dequantization."""
    return func(torch.empty((), dtype=w.dtype, device=w.device).expand(w.shape), *args, **kwargs)


def _on_dequantized(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Any other operation, on the dequantized values. A mutation of the weight is refused: it would be lost."""
    for value, spec in zip(args, func._schema.arguments, strict=False):
        if isinstance(value, QTensor) and spec.alias_info is not None and spec.alias_info.is_write:
            raise QTensorError(
                f"{func} would modify a quantized weight {list(value.shape)} in place. Assign new values with copy_, "
                "or work on .dequantize()."
            )
    args, kwargs = torch.utils._pytree.tree_map_only(QTensor, lambda w: w.dequantize(), (args, kwargs))
    return func(*args, **kwargs)
