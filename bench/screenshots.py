"""The pictures in docs/images: memory while loading, and in a browser the report page and the documentation.

    python bench/screenshots.py [--size 1000] [--only report]

Runs the demo, and mkdocs, for what it shows. Needs Chromium (or QTENSOR_BROWSER) and playwright.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from playwright.sync_api import sync_playwright

from qtensor.cli import demo

IMAGES = Path(__file__).parent.parent / "docs" / "images"
View = tuple[str, int, int]
"""Colour scheme, width and height."""
REPORT: dict[str, View] = {
    "report-light": ("light", 1200, 1250),
    "report-dark": ("dark", 1200, 1250),
    "report-phone": ("light", 390, 1250),
}
DOCS: dict[str, View] = {"docs-light": ("light", 1300, 900), "docs-dark": ("dark", 1300, 900)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1000, help="checkpoint of the memory picture, MB (default 1000)")
    parser.add_argument("--only", choices=("memory", "report", "docs"), help="one kind of picture")
    args = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if args.only in (None, "memory"):
            good = demo.run(args.size, out, "memory")
            shutil.copy(out / "memory.svg", IMAGES)
            if not good:
                sys.exit(1)
        if args.only in (None, "report"):
            demo.run(args.size, out, "model")
            photograph(out / "minilm-report.html", REPORT)
        if args.only in (None, "docs"):
            build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out / "site")]
            subprocess.run(build, check=True, cwd=IMAGES.parent.parent)
            photograph(out / "site" / "index.html", DOCS)


def photograph(page: Path, views: Mapping[str, View]) -> None:
    browser = os.environ.get("QTENSOR_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no browser: install chromium, or name one in QTENSOR_BROWSER")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, (theme, width, height) in views.items():
            context = started.new_context(color_scheme=theme, viewport={"width": width, "height": height}, offline=True)
            view = context.new_page()
            view.goto(page.as_uri())
            view.screenshot(path=IMAGES / f"{name}.png")
            print(f"written: {os.path.relpath(IMAGES)}/{name}.png")
            context.close()
        started.close()


if __name__ == "__main__":
    main()
