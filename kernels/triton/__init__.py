"""The GPU kernels, in Triton: one file per kernel, each opening with its roofline."""
