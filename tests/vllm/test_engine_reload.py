"""Reloads of a served model: bytes and answers of a fresh engine, the same addresses, all or nothing.

The first class holds what vLLM's own fp8_per_channel does with the same calls. One engine serves a class of tests, and
each of them leaves it on checkpoint A.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm import LLM

from qtensor import (
    IncompleteLoadError,
    NonFiniteWeightError,
    QTensorError,
    WeightShapeError,
    quantize,
    weight_checksums,
)
from qtensor.integrations.vllm import checksums, compat
from qtensor.integrations.vllm.reload import Reload
from qtensor.integrations.vllm.served import find_served
from support.growth import growth
from support.refits import kernel_calls
from support.vllm.checkpoints import checkpoint, tensors_of, variant
from support.vllm.engines import engine, look
from support.vllm.oracle import fused, mistakes
from support.vllm.reloads import (
    LAYER,
    Q_ROWS,
    QKV,
    Q,
    Tensors,
    addresses,
    example,
    fresh,
    lasting,
    options,
    other,
    reload,
    runtime,
    state,
)

# What vLLM's own fp8 does ---------------------------------------------------------------------------------------------

peer = pytest.mark.skipif(
    not compat.vllm_version().startswith(("0.32", "0.33")), reason="what the peer does was observed with vLLM 0.32"
)


@pytest.fixture(scope="class")
def native() -> Iterator[LLM]:
    with engine(checkpoint("llama"), "fp8_per_channel") as llm:
        yield llm


@peer
class TestPeer:
    """In this order: the last test leaves an engine that only a restart would cure."""

    def test_a_full_reload_is_exact_and_in_place(self, native: LLM) -> None:
        before = addresses(native)
        reload(native, other("llama"))
        assert addresses(native) == before
        assert mistakes(tensors_of(other("llama")), runtime(native), "fp8_per_channel") == []
        reload(native, checkpoint("llama"))

    def test_an_update_of_q_alone_ruins_k_and_v(self, native: LLM) -> None:
        before = runtime(native)[QKV].view(torch.uint8)
        given = tensors_of(checkpoint("llama"))
        dirt = [torch.full((256, 128), 3.0, dtype=torch.bfloat16) for _ in range(64)]
        del dirt  # An engine that has worked for a while has such memory to give out.
        reload(native, [(Q, given[Q])])
        after = runtime(native)[QKV].view(torch.uint8)
        assert (before[Q_ROWS:] != after[Q_ROWS:]).float().mean() > 0.5
        reload(native, checkpoint("llama"))

    def test_a_short_tensor_leaves_meta_tensors_and_poisons_the_next_reload(self, native: LLM) -> None:
        with pytest.raises(Exception, match="exceeds dimension size") as first:
            reload(native, [(Q, tensors_of(checkpoint("llama"))[Q][:-8])])
        assert LAYER not in str(first.value)
        assert any(native.apply_model(lambda model: [p.is_meta for p in model.parameters()])[0])
        with pytest.raises(Exception, match="exceeds dimension size"):
            reload(native, tensors_of(checkpoint("llama")).items())


# The same calls, with the plugin --------------------------------------------------------------------------------------


def oracle(folder: Path) -> Tensors:
    names = [LAYER + name for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")]
    given = tensors_of(folder)
    return {f"{name}.weight": quantize(fused(given, f"{name}.weight"), "fp8_per_channel").qdata for name in names}


@pytest.fixture(scope="class")
def served() -> Iterator[LLM]:
    fresh("llama")  # One engine at a time.
    example()
    settings = {"enable_prefix_caching": False, "weight_transfer_config": {"backend": "shared_file"}}
    with engine(checkpoint("llama"), "qtensor", **settings) as llm:
        yield llm


def changed(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
    def tensors() -> Iterable[tuple[str, torch.Tensor]]:
        made = tensors_of(other("llama"))
        made[name] = make(made.get(name, torch.zeros(4, 4)))
        return made.items()

    return tensors


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[3, 5] = float("nan")
    return tensor


def interrupted(error: BaseException, after: int) -> Callable[[], Any]:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for i, item in enumerate(tensors_of(other("llama")).items()):
            if i == after:
                raise error
            yield item

    return tensors


def missing(*names: str) -> Callable[[], Path]:
    def folder() -> Path:
        made = variant("llama", f"without-{'-'.join(names)}", lambda tensors: None)
        tensors = {n: t for n, t in tensors_of(other("llama")).items() if n not in names}
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        return made

    return folder


def truncated() -> Path:
    folder = variant("llama", "reload-truncated", lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50_000])
    return folder


DOWN = LAYER + "mlp.down_proj.weight"
FAULTS: dict[str, tuple[Callable[[], Any], type[BaseException], str]] = {
    "short q_proj": (changed(Q, lambda t: t[:-8]), WeightShapeError, Q),
    "short norm": (changed("model.norm.weight", lambda t: t[:-8]), QTensorError, "model.norm.weight"),
    "NaN in the last layer": (changed(DOWN, with_nan), NonFiniteWeightError, DOWN),
    "an extra tensor": (changed(LAYER + "mlp.z.weight", torch.neg), QTensorError, "mlp.z"),
    "q_proj missing": (missing(Q), IncompleteLoadError, Q),
    "a norm and the head missing": (missing("model.norm.weight", "lm_head.weight"), IncompleteLoadError, "lm_head"),
    "file cut short": (truncated, QTensorError, "are cut off"),
    "no such folder": (lambda: Path("/nowhere"), Exception, "nowhere"),
    "the source fails": (interrupted(OSError("connection lost"), 9), QTensorError, "connection lost"),
    "the keyboard": (interrupted(KeyboardInterrupt(), 15), KeyboardInterrupt, ""),
}


class TestPlugin:
    @pytest.mark.parametrize("mode", ["atomic", "per_weight"])
    @pytest.mark.parametrize("how", ["path", "iterator", "load_weights"])
    def test_a_full_reload_is_a_fresh_engine_in_place(self, served: LLM, mode: str, how: str) -> None:
        before, places = state(served), addresses(served)
        b = other("llama")
        with options(served, reload=mode):
            if how == "load_weights":
                served.apply_model(lambda model: model.load_weights(iter(tensors_of(b).items())))
            else:
                reload(served, b if how == "path" else tensors_of(b).items())
            assert addresses(served) == places
            seen, expected = look(served), fresh("llama")
            assert seen.weights == expected.weights
            assert seen.tokens == expected.tokens
            assert torch.equal(seen.logprobs, expected.logprobs)
            report = seen.report
            assert report is not None
            assert (report["state"], report["untouched"], report["missing"]) == ("finished", [], {})
            second_copy = report["peak_second_copy_bytes"]
            whole = report["quantized_bytes"] + report["passthrough_bytes"]
            assert 0 < second_copy <= (whole if mode == "atomic" else whole / 4)
            reload(served, checkpoint("llama"))
            reload(served)  # From where it came last.
        assert lasting(state(served)) == lasting(before)

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_failed_reload_changes_nothing(self, served: LLM, fault: str) -> None:
        source, kind, words = FAULTS[fault]
        before = state(served)
        with pytest.raises(kind, match=re.escape(words) or None):
            reload(served, source())
        assert state(served) == before
        reload(served)
        assert lasting(state(served)) == lasting(before)

    def test_a_failure_after_the_last_byte_changes_nothing(self, served: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        before = state(served)

        def out_of_memory(layer: Any) -> None:
            raise MemoryError("no room to pack")

        with monkeypatch.context() as patch:
            patch.setattr(compat, "process_again", out_of_memory)
            with pytest.raises(MemoryError):
                reload(served, other("llama"))
        assert state(served) == before

    @pytest.mark.parametrize("fault", ["short q_proj", "NaN in the last layer", "the keyboard"])
    def test_a_failed_reload_per_weight_leaves_whole_weights(self, served: LLM, fault: str) -> None:
        source, kind, words = FAULTS[fault]
        old, new = oracle(checkpoint("llama")), oracle(other("llama"))
        with options(served, reload="per_weight"), pytest.raises(kind, match=re.escape(words) or None):
            reload(served, source())
        for name, data in runtime(served).items():
            if name in old:
                bytes_now = data.view(torch.uint8)
                assert any(torch.equal(bytes_now, given[name].view(torch.uint8)) for given in (old, new)), name
        reload(served, checkpoint("llama"))
        assert mistakes(tensors_of(checkpoint("llama")), runtime(served), "fp8_per_channel") == []

    def test_an_update_of_q_alone_keeps_k_and_v(self, served: LLM) -> None:
        before = runtime(served)
        reload(served, [(Q, tensors_of(other("llama"))[Q])])
        mixed = tensors_of(checkpoint("llama")) | {Q: tensors_of(other("llama"))[Q]}
        after = runtime(served)
        assert mistakes(mixed, after, "fp8_per_channel") == []
        assert torch.equal(after[QKV][Q_ROWS:].view(torch.uint8), before[QKV][Q_ROWS:].view(torch.uint8))
        report = served.collective_rpc("qtensor_report")[0]
        assert list(report["missing"]) == [QKV]
        assert len(report["untouched"]) > 8
        reload(served)

    def test_bare_head_and_norm_updates_reach_what_is_packed(self, served: LLM) -> None:
        """The head is multiplied with through a packed copy."""
        before = look(served)
        head = tensors_of(checkpoint("llama"))["lm_head.weight"]
        reload(served, [("lm_head.weight", -head)])
        assert torch.equal(look(served).logprobs.argmin(-1), before.logprobs.argmax(-1))
        reload(served)
        assert look(served).tokens == before.tokens

    def test_lifecycle_chunks_serve_the_old_weights_until_the_end(self, served: LLM, tmp_path: Path) -> None:
        before, old = state(served), look(served)
        served.collective_rpc("start_weight_update")
        for bucket in example().fill_buckets(tmp_path / "bucket", reversed(tensors_of(other("llama")).items())):
            served.collective_rpc("update_weights", kwargs={"update_info": bucket})
            assert state(served) == before
        assert look(served).tokens == old.tokens
        served.collective_rpc("finish_weight_update")
        seen = look(served)
        assert (seen.weights, seen.tokens) == (fresh("llama").weights, fresh("llama").tokens)
        reload(served)

    def test_kernels_read_the_packed_buffers_of_vllms_weight_transfer_where_they_lie(self, served: LLM) -> None:
        packing = pytest.importorskip("vllm.distributed.weight_transfer.packed_tensor")
        tensors, buffers = iter(tensors_of(other("llama")).items()), []

        def unpacked() -> Iterator[tuple[str, torch.Tensor]]:
            while (chunk := packing.pack_tensors(tensors, lambda item: item[1], 1 << 18)) is not None:
                buffer = chunk.packed_tensor
                buffers.append(range(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes))
                yield from packing.unpack_tensor(buffer, chunk.names, chunk.shapes, chunk.dtypes, chunk.tensor_sizes)
                buffer.fill_(0xFF)  # It is used again.

        with kernel_calls() as sources:
            reload(served, unpacked())
        assert len(sources) > 8
        assert all(any(source.data_ptr() in buffer for buffer in buffers) for source in sources)
        assert mistakes(tensors_of(other("llama")), runtime(served), "fp8_per_channel") == []
        reload(served)

    def test_a_failed_chunk_ends_the_lifecycle_and_the_next_one_works(self, served: LLM, tmp_path: Path) -> None:
        before = state(served)
        send = example().fill_buckets
        served.collective_rpc("start_weight_update")
        with pytest.raises(WeightShapeError, match=re.escape(Q)):
            for bucket in send(tmp_path / "bucket", FAULTS["short q_proj"][0]()):
                served.collective_rpc("update_weights", kwargs={"update_info": bucket})
        with pytest.raises(RuntimeError, match="without a matching start"):
            served.collective_rpc("finish_weight_update")
        assert state(served) == before
        served.collective_rpc("start_weight_update")
        for bucket in send(tmp_path / "bucket", tensors_of(checkpoint("llama")).items()):
            served.collective_rpc("update_weights", kwargs={"update_info": bucket})
        served.collective_rpc("finish_weight_update")
        assert lasting(state(served)) == lasting(before)

    def test_an_update_that_was_left_open_is_given_up(self, served: LLM, tmp_path: Path) -> None:
        before = state(served)
        served.collective_rpc("start_weight_update")
        bucket = next(example().fill_buckets(tmp_path / "bucket", tensors_of(other("llama")).items()))
        served.collective_rpc("update_weights", kwargs={"update_info": bucket})
        reload(served)
        with pytest.raises(QTensorError, match="no reload of this model is open"):
            served.collective_rpc("finish_weight_update")
        served.collective_rpc("start_weight_update")  # vLLM does not wait for the end of the first one.
        served.collective_rpc("finish_weight_update")
        assert lasting(state(served)) == lasting(before)

    def test_a_failure_that_could_not_be_undone_at_once_is_undone_before_the_next_load(
        self, served: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = state(served)

        def stopped(*args: Any) -> None:
            raise MemoryError("no room to go back")

        with monkeypatch.context() as patch:
            patch.setattr(Reload, "roll_back", stopped)
            with pytest.raises(WeightShapeError) as caught:
                reload(served, FAULTS["short q_proj"][0]())
            assert "left between old and new" in caught.value.__notes__[0]
        (kept,) = served.apply_model(lambda model: find_served(model).open)  # type: ignore[union-attr]
        assert kept is not None
        served.apply_model(lambda model: model.load_weights(iter(tensors_of(other("llama")).items())))
        assert look(served).weights == fresh("llama").weights
        reload(served, checkpoint("llama"))
        assert lasting(state(served)) == lasting(before)

    def test_sparse_updates_are_refused_before_anything_changes(self, served: LLM) -> None:
        patches = pytest.importorskip("vllm.model_executor.model_loader.checkpoint_weight_patch")
        before = state(served)
        for name in (Q, "model.norm.weight"):
            shape, where = tensors_of(checkpoint("llama"))[name].shape, torch.tensor([0, 7], dtype=torch.int32)
            values = torch.tensor([0.5, -0.5], dtype=torch.bfloat16)
            patch = patches.CheckpointWeightPatch(name, tuple(shape), torch.bfloat16, values, where)
            with pytest.raises(QTensorError, match="Send each tensor that has changed whole"):
                served.apply_model(lambda model, patch=patch: patches.load_checkpoint_weight_patches(model, [patch]))
            assert state(served) == before

    def test_an_engine_that_writes_past_the_loaders_is_refused(
        self, served: LLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engines = pytest.importorskip("vllm.distributed.weight_transfer.sharded_rdt_engine")
        made = object.__new__(engines.ShardedRDTWeightTransferEngine)
        worker = served.llm_engine.model_executor.driver_worker.worker
        monkeypatch.setattr(worker, "weight_transfer_engine", made)
        before = state(served)
        with pytest.raises(QTensorError, match="Use another one: nccl, ipc or m2n"):
            served.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
        assert state(served) == before

    def test_checksums_are_those_of_the_quantized_fused_weights(self, served: LLM) -> None:
        given = tensors_of(checkpoint("llama"))
        found = checksums(served)[0]
        mine = {QKV: quantize(fused(given, QKV), "fp8_per_channel"), "model.norm.weight": given["model.norm.weight"]}
        assert {name: found[name] for name in mine} == weight_checksums(mine)

    def test_twenty_reloads_grow_nothing(self, served: LLM) -> None:
        places = addresses(served)
        checkpoints = [tensors_of(folder("llama")) for folder in (other, checkpoint)]
        tensors, resident = growth(lambda i: reload(served, checkpoints[i % 2].items()), 20, first=4)
        assert tensors <= 0
        assert resident < 256 << 10
        assert addresses(served) == places

    def test_the_page_runs(self, served: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "path/to/the/next").mkdir(parents=True)
        (tmp_path / "path/to/the/next/checkpoint").symlink_to(other("llama"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("vllm.LLM", lambda path, quantization: served)
        page = (Path(__file__).parents[2] / "docs" / "rl_refit.md").read_text()
        found = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        assert len(found) == 6
        namespace: dict[str, Any] = {}
        for block in found:
            exec(compile(block, "docs/rl_refit.md", "exec"), namespace)
        reload(served, checkpoint("llama"))
