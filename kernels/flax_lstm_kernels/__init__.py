"""Kernels of `flax_lstm.lstm`, one package for each kind of machine; see README.md."""
