"""Options: what a user may ask of a load or a reload, each a frozen value that is checked where it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.distributed as dist

from ..errors import ConfigError
from ..lazy.target import ShadowKind
from ..ranks.sharding import Sharding
from ..report.progress import ProgressLike
from ..schemes.config import read_patterns

OnMissing = Literal["error", "zero", "keep", "init"]
OnNonfinite = Literal["error", "keep"]
StrictSource = Literal["any", "lossless"]
Ranks = dist.ProcessGroup | Sharding | None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SessionOptions:
    """What loads and reloads have in common. See `online_quant`."""

    on_missing: OnMissing = "error"
    on_nonfinite: OnNonfinite = "error"
    strict_reads: bool = False
    process_group: Ranks = None
    progress: ProgressLike = None
    source: Mapping[str, Any] | None = None
    strict_source: StrictSource = "any"

    def __post_init__(self) -> None:
        one_of("strict_source", self.strict_source, "any", "lossless")
        if not (self.source is None or isinstance(self.source, Mapping)):
            raise ConfigError(f"source is the quantization_config of a config.json, or {{}}, not {self.source!r}")
        one_of("on_nonfinite", self.on_nonfinite, "error", "keep")
        flags(self, "strict_reads")
        group = self.process_group
        if group is not None and not isinstance(group, (Sharding, dist.ProcessGroup)):
            raise ConfigError(f"process_group is a torch.distributed group or a Sharding, not {group!r}")
        if not (self.progress is None or isinstance(self.progress, bool) or callable(self.progress)):
            raise ConfigError(f"progress is True, False, None or a function, not {self.progress!r}")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoadOptions(SessionOptions):
    """The options of `online_quant` and `load_checkpoint`."""

    device: torch.device | None = None
    min_sqnr: float | None = None
    measure_sqnr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("on_missing", self.on_missing, "error", "zero", "keep", "init")
        flags(self, "measure_sqnr")
        try:
            place = None if self.device is None else torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"device {self.device!r}: {error}") from None
        object.__setattr__(self, "device", place)
        limit = self.min_sqnr
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit != limit):
            raise ConfigError(f"min_sqnr is a number of decibels, not {limit!r}")
        if self.process_group is not None and limit is not None:
            raise ConfigError("min_sqnr decides by what one rank sees; it cannot be combined with process_group")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ReloadOptions(SessionOptions):
    """The options of `online_reload`."""

    on_missing: OnMissing = "keep"
    atomic: bool = True
    shadow: ShadowKind = "device"
    assert_identity: bool = False
    only: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.only, str):
            raise ConfigError(f"only is a list of patterns or None, not {self.only!r}")
        if self.only is not None:
            read_patterns("only", self.only)
        one_of("on_missing", self.on_missing, "error", "zero", "keep")
        one_of("shadow", self.shadow, "device", "host")
        flags(self, "atomic", "assert_identity")


def require_memory_on(device: torch.device | None) -> None:
    """Raises ConfigError, before anything is armed, for a device that this machine has not."""
    if device is None or device.type in ("cpu", "meta"):
        return
    try:
        torch.empty(0, dtype=torch.uint8, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"device {str(device)!r}: {error}") from None


def one_of(name: str, value: object, *allowed: str) -> None:
    """Raises ConfigError unless an option has one of the allowed values."""
    if value not in allowed:
        raise ConfigError(f"{name} is one of {', '.join(map(repr, allowed))}, not {value!r}")


def functions(**given: object) -> None:
    """Raises ConfigError unless these options are functions, or None."""
    for name, value in given.items():
        if not (value is None or callable(value)):
            raise ConfigError(f"{name} is a function or None, not {value!r}")


def flags(options: Any, *names: str) -> None:
    """Raises ConfigError unless these options are True or False."""
    assert {f.name for f in fields(options)} >= set(names)
    for name in names:
        if not isinstance(getattr(options, name), bool):
            raise ConfigError(f"{name} is True or False, not {getattr(options, name)!r}")
