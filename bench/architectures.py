"""Every architecture of the installed transformers, built inside online_quant and compared with a plain one.

    python bench/architectures.py [--only NAME ...] [--part I/N --out FILE]
    python bench/architectures.py --join FILE ...

In one go, or in N parts that are joined; parts of different code do not join.

Each configuration class is shrunk until its model has at most 20 million parameters. A plain model is built, its state
dict loaded into one that is built inside the block (with its constructors reading and transforming their own weights as
they like), and every parameter compared: `quantize(plain weight)`, byte for byte, or the plain value. A model that will
not shrink is built on the meta device alone, and its parameters' names, shapes and dtypes are compared.

What transformers itself cannot build from a configuration without more (a backbone to name, a timm model) is counted
as such, with its reason.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import logging
import sysconfig
import time
import warnings
from pathlib import Path
from typing import Any

import machine
import torch

import qtensor
from qtensor import QTensor, fp8, online_quant, quantize
from qtensor.tensor.qtensor import digest_of

MOST = 20_000_000
SMALLER: list[tuple[str, int]] = [
    (r"vocab_size", 128),
    (r"(hidden_size|d_model|embed_dim|dim|n_embd|projection_dim|hidden_dim|embedding_size)", 64),
    (r"(intermediate_size|d_ff|ffn_dim|encoder_ffn_dim|decoder_ffn_dim|moe_intermediate_size)", 96),
    (r"(num_hidden_layers|num_layers|n_layer|n_layers|encoder_layers|decoder_layers|num_decoder_layers)", 2),
    (r"(num_attention_heads|num_heads|n_head|n_heads|encoder_attention_heads|decoder_attention_heads)", 4),
    (r"(num_key_value_heads)", 2),
    (r"(num_experts|num_local_experts|n_routed_experts)", 4),
    (r"(max_position_embeddings|n_positions)", 128),
]

ARGUMENTS: dict[str, dict[str, Any]] = {
    # What these do not say themselves.
    **{key: {"prediction_length": 8} for key in ("autoformer", "informer", "time_series_transformer")},
    **{key: {"head_dim": 16} for key in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral")},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "nemotron": {"num_key_value_heads": 4},
}


def shrink(config: Any, steps: int, seen: set[int] | None = None) -> None:
    """Make the first `steps` kinds of size small, in the configuration and in those within it."""
    seen = set() if seen is None else seen
    if id(config) in seen:
        return
    seen.add(id(config))
    names = {name: size for pattern, size in SMALLER[:steps] for name in pattern.strip("()").split("|")}
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value, steps, seen)
        elif name in names and isinstance(value, int) and not isinstance(value, bool) and value > names[name]:
            with contextlib.suppress(Exception):
                setattr(config, name, names[name])


def size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def build(model_class: Any, config: Any, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device(device), contextlib.redirect_stdout(io.StringIO()):
        return model_class(config).eval()


def smallest(config_class: Any, model_class: Any) -> tuple[Any, bool]:
    """A configuration that builds, and whether it is small enough to be built for real. Raises if none builds."""
    plain, first = None, None
    # From the smallest: what a class insists on (sizes that have to agree) excludes some.
    for steps in (len(SMALLER), 4, 2, 1, 0):
        try:
            config = config_class(**ARGUMENTS.get(config_class.model_type, {}))
            shrink(config, steps)
            if size(build(model_class, config, "meta")) <= MOST:
                build(model_class, config, "cpu")
                return config, True
            plain = plain or config
        except Exception as error:
            first = error
    if plain is None:
        assert first is not None
        raise first
    return plain, False


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def compare(config: Any, model_class: Any) -> str:
    """Built and loaded inside the block: what is different from plain, or nothing."""
    plain = build(model_class, config, "cpu")
    for param in plain.parameters():
        param.data = torch.where(param.data.isfinite(), param.data, 0) if param.is_floating_point() else param.data
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    with online_quant(fp8):
        model = build(model_class, config, "cpu")
        model.load_state_dict(state)
    want = dict(plain.named_parameters(remove_duplicate=False))
    got = dict(model.named_parameters(remove_duplicate=False))
    if want.keys() != got.keys():
        return f"other parameters: {sorted(want.keys() ^ got.keys())[:4]}"
    for name, param in got.items():
        ours, theirs = param.detach(), want[name].detach()
        if isinstance(ours, QTensor):
            pairs = zip(ours.parts(), quantize(theirs, fp8).parts(), strict=True)
            if not all(same(a.contiguous(), b.contiguous()) for a, b in pairs):
                return f"{name}: other bytes"
        elif not same(ours.contiguous(), theirs.contiguous()):
            return f"{name}: other values"
    return ""


def compare_on_meta(config: Any, model_class: Any) -> str:
    plain = build(model_class, config, "meta")
    session = online_quant(fp8)
    session.__enter__()
    try:
        model = build(model_class, config, "meta")
        want = {n: (tuple(p.shape), p.dtype) for n, p in plain.named_parameters(remove_duplicate=False)}
        got = {n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters(remove_duplicate=False)}
    finally:
        session.abort()
    return "" if want == got else f"other parameters: {sorted(set(want.items()) ^ set(got.items()))[:4]}"


def main() -> None:
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th architecture from the i-th")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--join", nargs="*", type=Path, help="what the parts wrote")
    args = parser.parse_args()
    code = digest_of(Path(qtensor.__file__).parent, Path(qtensor.kernels.__file__).parent)
    if args.join:
        parts = [json.loads(path.read_text()) for path in args.join]
        assert {part["code"] for part in parts} == {code}, "the parts are of other code than this"
        finish(sorted((row for part in parts for row in part["rows"]), key=lambda row: row["architecture"]))
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    results: list[dict[str, Any]] = []
    part, parts = map(int, args.part.split("/"))
    for kind in sorted(CONFIG_MAPPING.keys())[part::parts]:
        if args.only and kind not in args.only:
            continue
        began = time.perf_counter()
        row: dict[str, Any] = {"architecture": kind}
        try:
            config_class = CONFIG_MAPPING[kind]
            model_class = MODEL_MAPPING.get(config_class, None)
            if model_class is None:
                row |= {"result": "no model", "why": "AutoModel knows no class for it"}
                results.append(row)
                continue
            model_class = model_class[0] if isinstance(model_class, tuple) else model_class
            config, real = smallest(config_class, model_class)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            why = f"{type(error).__name__}: {error}".replace(sysconfig.get_path("purelib"), "").splitlines()[0]
            row |= {"result": "not built", "why": why[:160]}
        else:
            try:
                difference = (compare if real else compare_on_meta)(config, model_class)
                row["result"] = "different" if difference else "loaded" if real else "on meta"
                row["why"] = difference
            except Exception as error:
                row |= {"result": "failed", "why": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        row["seconds"] = round(time.perf_counter() - began, 1)
        results.append(row)
        if row["result"] in ("failed", "different"):
            print(kind, row["result"], row["why"], flush=True)
    if args.out:
        args.out.write_text(json.dumps({"code": code, "rows": results}, indent=1) + "\n")
        print(f"part {args.part}: {dict(collections.Counter(row['result'] for row in results))}")
    else:
        finish(results)


def finish(rows: list[dict[str, Any]]) -> None:
    counts = collections.Counter(row["result"] for row in rows)
    facts = machine.facts("transformers", "torch", "numba")
    print(f"{facts['versions']}: {len(rows)} architectures; {dict(counts)}")
    machine.save("architectures", {**facts, "counts": dict(counts), "architectures": rows})


if __name__ == "__main__":
    main()
