"""Search for inputs that break the parsers of `fuzz_parsers`: coverage-guided, with atheris (libFuzzer). Not a test.

    pip install atheris
    PYTHONPATH=tests python tests/support/search_parsers.py header --seconds 600

A finding ends the search with its traceback, and its input is left beside the corpus as crash-*. At the end of a search
without one, the inputs that reach code no kept input reaches are added to tests/corpus/TARGET.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

os.environ["QTENSOR_KERNELS"] = "torch"  # Compiling loops would pass for an input that takes too long.
with atheris.instrument_imports(include=["qtensor"]):
    from support import fuzz_parsers

LONGEST = 1200
"""Bytes of an input. A longer one is seldom needed to reach a line, and is no joy to read."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=fuzz_parsers.TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--engine", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # what libFuzzer is called with
    args = parser.parse_args()
    if args.engine:
        atheris.Setup(
            [f"{sys.executable} {__file__} {args.target} --engine", *args.engine],  # what it starts more of itself by
            lambda data: fuzz_parsers.accepted(args.target, data) and None,
            custom_mutator=_mutated,
        )
        atheris.Fuzz()
        return
    kept = fuzz_parsers.CORPUS / args.target
    kept.mkdir(parents=True, exist_ok=True)
    found = Path(tempfile.mkdtemp(prefix=f"qtensor-{args.target}-"))
    words = found.with_suffix(".dict")
    words.write_text("".join(f'"{_escaped(w)}"\n' for w in fuzz_parsers.WORDS))
    run = [sys.executable, __file__, args.target, "--engine", f"-max_len={LONGEST}", "-rss_limit_mb=6000"]
    search = [f"-dict={words}", f"-max_total_time={args.seconds}", "-timeout=20", f"-artifact_prefix={kept.parent}/"]
    subprocess.run([*run, *search, str(found), str(kept)], check=True)
    subprocess.run([*run, "-merge=1", str(kept), str(found)], check=True)


def _mutated(data: bytes, max_size: int, seed: int) -> bytes:
    """As JSON, or as bytes."""
    random = Random(seed)
    changed = fuzz_parsers.mutated(data, random) if random.random() < 0.5 else data
    return changed if changed != data and len(changed) <= max_size else atheris.Mutate(data, max_size)


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace('"', '\\"')


if __name__ == "__main__":
    main()
