"""Weights that are being loaded: tensors without storage, what operations write to them, and where elements go."""
