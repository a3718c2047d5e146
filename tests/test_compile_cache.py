"""torch.compile keeps programs on disk: one that was made by another version of this code is not taken again."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.processes import ROOT, in_forks

ANOTHER_CAT = """

@OPS.implements(aten.cat.default, replaces=_cat)
def _another_cat(func: Any, weights: Sequence[Any], dim: int = 0) -> Any:
    scales = weights[{which}].scale.view(4, 8)
    return scales @ scales.mT
"""
"""One product: a program that needs no C++ compiler, so that the test is quick."""


def package(folder: Path) -> Path:
    """A copy of the package, as it is installed."""
    copy = folder / "qtensor"
    shutil.copytree(ROOT / "qtensor", copy, ignore=shutil.ignore_patterns("kernels", "integrations", "__pycache__"))
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def compiled_and_eager(folder: Path) -> tuple[float, float, int]:
    """What a compiled join of two weights gives, what it gives uncompiled, and how often of two times the cache on disk
    had the program."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    sys.path.insert(0, str(folder))
    from torch._dynamo.utils import counters

    import qtensor

    assert qtensor.__file__ == str(folder / "qtensor" / "__init__.py")
    pair = [qtensor.quantize(torch.full((32, 16), x, dtype=torch.bfloat16), qtensor.fp8_per_channel) for x in (1, 2)]
    for _ in range(2):
        torch._dynamo.reset()
        compiled = torch.compile(lambda a, b: torch.cat([a, b]), fullgraph=True)(*pair)
    return float(compiled.sum()), float(torch.cat(pair).sum()), counters["aot_autograd"]["autograd_cache_hit"]


def test_a_program_of_edited_code_is_made_anew(tmp_path: Path) -> None:
    joins = package(tmp_path) / "tensor" / "ops_joins.py"
    source = joins.read_text(encoding="utf-8")
    results = []
    for which in (0, 1):
        joins.write_text(source + ANOTHER_CAT.format(which=which), encoding="utf-8")
        results += in_forks(compiled_and_eager, [tmp_path], ("torch._inductor.compile_fx",))
    (before, _, hits), (compiled, eager, _) = results
    assert hits == 1  # the cache works, or this test would show nothing
    assert eager != before
    assert compiled == eager


def test_weights_that_need_programs_of_their_own_have_other_keys() -> None:
    from qtensor import QTensor, fp8_per_channel, mxfp8, quantize

    weight = quantize(torch.ones(64, 32, dtype=torch.bfloat16), fp8_per_channel)
    scale = torch.ones(64, 2)[:, :1]
    others = [
        weight.to("meta"),
        weight.t(),
        QTensor(weight.qdata, scale, weight.scheme, weight.dtype),
        quantize(torch.ones(64, 32), fp8_per_channel),
        quantize(torch.ones(64, 32, dtype=torch.bfloat16), mxfp8),
        quantize(torch.ones(32, 64, dtype=torch.bfloat16), fp8_per_channel).t(),
        weight.detach().requires_grad_(),
    ]
    assert len({w._stable_hash_for_caching() for w in [weight, *others]}) == 1 + len(others)
    assert weight.clone()._stable_hash_for_caching() == weight._stable_hash_for_caching()


def test_a_fake_weight_is_a_key_for_the_cache_alone() -> None:
    from qtensor import QTensor, fp8_per_channel, quantize

    weight = quantize(torch.ones(64, 32, dtype=torch.bfloat16), fp8_per_channel)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(weight)
        assert type(fake) is type(copy.copy(fake)) is type(copy.deepcopy(fake)) is QTensor


@pytest.mark.parametrize("part", ["tensor", "kernels"])
def test_every_file_counts(tmp_path: Path, part: str) -> None:
    from qtensor.tensor.qtensor import digest_of

    folder = package(tmp_path) / part
    before = digest_of(folder)
    for file in sorted(folder.rglob("*.py")):
        source = file.read_bytes()
        file.write_bytes(source + b"# edited\n")
        assert digest_of(folder) != before, file
        file.write_bytes(source)
    assert digest_of(folder) == before
    assert list(folder.rglob("ops_fsdp.py" if part == "tensor" else "*/numba_backend.py"))


def test_the_packages_that_count() -> None:
    from qtensor.tensor.qtensor import code_digest, digest_of

    assert code_digest() == digest_of(ROOT / "qtensor" / "tensor", ROOT / "kernels")
