"""The `qtensor` command: it parses arguments, calls what they name, and turns the outcome into an exit code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ..errors import ConfigError, MissingExtraError, QTensorError
from ..extras import require
from ..schemes.scheme import SCHEMES, Scheme, as_scheme
from ..version import __version__
from . import checkpoint as checkpoint_commands
from .output import OutputLost, complain, standard_output


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: all well. 1: a check failed, or a command could not do its work. 2: bad arguments. 130: stopped.
    141: the reader of its output went away."""
    with standard_output():
        try:
            try:
                args = _parser().parse_args(argv)
                code: int = args.run(args)
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt:
            return 130
        except OutputLost as lost:
            return lost.told()
        return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qtensor", description="Model weights that quantize themselves while any PyTorch loader fills them."
    )
    parser.add_argument("--version", action="version", version=f"qtensor {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print a completion script for a shell, to be sourced by it",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what is installed, which kernels run here, and do they work")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")
    doctor.add_argument(
        "--compile",
        nargs="*",
        type=_scheme,
        metavar="SCHEME",
        help="instead, compile the CPU loops of these schemes (of all, if none is named) for every process to come",
    )
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser(
        "demo", help="load a real model and a generated checkpoint straight into fp8, and show what it costs"
    )
    demo.add_argument("--size", type=_megabytes, default=300.0, help="generated checkpoint, MB (default 300)")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results (default demo-out)")
    demo.add_argument("--part", choices=("all", "model", "memory"), default="all", help="run one part only")
    demo.add_argument("--json", action="store_true", help="print the results as JSON; the text goes to stderr")
    demo.set_defaults(run=_demo)

    checkpoint_commands.add_parsers(commands)
    return parser


class _PrintCompletion(argparse.Action):
    """Made from the parser as it stands, so that every command and option is in it."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, option: str | None = None) -> None:
        try:
            shtab = require("shtab", "completion", str(option))
        except MissingExtraError as error:
            parser.error(str(error))
        print(shtab.complete(parser, shell))
        parser.exit()


def _scheme(text: str) -> Scheme:
    try:
        return as_scheme(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _megabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 1 <= value <= 1_000_000:
        raise argparse.ArgumentTypeError("give a size from 1 to 1000000 MB")
    return value


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    if args.compile is not None:
        done = doctor.compile_loops(args.compile or list(dict.fromkeys(SCHEMES.values())))
        print(json.dumps(done, indent=2) if args.json else doctor.describe_compiled(done))
        return 0 if done["ok"] else 1
    findings = doctor.examine()
    print(json.dumps(findings, indent=2, allow_nan=False) if args.json else doctor.describe(findings))
    return 0 if findings["ok"] else 1


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    try:
        if not args.json:
            return 0 if demo.run(args.size, args.out, args.part) else 1
        with redirect_stdout(sys.stderr):
            good = demo.run(args.size, args.out, args.part)
        print(json.dumps({"ok": good, **demo.results(args.out, args.part)}, indent=2))
        return 0 if good else 1
    except (QTensorError, OSError) as error:
        complain(f"qtensor demo: {error}")
        return 1
