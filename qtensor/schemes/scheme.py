"""Schemes: what a weight becomes (number format, granularity) and how activations meet it. One frozen value each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import ConfigError
from ..kernels import (
    FP8_PER_BLOCK,
    FP8_PER_CHANNEL,
    FP8_PER_TENSOR,
    INT4_ASYMMETRIC,
    INT4_PER_GROUP,
    INT4_PER_GROUP_32,
    INT8_PER_CHANNEL,
    MXFP4,
    MXFP8,
    NVFP4,
    RECIPES,
    SEARCHES,
    WeightFormat,
)

Activation = Literal["auto", "dynamic", "none"]


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantized and multiplied.

    Attributes:
        format: Element format, granularity and scale formula (see `qtensor.kernels.WeightFormat`).
        activation: "auto" quantizes activations to fp8 per token before a multiplication where the device multiplies
            in fp8, and keeps them elsewhere, where rounding them would gain nothing; "dynamic" quantizes them
            everywhere (per token and group of 128 for per-block weights, of 32 for mxfp8); "none" nowhere
            (weight-only). Only fp8 weights have the first two.
    """

    format: WeightFormat
    activation: Activation = "auto"

    def __post_init__(self) -> None:
        if self.activation != "none" and self.format.element != "e4m3":
            raise ConfigError(f'Scheme: {self.format.name} is weight-only; pass activation="none"')

    @property
    def name(self) -> str:
        """What `as_scheme` reads: the format's name, and after it ":searched" where scales are searched, or a colon and
        the recipe that they follow."""
        if self.is_searched:
            return self.format.name + SEARCHED
        return self.format.name + (f":{self.recipe}" if self.recipe else "")

    @property
    def is_searched(self) -> bool:
        """Whether each scale is chosen by the error that it leaves."""
        return self.format.search is not None

    @property
    def recipe(self) -> str | None:
        """The tool whose arithmetic is followed, where that is not the formula of the format itself."""
        return None if self.format.recipe is None else self.format.recipe.tool

    def searched(self) -> Scheme:
        """The same stored format, with each scale chosen among candidates by the squared error that it leaves.

        The candidates are the plain scale, which is taken where none is better, and some beside it (docs/schemes.md).
        Its name is that of this scheme followed by ":searched".

        Returns:
            The scheme.

        Raises:
            ConfigError: The format has no search: fp8_per_tensor and int4_asymmetric; or a recipe says what its scales
                are.
        """
        if self.recipe:
            raise ConfigError(f"{self.name}: a recipe says what its scales are, so there is none to search")
        search = SEARCHES.get(self.format.name)
        if search is None:
            if self.format.has_zero_point:
                raise ConfigError(f"{self.format.name} cannot be searched. Use it as it is, or int4_per_group:searched")
            raise ConfigError(
                f"{self.format.name} cannot be searched: one scale for a whole matrix leaves next to nothing to gain. "
                "Use fp8_per_channel or fp8_per_block"
            )
        return replace(self, format=replace(self.format, search=search))

    def by_recipe(self, tool: str) -> Scheme:
        """The same stored format, with the bytes that another tool makes of the same weight (docs/schemes.md).

        Args:
            tool: "vllm", "compressed-tensors" (and llm-compressor), "quark" or "torchao".

        Returns:
            The scheme; this one where the tool's formula is that of the scheme itself.

        Raises:
            ConfigError: There is no such recipe, or none of that tool for this format, or the scales are searched or
                follow a recipe.
        """
        if not isinstance(tool, str) or tool not in RECIPES:
            raise ConfigError(f"unknown recipe {tool!r}: use one of {', '.join(RECIPES)}")
        if self.is_searched or self.recipe:
            raise ConfigError(f"{self.name}: name what its scales are once, not {tool!r} besides")
        formats = RECIPES[tool]
        if self.format.name not in formats:
            raise ConfigError(
                f"there is no recipe of {tool} for {self.format.name}, of which it has none, or none known byte for "
                f"byte; there is one for {', '.join(formats)}"
            )
        return replace(self, format=replace(self.format, recipe=formats[self.format.name]))

    def plain(self) -> Scheme:
        """The same scheme with scales by the formula alone, without search and recipe."""
        return replace(self, format=self.format.plain)

    def weight_only(self) -> Scheme:
        """The same weights with unquantized activations."""
        return replace(self, activation="none")

    def __str__(self) -> str:
        if self.activation == "dynamic":
            return f"{self.name} (fp8 activations)"
        only_choice = self.format.element != "e4m3"
        return self.name if self.activation == "auto" or only_choice else f"{self.name} (weight-only)"


fp8_per_tensor = Scheme(FP8_PER_TENSOR)
fp8_per_channel = Scheme(FP8_PER_CHANNEL)
fp8_per_block = Scheme(FP8_PER_BLOCK)
fp8 = fp8_per_channel
mxfp8 = Scheme(MXFP8)
mxfp4 = Scheme(MXFP4, "none")
nvfp4 = Scheme(NVFP4, "none")
int8_per_channel = Scheme(INT8_PER_CHANNEL, "none")
int4_per_group = Scheme(INT4_PER_GROUP, "none")
int4_per_group_32 = Scheme(INT4_PER_GROUP_32, "none")
int4_asymmetric = Scheme(INT4_ASYMMETRIC, "none")

SEARCHED = ":searched"
_NAMED = (
    fp8_per_tensor,
    fp8_per_channel,
    fp8_per_block,
    mxfp8,
    mxfp4,
    nvfp4,
    int8_per_channel,
    int4_per_group,
    int4_per_group_32,
    int4_asymmetric,
)
SCHEMES: dict[str, Scheme] = {s.name: s for s in _NAMED} | {"fp8": fp8}

SchemeLike = Scheme | str
Targets = Sequence[str] | Mapping[str, SchemeLike]


def as_scheme(value: SchemeLike) -> Scheme:
    """A `Scheme`, or its name as a string ("fp8_per_block", "nvfp4:searched", "mxfp4:torchao"), as a `Scheme`. Raises
    ConfigError for another name."""
    if isinstance(value, Scheme):
        return value
    if isinstance(value, str):
        plain, suffix = split_name(value)
        if plain in SCHEMES and suffix in ("", SEARCHED):
            return SCHEMES[plain].searched() if suffix else SCHEMES[plain]
        if plain in SCHEMES and suffix[1:] in RECIPES:
            return SCHEMES[plain].by_recipe(suffix[1:])
    raise ConfigError(
        f"unknown scheme {value!r}: use one of {', '.join(sorted(SCHEMES))}, each but fp8_per_tensor and "
        f'int4_asymmetric with "{SEARCHED}" behind it if its scales are to be searched, or with a colon and a recipe '
        f"({', '.join(RECIPES)}), or a qtensor.Scheme"
    )


def split_name(name: str) -> tuple[str, str]:
    """The name of a scheme, and what stands behind it: "nvfp4:searched" → "nvfp4", ":searched"."""
    plain, colon, suffix = name.partition(":")
    return plain, colon + suffix
