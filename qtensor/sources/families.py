"""Every family of sources, and which of them a weight is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import awq, bitsandbytes, fp8, gguf, gptq, integers, mxfp4, nvfp4, torchao
from .source import Family, Source, Specs

FAMILIES: tuple[Family, ...] = (
    fp8.FAMILY,
    mxfp4.FAMILY,
    nvfp4.FAMILY,
    integers.FAMILY,
    gptq.FAMILY,
    awq.FAMILY,
    bitsandbytes.FAMILY,
    torchao.FAMILY,
    gguf.FAMILY,
)

NAMES: tuple[str, ...] = tuple(dict.fromkeys(name for family in FAMILIES for name in family.names))
"""Everything that a part of a weight may be called."""


def recognise(specs: Specs, config: Mapping[str, Any]) -> Source | None:
    """The source of a weight with those parts; None if there is none, or they do not tell yet.

    specs, config: as `Recognise` takes them. Families that config.json's method names are asked first. Raises Unusable.
    """
    method = config.get("quant_method")
    for family in sorted(FAMILIES, key=lambda family: method not in family.methods):
        if (found := family.recognise(specs, config)) is not None:
            return found
    return None
