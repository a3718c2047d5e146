"""What a checkpoint holds: which weights are quantized how, what they weigh, and how far they are from their source."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..kernels.audit import sqnr_db
from ..modules import weight_of
from ..sources.families import recognise
from ..sources.source import Spec
from ..tensor.qtensor import QTensor
from ..text import joined
from .gguf import GGUF, open_checkpoint
from .reading import Checkpoint, Stored
from .requantizing import groups_of, weights_in
from .verify import Weight, weights_of

_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class WeightReport:
    """One quantized weight. bytes: of its values and scales. sqnr: in dB against the source; None if not compared."""

    name: str
    scheme: str
    shape: tuple[int, ...]
    bytes: int
    sqnr: float | None = None


@dataclass
class CheckpointReport:
    """What is quantized how in a checkpoint.

    Attributes:
        folder: Of the checkpoint.
        method: config.json's quant_method.
        files: Names of the files that hold tensors.
        quantized: One per matrix.
        plain: Bytes of the other tensors, by name.
    """

    folder: str
    method: str | None
    files: int
    quantized: list[WeightReport] = field(default_factory=list)
    plain: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report for `json.dumps`. JSON has no infinity, so an SQNR that is not finite (that of a weight that lost
        nothing) is null, as it is without `against`."""
        data = asdict(self)
        for weight in data["quantized"]:
            if weight["sqnr"] is not None and not math.isfinite(weight["sqnr"]):
                weight["sqnr"] = None
        return data

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.files} file{'s' * (self.files != 1)}, {self.method or 'not quantized'}"]
        for scheme in sorted({w.scheme for w in self.quantized}):
            group = [w for w in self.quantized if w.scheme == scheme]
            line = f"  {scheme:28} {len(group):6} weights {sum(w.bytes for w in group) / 1e6:12.1f} MB"
            compared = sorted((w for w in group if w.sqnr is not None), key=lambda w: w.sqnr or 0.0)
            if compared:
                middle = compared[len(compared) // 2].sqnr
                line += (
                    f"   SQNR {compared[0].sqnr:.1f} dB at least ({compared[0].name}), {middle:.1f} dB in the middle"
                )
            lines.append(line)
        lines.append(f"  {'as they were':28} {len(self.plain):6} tensors {sum(self.plain.values()) / 1e6:12.1f} MB")
        return joined(lines)


def inspect_checkpoint(folder: str | Path, against: str | Path | None = None) -> CheckpointReport:
    """Look at a checkpoint, and compare its quantized weights with a high-precision checkpoint.

    Args:
        folder: Of the checkpoint, or a `.gguf` file.
        against: The folder of its source; then SQNR is reported, 10·log10(Σx² / Σ(x - x̂)²) over each weight, in dB,
            infinite where nothing was lost.

    Returns:
        What is quantized how.

    Raises:
        CheckpointError: A checkpoint cannot be read, or the source does not have a weight, or has it in another shape.
        ConfigError: `against` is given for a `.gguf` file.
    """
    checkpoint = open_checkpoint(folder)
    report = CheckpointReport(str(folder), checkpoint.method, len(checkpoint.files))
    if checkpoint.method == GGUF:
        if against is not None:
            raise ConfigError(f"{folder}: is a {GGUF} file, and those are not compared with a source")
        return _of_parts(checkpoint, report)
    weights, plain = weights_of(checkpoint)
    source = Checkpoint(against) if against is not None else None
    report.plain = {name: stored.nbytes for name, stored in plain.items()}
    for module, weight in weights.items():
        name = weight_of(module)
        shape, held = weight.shape, sum(s.nbytes for s in weight.tensors.values())
        sqnr = _sqnr(name, weight, source) if source is not None else None
        report.quantized.append(WeightReport(name, str(weight.layout.scheme), shape, held, sqnr))
    return report


def _of_parts(checkpoint: Checkpoint, report: CheckpointReport) -> CheckpointReport:
    """By the names and shapes of parts alone: nothing is decoded."""
    groups, plain = groups_of(checkpoint.tensors, weights_in(checkpoint.tensors))
    report.plain = {name: stored.nbytes for name, stored in plain.items()}
    for name, group in groups.items():
        specs = {part: Spec(stored.dtype, stored.shape) for part, stored in group.items()}
        found = recognise(specs, checkpoint.quantization or {})
        if found is None:
            raise CheckpointError(f"{name}: is in no format that is known")
        held = sum(stored.nbytes for stored in group.values())
        report.quantized.append(WeightReport(name, str(found), found.shape(specs), held))
    return report


def _sqnr(name: str, weight: Weight, source: Checkpoint) -> float:
    original = source.tensors.get(name)
    if original is None:
        raise CheckpointError(f"{source.folder}: has no {name} to compare with")
    quantized = weight.read(torch.float32)
    if tuple(quantized.shape) != original.shape:
        raise CheckpointError(f"{name}: is {list(original.shape)} in {source.folder} and {list(quantized.shape)} here")
    signal = noise = 0.0
    for x, approximation in _pairs(original, quantized):
        signal += float(x.square().sum(dtype=torch.float64))
        noise += float((x - approximation).square().sum(dtype=torch.float64))
    return sqnr_db(signal, noise)


def _pairs(original: Stored, quantized: QTensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both as fp32, some rows at a time: whole blocks of 128."""
    rows, cols = original.shape
    step = max(1, _ELEMENTS // max(1, 128 * cols)) * 128
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        x = original.read(start * cols, torch.empty((stop - start, cols), dtype=original.dtype, device="cpu"))
        rows_of: Any = quantized[start:stop]
        yield x.float(), rows_of.dequantize(torch.float32)
