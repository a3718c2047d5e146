"""Device maps that a library may not load quantized weights with: some weights would be elsewhere than on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError


def refuse_offload(device_map: Any, stored: bool) -> None:
    """Raise ConfigError for a map with layers on the disk, or with some that wait on the CPU for their turn on a GPU.

    stored: the folder holds quantized weights, which may wait on the CPU.
    """
    places = {str(place) for place in device_map.values()} if isinstance(device_map, Mapping) else set()
    if "disk" in places:
        raise ConfigError(
            "this device_map has layers on the disk, where accelerate keeps plain values and no scales. Put them on "
            '"cpu", where they take their quantized bytes'
        )
    if "cpu" in places and len(places) > 1 and not stored:
        raise ConfigError(
            "this device_map offloads layers to the CPU, and these are quantized once they are loaded. Load with "
            'device_map="cpu", and offload the quantized model: accelerate.dispatch_model(model, device_map) or '
            "accelerate.cpu_offload(model, execution_device)"
        )
