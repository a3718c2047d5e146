"""Sources: the quantized formats in which checkpoints arrive, decoded unit by unit."""
