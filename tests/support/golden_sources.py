"""Makes tests/golden/sources.safetensors: parts of random codes, decoded by the libraries that own the formats.

    python tests/support/golden_sources.py [CASE ...]    # one or more cases, by the beginnings of their names; or all

It needs compressed-tensors, gptqmodel, autoawq, bitsandbytes, gguf, nvidia-modelopt and torchao (`make test-libraries`
has them), whose versions go into the file. Cases that are not made anew stay as they are.
`tests/test_sources_golden.py` compares with it, without them.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
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
    found |= by_modelopt(g) | by_torchao(g)
    return found


def by_modelopt(g: torch.Generator) -> dict[str, tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]]:
    """Its nvfp4 is decoded by its own tensor, whose table has 0 where the format has -0; what its int4 packs is what it
    has in the model."""
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    from support.sources import e4m3, packed

    weight, scales = torch.randn(ROWS, COLS, generator=g), torch.rand(ROWS, COLS // 128, generator=g) * 0.3 + 0.05
    wide = scales.repeat_interleave(128, 1)
    parts = {"*": pack_int4_in_uint8(weight, scales, 128), "*_scale": scales}
    kept = ((weight / wide).round().clamp(-8, 7) * wide).bfloat16()
    found = {"ModelOpt int4": (parts, kept, {"quant_method": "modelopt"})}
    codes, fine = packed((ROWS, COLS // 2), g), e4m3((ROWS, COLS // 16), g).abs()
    codes = torch.where(codes & 0xF == 8, codes & 0xF0, codes)
    codes = torch.where(codes >> 4 == 8, codes & 0xF, codes)
    whole = torch.rand((), generator=g) * 0.01
    held = NVFP4QTensor(torch.Size((ROWS, COLS)), torch.bfloat16, codes)
    decoded = held.dequantize(torch.bfloat16, scale=fine, double_scale=whole, block_sizes={-1: 16})
    parts = {"*": codes, "*_scale": fine, "*_scale_2": whole}
    return found | {"ModelOpt nvfp4": (parts, decoded, {"quant_method": "modelopt"})}


def by_torchao(g: torch.Generator) -> dict[str, tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]]:
    import torchao.quantization as ao
    from torchao.quantization.granularity import PerGroup

    configs = {
        "torchao fp8": ao.Float8WeightOnlyConfig(),
        "torchao int8": ao.Int8WeightOnlyConfig(version=2),
        "torchao intx": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    }
    found = {}
    for case, config in configs.items():
        linear = torch.nn.Linear(COLS, ROWS, bias=False, dtype=torch.bfloat16)
        linear.weight.data.normal_(generator=g)
        ao.quantize_(linear, config)
        weight = linear.weight
        names = [n for n in ("qdata", "scale", "zero_point") if getattr(weight, n, None) is not None]
        parts = {f"_*_{name}": getattr(weight, name) for name in names}
        found[case] = (parts, weight.dequantize(), {"quant_method": "torchao"})
    return found


if __name__ == "__main__":
    wanted = tuple(sys.argv[1:])
    tensors, configs = {}, {}
    if wanted:
        with safe_open(FILE, "pt") as file:
            configs = json.loads(file.metadata()["configs"])
            made_by = json.loads(file.metadata()["made_by"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    else:
        made_by = {}
    for case, (parts, decoded, config) in cases().items():
        if wanted and not case.startswith(wanted):
            continue
        configs[case] = config
        for name, tensor in {**parts, DECODED: decoded}.items():
            tensors[f"{case}/{name}"] = tensor.detach().contiguous().clone()
    libraries = ("compressed-tensors", "autoawq", "bitsandbytes", "gguf", "gptqmodel", "nvidia-modelopt", "torchao")
    made_by = {name: version(name) for name in libraries} | made_by
    save_file(tensors, FILE, {"configs": json.dumps(configs), "made_by": json.dumps(made_by)})
