"""From a high-precision checkpoint to a quantized one, file to file, without the model's code.

A plan says what becomes of each tensor. Its shards are independent tasks: `convert_shard` reads one file, writes one
file, and needs nothing but its task, so that any number of processes or machines can share them; the index, config.json
and the list of checksums are written once, at the end. Within a shard, threads take one tensor each (streaming.py):
memory is a few chunks per thread, whatever the size of the checkpoint. It is one file because the plan, the tasks and
the end have to agree on every name and number that a folder holds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.files import LIST_BYTES, read_json
from ..checkpoint.fused import fused_group, refuse_misaligned, refuse_short_groups
from ..checkpoint.gguf import open_checkpoint
from ..checkpoint.layouts import (
    COMPRESSED_TENSORS,
    Spec,
    layout_of,
    quantization_config,
    require_format,
)
from ..checkpoint.reading import CONFIG, Checkpoint, Stored
from ..checkpoint.verify import require_workers, verify_checkpoint
from ..checkpoint.writing import (
    PLAN,
    Names,
    Records,
    ShardWriter,
    Staging,
    build_folder,
    carry_over,
    leads_out,
    side_files,
    write_json,
    write_manifest,
)
from ..errors import CheckpointError
from ..kernels import SOURCE_DTYPES
from ..modules import module_of, weight_of
from ..report.progress import Progress, ProgressLike, from_bytes
from ..schemes.config import SchemeSpec
from ..schemes.scheme import Scheme
from ..schemes.selection import DEFAULT_IGNORE, Selection
from ..sessions.options import StrictSource, functions, one_of
from .decoding import Decoded, decoded
from .streaming import OnBytes, TensorTask, copy, quantize

_ATTEMPT = "attempt-"


@dataclass(frozen=True)
class ShardTask:
    """One file to read and one to write. Can be pickled, and done anywhere that sees both folders."""

    target: Path
    format: str
    tensors: tuple[TensorTask, ...]

    @property
    def nbytes(self) -> int:
        """Of the source's tensors."""
        return sum(tensor.stored.nbytes for tensor in self.tensors)


@dataclass
class ConversionReport:
    """What `quantize_checkpoint` did.

    Attributes:
        scheme: What matrices became, by name.
        quantized: How many.
        source_bytes: Of the tensors that were read.
        written_bytes: Of the tensors that were written.
        resumed_files: Files that an interrupted run had finished.
        files: Files in all.
        seconds: From the first file to the last.
        left: Weights that stay as they were, and why.
        warnings: What a person should know.
    """

    scheme: str
    quantized: int = 0
    source_bytes: int = 0
    written_bytes: int = 0
    resumed_files: int = 0
    files: int = 0
    seconds: float = 0.0
    left: dict[str, str] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Conversion:
    """All there is to do, as the headers of the source tell it: the same on every machine that sees the source."""

    checkpoint: Checkpoint
    schemes: dict[str, Scheme]
    format: str
    tasks: list[ShardTask]
    report: ConversionReport

    def digest(self) -> str:
        """Of the source and the settings. Work that was begun is of use only to a conversion with the same digest."""
        text = json.dumps(
            {
                "format": self.format,
                "schemes": {module: str(scheme) for module, scheme in sorted(self.schemes.items())},
                "files": {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in self.checkpoint.files},
                "tensors": {
                    n: [str(s.dtype), s.shape, s.offset, s.path.name]
                    for n, s in sorted(self.checkpoint.tensors.items())
                },
            }
        )
        return hashlib.sha256(text.encode()).hexdigest()


