"""What a load imports that `import qtensor` left out, told by thread. This file imports nothing that would bring it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qtensor import mxfp8, nvfp4, online_quant, online_reload, weight_checksums


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).to(torch.bfloat16)


def load_and_reload(scheme: Any) -> None:
    weights = build().state_dict()
    with online_quant(scheme, progress=True) as session:
        model = build()
        model.load_state_dict(weights)
    str(session.report())
    for rows in (1, 64):
        model(torch.ones(rows, 128, dtype=torch.bfloat16))
    for how in ({}, {"shadow": "host"}, {"atomic": False}):
        with online_reload(model, **how):  # type: ignore[arg-type]
            model.load_state_dict(weights)
    model.state_dict()
    weight_checksums(model)


def fit() -> None:
    weights = build().state_dict()
    with online_quant(fit="100KB", progress=False):
        build().load_state_dict(weights)


def quantized_source() -> None:
    layer = nn.Linear(128, 128, bias=False, dtype=torch.bfloat16)
    parts = {"weight": torch.ones(128, 128).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)}
    with online_quant(mxfp8, layer, source={"quant_method": "fp8"}, progress=False):
        layer.load_state_dict(parts)


PROGRAMS: dict[str, Callable[[], None]] = {
    "mxfp8": lambda: load_and_reload(mxfp8),
    "searched": lambda: load_and_reload(nvfp4.searched()),
    "fit": fit,
    "quantized source": quantized_source,
    "beside transformers": quantized_source,
}


def late_imports(program: str) -> tuple[list[str], list[str]]:
    """The modules that are looked for, while it runs, by the thread that runs it, and by others."""
    ours, others = [], []

    class Watch:
        def find_spec(self, name: str, *_: Any) -> None:
            (ours if threading.get_ident() == me else others).append(name)

    if program == "beside transformers":
        pytest.importorskip("transformers", reason="its table of quantizers is what is looked into here")
    me = threading.get_ident()
    sys.meta_path.insert(0, Watch())  # type: ignore[arg-type]
    PROGRAMS[program]()
    return ours, others
