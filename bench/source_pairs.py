"""Every quantized source into every scheme: moved, or what is lost by quantizing twice (the table of docs/sources.md).

    python bench/source_pairs.py

Each row is a format that checkpoints come in, each column a scheme. A cell is the signal-to-quantization-noise ratio,
in dB, of what is loaded against the weights in high precision, random normal ones: **bold** where the source's numbers
are kept to the last bit, *slanted* where codes are kept and one scale is rounded. The column "itself" is the source's
own ratio; the first row is quantized once. tests/test_sources_page.py compares the page with this.
"""

from __future__ import annotations

import torch
from source_formats import ENCODERS, Tensors
from torch import nn

from qtensor import online_quant, quantize
from qtensor.sources import LOSSLESS, MOVED
from qtensor.sources.families import recognise
from qtensor.sources.source import Spec

SIDE = 256
SCHEMES = (
    "fp8_per_tensor",
    "fp8_per_channel",
    "fp8_per_block",
    "mxfp8",
    "mxfp4",
    "nvfp4",
    "int8_per_channel",
    "int4_per_group",
    "int4_per_group_32",
    "int4_asymmetric",
)
ONCE = "bf16"
MARKS = {LOSSLESS: "**", MOVED: "*"}


def weight() -> torch.Tensor:
    """`[SIDE, SIDE]`, normal, in bf16."""
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()


def sqnr(values: torch.Tensor, exact: torch.Tensor) -> float:
    noise = (values.float() - exact.float()).square().sum()
    return float(10 * torch.log10(exact.float().square().sum() / noise))


def decoded(parts: Tensors) -> torch.Tensor:
    """The matrix of these parts, in bf16."""
    source = recognise({name: Spec(part.dtype, tuple(part.shape)) for name, part in parts.items()}, {})
    assert source is not None
    needed = {name: parts[name] for name, part in source.parts((SIDE, SIDE)).items() if part.needed}
    return source.decode(needed, (SIDE, SIDE), torch.bfloat16)


def loaded(parts: Tensors, scheme: str) -> tuple[torch.Tensor, str]:
    """The values of a layer that loaded these parts, and what the report says became of them."""
    model = nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16, device="meta")
    with online_quant(scheme, model) as session:
        model.load_state_dict({name.replace("*", "weight"): part for name, part in parts.items()})
    return model.weight.dequantize(), session.report().layers[0].source.rpartition(": ")[2]


def rows() -> dict[str, list[str]]:
    """The cells of each row: the source itself, then each scheme."""
    exact = weight()
    found = {ONCE: ["", *(f"{sqnr(quantize(exact, scheme).dequantize(), exact):.1f}" for scheme in SCHEMES)]}
    for name, encode in ENCODERS.items():
        parts = encode(exact.float())
        cells = [f"{sqnr(decoded(parts), exact):.1f}"]
        for scheme in SCHEMES:
            values, became = loaded(parts, scheme)
            mark = MARKS.get(became, "")
            cells.append(f"{mark}{sqnr(values, exact):.1f}{mark}")
        found[name] = cells
    return found


def main() -> None:
    print(f"| source | itself | {' | '.join(SCHEMES)} |\n| --- |{' --: |' * (1 + len(SCHEMES))}")
    for name, cells in rows().items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
