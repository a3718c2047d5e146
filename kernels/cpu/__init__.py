"""The CPU kernels: loops that numba compiles, and the threads that share them."""
