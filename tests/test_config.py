"""A scheme per layer, in every way it can be written down, and what is refused."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

from qtensor import QTensor, QTensorError, fp8, fp8_per_block, int8_per_channel, mxfp4, mxfp8, online_quant
from support.helpers import Experts, assert_no_hooks, assert_oracle


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(64, 64, dtype=torch.bfloat16) for name in ("q_proj", "o_proj")})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(64, 96, dtype=torch.bfloat16)})
        self.mlp["experts"] = Experts((2, 32, 64), torch.bfloat16)
        nn.init.normal_(self.mlp["experts"].w)
        self.gate = nn.Linear(64, 2, dtype=torch.bfloat16)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})


def schemes(spec: object, **options: object) -> dict[str, object]:
    """The scheme each weight got, by its name in the first layer; both layers load and equal the oracle."""
    full = {name: value.detach().clone() for name, value in model().state_dict().items()}
    loaded = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with online_quant(spec, loaded, **options):
            loaded.load_state_dict(full)
    found = {}
    for name, param in loaded.named_parameters():
        if isinstance(param, QTensor):
            assert_oracle(param, full[name], param.scheme)
            if name.startswith("layers.0."):
                found[name.removeprefix("layers.0.").removesuffix(".weight")] = param.scheme
    return found


ATTENTION = ("self_attn.q_proj", "self_attn.o_proj")
PER_LAYER = {**dict.fromkeys(ATTENTION, fp8), "mlp.up_proj": mxfp4, "mlp.experts.w": mxfp4}


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ({"re:.*self_attn.*": fp8, "*.mlp.*": mxfp4}, PER_LAYER),
        ({"re:.*self_attn.*": "fp8_per_channel", "*.mlp.*": "mxfp4"}, PER_LAYER),
        ({"targets": {"re:.*self_attn.*": "fp8_per_channel", "*.mlp.*": {"weight": "mxfp4"}}}, PER_LAYER),
        ({"linear": "fp8_per_block"}, dict.fromkeys((*ATTENTION, "mlp.up_proj"), fp8_per_block)),
        (
            {"linear": {"weight": "mxfp8"}, "moe": "int8_per_channel_weight_only", "ignore": ["*.q_proj"]},
            {"self_attn.o_proj": mxfp8, "mlp.up_proj": mxfp8, "mlp.experts.w": int8_per_channel},
        ),
        ({"moe": "mxfp8", "linear": None, "quant_method": "online"}, {"mlp.experts.w": mxfp8}),
        ("mxfp8", dict.fromkeys((*ATTENTION, "mlp.up_proj", "mlp.experts.w"), mxfp8)),
    ],
    ids=str,
)
def test_every_form_gives_each_weight_its_scheme(spec: object, want: dict) -> None:
    assert schemes(spec) == want
    if isinstance(spec, dict) and all(not hasattr(value, "format") for value in spec.values()):
        assert schemes(json.dumps(spec)) == want


def test_ignore_goes_before_targets() -> None:
    assert schemes({"*.mlp.*": mxfp4}, ignore=["*.experts*"]) == {"mlp.up_proj": mxfp4}
    assert schemes(fp8, targets={"*.up_proj": "mxfp8"}) == {"mlp.up_proj": mxfp8}


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ({"*": "fp7"}, {}, r"targets\['\*'\]='fp7' is no scheme; use one of .*mxfp4"),
        ({"linear": "fp8", "moo": "fp8"}, {}, "unknown option 'moo'; the options are linear, moe, ignore, targets"),
        ({"linear": "fp8", "targets": {"*": "fp8"}}, {}, "cannot be given with it"),
        ({"linear": "fp8", "ignore": 3}, {}, "ignore is a list of patterns, not 3"),
        ({"linear": {"weight": "fp8", "activation": "mxfp8"}}, {}, "leave out `activation`"),
        ({"targets": ["*"]}, {}, "targets maps patterns to schemes"),
        ({"*": None}, {}, "names no scheme; put the pattern in `ignore`"),
        ({"re:(": "fp8"}, {}, "not a regular expression"),
        ({"*": "fp8"}, {"targets": ["*"]}, "leave out `targets`"),
        ('{"linear": ', {}, "not JSON"),
    ],
    ids=str,
)
def test_bad_configs_are_refused_before_anything_is_armed(spec: object, options: dict, words: str) -> None:
    with pytest.raises(QTensorError, match=words):
        online_quant(spec, nn.Linear(4, 4), **options)
    assert_no_hooks()


def test_the_first_pattern_that_matches_decides() -> None:
    assert schemes({"re:.*up_proj": "fp8", "*.mlp.*": mxfp4}) == {"mlp.up_proj": fp8, "mlp.experts.w": mxfp4}
    assert schemes({"*.mlp.*": mxfp4, "re:.*up_proj": "fp8"}) == {"mlp.up_proj": mxfp4, "mlp.experts.w": mxfp4}
