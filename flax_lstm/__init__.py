"""The LSTM for JAX: one pure function, Flax modules, and a sentiment classifier."""

from flax_lstm.cell import (
    LSTMParams,
    LSTMState,
    init_lstm_params,
    lstm_cell,
    zero_state,
)
from flax_lstm.sequence import lstm, scan_cell

__all__ = [
    "LSTMParams",
    "LSTMState",
    "init_lstm_params",
    "lstm",
    "lstm_cell",
    "scan_cell",
    "zero_state",
]
