"""What ranks give each other for one forward pass under fully_shard, in bf16 and quantized.

    python bench/fsdp.py [--ranks 2 4] [--layers 1]

The layers of a Llama (hidden 2048, inner 8192) are split by `fully_shard`, one group per layer, loaded, and run once on
one token. The bytes are what each rank puts into its all-gathers, counted by an all-gather that FSDP is given; they are
exact, so one run is enough.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import machine
import torch
import torch.distributed as dist
from distributed import HIDDEN, LAYER_BYTES, SHAPES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from qtensor import online_quant

WAYS = ("bf16", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "mxfp8", "nvfp4")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (rows, cols, _) in SHAPES.items():
            self.add_module(name, nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o(self.q(x) + self.k(x) + self.v(x))
        return x + self.down(self.gate(x) * self.up(x))


class Counted:
    """FSDP's all-gather, counting what this rank gives."""

    given = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> Any:
        self.given += input_tensor.nbytes
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=1)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for world in args.ranks:
        rows += machine.on_ranks(work, world, args.layers)
    print("| ranks | weights | bytes per rank | of bf16 |\n| --- | --- | ---: | ---: |")
    for row in rows:
        share = row["bytes"] / rows[0]["bytes"] * row["ranks"] / rows[0]["ranks"]
        print(f"| {row['ranks']} | {row['way']} | {row['bytes']:,} | {share:.3f} |")
    results = {**machine.facts("torch", "numba"), "weight_bytes": args.layers * LAYER_BYTES, "rows": rows}
    print(f"\nwritten: {os.path.relpath(machine.save('fsdp', results))}")


def work(rank: int, world: int, layers: int) -> list[dict[str, Any]]:
    mesh = init_device_mesh("cpu", (world,))
    rows = []
    for way in WAYS:
        model = nn.Sequential(*(Layer() for _ in range(layers)))
        counted = Counted()
        for layer in model:
            fully_shard(layer, mesh=mesh).set_custom_all_gather(counted)
        fully_shard(model, mesh=mesh)
        if way != "bf16":
            with online_quant(way, model, ignore=(), on_missing="keep"):
                pass
        with torch.no_grad():
            model(torch.ones(1, HIDDEN).bfloat16())
        rows.append({"ranks": world, "way": way, "bytes": counted.given})
    return rows


if __name__ == "__main__":
    main()
