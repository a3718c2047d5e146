"""Sources: the quantized formats in which checkpoints arrive, decoded unit by unit.

`import qtensor` imports none of this package's files: most loads meet no quantized source.
"""

LOSSLESS, MOVED, REQUANTIZED, DECODED = "lossless", "moved", "requantized", "decoded"
"""What became of a weight's numbers: the same; the same codes and scales, with a global scale that is rounded;
quantized a second time; in high precision."""
