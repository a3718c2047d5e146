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
    INT4_PER_GROUP,
    INT8_PER_CHANNEL,
    MXFP4,
    MXFP8,
    NVFP4,
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
        """What `as_scheme` reads: the format's name, and ":searched" after it where scales are searched."""
        return self.format.name + (SEARCHED if self.is_searched else "")

    @property
    def is_searched(self) -> bool:
        """Whether each scale is chosen by the error that it leaves."""
        return self.format.search is not None

    def searched(self) -> Scheme:
        """The same stored format, with each scale chosen among candidates by the squared error that it leaves.

        The candidates are the plain scale, which is taken where none is better, and some beside it (docs/schemes.md).
        Its name is that of this scheme followed by ":searched".

        Returns:
            The scheme.

        Raises:
            ConfigError: The format has no search: fp8_per_tensor.
        """
        search = SEARCHES.get(self.format.name)
        if search is None:
            raise ConfigError(
                f"{self.format.name} cannot be searched: one scale for a whole matrix leaves next to nothing to gain. "
                "Use fp8_per_channel or fp8_per_block"
            )
        return replace(self, format=replace(self.format, search=search))

    def plain(self) -> Scheme:
        """The same scheme with scales by the formula alone, as `searched` found it."""
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

SEARCHED = ":searched"
_NAMED = (fp8_per_tensor, fp8_per_channel, fp8_per_block, mxfp8, mxfp4, nvfp4, int8_per_channel, int4_per_group)
SCHEMES: dict[str, Scheme] = {s.name: s for s in _NAMED} | {"fp8": fp8}

SchemeLike = Scheme | str
Targets = Sequence[str] | Mapping[str, SchemeLike]


def as_scheme(value: SchemeLike) -> Scheme:
    """A `Scheme`, or its name as a string ("fp8_per_block", "nvfp4:searched"), as a `Scheme`. Raises ConfigError for
    another name."""
    if isinstance(value, Scheme):
        return value
    if isinstance(value, str):
        plain = value.removesuffix(SEARCHED)
        if plain in SCHEMES:
            return SCHEMES[plain] if plain == value else SCHEMES[plain].searched()
    raise ConfigError(
        f'unknown scheme {value!r}: use one of {", ".join(sorted(SCHEMES))}, each but fp8_per_tensor with "{SEARCHED}" '
        "behind it if its scales are to be searched, or a qtensor.Scheme"
    )
