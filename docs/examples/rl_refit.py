"""Refit: a trainer process improves a policy, and vLLM serves every new version of it in fp8, without a restart.

    python docs/examples/rl_refit.py [--rounds 2]

The engine writes completions; the trainer rewards even tokens, takes a few policy-gradient steps, and sends its bf16
weights back in buckets of shared memory through vLLM's own lifecycle: start_weight_update, update_weights for every
bucket, finish_weight_update. qtensor quantizes them as they arrive, beside the weights that serve, and makes them live
at the end. Trainer and engine then compare checksums, and a fresh engine on the same weights has to give the same
answers. Needs vllm, transformers and qtensor; runs on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # The engine's core and its worker live in this process.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from torch import multiprocessing

BUCKET_BYTES = 256 << 10
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, VOCABULARY = 8, 8, 8, 512
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


# Buckets: one file of shared memory, filled by the trainer and read by the engine -------------------------------------


def fill_buckets(file: Path, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, Any]]:
    """Write weights into the file, bucket after bucket, and yield the update_info of each. What it yielded must have
    been read before the next one is asked for."""
    bucket = torch.from_file(str(file), shared=True, size=BUCKET_BYTES, dtype=torch.uint8)
    tensors: list[list[Any]] = []
    end = 0
    for name, weight in weights:
        if end + weight.nbytes > BUCKET_BYTES:
            yield {"file": str(file), "tensors": tensors}
            tensors, end = [], 0
        bucket[end : end + weight.nbytes].view(weight.dtype).copy_(weight.reshape(-1))
        tensors.append([name, str(weight.dtype).removeprefix("torch."), list(weight.shape), end])
        end += -(-weight.nbytes // 16) * 16
    yield {"file": str(file), "tensors": tensors}


def read_bucket(file: str, tensors: list[list[Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a bucket, where they lie."""
    bucket = torch.from_file(file, shared=True, size=BUCKET_BYTES, dtype=torch.uint8)
    for name, dtype_name, shape, start in tensors:
        dtype = getattr(torch, dtype_name)
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        yield name, bucket[start:stop].view(dtype).view(shape)


def register_transport() -> None:
    """Teach vLLM the backend "shared_file", as its own backends are made."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader import reload

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        pass

    @dataclass
    class Bucket(WeightTransferUpdateInfo):
        file: str
        tensors: list[list[Any]]

    class SharedFileEngine(WeightTransferEngine[InitInfo, Bucket]):
        init_info_cls, update_info_cls = InitInfo, Bucket

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            pass

        def start_weight_update(self) -> None:
            reload.initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: Bucket) -> None:
            self.model.load_weights(read_bucket(update_info.file, update_info.tensors))

        def finish_weight_update(self) -> None:
            reload.finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

    if "shared_file" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("shared_file", SharedFileEngine)


# The trainer, a process of its own ------------------------------------------------------------------------------------


def make_policy(folder: Path) -> None:
    """A tiny Llama in bf16, as a checkpoint."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    policy = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    policy.save_pretrained(folder)


