"""These tests run real vLLM. Where it is not installed they are not collected; `make test-vllm` has an environment."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

_found = importlib.util.find_spec("vllm")
if _found is None or _found.origin is None:  # This folder itself can pass for an empty package of that name.
    collect_ignore_glob = ["test_*.py"]
