"""Searched scales: what is chosen is what docs/schemes.md says, never worse than the plain scale, and read by all.

That whatever a loader did equals the oracle is in test_properties.py, whose schemes these are among."""

from __future__ import annotations

import io
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import qtensor
from qtensor import ConfigError, QTensor, load_checkpoint, online_quant, online_reload, quantize
from qtensor.checkpoint.quantization_config import QTensorConfig
from qtensor.cli.main import main
from qtensor.errors import QTensorError
from qtensor.kernels import FORMATS, SEARCHES, Parts, WeightFormat, choose
from qtensor.kernels.codes import decode
from qtensor.kernels.reference import TORCH
from qtensor.ranks.sharding import sharing_group
from qtensor.schemes.config import read_config
from qtensor.schemes.scheme import SCHEMES, Scheme, as_scheme
from support.kernel_cases import VALUES, make_values

SEARCHED = [SCHEMES[name].searched() for name in SEARCHES]
schemes = pytest.mark.parametrize("scheme", SEARCHED, ids=str)


def units(weight: torch.Tensor, fmt: WeightFormat) -> list[tuple[slice, slice]]:
    """Rows and columns of each of a matrix's scales, in row-major order."""
    rows, cols = weight.shape
    height, width = fmt.block[0], cols if fmt.granularity == "channel" else fmt.block[1]
    return [(slice(i, i + height), slice(j, j + width)) for i in range(0, rows, height) for j in range(0, cols, width)]


def measured(weight: torch.Tensor, got: QTensor) -> list[tuple[int, float]]:
    """Of each unit, sum and step of the error as `Search` defines it: one element at a time, in Python's integers."""
    fmt = got.scheme.format
    search = fmt.search or SEARCHES[fmt.name]
    plain_steps, steps = (steps_of(q).flatten() for q in (quantize(weight, Scheme(fmt.plain, "none")), got))
    values = values_of(got)[:, : weight.shape[1]]
    found = []
    for place, step, plain in zip(units(weight, fmt), steps, plain_steps, strict=True):
        x, q, inverse = weight[place].float(), values[place], 1.0 / step
        if fmt.per_byte == 2:
            numbers = sorted(
                {int(v * search.resolution) for v in decode(torch.arange(256).byte(), fmt).flatten().tolist()}
            )
            x = x if fmt.element == "int4" else x.abs()
            unit = float(1.0 / plain) if plain else 0.0
            fixed = ((x * unit) * (4 * search.resolution)).round().flatten().tolist()
            ratio = int((plain / step * 8192.0).round()) if step else 0
            scaled = [(int(v) * ratio + 2**14) >> 15 if math.isfinite(v) else 0 for v in fixed]
            counted = [min(abs(v - number) for number in numbers) for v in scaled]
        else:
            r = x / step if fmt.element == "int8" else x * (inverse if inverse.isfinite() else 0.0)
            if fmt.element == "e4m3":  # Dividing may fall to the other side of a tie.
                q = r.clamp(-448, 448).to(torch.float8_e4m3fn).float()
            counted = (((r if step else torch.zeros_like(r)) - q) * search.resolution).round().flatten().tolist()
        found.append((sum(int(d) ** 2 for d in counted), float(step)))
    return found


def steps_of(weight: QTensor) -> torch.Tensor:
    steps = weight.scheme.format.step(weight.scale)
    return steps if weight.global_scale is None else steps * weight.global_scale


def values_of(weight: QTensor) -> torch.Tensor:
    """Its codes, in units of their scale."""
    return decode(weight.qdata, weight.scheme.format)


def squared_errors(weight: torch.Tensor, got: QTensor) -> list[float]:
    """Of each unit, in fp64."""
    fmt = got.scheme.format
    error = weight.double() - got.dequantize(torch.float32).double()
    return [float(error[place].square().sum()) for place in units(weight, fmt)]


