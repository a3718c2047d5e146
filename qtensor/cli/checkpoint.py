"""`qtensor quantize`, `inspect` and `verify`: arguments in, text or JSON and an exit code out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.inspecting import inspect_checkpoint
from ..checkpoint.layouts import COMPRESSED_TENSORS, LAYOUTS
from ..checkpoint.planning import plan
from ..checkpoint.snapshots import is_snapshot, snapshot_roots, verify_snapshot
from ..checkpoint.verify import verify_checkpoint
from ..convert.cluster import LOST_AFTER, launched
from ..convert.converting import ConversionReport, quantize_checkpoint
from ..convert.launch import quantize_on_ranks, quantize_on_ray
from ..errors import QTensorError
from ..kernels import RECIPES, SEARCHES
from ..schemes.config import SchemeSpec
from ..schemes.planning import DEFAULT_SCHEMES, load_plan
from ..schemes.scheme import SCHEMES, SEARCHED, Scheme, SchemeLike, as_scheme
from ..schemes.selection import DEFAULT_IGNORE
from ..text import joined
from .output import OutputLost, complain


def add_parsers(commands: Any) -> None:
    """Add the four verbs to the `qtensor` command's subparsers; each sets `run`, which returns the exit code."""
    saveable = sorted({name for rows in LAYOUTS.values() for name in rows} | {"fp8"})
    quantize = commands.add_parser("quantize", help="quantize a checkpoint, file to file, without the model's code")
    quantize.add_argument(
        "source", type=Path, metavar="SRC", help="folder of a safetensors checkpoint, or a .gguf file"
    )
    quantize.add_argument("target", type=Path, metavar="DST", help="folder to write; it must not exist")
    saveable = [name for name in saveable if name in SCHEMES]
    searchable = [name + SEARCHED for name in saveable if SCHEMES[name].format.name in SEARCHES]
    chosen = quantize.add_mutually_exclusive_group()
    chosen.add_argument("--scheme", choices=[*saveable, *searchable], default="fp8")
    chosen.add_argument("--plan", type=Path, metavar="FILE", help="a scheme per weight, as `qtensor plan` writes it")
    quantize.add_argument("--recipe", choices=list(RECIPES), help="the bytes that this tool makes of the same weights")
    quantize.add_argument("--weight-only", action="store_true", help="servers are told not to quantize activations")
    quantize.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="P",
        help="leave these as they are, besides the usual ones; repeatable",
    )
    quantize.add_argument("--format", choices=list(LAYOUTS), default=COMPRESSED_TENSORS)
    quantize.add_argument(
        "--lossless",
        action="store_true",
        help="refuse a weight that is quantized already and would be quantized a second time",
    )
    quantize.add_argument("--workers", type=_count, default=2, metavar="N", help="threads (default 2)")
    quantize.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="share the files with the machines of a Ray cluster; the one this machine belongs to, or one of its own, "
        "without an address",
    )
    quantize.add_argument(
        "--lost-after",
        type=_count,
        default=int(LOST_AFTER),
        metavar="S",
        help="under torchrun, a rank without a sign of life for so many seconds is lost, and its file done by another "
        f"(default {LOST_AFTER:.0f})",
    )
    quantize.set_defaults(run=_quantize)

    planned = commands.add_parser("plan", help="which scheme each weight gets so that a model fits into memory")
    planned.add_argument(
        "model", type=Path, metavar="MODEL", help="folder of a safetensors checkpoint, or of a config.json alone"
    )
    planned.add_argument(
        "--fit", required=True, metavar="SIZE", help="bytes that the model may take, as 10GB or 9.5GiB"
    )
    planned.add_argument(
        "--reserve", default="0", metavar="SIZE", help="of these, to leave free for a KV cache and activations"
    )
    planned.add_argument(
        "--schemes",
        default=",".join(scheme.name for scheme in DEFAULT_SCHEMES),
        metavar="A,B",
        help="to choose from (default %(default)s)",
    )
    planned.add_argument(
        "--ignore", action="append", default=[], metavar="P", help="leave these as they are; repeatable"
    )
    planned.add_argument("--engine", choices=("pytorch", "vllm"), default="pytorch", help="who is going to load it")
    planned.add_argument("--out", type=Path, metavar="FILE", help="write the plan there, as JSON")
    planned.set_defaults(run=_plan)

    inspect = commands.add_parser("inspect", help="what is quantized how in a checkpoint")
    inspect.add_argument("path", type=Path, metavar="PATH")
    inspect.add_argument(
        "--against", type=Path, metavar="SRC", help="its high-precision source, to compare with (SQNR)"
    )
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="is a checkpoint whole: names, shapes, scales, checksums")
    verify.add_argument("path", type=Path, metavar="PATH")
    verify.add_argument("--workers", type=_count, default=2, metavar="N", help="threads (default 2)")
    verify.set_defaults(run=_verify)
    for parser in (quantize, planned, inspect, verify):
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError("give a number from 1 to 1024")
    return int(text)


