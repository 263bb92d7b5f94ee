"""Runs what the compiler makes of the Hopper kernels, without a GPU."""
