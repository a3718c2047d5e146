"""What 0.1 had under a public name works under it today; and what `import qtensor` brings along."""

from __future__ import annotations

import ast
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qtensor
from qtensor import fp8, quantize

ROOT = Path(__file__).parents[1]
NAMES = {
    "qtensor": """
        DEFAULT_IGNORE CheckpointError ConfigError CopyCounter Coverage IncompleteLoadError LayerReport LazyWeight
        LoadReport LossyReadError NonFiniteWeightError ProgressEvent QTensor QTensorError Scheme Session Sharding
        WeightDtypeError WeightShapeError fp8 fp8_per_block fp8_per_channel fp8_per_tensor int4_per_group
        int4_per_group_32 int8_per_channel load_checkpoint mxfp4 mxfp8 nvfp4 online_quant online_reload quantize
        save_checkpoint weight_checksums __version__
    """,
    "qtensor.checkpoint": """
        CheckpointReport ConversionReport ShardTask convert_shard inspect_checkpoint load_checkpoint problems
        quantize_checkpoint quantize_on_ranks quantize_on_ray save_checkpoint
    """,
    "qtensor.kernels": """
        FORMATS FP8_PER_BLOCK FP8_PER_CHANNEL FP8_PER_TENSOR INT4_PER_GROUP INT8_PER_CHANNEL MXFP4 MXFP8 NVFP4
        SOURCE_DTYPES Audit NonFinite UnsupportedBackend WeightFormat choose dequantize describe linear
        quantize_activation quantize_into round_trip_activation
    """,
    "qtensor.quantized": "_rebuild",
}
VLLM_NAMES = {"checksums", "register", "reports"}
THIRD_PARTY = "torch, numpy, safetensors"


@pytest.mark.parametrize("module", NAMES)
def test_a_name_of_0_1_is_still_there(module):
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("module", ["qtensor", "qtensor.checkpoint", "qtensor.convert", "qtensor.kernels"])
def test_all_that_is_exported_is_there(module):
    found = importlib.import_module(module)
    assert [name for name in found.__all__ if not hasattr(found, name)] == []


def test_the_plugin_has_the_names_of_0_1():
    """Read from its source, because vLLM may not be installed."""
    tree = ast.parse((ROOT / "integrations/vllm/__init__.py").read_text(encoding="utf-8"))
    assert {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} >= VLLM_NAMES


def test_checkpoints_are_made_and_judged_by_names_of_the_package():
    assert {"quantize_checkpoint", "inspect_checkpoint", "verify_checkpoint", "ReloadSession"} <= set(qtensor.__all__)


def test_a_weight_that_0_1_pickled_is_loaded(monkeypatch):
    weight = quantize(torch.randn(4, 64), fp8)
    function = weight.__reduce_ex__(2)[0]
    for name, value in (("__module__", "qtensor.quantized"), ("__name__", "_rebuild"), ("__qualname__", "_rebuild")):
        monkeypatch.setattr(function, name, value)
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    monkeypatch.undo()
    assert b"cqtensor.quantized\n_rebuild\n" in file.getvalue()
    file.seek(0)
    found = torch.load(file, weights_only=True)["weight"]
    assert (type(found), found.scheme) == (type(weight), weight.scheme)
    assert torch.equal(found.qdata.view(torch.uint8), weight.qdata.view(torch.uint8))
    assert torch.equal(found.scale, weight.scale)


def imported(modules: str) -> list[str]:
    """What a fresh interpreter has imported after these."""
    program = f"import json, sys, {modules}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT / "tests"
    )
    return list(json.loads(done.stdout))


def top_level(modules: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(modules)}


def test_import_brings_no_other_package():
    assert top_level("qtensor") - top_level(THIRD_PARTY) - set(sys.stdlib_module_names) == {"qtensor"}


def test_import_brings_nothing_that_a_load_may_never_need():
    rare = [
        "sources",
        "convert",
        "cli",
        "integrations",
        "kernels.triton",
        "checkpoint.layouts",
        "checkpoint.loading",
        "lazy.counter",
    ]
    brought = [name for name in imported("qtensor") if name.startswith(tuple(f"qtensor.{part}" for part in rare))]
    assert brought == ["qtensor.sources"]
