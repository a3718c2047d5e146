"""QTensor: a quantized weight that behaves as the high-precision tensor it stands for.

It reports the logical dtype and shape, holds `qdata` and `scale`, and answers operations from one table. Operations
that have no entry are computed on the dequantized values, so that results are right first and fast where it matters:
linear and matrix products, slices of whole scale groups, embedding lookups.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import kernels
from ..errors import NonFiniteWeightError, QTensorError, WeightDtypeError, WeightShapeError
from ..kernels import FORMATS, SOURCE_DTYPES, Audit, NonFinite, compiled
from ..schemes.scheme import Scheme, SchemeLike, as_scheme

aten = torch.ops.aten
_OPS: dict[Any, Callable[..., Any]] = {}


def _implements(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        _OPS.update(dict.fromkeys(ops, fn))
        return fn

    return register


class QTensor(torch.Tensor):
    """A weight `[N, K]` or `[E, N, K]` in quantized form.

    qdata: the quantized values, row-major `[..., N, K]`; `[..., N, K/2]` (rounded up) where two share a byte.
    scale: `scheme.format.scale_shape` of `[..., N, K]`, in `scheme.format.scale_dtype`.
    global_scale: fp32 `[..., 1]`, the second scale of each matrix, for formats with one (nvfp4); else None.
    scheme: the `Scheme` that made them.
    cols: K; told apart from `qdata`, which cannot know it is odd.
    transposed: the logical shape is `[..., K, N]`; `qdata` and `scale` keep their layout.
    whole_units: False for a slice that shares scales with elements outside of it; such a slice is read-only.
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
        fmt, dtype = self.scheme.format, dtype or self.dtype
        values = kernels.dequantize(self.qdata, self.scale, fmt, dtype, global_scale=self.global_scale)
        values = values[..., : self.cols]
        return values.mT if self.transposed else values

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes held: quantized values and scales."""
        return sum(part.nbytes for part in self.parts())

    def parts(self) -> tuple[torch.Tensor, ...]:
        """The tensors it is made of: quantized values, scales, and the global scale of formats with one."""
        return (self.qdata, self.scale) if self.global_scale is None else (self.qdata, self.scale, self.global_scale)

    def _parts_by_rows(self) -> list[torch.Tensor]:
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
        parts = shard._parts_by_rows()[: 1 if mesh.size() == 1 else None]
        return tuple(part.view(torch.uint8) for part in parts), None

    def fsdp_post_all_gather(
        self, gathered: tuple[torch.Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Any = None
    ) -> tuple[QTensor, tuple[()]] | None:
        """The weight of which this is a shard, followed by padding. With `out` it is there already: its parts are the
        memory that was gathered into."""
        if out is not None:
            return None
        of_all = dict(zip(map(id, self._parts_by_rows()), gathered, strict=False))
        whole = [of_all[id(part)].view(part.dtype) if id(part) in of_all else part for part in self.parts()]
        return self._with(*whole, dtype=dtype, whole_units=True), ()

    def numpy(self, *, force: bool = False) -> Any:
        return self.detach().dequantize().numpy(force=force)

    def tolist(self) -> Any:
        return self.dequantize().tolist()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"QTensor({list(self.shape)}, {self.dtype}, scheme={self.scheme}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> QTensor:
        other = self._with(*(part.clone() for part in self.parts()))
        other.__dict__.update(
            {k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k not in other.__dict__ and k[0] != "_"}
        )
        if isinstance(self, torch.nn.Parameter):
            other._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = other
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        scheme, is_param = self.scheme, isinstance(self, torch.nn.Parameter)
        how = (scheme.name, scheme.activation, self.dtype, self.transposed, is_param)
        return _rebuild, (self.qdata, self.scale, *how, self.global_scale, self.cols)

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
        the cached program holds what the operations below did when it was made."""
        parts = (self.scheme, self.dtype, self.transposed, self.whole_units, tuple(self.shape), _code_digest())
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _OPS.get(func)
        if handler is not None:
            return handler(func, *args, **(kwargs or {}))
        return _on_dequantized(func, *args, **(kwargs or {}))

    def _with(
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
    """Quantize a whole weight `[N, K]` or `[E, N, K]` (bf16, fp16 or fp32, any strides, any device).

    This is the oracle: every session, whatever the loader did, ends with exactly these bytes. `on_nonfinite="keep"`
    stores NaN as NaN (as 0 where the format has none: e2m1 and integers) and saturates infinities; neither enters a
    scale.

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
        kernels.quantize_into(
            weight.detach(), result.qdata, result.scale, scheme.format, audit, global_scale=result.global_scale
        )
    except NonFinite as error:
        raise NonFiniteWeightError(nonfinite_message("weight", weight.shape, error)) from None
    return result


def empty(shape: Sequence[int], scheme: Scheme, dtype: torch.dtype, device: Any) -> QTensor:
    """A QTensor whose storage is allocated and not yet written."""
    shape = tuple(shape)
    fmt = scheme.format
    qdata = torch.empty(fmt.qdata_shape(shape), dtype=fmt.dtype, device=device)
    scale = torch.empty(fmt.scale_shape(shape), dtype=fmt.scale_dtype, device=device)
    global_shape = fmt.global_scale_shape(shape)
    global_scale = None if global_shape is None else torch.empty(global_shape, dtype=torch.float32, device=device)
    return QTensor(qdata, scale, scheme, dtype, global_scale=global_scale, cols=shape[-1])


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
    global_scale: torch.Tensor | None = None,
    cols: int | None = None,
) -> QTensor:
    """What a pickled QTensor calls: made of tensors and strings alone, so that weights_only loading accepts it."""
    how = Scheme(FORMATS[scheme], activation), dtype, transposed
    result = QTensor(qdata, scale, *how, global_scale=global_scale, cols=cols)
    if is_param:
        result._is_param = True  # type: ignore[attr-defined]
    return result


# Files saved by version 0.1 have the second name.
torch.serialization.add_safe_globals([_rebuild, (_rebuild, "qtensor.quantized._rebuild")])


# Aliases, copies and moves ------------------------------------------------------------------------------------------


@functools.cache
def _code_digest() -> str:
    """A digest of the source that computes with QTensors: this file, slices, and the kernels."""
    here = Path(__file__)
    files = [here, here.with_name("ops_slices.py"), *sorted(Path(kernels.__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@_implements(aten.detach.default, aten.alias.default)
def _alias(func: Any, w: QTensor) -> QTensor:
    return w._with(*map(func, w.parts()))


@_implements(aten.clone.default)
def _clone(func: Any, w: QTensor, *, memory_format: Any = None) -> QTensor:
    return w._with(*(part.clone() for part in w.parts()), whole_units=True)


@_implements(aten._to_copy.default)
def _to_copy(
    func: Any, w: QTensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> Any:
    if dtype is not None and dtype not in SOURCE_DTYPES:
        return func(w.dequantize(), dtype=dtype, device=device)
    move = {"device": device, "non_blocking": non_blocking, "copy": True}
    if w._padded is not None:
        room = w._padded._with(*(part.to(**move) for part in w._padded.parts()), dtype=dtype or w.dtype)
        room._is_room = True
        return room[: w.shape[0]]
    return w._with(*(part.to(**move) for part in w.parts()), dtype=dtype or w.dtype, whole_units=True)


@_implements(aten.t.default, aten.transpose.int)
def _transpose(func: Any, w: QTensor, d0: int = 0, d1: int = 1) -> Any:
    if {d0 % w.dim(), d1 % w.dim()} != {w.dim() - 2, w.dim() - 1}:
        return func(w.dequantize(), d0, d1)
    return w._with(*w.parts(), transposed=not w.transposed)


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
    scale = w.scale if fmt.granularity == "tensor" else _rows(w.scale, rows // fmt.block[0])
    row_format = replace(fmt, block=(1, fmt.block[1]))
    values = compiled.dequantize(_rows(w.qdata, rows), scale, row_format, w.dtype, global_scale=w.global_scale)
    return values[:, : w.cols].reshape(*indices.shape, w.cols)


def _rows(t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`t[index]`, as bytes where elements are bytes: CPU has no indexing for float8."""
    return t[index] if t.dtype.itemsize > 1 else t.view(torch.uint8)[index].view(t.dtype)


def _product(x: torch.Tensor, w: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x `[M, K]` times the stored matrix `[N, K]` transposed, plus bias `[N]`."""
    fmt = w.scheme.format
    if w.scheme.activation == "dynamic":
        if has_fp8_matmul(x, w):
            return scaled_mm(x, w, bias)
        x = kernels.round_trip_activation(x, fmt)
    return kernels.linear(x, w.qdata, w.scale, fmt, bias, w.global_scale)


def has_fp8_matmul(x: torch.Tensor, w: QTensor) -> bool:
    """Can the device multiply these in fp8? sm_89 and newer, per-token × per-row scales, sizes in steps of 16."""
    return (
        x.is_cuda
        and w.scheme.format.granularity in ("tensor", "channel")
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
            for mine, theirs in zip(dst.parts(), src.parts(), strict=True):
                mine.copy_(theirs)
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
        stored = src.mT if dst.transposed else src
        kernels.quantize_into(stored, dst.qdata, dst.scale, dst.scheme.format, global_scale=dst.global_scale)
    except NonFinite as error:
        raise NonFiniteWeightError(nonfinite_message("QTensor", stored.shape, error)) from None


def _require_whole_units(dst: QTensor) -> None:
    if not dst.whole_units:
        raise QTensorError(
            f"QTensor slice {list(dst.shape)}: these elements share a {dst.scheme.name} scale with others, so they "
            "cannot be written alone. Write whole rows, bands of 128 rows (per_block) or all of it (per_tensor, nvfp4)."
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
