"""Which files of a safetensors checkpoint are cut short, told from their headers alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path

_SHOWN = 3


def describe_truncated(folder: str | None) -> str:
    """One sentence per file that is shorter than its header promises, naming the tensors that are lost; "" if none."""
    if folder is None or not Path(folder).is_dir():
        return ""
    return " ".join(filter(None, map(_describe, sorted(Path(folder).glob("*.safetensors")))))


def _describe(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            return f"{path.name} is cut short within its header ({size} bytes)."
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return f"{path.name} has a damaged header."
    ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    lost = [name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > size]
    if not lost:
        return ""
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    names = ", ".join(f"'{name}'" for name in lost[:_SHOWN])
    return f"{path.name} has {size} of {max(ends.values())} bytes: {names}{more} are cut off."
