"""The pictures in docs/images: memory while loading, and the report page in a browser, light, dark and on a phone.

    python bench/screenshots.py [--size 1000]

Runs the demo for what it shows. Needs Chromium (or QTENSOR_BROWSER) and playwright.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from qtensor import demo

IMAGES = Path(__file__).parent.parent / "docs" / "images"
VIEWS = {
    "report-light": ("light", 1200, 1250),
    "report-dark": ("dark", 1200, 1250),
    "report-phone": ("light", 390, 1250),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1000, help="checkpoint of the memory picture, MB (default 1000)")
    parser.add_argument("--only", choices=("memory", "report"), help="one kind of picture")
    args = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if args.only != "report":
            good = demo.run(args.size, out, "memory")
            shutil.copy(out / "memory.svg", IMAGES)
            if not good:
                sys.exit(1)
        if args.only != "memory":
            demo.run(args.size, out, "model")
            photograph(out / "minilm-report.html")


def photograph(page: Path) -> None:
    browser = os.environ.get("QTENSOR_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no browser: install chromium, or name one in QTENSOR_BROWSER")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, (theme, width, height) in VIEWS.items():
            context = started.new_context(color_scheme=theme, viewport={"width": width, "height": height}, offline=True)
            view = context.new_page()
            view.goto(page.as_uri())
            view.screenshot(path=IMAGES / f"{name}.png")
            print(f"written: {os.path.relpath(IMAGES)}/{name}.png")
            context.close()
        started.close()


if __name__ == "__main__":
    main()
