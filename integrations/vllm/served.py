"""A model that this plugin loads: what its load and all of its reloads share, and how both answer the weights they arm.

A ServedModel lives as long as its model. One transaction at a time fills it: first a load, then any number of reloads.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from qtensor.checkpoint import verify
from qtensor.checkpoint.reading import Checkpoint
from qtensor.errors import ConfigError
from qtensor.kernels import upload
from qtensor.kernels.cpu import compiling
from qtensor.lazy.weight import ArmedWeight
from qtensor.report.report import LoadReport
from qtensor.schemes.scheme import Scheme
from qtensor.sessions.transaction import State, Transaction

from . import compat
from .incoming import Incoming, Weights
from .layers import Published
from .missing import Names
from .options import REQUANTIZING, Choice
from .parallel import RankHost
from .reporting import rank
from .sources import decoded

_ATTRIBUTE = "_qtensor_served"


class ServedModel:
    """open: the transaction under way. published: the quantized weights, where their layers have put them. plain: the
    names of the others that a load fills (see `snapshots.plain_names`). aliases: see `layers.aliases`. report: of the
    last transaction that succeeded. resident_peak: bytes by which the load raised anonymous memory."""

    def __init__(self, root: nn.Module, choice: Choice) -> None:
        self.root, self.choice = root, choice
        self.setting = Setting.of(root)
        self.names = Names(choice.parts)
        decode = partial(decoded, config=choice.stored, dtype=self.setting.dtype or torch.bfloat16)
        asked = choice.options.source in REQUANTIZING
        kind = type(root).__name__
        self.incoming = Incoming(self.names, kind, lambda: self.setting.folder, decode if asked else None)
        self.published: list[Published] = []
        self.plain: list[str] = []
        self.aliases: dict[tuple[int, str], torch.Tensor] = {}
        self.open: Filling | None = None
        self.report: LoadReport | None = None
        self.resident_peak = 0
        object.__setattr__(root, _ATTRIBUTE, self)

    @staticmethod
    def of(root: nn.Module) -> ServedModel | None:
        """What this very module is to qtensor."""
        found = root.__dict__.get(_ATTRIBUTE)
        return found if isinstance(found, ServedModel) else None

    def as_dict(self) -> dict[str, Any] | None:
        """The report for other processes: plain data only."""
        if self.report is None:
            return None
        where = {"rank": rank()[0], "model": type(self.root).__name__, "resident_peak_bytes": self.resident_peak}
        return where | asdict(self.report)


def require_written(served: ServedModel) -> None:
    """If the option `verify` says so: raise CheckpointError for a file that is not what was written, or of which nobody
    knows what that was."""
    if not served.choice.options.verify:
        return
    folder = Path(served.setting.folder or "")
    if not folder.is_dir():
        raise ConfigError(
            f"qtensor: verify compares files of a folder, and {folder} is none; download the model, and give the folder"
        )
    verify.require_written(folder, Checkpoint(folder).tensors.values())


def find_served(model: nn.Module) -> ServedModel | None:
    """The model that qtensor loads or has loaded: this one, or the one in it; None if qtensor has no part in it."""
    return next(filter(None, map(ServedModel.of, model.modules())), None)


class Filling(RankHost, Transaction):
    """What a load and a reload have in common: which weights they arm (`slots`), and what they tell them.

    A weight knows its scheme from the start; its messages name the layer, and the checkpoint's tensor while one is
    being written.
    """

    why_closed: ClassVar[dict[State, str]] = {}

    def __init__(self, served: ServedModel) -> None:
        super().__init__()
        self.served = served
        compiling.listeners.add(self)
        self.refuse_nonfinite = served.choice.options.on_nonfinite == "error"
        self.incoming.lossless = served.choice.options.source == "lossless"

    def compiling(self, text: str) -> None:
        """The load waits for CPU loops."""
        compat.logger().info("qtensor: %s", text)

    def decide(self, weight: ArmedWeight) -> Scheme | None:
        scheme: Scheme | None = weight.scheme
        return scheme

    def name_of(self, weight: ArmedWeight) -> str:
        slot, current = self.slots.get(weight), self.served.incoming.current
        name = slot.full_name if slot is not None else weight.owner[1]
        return f"{name} (from the checkpoint's tensor '{current}')" if current else name

    @abstractmethod
    def load_weights(self, inner: Any, weights: Weights, args: Any, kwargs: Any) -> Any:
        """The model's own `load_weights`: all of a load, or one chunk of a reload. An error gives everything up."""

    def close(self, state: State) -> None:
        """Nothing can be written any more."""
        super().close(state)
        self.closed = self.closed or self.why_closed[state]
        self._writing.clear()
        upload.release()
        compiling.listeners.discard(self)
        self.served.open = None


@dataclass(frozen=True)
class Setting:
    """What the plugin needs of vLLM's configuration, which can be asked for only while a model is built.

    draft: the model proposes tokens for another one. stages: of the pipeline.
    """

    load_format: str
    model_config: Any
    draft: bool = False
    stages: int = 1

    @property
    def all_layers(self) -> bool:
        """Has the model every layer, so that a pattern without a match is a mistake?"""
        return self.model_config is not None and self.stages == 1 and not self.draft

    @property
    def folder(self) -> str | None:
        """What is being read: a reload may read another checkpoint than the load did."""
        return str(self.model_config.model) if self.model_config is not None else None

    @property
    def dtype(self) -> torch.dtype | None:
        """What the model computes in."""
        return self.model_config.dtype if self.model_config is not None else None

    @classmethod
    def of(cls, root: nn.Module) -> Setting:
        """That of a model which is being built. A draft is built in its target's configuration, with one of its own
        beside it."""
        from vllm.config import get_current_vllm_config
        from vllm.distributed import get_pp_group

        config = get_current_vllm_config()
        model = config.model_config
        if model is None:
            return cls("", None)
        own = compat.draft_config(root, config)
        load_format = config.load_config.load_format
        name = str(getattr(load_format, "value", load_format))
        return cls(name, own or model, own is not None, get_pp_group().world_size)
