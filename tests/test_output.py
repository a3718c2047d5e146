"""What people read: no name can give orders to a terminal, and wherever output goes the exit code tells the truth."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_conversion import write
from torch import nn

import qtensor
from qtensor import CheckpointError, LayerReport, LoadReport, fp8, kernels, load_checkpoint, online_quant
from qtensor.cli import demo, doctor, main
from qtensor.lazy.counter import CopyReport
from qtensor.text import joined, printable, printable_lines

ORDERS = "\x1b]0;owned\x07\x9b31m\r\u202e\u2066\u2028\u2029\x85\x00\x7f\n"
NAME = f"up{ORDERS}qtensor: all well"


def obeyed(text: str) -> set[str]:
    """What a terminal would do in a text of ours, whose line breaks are meant."""
    return {c for c in text if not c.isprintable() and c not in "\n\t"}


@given(st.text(st.characters(), max_size=30))
def test_nothing_but_what_is_seen_is_left(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert not obeyed(printable_lines(text))
    assert joined([text, text]) == f"{shown}\n{shown}"
    assert not text.isprintable() or shown == text


ERRORS = [error for module in (qtensor.errors, kernels) for error in vars(module).values() if isinstance(error, type)]
ERRORS = [error for error in dict.fromkeys(ERRORS) if issubclass(error, qtensor.QTensorError)]


@pytest.mark.parametrize("error", ERRORS)
def test_no_error_carries_orders(error: type[Exception]) -> None:
    made = error(0, float("nan")) if error is kernels.NonFinite else error(NAME)
    assert not obeyed(str(made))
    assert not obeyed(str(made.args))


def test_an_error_about_a_checkpoint_is_one_line_and_ends() -> None:
    assert str(CheckpointError(NAME)).isprintable()
    assert len(str(CheckpointError("x" * 10**6))) < 5000


def hostile(folder: Path) -> Path:
    tensors = {f"{NAME}.weight": torch.randn(4, 128), f"{NAME}.norm": torch.ones(4), "down.weight": torch.ones(4, 128)}
    (folder / "source").mkdir()
    (folder / "source" / f"tokenizer{ORDERS.replace(chr(0), '')}.json").write_text("{}")
    return write(folder / "source", tensors, 2)


def test_no_command_obeys_a_name(tmp_path, capsys) -> None:
    source, out = hostile(tmp_path), tmp_path / "out"
    commands = [
        ["quantize", str(source), str(out), "--ignore", "up*", "--ignore", NAME],
        ["quantize", str(source), str(tmp_path / "all"), "--scheme", "fp8_per_tensor"],
        ["quantize", str(source), str(tmp_path / "none"), "--ignore", "*"],
        ["quantize", str(out), str(tmp_path / "again")],
        ["inspect", str(tmp_path / "all"), "--against", str(source)],
        ["inspect", str(tmp_path / "all"), "--against", str(out)],
        ["inspect", str(tmp_path / NAME.replace("\0", ""))],
        ["verify", str(tmp_path / "all")],
    ]
    for command in commands:
        main.main(command)
        main.main([*command, "--json"])
    for file in (tmp_path / "all").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-4] + bytes(4))
    assert main.main(["verify", str(tmp_path / "all")]) == 1
    said = capsys.readouterr()
    assert "\\x1b]0;owned\\x07" in said.out
    assert "\\x1b]0;owned\\x07" in said.err
    assert not obeyed(said.out + said.err)
    assert not any(line.startswith("qtensor: all well") for line in (said.out + said.err).splitlines())


def test_no_report_and_no_warning_obeys_a_name(tmp_path) -> None:
    layer = LayerReport(NAME, "fp8", (2, 2), 4, 8, note=NAME)
    report = LoadReport(layers=[layer], untouched=[NAME], warnings=[NAME], passthrough={NAME: NAME})
    texts = [str(report), str(CopyReport(1, [], {NAME: [((0, 1), (0, 1))]}, {NAME: (2, 2)}))]
    source = hostile(tmp_path)
    with pytest.raises(CheckpointError) as found:
        load_checkpoint(nn.ModuleDict({"down": nn.Linear(128, 4, bias=False)}), source)
    texts.append(str(found.value))
    model = nn.ModuleDict({printable(NAME).replace(".", "") + "\x1b": nn.Linear(8, 8, bias=False)})
    with warnings.catch_warnings(record=True) as heard, pytest.raises(qtensor.IncompleteLoadError) as missing:
        warnings.simplefilter("always")
        with online_quant(fp8, model, ignore=[f"{NAME}*"]):
            pass
    texts += [str(missing.value), *(str(warning.message) for warning in heard)]
    for text in texts:
        assert "\\x1b" in text
        assert not obeyed(text)
        assert not any(line.strip().startswith("qtensor: all well") for line in text.splitlines())


# Where output goes ----------------------------------------------------------------------------------------------------


class Sink(io.RawIOBase):
    """A file without room, or whose reader went away."""

    def __init__(self, number: int) -> None:
        self._number = number

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(self._number, os.strerror(self._number))


def stream(kind: str) -> Any:
    if kind == "closed":
        return None
    if kind in ("full", "pipe"):
        sink = Sink(errno.ENOSPC if kind == "full" else errno.EPIPE)
        return io.TextIOWrapper(io.BufferedWriter(sink), encoding="utf-8")  # type: ignore[type-var]
    return io.TextIOWrapper(io.BytesIO(), encoding=kind)


LOST = {"closed": 1, "full": 1, "pipe": 141}
TEXT = ("ascii", "latin-1", "utf-8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("output")
    source = write(folder / "source", {"überall.weight": torch.randn(4, 128)})
    assert main.main(["quantize", str(source), str(folder / "made")]) == 0
    return {"source": str(source), "made": str(folder / "made"), "folder": str(folder)}


COMMANDS: dict[str, list[str]] = {
    "help": ["--help"],
    "version": ["--version"],
    "completion": ["--print-completion", "bash"],
    "doctor": ["doctor"],
    "demo": ["demo", "--part", "memory"],
    "inspect": ["inspect", "{made}", "--against", "{source}"],
    "verify": ["verify", "{made}"],
    "quantize --json": ["quantize", "{source}", "{folder}/{to}", "--json"],
    "quantize": ["quantize", "{source}", "{folder}/{to}"],
}


@pytest.fixture
def run(folders, monkeypatch, tmp_path) -> Callable[[str, Any], int]:
    monkeypatch.setattr(doctor, "examine", lambda: {"ok": True})
    monkeypatch.setattr(doctor, "describe", lambda findings: "→ All well.")
    monkeypatch.setattr(demo, "run", lambda *_: print("→ every byte") is None)
    monkeypatch.chdir(tmp_path)

    def call(command: str, out: Any) -> int:
        if command == "completion":
            pytest.importorskip("shtab")
        monkeypatch.setattr(sys, "stdout", out)
        try:
            return main.main([word.format(**folders, to=tmp_path.name) for word in COMMANDS[command]])
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            monkeypatch.undo()

    return call


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_was_asked_for_and_is_lost_is_a_failure(command, kind, run, folders, tmp_path, capsys) -> None:
    """The work of `quantize` is its folder: done is done. `--json` asks for output."""
    code = run(command, stream(kind))
    assert code == (0 if command == "quantize" else LOST[kind])
    said = capsys.readouterr().err
    assert ("standard output cannot be written" in said) == (kind != "pipe")
    assert "Traceback" not in said
    if command.startswith("quantize"):
        assert main.main(["verify", f"{folders['folder']}/{tmp_path.name}"]) == 0


@pytest.mark.parametrize("encoding", TEXT)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_encoding_without_the_character_gets_a_replacement(command, encoding, run) -> None:
    out = stream(encoding)
    assert run(command, out) == 0
    text = out.buffer.getvalue().decode(encoding)
    arrow = "→" if encoding == "utf-8" else "\\u2192"
    if command in ("doctor", "demo", "quantize"):
        assert arrow in text
    elif command == "inspect":
        assert ("\\xfcberall" if encoding == "ascii" else "überall") in text
    elif command == "quantize --json":
        assert json.loads(text)["quantized"] == 1
    assert text


def test_standard_error_that_is_lost_changes_no_exit_code(monkeypatch, capsys) -> None:
    for kind in LOST:
        monkeypatch.setattr(sys, "stderr", stream(kind))
        assert main.main(["inspect", "no-such-folder"]) == 1
        assert main.main(["verify", "no-such-folder"]) == 1
        monkeypatch.undo()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file without room")
@pytest.mark.parametrize(("end", "code"), [(">/dev/full", 1), (">&- 2>&-", 1)])
def test_a_process_says_so_once_and_leaves(end, code, folders) -> None:
    """Python itself flushes once more when it exits, and files that are opened take the numbers of closed ones."""
    command = f"{sys.executable} -m qtensor quantize {folders['source']} '{folders['folder']}/{hash(end)}' --json {end}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert main.main(["verify", f"{folders['folder']}/{hash(end)}"]) == 0
