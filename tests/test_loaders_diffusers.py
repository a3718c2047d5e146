"""diffusers' `quantization_config=QTensorConfig(...)`, with a stand-in that asks its quantizer as diffusers does."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qtensor
from qtensor import CheckpointError, ConfigError, QTensor, load_checkpoint, online_quant, weight_checksums
from qtensor.checkpoint import diffusers as ours
from qtensor.schemes.scheme import SCHEMES

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
STAND_INS = Path(__file__).parent / "support" / "stand_ins"
NAMES = sorted({scheme.name for scheme in SCHEMES.values()})


@pytest.fixture
def config(monkeypatch: Any) -> Iterator[Any]:
    """The class that users import: before anybody has imported diffusers."""
    from qtensor.checkpoint import quantizer

    monkeypatch.syspath_prepend(str(STAND_INS))
    yield qtensor.QTensorConfig
    quantizer.unregister()
    ours.unregister()
    ours.quantizer.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        del sys.modules[name]


@pytest.fixture
def model_class(config: Any) -> Any:
    mixin = importlib.import_module("diffusers.models.modeling_utils").ModelMixin

    class Model(mixin):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(128, 256), nn.LayerNorm(256), nn.Linear(256, 128, bias=False)])
            self.register_to_config(size=128)

    return Model


@pytest.fixture
def folder(model_class: Any, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model_class().save_pretrained(tmp_path / "plain", max_shard_size="100KB")
    return tmp_path / "plain"


def contents(path: Path) -> dict[str, Any]:
    files = {p.name: p.read_bytes() for p in path.iterdir()}
    return {name: json.loads(data) if name.endswith(".json") else data for name, data in files.items()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", NAMES)
def test_the_bytes_of_the_context_manager_and_back(
    scheme: str, dtype: Any, config: Any, model_class: Any, folder: Path, tmp_path: Path
) -> None:
    model = model_class.from_pretrained(folder, quantization_config=config(scheme), torch_dtype=dtype)
    with online_quant(scheme):
        other = model_class.from_pretrained(folder, torch_dtype=dtype)
    assert weight_checksums(model) == weight_checksums(other)
    assert [layer.name for layer in model.hf_quantizer.report.layers] == ["inner.0.weight", "inner.2.weight"]
    assert model.get_memory_footprint() == sum(p.nbytes for p in model.parameters())
    for name, saved in (("config", model), ("block", other)):
        saved.save_pretrained(tmp_path / name, max_shard_size="10KB")
        again = model_class.from_pretrained(tmp_path / name, torch_dtype=dtype)
        assert weight_checksums(again) == weight_checksums(model)
        assert [p.dtype for p in again.parameters()] == [p.dtype for p in model.parameters()]
        again.save_pretrained(tmp_path / f"{name} again", max_shard_size="10KB")
        assert contents(tmp_path / name) == contents(tmp_path / f"{name} again")
        load_checkpoint(plain := model_class(), tmp_path / name)
        assert weight_checksums(plain if dtype is None else plain.to(dtype)) == weight_checksums(model)
    model.hf_quantizer.dequantize(model)
    assert not any(isinstance(param, QTensor) for param in model.parameters())


def test_what_cannot_be_is_refused(config: Any, model_class: Any, folder: Path, tmp_path: Path) -> None:
    model = model_class.from_pretrained(folder, quantization_config=config("fp8"))
    for places, options in (({"": 0, "inner.1": "cpu"}, {"quantization_config": config("fp8")}), ({"": "disk"}, {})):
        model.save_pretrained(tmp_path / f"saved {len(places)}")
        source = folder if options else tmp_path / f"saved {len(places)}"
        with pytest.raises(ConfigError, match="device_map"):
            model_class.from_pretrained(source, device_map=places, **options)
    with pytest.raises(CheckpointError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "pickled", safe_serialization=False)


def test_a_library_that_is_imported_later_knows_it_too(config: Any) -> None:
    assert "diffusers" not in sys.modules
    tables = importlib.import_module("diffusers.quantizers.auto")
    assert tables.AUTO_QUANTIZATION_CONFIG_MAPPING.keys() == {"qtensor", "compressed-tensors", "fp8"}
    assert tables.AUTO_QUANTIZER_MAPPING.keys() == {"qtensor"}
    ours.register()
    ours.unregister()
    assert tables.AUTO_QUANTIZATION_CONFIG_MAPPING == tables.AUTO_QUANTIZER_MAPPING == {}
    assert qtensor.QTensorConfig is config
    assert tables.AUTO_QUANTIZER_MAPPING.keys() == {"qtensor"}
    assert not any(type(finder).__module__.startswith("qtensor") for finder in sys.meta_path)
