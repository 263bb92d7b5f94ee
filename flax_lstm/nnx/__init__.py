"""NNX modules over `flax_lstm.lstm`: LSTMCell, LSTM, StackedLSTM, SentimentClassifier.

Axes       T time, *B any number of batch axes, I input size, H hidden size. Sequences
           are `[*B, T, I]`, or `[T, *B, I]` with `time_major=True`.
Parameters Those of `nnx.OptimizedLSTMCell`: `dense_i.kernel [I, 4H]`, `dense_h.kernel
           [H, 4H]` and `dense_h.bias [4H]`, gate order i f g o.
Randomness Comes in as an argument; no module keeps a random state, so that
           `nnx.split(module)` gives parameters and nothing else.

Different from Flax on purpose: a row of length 0 returns its initial carry, outputs in
the padding are zero, the forget bias starts at 1, and with dtype bfloat16 the outputs
are bfloat16 while c is carried in float32.
"""

from flax_lstm.layers import initial_state
from flax_lstm.nnx.classifier import SentimentClassifier, classifier_functions
from flax_lstm.nnx.recurrent import LSTM, LSTMCell, from_fused, to_fused
from flax_lstm.nnx.stack import BidirectionalLSTM, StackedLSTM

__all__ = [
    "LSTM",
    "BidirectionalLSTM",
    "LSTMCell",
    "SentimentClassifier",
    "StackedLSTM",
    "classifier_functions",
    "from_fused",
    "initial_state",
    "to_fused",
]
