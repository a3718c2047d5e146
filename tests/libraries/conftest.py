"""These tests run other people's libraries. Where those are not installed they are not collected;
`make test-libraries` has an environment."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("peft") is None:
    collect_ignore_glob = ["test_*.py"]
