"""The LSTM for JAX: one pure function, Flax modules, and a sentiment classifier."""

from flax_lstm.cell import (
    LSTMParams,
    LSTMState,
    init_lstm_params,
    lstm_cell,
    zero_state,
)
from flax_lstm.directions import bidirectional
from flax_lstm.over_time import scan_cell
from flax_lstm.sequence import Internals, explain, lstm, lstm_internals

__all__ = [
    "Internals",
    "LSTMParams",
    "LSTMState",
    "bidirectional",
    "explain",
    "init_lstm_params",
    "lstm",
    "lstm_cell",
    "lstm_internals",
    "scan_cell",
    "zero_state",
]