def train(folder: Path, bucket_file: Path, engine: Connection, steps: int) -> None:
    """Answer every batch of (prompts, completions) with a better policy, until None comes."""
    import transformers

    torch.set_num_threads(1)
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    version = 0
    while (rollouts := engine.recv()) is not None:
        prompts, completions = (torch.tensor(part) for part in rollouts)
        for _ in range(steps):
            loss = -(_advantage(completions) * _log_probabilities(policy, prompts, completions)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        version += 1
        policy.save_pretrained(folder.with_name(f"version-{version}"))  # For the fresh engine to compare with.
        for bucket in fill_buckets(bucket_file, _weights(policy)):
            engine.send(bucket)
            engine.recv()
        engine.send(expected_checksums(policy))


def _advantage(completions: torch.Tensor) -> torch.Tensor:
    """Even tokens are good. `[B, T]`, zero on average."""
    reward = (completions % 2 == 0).float()
    return reward - reward.mean()


def _log_probabilities(policy: Any, prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
    tokens = torch.cat([prompts, completions], dim=1)
    logits = policy(tokens).logits[:, prompts.shape[1] - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, completions.unsqueeze(-1)).squeeze(-1)


def _weights(policy: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, param in policy.named_parameters():
        yield name, param.detach()


def expected_checksums(policy: torch.nn.Module) -> dict[str, str]:
    """What the engine has to hold if it took exactly these weights: quantized, in vLLM's fused layout."""
    from qtensor import fp8, quantize, weight_checksums

    given = dict(_weights(policy))
    made = {}
    for layer in range(2):
        for block, projections in (("self_attn", ("qkv_proj", "o_proj")), ("mlp", ("gate_up_proj", "down_proj"))):
            for projection in projections:
                prefix = f"model.layers.{layer}.{block}."
                parts = [given[f"{prefix}{part}.weight"] for part in FUSED.get(projection, (projection,))]
                made[f"{prefix}{projection}.weight"] = quantize(torch.cat(parts), fp8)
    return weight_checksums(made)


# The engine -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Any]:
    """A vLLM engine that quantizes with qtensor while it loads."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(folder),
        quantization="qtensor",
        dtype="bfloat16",
        max_model_len=PROMPT_TOKENS + NEW_TOKENS,
        max_num_seqs=PROMPTS,
        skip_tokenizer_init=True,
        enforce_eager=True,
        **options,
    )
    try:
        yield llm
    finally:
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def generate(llm: Any, prompts: list[list[int]], temperature: float = 0.0) -> list[list[int]]:
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=NEW_TOKENS, temperature=temperature, seed=0, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def refit(llm: Any, trainer: Connection) -> dict[str, str]:
    """Take the weights the trainer sends, all or nothing. Returns its checksums. If the trainer dies as it sends, the
    engine goes on with the weights that it had."""
    from qtensor.integrations.vllm import abort_update

    llm.collective_rpc("start_weight_update")
    try:
        while "tensors" in (message := trainer.recv()):
            llm.collective_rpc("update_weights", kwargs={"update_info": message})
            trainer.send("read")
    except (EOFError, ConnectionError):
        abort_update(llm)
        raise
    llm.collective_rpc("finish_weight_update")
    llm.reset_prefix_cache()  # What it holds was computed with the old weights.
    return message


def improve(folder: Path, trainer: Connection, prompts: list[list[int]], rounds: int) -> list[dict[str, Any]]:
    """Serve the policy and refit it `rounds` times. Returns, per version: reward, answers, checksums of both sides."""
    from qtensor.integrations.vllm import checksums

    versions = []
    with serving(folder, weight_transfer_config={"backend": "shared_file"}) as llm:
        for version in range(1, rounds + 1):
            completions = generate(llm, prompts, temperature=1.0)
            trainer.send((prompts, completions))
            sent = refit(llm, trainer)
            held = checksums(llm)[0]
            even = sum(token % 2 == 0 for row in completions for token in row)
            versions.append(
                {
                    "version": version,
                    "reward": even / (PROMPTS * NEW_TOKENS),
                    "answers": generate(llm, prompts),
                    "sent": sent,
                    "held": {name: held[name] for name in sent},
                }
            )
    return versions


def answers(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """A fresh engine's."""
    with serving(folder) as llm:
        return generate(llm, prompts)


def run(rounds: int = 2, steps: int = 4) -> list[dict[str, Any]]:
    """Train and refit `rounds` times, and ask a fresh engine about each version."""
    register_transport()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory() as root, tempfile.NamedTemporaryFile(dir=shared) as bucket_file:
        folder = Path(root) / "version-0"
        make_policy(folder)
        ours, theirs = multiprocessing.Pipe()
        trainer = multiprocessing.get_context("spawn").Process(
            target=train, args=(folder, Path(bucket_file.name), theirs, steps), daemon=True
        )
        trainer.start()
        versions = improve(folder, ours, prompts, rounds)
        ours.send(None)
        trainer.join()
        for found in versions:
            found["fresh"] = answers(folder.with_name(f"version-{found['version']}"), prompts)
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    for found in run(parser.parse_args().rounds):
        print(
            f"version {found['version']}: share of even tokens before it {found['reward']:.2f}; "
            f"checksums {'equal' if found['sent'] == found['held'] else 'DIFFER'}; "
            f"answers {'equal' if found['answers'] == found['fresh'] else 'DIFFER from'} a fresh engine's"
        )


if __name__ == "__main__":
    main()
