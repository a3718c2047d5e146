"""docs/examples/rl_refit.py as it stands: a trainer process, a served model, and a fresh engine to compare with. What
else meets a refit: a trainer that is killed as it sends, and adapters."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from vllm import LLM
from vllm.lora.request import LoRARequest

from qtensor.integrations.vllm import root
from support.processes import elsewhere
from support.vllm.checkpoints import adapter, checkpoint, tensors_of
from support.vllm.engines import Seen, engine, look
from support.vllm.reloads import EXAMPLE, LAYER, example, other, reload


def test_a_refit_engine_is_a_fresh_engine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parent)  # Where the trainer's process finds what it runs.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # As importing the example does, unless an engine ran since.
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--rounds", "1"])
    example().main()
    said = capsys.readouterr().out
    assert "version 1: " in said
    assert "checksums equal; answers equal" in said


def send(file: Path, tensors: dict[str, torch.Tensor], engine_end: Connection, die_after: int | None) -> None:
    """A trainer: send these in buckets, as the example's does; be killed after so many."""
    sys.path.insert(0, str(EXAMPLE.parent))
    from rl_refit import fill_buckets

    for count, bucket in enumerate(fill_buckets(file, iter(tensors.items())), start=1):
        engine_end.send(bucket)
        engine_end.recv()
        if count == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
    engine_end.send({})


def test_a_trainer_that_is_killed_as_it_sends_leaves_the_old_weights(tmp_path: Path) -> None:
    file = tmp_path / "bucket"
    file.touch()
    example()
    tensors = {name: tensor.clone() for name, tensor in tensors_of(other("llama")).items()}
    settings = {"enable_prefix_caching": False, "weight_transfer_config": {"backend": "shared_file"}}
    with engine(other("llama"), "qtensor", **settings) as llm:
        moved = root(llm)
    with engine(checkpoint("llama"), "qtensor", **settings) as llm:
        before, first = root(llm), look(llm)
        for die_after in (1, 3, None):
            ours, theirs = elsewhere.Pipe()
            trainer = elsewhere.Process(target=send, args=(file, tensors, theirs, die_after), daemon=True)
            trainer.start()
            theirs.close()  # Else nobody would hear of it that the trainer is gone.
            if die_after:
                with pytest.raises((EOFError, ConnectionError)):
                    example().refit(llm, ours)
                assert root(llm) == before
                assert torch.equal(look(llm).logprobs, first.logprobs)
            else:
                example().refit(llm, ours)
            trainer.join()
            assert trainer.exitcode == (-signal.SIGKILL if die_after else 0)
        assert root(llm) == moved


def test_an_adapter_stays_across_refits() -> None:
    """With it and without it the answers are those of a fresh engine on the new weights."""
    request = LoRARequest("adapter", 1, str(adapter("llama", ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))))
    settings = {"enable_lora": True, "max_lora_rank": 8, "enable_prefix_caching": False}

    def both(llm: LLM) -> list[Seen]:
        return [look(llm), look(llm, lora=request)]

    with engine(other("llama"), "qtensor", **settings) as llm:
        wanted = both(llm)
    b = tensors_of(other("llama"))
    bad = b | {LAYER + "mlp.down_proj.weight": torch.full_like(b[LAYER + "mlp.down_proj.weight"], float("nan"))}
    with engine(checkpoint("llama"), "qtensor", **settings) as llm:
        before = both(llm)
        assert before[1].distance(before[0]) > 0.15  # It does something.
        with pytest.raises(Exception, match="nan at index"):
            reload(llm, bad.items())
        for old, now in zip(before, both(llm), strict=True):
            assert torch.equal(now.logprobs, old.logprobs)
        reload(llm, b.items())
        for new, now in zip(wanted, both(llm), strict=True):
            assert (now.weights, now.tokens) == (new.weights, new.tokens)
            assert torch.equal(now.logprobs, new.logprobs)
