"""Every family of sources, and which of them a weight is.

They are imported when they are asked for: most loads meet no quantized source.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from .source import Family, Source, Specs


@cache
def families() -> tuple[Family, ...]:
    """All of them; what several would recognise is the first's."""
    from . import awq, bitsandbytes, fp8, gguf, gptq, integers, modelopt, mxfp4, nvfp4, torchao

    # ModelOpt first: what it asks of a layer is nothing that the others know.
    modules = (modelopt, fp8, mxfp4, nvfp4, integers, gptq, awq, bitsandbytes, torchao, gguf)
    return tuple(module.FAMILY for module in modules)


@cache
def part_names() -> tuple[str, ...]:
    """Everything that a part of a weight may be called."""
    return tuple(dict.fromkeys(name for family in families() for name in family.names))


@cache
def methods() -> tuple[str, ...]:
    """Everything that config.json may call one of them."""
    return tuple(dict.fromkeys(method for family in families() for method in family.methods))


def recognise(specs: Specs, config: Mapping[str, Any]) -> Source | None:
    """The source of a weight with those parts; None if there is none, or they do not tell yet.

    specs, config: as `Recognise` takes them. Families that config.json's method names are asked first. Raises Unusable.
    """
    method = config.get("quant_method")
    for family in sorted(families(), key=lambda family: method not in family.methods):
        if (found := family.recognise(specs, config)) is not None:
            return found
    return None
