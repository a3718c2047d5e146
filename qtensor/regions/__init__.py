"""Sets of elements of a weight: exact coverage, strided views as boxes. Nothing here knows of quantization."""
