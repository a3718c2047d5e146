"""One root for all weights: names and bytes, and nothing else, decide about it."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qtensor import ConfigError, fp8, nvfp4, quantize, weight_checksums, weight_root


def by_rfc_6962(leaves: list[bytes]) -> bytes:
    """The root as the RFC defines it: MTH(D[n]) of §2.1."""
    if len(leaves) < 2:
        return leaves[0] if leaves else hashlib.sha256(b"").digest()
    k = max(2**i for i in range(len(leaves)) if 2**i < len(leaves))
    return hashlib.sha256(b"\1" + by_rfc_6962(leaves[:k]) + by_rfc_6962(leaves[k:])).digest()


names = st.dictionaries(st.text(max_size=6), st.binary(min_size=32, max_size=32), max_size=20)


@given(sums=names, order=st.randoms(), data=st.data())
def test_the_root_is_that_of_the_sorted_leaves(sums, order, data):
    leaves = [
        hashlib.sha256(b"\0" + name.encode() + b"\0" + sums[name]).digest() for name in sorted(sums, key=str.encode)
    ]
    shuffled = list(sums.items())
    order.shuffle(shuffled)
    given_sums = {name: digest.hex() for name, digest in shuffled}
    root = weight_root(given_sums)
    assert root == by_rfc_6962(leaves).hex()
    if sums:
        name = data.draw(st.sampled_from(list(sums)))
        other = {**given_sums, name: hashlib.sha256(sums[name]).hexdigest()}
        assert weight_root(other) != root
        assert weight_root({n: v for n, v in given_sums.items() if n != name}) != root
        assert weight_root({(n + "'" if n == name else n): v for n, v in given_sums.items()}) != root


def test_models_tensors_and_checksums_have_one_root():
    model = nn.ModuleDict({"a": nn.Linear(64, 2048, bias=False), "b": nn.Linear(2048, 600)})
    weights = {"a.weight": quantize(model["a"].weight.data, fp8), "b.weight": quantize(model["b"].weight.data, nvfp4)}
    for name, weight in weights.items():
        model[name[0]].weight = nn.Parameter(weight, requires_grad=False)
    whole = {**weights, "b.bias": model["b"].bias}
    sums = weight_checksums(whole)
    assert list(sums) == list(whole)
    assert sums == {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in whole.items()}
    assert weight_root(model) == weight_root(whole) == weight_root(sums)
    assert weight_root({**whole, "b.bias": sums["b.bias"]}) == weight_root(model)
    weights["a.weight"].qdata.view(torch.uint8)[5, 7] ^= 1
    assert weight_root(model) != weight_root(sums)


def _bytes(tensor: torch.Tensor) -> bytes:
    parts = tensor.parts() if hasattr(tensor, "parts") else (tensor.detach(),)
    return b"".join(part.view(torch.uint8).numpy().tobytes() for part in parts)


@pytest.mark.parametrize("wrong", ["", "00", "zz" * 32, "0" * 66])
def test_what_is_no_checksum_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"fc\.weight has no sha256"):
        weight_root({"fc.weight": wrong})