Share = Callable[[Conversion, list[ShardTask], Path, OnBytes], None]
"""Does those of a conversion's tasks that are listed, each by `attempt` with the folder of notes that is given."""


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    scheme: SchemeSpec,
    *,
    ignore: Sequence[str] = DEFAULT_IGNORE,
    format: str = COMPRESSED_TENSORS,
    workers: int = 2,
    progress: ProgressLike = None,
    share: Share | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
    strict_source: StrictSource = "any",
) -> ConversionReport:
    """Quantize a checkpoint's matrices; everything else is copied. Each equals `quantize(tensor, scheme)`.

    Of a source that is quantized already (docs/sources.md), matrices are decoded as they are read, or moved where they
    are the same numbers in the scheme; those that `ignore` selects are written in high precision.

    A matrix is a 2-d tensor called "….weight" that no pattern of `ignore` selects. A scale that is one for a whole
    matrix (fp8_per_tensor, nvfp4) is that of the matrix servers fuse of it (q, k, v; gate, up). What an interrupted run
    left in `TARGET.partial` is continued, and the result is that of an uninterrupted one, byte for byte. An existing
    target is refused.

    Args:
        source: Folder of a safetensors checkpoint, or a `.gguf` file.
        target: Folder to write.
        scheme: A `Scheme` or its name, `{pattern: scheme}`, or a `Plan`.
        ignore: Patterns of weights to leave as they are.
        format: Of the files, as `save_checkpoint` takes it.
        workers: Threads.
        progress: As `online_quant` takes it; events count the source's bytes.
        share: Who does the tasks, if not this process alone.
        on_bytes: What 0.1 had instead of `progress`, called with the bytes just read and the bytes there are to read in
            all; it goes in 0.3.
        strict_source: "lossless" refuses a matrix that is quantized already and would be quantized a second time.

    Returns:
        What was quantized, and what was left and why.

    Raises:
        CheckpointError: The source cannot be read, or the target not written; the target then does not exist.
        ConfigError: The scheme, the format or another option is unknown.
        LossySourceError: As `strict_source` says.
        NonFiniteWeightError: A tensor, which is named, has an element that is not finite.
    """
    started = time.perf_counter()
    require_workers(workers)
    functions(share=share, on_bytes=on_bytes)
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists; nothing is overwritten. Give a new folder.")
    conversion = prepare(source, target, scheme, ignore, format, strict_source)
    report = conversion.report
    staging = Staging(target, resume=True)
    with staging.building(keep=True) as folder:
        _require_same_plan(staging, conversion)
        for unfinished in staging.notes.glob(f"{_ATTEMPT}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        todo = [task for task in conversion.tasks if finished(task, staging.notes) is None]
        report.resumed_files = len(conversion.tasks) - len(todo)
        beside = sum(path.stat().st_size for path in side_files(conversion.checkpoint.folder))
        staging.require_space(sum(_nbytes(task) for task in todo) + beside)
        for path in set(folder.iterdir()) - {task.target for task in conversion.tasks}:
            path.unlink()  # What an interrupted run copied may have changed, or gone, since.
        begin(conversion.checkpoint, folder, conversion.schemes, format)
        with Progress(from_bytes(on_bytes) if on_bytes else progress, "quantizing", unit="byte") as shown:
            shown.expect(report.source_bytes)
            shown.advance(report.source_bytes - sum(task.nbytes for task in todo))
            (share or _alone(workers))(conversion, todo, staging.notes, shown.advance)
        records: Records = {}
        for task in conversion.tasks:
            records |= finished(task, staging.notes) or {}
        write_manifest(folder, format, records)
        if found := verify_checkpoint(folder, workers, progress=False):
            raise CheckpointError(
                f"{folder}: does not read back as it was written: {found[0]}. Remove it and start again."
            )
        staging.publish()
    report.quantized = len(conversion.schemes)
    report.written_bytes = Checkpoint(target).nbytes
    report.seconds = time.perf_counter() - started
    return report


def prepare(
    source: str | Path,
    target: Path,
    scheme: SchemeSpec,
    ignore: Sequence[str],
    format: str,
    strict_source: StrictSource = "any",
) -> Conversion:
    """What there is to do, from the headers alone; nothing is written. Raises CheckpointError."""
    require_format(format)
    one_of("strict_source", strict_source, "any", "lossless")
    selection = Selection(scheme, ignore, None)
    checkpoint = decoded(open_checkpoint(source), strict_source == "lossless")
    for path in (*checkpoint.files, checkpoint.folder / CONFIG, *side_files(checkpoint.folder)):
        if leads_out(path):
            raise CheckpointError(f"{path} is a link out of its folder, and is not published; put the file there")
    report = ConversionReport(str(selection), source_bytes=checkpoint.nbytes, files=len(checkpoint.shards))
    report.sources = dict(Counter(str(t.source) for t in checkpoint.tensors.values() if isinstance(t, Decoded)))
    schemes = _choose(checkpoint, selection, format, report)
    tasks = plan(checkpoint, build_folder(target), schemes, format)
    names = Names()
    for tensor in (tensor for task in tasks for tensor in task.tensors):
        kind = f" ({tensor.scheme})" if tensor.scheme is not None else ""
        for name in _specs_of(tensor, format):
            names.claim(name, tensor.stored.name + kind)
    return Conversion(checkpoint, schemes, format, tasks, report)


def plan(checkpoint: Checkpoint, folder: Path, schemes: dict[str, Scheme], format: str) -> list[ShardTask]:
    """The tasks, one per file. schemes: of the modules to quantize."""
    by_module = {module_of(name): stored for name, stored in checkpoint.tensors.items() if module_of(name) in schemes}
    tensors: dict[str, list[TensorTask]] = {file: [] for file in checkpoint.shards}
    for name, stored in checkpoint.tensors.items():
        module = module_of(name)
        chosen = schemes.get(module) if module is not None else None
        partners: tuple[Stored | Decoded, ...] = ()
        if chosen is not None and chosen.format.needs_whole_matrix:
            partners = tuple(by_module[m] for m in fused_group(module or "") if m in schemes)
        tensors[checkpoint.shard_of(stored)].append(TensorTask(stored, chosen, partners))
    return [
        ShardTask(folder / file, format, tuple(sorted(found, key=lambda t: t.stored.offset)))
        for file, found in tensors.items()
        if found or not checkpoint.tensors  # A file may hold nothing but scales of weights in others.
    ]


def convert_shard(task: ShardTask, pool: ThreadPoolExecutor, on_bytes: OnBytes = lambda n: None) -> Records:
    """Do one task.

    Args:
        task: What to convert, from where to where.
        pool: The threads to do it with.
        on_bytes: Called with source bytes as they are done.

    Returns:
        What was written, for the report and the index.
    """
    writer = ShardWriter(task.target, _specs(task))

    def work(tensor: TensorTask) -> None:
        with writer.open() as out:
            if tensor.scheme is None:
                copy(tensor.stored, writer, out, on_bytes)
            else:
                quantize(tensor, task.format, writer, out, on_bytes)

    jobs = [pool.submit(work, tensor) for tensor in task.tensors]
    try:
        for job in jobs:
            job.result()
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    return writer.finish()


def attempt(task: ShardTask, notes: Path, pool: ThreadPoolExecutor, on_bytes: OnBytes = lambda n: None) -> None:
    """`convert_shard` aside; then the file, and after it a note of its records, take their places in one step each.

    A shard may be attempted any number of times, at the same time too: all attempts write the same bytes.
    """
    with tempfile.TemporaryDirectory(prefix=_ATTEMPT, dir=notes) as aside:
        file = Path(aside, task.target.name)
        note = Path(aside, "note")
        write_json(note, convert_shard(replace(task, target=file), pool, on_bytes))
        file.replace(task.target)
        note.replace(_note(task, notes))


def finished(task: ShardTask, notes: Path) -> Records | None:
    """The records of a shard that was finished, in this run or an earlier one."""
    note = _note(task, notes)
    return read_json(note, LIST_BYTES) if note.exists() and task.target.exists() else None


def begin(checkpoint: Checkpoint, folder: Path, schemes: dict[str, Scheme], format: str) -> None:
    """What is written once, and before the shards, so that what is wrong with it is found before their hours: the files
    beside the weights, and config.json."""
    plain = {m for name, s in checkpoint.tensors.items() if (m := module_of(name)) is not None and len(s.shape) == 2}
    plain.add("lm_head")  # It may be tied, and then has no tensor of its own.
    carry_over(checkpoint.folder, folder)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    if schemes:
        config["quantization_config"] = quantization_config(format, schemes, plain - schemes.keys())
    write_json(folder / CONFIG, config)


def _choose(checkpoint: Checkpoint, selection: Selection, format: str, report: ConversionReport) -> dict[str, Scheme]:
    """The scheme of each module that is going to be quantized."""
    schemes: dict[str, Scheme] = {}
    for name, stored in checkpoint.tensors.items():
        module = module_of(name)
        if len(stored.shape) == 3 and module is None:
            report.left[name] = "a stack of matrices in one tensor"
        if module is None or len(stored.shape) != 2:
            continue
        scheme, why = selection.of_matrix(module, name, stored.shape[0])
        if scheme is None:
            report.left[name] = why
        elif stored.dtype not in SOURCE_DTYPES:
            report.left[name] = f"holds {stored.dtype}"
        elif not stored.nbytes:
            report.left[name] = "holds no elements"
        else:
            layout_of(scheme, format, name)
            schemes[module] = scheme
    if unused := selection.unused_patterns():
        report.warnings.append(f"patterns that matched no weight: {', '.join(unused)}")
    if not schemes:
        raise CheckpointError(
            f'{checkpoint.folder}: has no 2-d "….weight" that is not ignored; there is nothing to quantize'
        )
    refuse_short_groups({m: checkpoint.tensors[weight_of(m)].shape[1] for m in schemes}, schemes)
    refuse_misaligned({m: checkpoint.tensors[weight_of(m)].shape[0] for m in schemes}, schemes)
    return schemes


def _specs(task: ShardTask) -> dict[str, Spec]:
    return {name: spec for tensor in task.tensors for name, spec in _specs_of(tensor, task.format).items()}


def _specs_of(tensor: TensorTask, format: str) -> dict[str, Spec]:
    """What one tensor becomes in the files."""
    stored = tensor.stored
    if tensor.scheme is None:
        return {stored.name: (stored.dtype, stored.shape)}
    rows, cols = stored.shape
    specs = layout_of(tensor.scheme, format, stored.name).specs((rows, cols))
    return {stored.name.removesuffix("weight") + suffix: spec for suffix, spec in specs.items()}


def _nbytes(task: ShardTask) -> int:
    return sum(dtype.itemsize * int(torch.Size(shape).numel()) for dtype, shape in _specs(task).values())


# Sharing and resuming -------------------------------------------------------------------------------------------------


def _alone(workers: int) -> Share:
    def share(conversion: Conversion, todo: list[ShardTask], notes: Path, on_bytes: OnBytes) -> None:
        with ThreadPoolExecutor(workers) as pool:
            for task in todo:
                attempt(task, notes, pool, on_bytes)

    return share


def _require_same_plan(staging: Staging, conversion: Conversion) -> None:
    """What an interrupted run left is only of use to a run with the same source and settings."""
    digest, note = conversion.digest(), staging.notes / PLAN
    if not note.exists():
        fresh = note.with_name("plan.new")
        write_json(fresh, digest)
        fresh.replace(note)
    elif note.read_text(encoding="utf-8", errors="replace").strip() != json.dumps(digest):
        raise CheckpointError(
            f"{staging.path} holds an unfinished conversion of another source, or with other settings. Remove it, or "
            "finish it with the settings it was begun with."
        )


def _note(task: ShardTask, notes: Path) -> Path:
    return notes / f"{task.target.name}.json"
