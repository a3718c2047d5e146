"""The version: pyproject.toml and CITATION.cff say the same (a test compares them)."""

__version__ = "0.2.0"
