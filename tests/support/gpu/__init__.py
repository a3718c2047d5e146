"""A GPU without a GPU: an interpreter for the PTX that Triton emits, and a Triton driver that launches on it."""
