"""The benchmark suite: LSTM implementations side by side, and the machine's limit.

`flax-lstm bench` is its command line. Nothing else in the package imports it.
"""
