"""Memory of loads that assign into `module._parameters`: accelerate with a device_map, and diffusers.

    python bench/load_placed.py [--mb 500] [--repeat 3]

The checkpoint is fp32 and the model bf16, so every value is cast, and no page of the mapped file can stand for it. Both
libraries cast a weight before they assign it: of a plain model that is the weight, of a quantized one it is held beside
it, one at a time ("cast MB": the largest). Peak and final are anonymous memory above what the warm process held; each
process has done the same load with a tiny model, and returns freed memory to the system at once
(MALLOC_MMAP_THRESHOLD_).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import machine
import torch
from load_memory import held_bytes, summarize
from safetensors.torch import save_file
from torch import nn

from qtensor import online_quant
from qtensor.report.memory import Child, Measurement, measure

WAYS = {
    "accelerate": "bf16, accelerate with a device_map",
    "accelerate-qtensor": "fp8, the same",
    "diffusers": "bf16, diffusers' from_pretrained",
    "diffusers-qtensor": "fp8, the same",
}
WIDTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=500, help="bytes of the model in bf16, 10^6 (default 500)")
    parser.add_argument("--repeat", type=int, default=3, help="processes per way (default 3)")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child[0], Path(args.child[1]))
        return
    ways = [way for way in WAYS if importlib.util.find_spec(way.partition("-")[0])]
    # Otherwise glibc keeps freed memory of the size of a weight for the next one, and calls it used.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    with tempfile.TemporaryDirectory() as folder:
        for way in ways:
            write(way, Path(folder, way.partition("-")[0]), args.mb)
        runs: dict[str, list[Measurement]] = {way: [] for way in ways}
        for _ in range(args.repeat):
            for way, found in runs.items():
                path = str(Path(folder, way.partition("-")[0]))
                found.append(measure([sys.executable, __file__, "--child", way, path]))
    rows = {way: summarize(found) for way, found in runs.items()}
    print("| way of loading | model MB | cast MB | peak MB | final MB | peak / model | seconds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for way, row in rows.items():
        model, peak, final = (row[key] / 1e6 for key in ("model_bytes", "peak_bytes", "final_bytes"))
        cast = runs[way][0].result["cast_bytes"] / 1e6
        row["cast_bytes"] = runs[way][0].result["cast_bytes"]
        print(
            f"| {WAYS[way]} | {model:.0f} | {cast:.1f} | {peak:.0f} | {final:.0f} | {peak / model:.3f} "
            f"| {row['seconds']:.2f} |"
        )
    packages = ("torch", "safetensors", *{way.partition("-")[0] for way in ways})
    results = {**machine.facts(*packages), "repeat": args.repeat, "rows": rows}
    print(f"\nwritten: {os.path.relpath(machine.save('load_placed', results))}")


def net(blocks: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(blocks))
    )


def dit(blocks: int) -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_layers=blocks, num_attention_heads=WIDTH // 64, attention_head_dim=64, sample_size=8, num_embeds_ada_norm=10
    )


def write(way: str, folder: Path, megabytes: float) -> None:
    if folder.exists():
        return
    folder.mkdir(parents=True)
    if way.startswith("diffusers"):
        dit(max(1, round(megabytes / 37))).save_pretrained(folder)
        return
    model = net(max(1, round(megabytes / 16.8)))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "blocks").write_text(str(len(model)))  # type: ignore[arg-type]


def run_child(way: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as tiny:
        write(way, Path(tiny, "model"), 1)
        load(way, Path(tiny, "model"))
    gc.collect()  # Otherwise the load gives back what the first one left, and its own final looks smaller than it is.
    child = Child()
    child.ready()
    model = load(way, folder)
    child.done(
        model_bytes=sum(held_bytes(param) for param in model.parameters()),
        cast_bytes=max(param.numel() * param.element_size() for param in model.parameters()),
    )


def load(way: str, folder: Path) -> nn.Module:
    with online_quant("fp8", progress=False) if way.endswith("qtensor") else nullcontext():
        if way.startswith("diffusers"):
            from diffusers import DiTTransformer2DModel

            found: nn.Module = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
            return found
        import accelerate

        with accelerate.init_empty_weights():
            model = net(int((folder / "blocks").read_text())).bfloat16()
        accelerate.load_checkpoint_in_model(model, str(folder), device_map={"": "cpu"})
        return model


if __name__ == "__main__":
    main()