def _quantize(args: argparse.Namespace) -> int:
    work: Callable[..., ConversionReport | None] = quantize_checkpoint
    if args.ray is not None:
        work = partial(quantize_on_ray, address=args.ray or None)
    elif launched():
        work = partial(quantize_on_ranks, lost_after=float(args.lost_after))
    with _failures(args) as outcome:
        report = work(
            args.source,
            args.target,
            _scheme(args),
            ignore=(*DEFAULT_IGNORE, *args.ignore),
            format=args.format,
            workers=args.workers,
            strict_source="lossless" if args.lossless else "any",
        )
        if report is not None:  # Ranks other than 0 have none.
            outcome(report.to_json(), _describe(report, args.target), beside_the_point=True)
    return outcome.code


def _scheme(args: argparse.Namespace) -> SchemeSpec:
    def read(given: SchemeLike) -> Scheme:
        scheme = as_scheme(given)
        scheme = scheme if args.recipe is None else scheme.by_recipe(args.recipe)
        return scheme.weight_only() if args.weight_only else scheme

    if args.plan is None:
        return read(args.scheme)
    return {pattern: read(scheme) for pattern, scheme in load_plan(args.plan).targets.items()}


def _plan(args: argparse.Namespace) -> int:
    with _failures(args) as outcome:
        found = plan(
            args.model,
            args.fit,
            reserve=args.reserve,
            schemes=args.schemes.split(","),
            ignore=args.ignore,
            engine=args.engine,
        )
        if args.out is not None:
            found.save(args.out)
        outcome(found.to_json(), f"{joined([str(args.model)])}: {found}")
    return outcome.code


def _describe(report: ConversionReport, target: Path) -> str:
    speed = report.source_bytes / 1e9 / max(report.seconds, 1e-9)
    lines = [f"{target}: {report.quantized} weights to {report.scheme}"]
    if report.resumed_files:
        lines[0] += f" ({report.resumed_files} of {report.files} files were there from an interrupted run)"
    lines.append(
        f"  {report.source_bytes / 1e6:.1f} MB → {report.written_bytes / 1e6:.1f} MB "
        f"in {report.seconds:.1f} s, {speed:.2f} GB/s"
    )
    lines += [f"  {count} came in {source}" for source, count in sorted(report.sources.items())]
    kinds = sorted(set(report.left.values()))
    for reason in kinds:
        names = [name for name, why in report.left.items() if why == reason]
        lines.append(
            f"  left as they were, {reason}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        )
    return joined(lines + [f"  warning: {w}" for w in report.warnings])


def _inspect(args: argparse.Namespace) -> int:
    with _failures(args) as outcome:
        report = inspect_checkpoint(args.path, args.against)
        outcome(report.to_json(), str(report))
    return outcome.code


def _verify(args: argparse.Namespace) -> int:
    with _failures(args) as outcome:
        snapshot = is_snapshot(args.path)
        found = verify_snapshot(args.path) if snapshot else verify_checkpoint(args.path, args.workers)
        text = joined([f"{args.path}: {len(found)} problem{'s' * (len(found) != 1)}", *(f"  {p}" for p in found)])
        facts: dict[str, Any] = {"path": str(args.path), "ok": not found, "problems": found}
        if not found:
            text = joined([f"{args.path}: whole"])
            if snapshot:
                facts["roots"] = roots = snapshot_roots(args.path)
                text = joined([text, *(f"  root of rank {rank}: {root}" for rank, root in enumerate(roots))])
        outcome(facts, text)
        outcome.code = 1 if found else 0
    return outcome.code


class _Outcome:
    """Prints what a command found, as text or JSON; `code` is the exit code."""

    def __init__(self, as_json: bool) -> None:
        self._as_json, self.code = as_json, 0

    def __call__(self, value: dict[str, Any], text: str, beside_the_point: bool = False) -> None:
        """beside_the_point: the command has done its work, whether anyone hears of it or not."""
        try:
            self._print(value, text)
        except OutputLost as lost:
            if not beside_the_point or self._as_json:
                raise
            lost.told()

    def _print(self, value: dict[str, Any], text: str) -> None:
        print(json.dumps(value, indent=2, allow_nan=False) if self._as_json else text)
        sys.stdout.flush()


@contextmanager
def _failures(args: argparse.Namespace) -> Iterator[_Outcome]:
    """What a user can put right becomes one line (or {"error": ...}) and exit code 1."""
    outcome = _Outcome(args.json)
    try:
        yield outcome
    except (QTensorError, OSError) as error:
        outcome.code = 1
        if args.json:
            print(json.dumps({"error": str(error)}))
        else:
            complain(f"qtensor {args.command}: {error}")
