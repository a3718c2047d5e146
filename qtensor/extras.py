"""Optional packages: whoever needs one asks here, and is told the pip line that brings it where it is missing."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import MissingExtraError


def require(module: str, extra: str, purpose: str) -> Any:
    """The module, imported. extra: of the extras in pyproject.toml, the one that has it. purpose: what needs it.

    Raises MissingExtraError, an ImportError, whose cause says what went wrong.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(f"{purpose} needs {package}: pip install 'qtensor-online[{extra}]'") from error
