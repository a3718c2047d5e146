"""The documentation holds: its Python runs as typed, and the commands and pages it names exist."""

import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

import qtensor
from qtensor.checkpoint.transformers import transformers_asks
from qtensor.schemes.scheme import SCHEMES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The page's code blocks of a language, each with the line it starts on."""
    found = re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(page.read_text()[: m.start(1)].count("\n"), m[1]) for m in found]


# These run where vLLM is: tests/vllm/test_page.py and test_reload.py; where peft and diffusers are: test_pages.py in
# tests/libraries.
ELSEWHERE = ("vllm.md", "rl_refit.md", "adapters.md", "diffusers.md")
RUNNABLE = [p for p in PAGES if blocks(p, "python") and p.name not in ELSEWHERE]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda p: p.name)
def test_python_of_a_page_runs_in_order(page, tmp_path, monkeypatch):
    if page.name == "checkpoints.md" and not transformers_asks():
        pytest.skip("from_pretrained of quantized checkpoints needs transformers 5.21 or newer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace = {"__name__": "__main__"}
    for line, source in blocks(page, "python"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The padding makes a traceback point at the line of the page.
            exec(compile("\n" * line + source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.name)
def test_commands_name_files_that_exist(page):
    shell = "\n".join(source for language in ("sh", "console", "bash") for _, source in blocks(page, language))
    inline = "\n".join(re.findall(r"`([^`\n]+)`", page.read_text()))
    for file in re.findall(r"python (\S+\.py)", shell + "\n" + inline):
        assert (ROOT / file).is_file(), f"{page.name} runs {file}"
    makefiles = (ROOT / "Makefile").read_text() + (ROOT / "integrations/vllm/vllm.mk").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefiles, re.MULTILINE))
    for target in re.findall(r"^make ([a-z-]+)", shell + "\n" + inline, re.MULTILINE):
        assert target in targets, f"{page.name} says make {target}"


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_one_version_everywhere():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert qtensor.__version__ == pyproject == citation
    assert f"## {pyproject}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_public_name_is_in_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    named = set(re.findall(r"^::: qtensor\.(\w+)$", page, re.MULTILINE))
    errors = {name for name in qtensor.__all__ if name.endswith("Error")}  # the page has all of qtensor.errors
    schemes = {*SCHEMES, "fp8"}  # docs/schemes.md has them
    assert set(qtensor.__all__) - errors - schemes - named == set()


def test_every_error_has_a_section():
    sections = set(re.findall(r"^## (\w+)$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE))
    assert {name for name in qtensor.__all__ if name.endswith("Error")} - sections == set()


def test_the_site_builds_and_asks_nothing_of_the_network(tmp_path):
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in tmp_path.rglob("*.html"):
        foreign = re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["'](https?://[^"']+)""", page.read_text())
        assert not foreign, f"{page.name} loads {foreign}"


def test_every_page_is_in_the_menu():
    menu = re.findall(r"(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))
