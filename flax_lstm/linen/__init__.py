"""Linen modules over `flax_lstm.lstm`: LSTMCell, LSTM, StackedLSTM and more.

Axes       T time, *B any number of batch axes, I input size, H hidden size. Sequences
           are `[*B, T, I]`, or `[T, *B, I]` with `time_major=True`.
Parameters The twelve leaves of `nn.OptimizedLSTMCell`: kernels `ii if ig io [I, H]`,
           kernels and biases `hi hf hg ho [H, H]` and `[H]`. They are put together
           once for a sequence, outside the loop.
Loading    `LSTM(H)` has the parameters of `nn.RNN(nn.OptimizedLSTMCell(H))`, below
           `cell`. Flax names that cell differently where it is made inside a
           `@nn.compact` method (`OptimizedLSTMCell_0`); move the leaves there.

Different from Flax on purpose: a row of length 0 returns its initial carry, outputs in
the padding are zero, the forget bias starts at 1, and with dtype bfloat16 the outputs
are bfloat16 while c is carried in float32.
"""

from flax_lstm.layers import initial_state
from flax_lstm.linen.classifier import SentimentClassifier, classifier_functions
from flax_lstm.linen.recurrent import (
    LSTM,
    LSTMCell,
    from_fused,
    from_nnx,
    to_fused,
    to_nnx,
)
from flax_lstm.linen.stack import BidirectionalLSTM, StackedLSTM

__all__ = [
    "LSTM",
    "BidirectionalLSTM",
    "LSTMCell",
    "SentimentClassifier",
    "StackedLSTM",
    "classifier_functions",
    "from_fused",
    "from_nnx",
    "initial_state",
    "to_fused",
    "to_nnx",
]
