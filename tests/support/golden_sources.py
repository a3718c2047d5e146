"""Makes tests/golden/sources.safetensors: parts of random codes, decoded by the libraries that own the formats.

    python tests/support/golden_sources.py    # needs compressed-tensors, gptqmodel, autoawq, bitsandbytes, gguf

Their versions go into the file. `tests/test_sources_golden.py` compares with it, without them.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FILE = Path(__file__).parents[1] / "golden" / "sources.safetensors"
DECODED = "decoded"
"""What the tensor that the owner made of the others is called."""
ROWS, COLS = 32, 256


def cases() -> dict[str, tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]]:
    """By name: the parts, the matrix that their owner makes of them, and what config.json would say."""
    import bitsandbytes.functional as bnb
    import gguf
    from awq.utils.packing_utils import dequantize_gemm
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    from support.sources import FORMS, HALVES, gguf_rows, order, words

    found = {}
    g = torch.Generator().manual_seed(0)
    for bits in (3, 4, 8):
        args = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=32)
        half = 1 << bits - 1
        state = {
            "weight": torch.randn(ROWS, COLS, generator=g).bfloat16() * half * 0.01,
            "weight_scale": (torch.rand(ROWS, COLS // 32, generator=g) * 0.02 + 1e-3).bfloat16(),
            "weight_zero_point": torch.randint(-half, half, (ROWS, COLS // 32), generator=g).to(torch.int8),
        }
        owner, scheme = (
            BaseCompressor.get_value_from_registry("pack-quantized"),
            QuantizationScheme(targets=["Linear"], weights=args),
        )
        parts = owner.compress(state, scheme)
        decoded = owner.decompress(dict(parts), scheme)["weight"]
        config = {"config_groups": {"g": {"weights": {"type": "int", "num_bits": bits, "group_size": 32}}}}
        found[f"int{bits}"] = ({k.replace("weight", "*"): t for k, t in parts.items()}, decoded, config)
    for bits in (2, 3, 4, 8):
        for first in (True, False):
            module = TorchLinear(bits, 32, True, True, COLS, ROWS, False, torch.int32, register_buffers=True)
            parts = {
                "qweight": words(tuple(module.qweight.shape), g),
                "qzeros": words(tuple(module.qzeros.shape), g),
                "scales": (torch.rand(module.scales.shape, generator=g) * 0.02 + 1e-3).half(),
                "g_idx": order(COLS, COLS // 32, g),
            }
            for name, tensor in parts.items():
                getattr(module, name).data = tensor.clone()
            if first:
                convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
            module.post_init()
            config = {"bits": bits, "checkpoint_format": "gptq" if first else "gptq_v2"}
            found[f"gptq{bits}{'' if first else ' v2'}"] = (parts, module.dequantize_weight().t(), config)
    parts = FORMS["AWQ"].parts(ROWS, COLS)
    parts["scales"] = parts["scales"].half()
    found["awq"] = (parts, dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, 32).t(), {})
    for kind in ("nf4", "fp4"):
        values, state = bnb.quantize_4bit(
            torch.randn(ROWS, COLS, generator=g).bfloat16(), quant_type=kind, compress_statistics=kind == "nf4"
        )
        parts = {"*": values, **{f"*.{k}": t for k, t in state.as_dict(packed=True).items()}}
        found[kind] = (parts, bnb.dequantize_4bit(values, state), {})
    values, absmax, _ = bnb.int8_vectorwise_quant(torch.randn(ROWS, COLS, generator=g).half())
    found["bitsandbytes int8"] = ({"*": values, "SCB": absmax}, bnb.int8_vectorwise_dequant(values, absmax), {})
    for kind in HALVES:
        rows = gguf_rows(kind, 4, COLS, g)
        decoded = torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind]))
        found[kind] = ({f"*.{kind}": rows}, decoded, {})
    return found


if __name__ == "__main__":
    tensors, configs = {}, {}
    for case, (parts, decoded, config) in cases().items():
        configs[case] = config
        for name, tensor in {**parts, DECODED: decoded}.items():
            tensors[f"{case}/{name}"] = tensor.detach().contiguous().clone()
    libraries = ("compressed-tensors", "autoawq", "bitsandbytes", "gguf")
    made_by = {name: version(name) for name in libraries} | {"gptqmodel": "7.7.0"}
    save_file(tensors, FILE, {"configs": json.dumps(configs), "made_by": json.dumps(made_by)})
