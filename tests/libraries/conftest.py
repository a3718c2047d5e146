"""These tests run other people's libraries. Where those are not installed they are not collected;
`make test-libraries` has an environment."""

from __future__ import annotations

import importlib.util

import pytest

import qtensor

if importlib.util.find_spec("peft") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _known_to_libraries() -> None:
    """As for a user who has imported `QTensorConfig`, whatever another test's end has made the libraries forget."""
    assert qtensor.QTensorConfig is not None
