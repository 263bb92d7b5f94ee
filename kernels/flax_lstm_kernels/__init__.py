"""Accelerator kernels of `flax_lstm.lstm`. None has been added yet."""