@schemes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_best_candidate_is_taken_of_all_that_there_are(scheme: Scheme, dtype: torch.dtype) -> None:
    """Each candidate alone, by formats that know no other, and the least of what they leave."""
    weight = make_values("normal", (37, 150), dtype, seed=3) * 0.02
    got, fmt = quantize(weight, scheme), scheme.format
    assert fmt.search is not None
    best = [s * step**2 for s, step in measured(weight, quantize(weight, scheme.plain()))]
    plain = list(best)
    for candidate in fmt.search.candidates[1:]:
        # A search whose only other candidate this is, and that any error of takes: the plain one counts as worse.
        one = replace(fmt, search=replace(fmt.search, candidates=(fmt.search.candidates[0], candidate)))
        errors = [s * step**2 for s, step in measured(weight, quantize(weight, Scheme(one, scheme.activation)))]
        best = [min(a, b) for a, b in zip(best, errors, strict=True)]
    assert [s * step**2 for s, step in measured(weight, got)] == best
    if fmt.name != "mxfp8":  # It hardly ever gains.
        assert best != plain


@schemes
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=25)
@given(
    kind=st.sampled_from(VALUES),
    shape=st.sampled_from([(1, 1), (3, 16), (5, 130), (140, 33)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    spread=st.sampled_from([1e-6, 0.02, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_no_unit_is_worse_than_with_its_plain_scale(
    scheme: Scheme, kind: str, shape: tuple[int, int], dtype: torch.dtype, spread: float, seed: int
) -> None:
    """By the measure, exactly. By the error in fp64, up to what the measure cannot see: a step of its resolution for
    each element, and what fp32 rounds."""
    weight = make_values(kind, shape, dtype, seed)
    if kind in ("normal", "one outlier"):
        weight = (weight.float() * spread).clamp(-6e4, 6e4).to(dtype)
    plain, got = quantize(weight, scheme.plain()), quantize(weight, scheme)
    fmt = scheme.format
    assert fmt.search is not None
    assert got.scheme == scheme
    for (s, step), (t, plain_step) in zip(measured(weight, got), measured(weight, plain), strict=True):
        assert (s, step) == (t, plain_step) or s * step**2 < t * plain_step**2
    steps = [steps_of(q) for q in (got, plain)]
    for place, mine, old, a, b in zip(
        units(weight, fmt), squared_errors(weight, got), squared_errors(weight, plain), *(s.flatten() for s in steps),
        strict=True,
    ):  # fmt: skip
        blind = weight[place].numel() ** 0.5 * (abs(float(a)) + float(b)) / fmt.search.resolution
        rounded = 1e-6 * float(weight[place].double().norm())
        assert mine**0.5 <= old**0.5 + blind + rounded


@schemes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_loops_for_cpus_choose_what_the_reference_chooses(scheme: Scheme, dtype: torch.dtype) -> None:
    """Of all sizes, short last groups, and numbers that divide only the long way; in one piece and by two threads."""
    pytest.importorskip("numba", reason="the numba kernels need the optional extra 'cpu'")
    numba = choose(torch.device("cpu"), "numba")
    sources = [make_values(kind, (9, 1300), dtype, 5) for kind in VALUES]
    sources += [make_values("normal", shape, dtype, 6) * spread for shape, spread in SIZES.items()]
    for source in sources:
        ours, wanted = (Parts.of(tuple(source.shape), scheme.format) for _ in range(2))
        numba.quantize_into(source, ours, scheme.format)
        TORCH.quantize_into(source, wanted, scheme.format)
        for part, other in zip(ours, wanted, strict=True):
            assert torch.equal(part.view(torch.uint8), other.view(torch.uint8)), (scheme, dtype, source.shape)


SIZES = {(33, 1): 1.0, (7, 5): 1e-3, (19, 130): 30.0, (3, 20000): 0.02, (2, 40, 96): 1.0, (700, 512): 0.02}


@pytest.mark.parametrize("name", ["int8_per_channel", "int8_per_channel:searched", "fp8_per_channel:searched"])
def test_loops_take_the_reference_s_side_of_every_border(name: str) -> None:
    """Rows of two elements in bfloat16: each significand as the larger one, with every smaller number that a code or an
    error can depend on. The loops round in fewer steps than the reference, which this alone could show."""
    pytest.importorskip("numba", reason="the numba kernels need the optional extra 'cpu'")
    numba, fmt = choose(torch.device("cpu"), "numba"), as_scheme(name).format
    largest = torch.arange(128, 256) / 128.0
    smaller = (torch.arange(128, 256) / 128.0)[:, None] * 2.0 ** torch.arange(-19, 1)
    rows = torch.cartesian_prod(largest, smaller.flatten())
    rows[::3, 1] *= -1
    source = rows[rows[:, 1].abs() <= rows[:, 0]].bfloat16()
    ours, wanted = (Parts.of(tuple(source.shape), fmt) for _ in range(2))
    numba.quantize_into(source, ours, fmt)
    TORCH.quantize_into(source, wanted, fmt)
    for part, other in zip(ours, wanted, strict=True):
        differ = (part.view(torch.uint8) != other.view(torch.uint8)).view(len(source), -1).any(1)
        assert not differ.any(), source[differ][:5]


@schemes
def test_no_order_of_columns_changes_a_choice(scheme: Scheme) -> None:
    """Sums of integers have none."""
    fmt = scheme.format
    width = 128 if fmt.granularity in ("channel", "block") else fmt.block[1]
    weight = torch.randn(128, 4 * width).bfloat16()
    order = torch.cat([torch.randperm(width) + i * width for i in range(4)])
    assert torch.equal(
        quantize(weight, scheme).scale.view(torch.uint8), quantize(weight[:, order], scheme).scale.view(torch.uint8)
    )


@schemes
def test_what_is_let_through_counts_for_nothing(scheme: Scheme) -> None:
    """NaN and infinity among the elements change no choice, but for a group that they alone would be."""
    weight = torch.randn(6, 256).bfloat16()
    bad = weight.clone()
    bad[:, 3], bad[:, 150] = float("nan"), float("-inf")
    weight[:, 3] = weight[:, 150] = 0.0
    ours, wanted = quantize(bad, scheme, on_nonfinite="keep"), quantize(weight, scheme)
    assert torch.equal(ours.scale.view(torch.uint8), wanted.scale.view(torch.uint8))


@schemes
def test_a_name_is_read_back(scheme: Scheme, tmp_path: Path) -> None:
    """By everything that takes one: strings, configurations, pickles and files of PyTorch."""
    assert scheme.name == scheme.format.name + ":searched"
    assert as_scheme(scheme.name) == scheme == scheme.searched()
    assert scheme.plain() == SCHEMES[scheme.format.name]
    assert scheme.name in str(scheme.weight_only())
    assert read_config({"linear": scheme.name}).linear == scheme
    config = QTensorConfig.from_dict(QTensorConfig(scheme).to_dict())
    assert config.selection().config.linear == scheme
    weight = quantize(torch.randn(8, 32).bfloat16(), scheme)
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=True), pickle.loads(pickle.dumps(weight))):
        assert twin.scheme == scheme
        assert torch.equal(twin.qdata.view(torch.uint8), weight.qdata.view(torch.uint8))


def test_aliases_and_vllms_names_are_searched_too() -> None:
    assert as_scheme("fp8:searched") == SCHEMES["fp8_per_channel"].searched()
    assert read_config({"linear": "fp8_per_block_static:searched"}).linear == SCHEMES["fp8_per_block"].searched()


def test_one_scale_for_a_matrix_is_not_searched() -> None:
    for attempt in (SCHEMES["fp8_per_tensor"].searched, lambda: as_scheme("fp8_per_tensor:searched")):
        with pytest.raises(ConfigError, match="fp8_per_tensor cannot be searched"):
            attempt()
    with pytest.raises(ConfigError, match="linear: fp8_per_tensor cannot be searched"):
        read_config({"linear": "fp8_per_tensor:searched"})
    with pytest.raises(ConfigError, match="unknown scheme 'nvfp4:serched'"):
        as_scheme("nvfp4:serched")


class Net(nn.Module):
    """Layers with names that are not tied together by servers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(a, b, bias=False, dtype=torch.bfloat16) for a, b in ((128, 256), (256, 128)))


@schemes
def test_a_checkpoint_is_read_as_any_other_and_remembers(scheme: Scheme, tmp_path: Path) -> None:
    """The layout is the plain scheme's; that it was searched stands beside it, and a reload searches again."""
    torch.manual_seed(0)
    state = Net().state_dict()
    with online_quant(scheme):
        model = Net()
        model.load_state_dict(state)
    qtensor.save_checkpoint(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["searched"] == ["group_0"]
    del config["searched"]
    with online_quant(scheme.plain()):
        plain = Net()
        plain.load_state_dict(state)
    qtensor.save_checkpoint(plain, tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"] == config
    again = Net()
    load_checkpoint(again, tmp_path / "saved")
    for name, weight in state.items():
        got = again.get_parameter(name)
        assert got.scheme == scheme
        for part, wanted in zip(got.parts(), quantize(weight, scheme).parts(), strict=True):
            assert torch.equal(part.view(torch.uint8), wanted.view(torch.uint8))
    new = {name: weight * 3 + 0.01 for name, weight in state.items()}
    with online_reload(again):
        again.load_state_dict(new)
    for name, weight in new.items():
        for part, wanted in zip(again.get_parameter(name).parts(), quantize(weight, scheme).parts(), strict=True):
            assert torch.equal(part.view(torch.uint8), wanted.view(torch.uint8))


def test_the_command_line_searches_and_verifies(tmp_path: Path) -> None:
    """File to file: the bytes of `quantize`, in a folder that is whole."""
    torch.manual_seed(0)
    source, made = tmp_path / "source", tmp_path / "made"
    source.mkdir()
    weight = torch.randn(64, 256).bfloat16()
    save_file({"model.layers.0.mlp.down_proj.weight": weight}, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text("{}")
    assert main(["quantize", str(source), str(made), "--scheme", "nvfp4:searched"]) == 0
    held = load_file(next(made.glob("*.safetensors")))
    wanted = quantize(weight, "nvfp4:searched")
    prefix = "model.layers.0.mlp.down_proj."
    assert torch.equal(held[f"{prefix}weight_packed"], wanted.qdata)
    assert torch.equal(held[f"{prefix}weight_scale"].view(torch.uint8), wanted.scale.view(torch.uint8))
    assert main(["verify", str(made)]) == 0
    with pytest.raises(SystemExit):
        main(["quantize", str(source), str(tmp_path / "other"), "--scheme", "fp8_per_tensor:searched"])


@schemes
def test_bytes_of_the_same_format_are_not_searched_again(scheme: Scheme) -> None:
    """A weight copied from a quantized one has its bytes, whichever of the two was searched."""
    weight = torch.randn(256, 128).bfloat16()
    for source, target in ((scheme, scheme.plain()), (scheme.plain(), scheme)):
        given, got = quantize(weight, source), quantize(torch.zeros_like(weight), target)
        got.copy_(given)
        assert got.scheme == target
        for part, wanted in zip(got.parts(), given.parts(), strict=True):
            assert torch.equal(part.view(torch.uint8), wanted.view(torch.uint8))


def test_a_scale_that_spans_ranks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of which each rank has some columns. The global scale of nvfp4 is the plain one, and may be agreed on."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: 0)
    group = object()
    for name in ("fp8_per_channel", "int8_per_channel"):
        fmt = SCHEMES[name].searched().format
        with pytest.raises(QTensorError, match=f"layer.weight: a searched {name} scale is chosen by the error of all"):
            sharing_group("layer.weight", [(1, group)], (8, 32), fmt)  # type: ignore[list-item]
        assert sharing_group("layer.weight", [(0, group)], (8, 32), fmt) is None  # type: ignore[list-item]
    nvfp4 = SCHEMES["nvfp4"].searched().format
    assert sharing_group("layer.weight", [(1, group)], (8, 32), nvfp4) is group  # type: ignore[list-item]


def test_each_format_names_its_candidates() -> None:
    """The plain scale first, and sums that stay below 2^31 for 128 elements, as `Search` promises."""
    largest = {"e4m3": 448.0, "e2m1": 6.0, "int8": 127.0, "int4": 7.0}
    for name, search in SEARCHES.items():
        fmt = FORMATS[name]
        assert search.candidates[0] == (1.0 if fmt.has_float_scale else 0)
        most = max(search.limit - largest[fmt.element], 16.0 if fmt.element == "e4m3" else 1.0) * search.resolution
        count = 128 if fmt.element in ("e4m3", "int8", "int4") else 32
        assert count * most**2 < 2**31
