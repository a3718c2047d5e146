"""The rule of plans: what fits is chosen, what does not is refused with the size that would."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtensor import ConfigError, Plan, plan, quantize
from qtensor.kernels.audit import sqnr_db
from qtensor.schemes.plan import Tensor
from qtensor.schemes.planning import (
    EDGE,
    EXPECTED_SQNR,
    SENSITIVITY,
    _error,
    bytes_of,
    kind_of,
    make_plan,
    read_size,
)
from qtensor.schemes.scheme import SCHEMES, Scheme, as_scheme
from support.planned_models import Model, in_memory


@pytest.mark.parametrize("name", EXPECTED_SQNR)
def test_the_expected_sqnr_is_that_of_normally_distributed_weights(name: str) -> None:
    x = torch.randn(512, 2048, generator=torch.Generator().manual_seed(1)).bfloat16()
    error = x.double() - quantize(x, as_scheme(name)).dequantize(torch.float32).double()
    found = sqnr_db(float(x.double().square().sum()), float(error.square().sum()))
    close = 0.4 if name.startswith("int8") else 0.15  # The longer a row, the larger its largest.
    assert found == pytest.approx(EXPECTED_SQNR[name], abs=close)


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.embed_tokens.weight", "embedding", None),
        ("transformer.wte.weight", "embedding", None),
        ("bert.embeddings.word_embeddings.weight", "embedding", None),
        ("lm_head.weight", "head", None),
        ("model.layers.3.self_attn.q_proj.weight", "attention in", 3),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", "attention in", 3),
        ("model.layers.11.self_attn.qkv_proj.weight", "attention in", 11),
        ("transformer.h.0.attn.c_attn.weight", "attention in", 0),
        ("bert.encoder.layer.2.attention.self.query.weight", "attention in", 2),
        ("gpt_neox.layers.1.attention.query_key_value.weight", "attention in", 1),
        ("model.layers.3.self_attn.o_proj.weight", "attention out", 3),
        ("transformer.h.0.attn.c_proj.weight", "attention out", 0),
        ("bert.encoder.layer.2.attention.output.dense.weight", "attention out", 2),
        ("model.layers.3.mlp.gate_proj.weight", "MLP in", 3),
        ("transformer.h.0.mlp.c_fc.weight", "MLP in", 0),
        ("bert.encoder.layer.2.intermediate.dense.weight", "MLP in", 2),
        ("model.layers.3.mlp.down_proj.weight", "MLP out", 3),
        ("transformer.h.0.mlp.c_proj.weight", "MLP out", 0),
        ("bert.encoder.layer.2.output.dense.weight", "MLP out", 2),
        ("model.layers.3.mlp.experts.7.gate_proj.weight", "experts", 3),
        ("model.layers.3.mlp.experts.down_proj", "experts", 3),
        ("model.layers.3.block_sparse_moe.experts.0.w1.weight", "experts", 3),
        ("model.layers.3.mlp.shared_expert.up_proj.weight", "MLP in", 3),
        ("score.weight", "other", None),
    ],
)
def test_kinds_are_told_by_names(name: str, kind: str, layer: int | None) -> None:
    assert kind_of(name) == (kind, layer)


NAMES = ["embed_tokens.weight", "lm_head.weight"] + [
    f"layers.{i}.{rest}.weight"
    for i in range(3)
    for rest in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]
tensors = st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True).flatmap(
    lambda names: st.tuples(
        *(
            st.builds(lambda n, k, name=name: Tensor((name,), (n, 128 * k), 2), st.integers(1, 99), st.integers(1, 9))
            for name in names
        )
    )
)


def loss(found: Plan) -> float:
    """What the rule says a plan costs."""
    last = max((w.layer for w in found.weights if w.layer is not None), default=0)
    groups = {}
    for w in found.weights:
        edge = w.layer is not None and min(w.layer, last - w.layer) < (last + 1) / 8
        key = f"{w.kind} {w.layer}"
        groups[key] = SENSITIVITY[w.kind] * (EDGE if edge else 1.0) * _error(w.scheme)
    return sum(groups.values())


def all_plans(found: Plan, schemes: list[Scheme]) -> Any:
    """Every choice there is: (bytes, loss)."""
    keys = list(dict.fromkeys((w.kind, w.layer) for w in found.weights))
    for chosen in itertools.product([None, *schemes], repeat=len(keys)):
        of = dict(zip(keys, chosen, strict=True))
        weights = [
            type(w)(w.tensor, s := of[w.kind, w.layer], bytes_of(w.tensor, s), w.kind, w.layer) for w in found.weights
        ]
        one = Plan(0, 0, tuple(weights), {})
        yield one.bytes, loss(one)


@given(tensors=tensors, part=st.floats(0, 1.1))
def test_a_plan_fits_and_no_other_choice_is_much_better(tensors: tuple[Tensor, ...], part: float) -> None:
    schemes = [SCHEMES["nvfp4"], SCHEMES["fp8"]]
    full = sum(bytes_of(t, None) for t in tensors)
    least = sum(min(bytes_of(t, s) for s in (None, *schemes)) for t in tensors)
    if int(part * full) < least:
        with pytest.raises(ConfigError, match=rf"takes {re.escape(f'{least / 1e6:.2f}')} MB at least"):
            make_plan(tensors, int(part * full), schemes=schemes)
        return
    found = make_plan(tensors, int(part * full), schemes=schemes)
    assert found.bytes <= int(part * full)
    assert make_plan(tensors, int(part * full), schemes=schemes) == found
    groups: dict[Any, list[Any]] = {}
    for weight in found.weights:
        groups.setdefault((weight.kind, weight.layer), []).append(weight)
    assert all(len({w.scheme for w in group}) == 1 for group in groups.values())
    # Greedy steps along hulls: as good as any choice that leaves room for the largest step there is.
    step = max(sum(bytes_of(w.tensor, None) for w in group) for group in groups.values())
    rivals = [cost for size, cost in all_plans(found, schemes) if size <= part * full - step]
    assert loss(found) <= min(rivals, default=math.inf) + 1e-12


def test_what_fits_as_it_is_stays() -> None:
    model = Model()
    found = plan(model, in_memory(model))
    assert found.targets == {}
    assert found.bytes == in_memory(model)


def test_the_smallest_size_that_is_named_fits() -> None:
    model = Model()
    with pytest.raises(ConfigError, match="does not fit") as refused:
        plan(model, "1KB", schemes=["mxfp4"])
    least = float(re.search(r"takes ([\d.]+) MB at least", str(refused.value))[1])
    assert plan(model, f"{least + 0.01}MB", schemes=["mxfp4"]).bytes <= (least + 0.01) * 1e6
    with pytest.raises(ConfigError, match="does not fit"):
        plan(model, f"{least + 0.01}MB", reserve="20KB", schemes=["mxfp4"])


def test_tied_weights_count_once_and_get_one_scheme() -> None:
    model = Model()
    model.lm_head.weight = model.embed_tokens.weight
    found = plan(model, in_memory(model) // 2)
    assert sum(w.bytes for w in found.weights) == found.bytes <= in_memory(model) // 2
    assert found.targets.get("embed_tokens") == found.targets.get("lm_head")


def test_weights_of_short_groups_are_offered_no_scheme_that_some_reader_refuses() -> None:
    odd = Tensor(("layers.0.mlp.up_proj.weight",), (128, 200), 2)
    found = make_plan([odd], bytes_of(odd, SCHEMES["fp8"]), schemes=["mxfp4", "fp8"])
    assert found.weights[0].scheme == SCHEMES["fp8"]


def test_for_vllm_experts_are_one_layer_and_embeddings_stay() -> None:
    names = ["model.embed_tokens", "lm_head", "model.layers.0.mlp.gate"]
    names += [f"model.layers.0.mlp.experts.{e}.{p}_proj" for e in range(2) for p in ("gate", "up", "down")]
    found = make_plan([Tensor((f"{n}.weight",), (128, 128), 2) for n in names], "150KB", engine="vllm")
    assert found.targets == {"model.layers.0.mlp.experts": SCHEMES["nvfp4"]}
    assert found.lm_head
    assert {w.name: w.scheme for w in found.weights}["lm_head.weight"] == SCHEMES["fp8"]
    assert {w.scheme for w in found.weights if w.name.startswith(("model.embed", "model.layers.0.mlp.gate"))} == {None}


@pytest.mark.parametrize(("text", "size"), [("10GB", 10**10), ("1.5GiB", 3 << 29), ("7", 7), ("2 kB", None), (5, 5)])
def test_sizes(text: Any, size: int | None) -> None:
    if size is None:
        with pytest.raises(ConfigError, match="10GB"):
            read_size("fit", text)
    else:
        assert read_size("fit", text) == size
