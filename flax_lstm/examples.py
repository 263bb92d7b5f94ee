"""Ragged rows of token ids with their labels, end to end in three arrays.

Axes  N all tokens of a part, R its rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64
from numpy.typing import ArrayLike

from flax_lstm.config import UserError


@runtime_checkable
class Measured(Protocol):
    """Rows as the plan of an epoch sees them."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> Int64[np.ndarray, "R"]:
        """Number of tokens of each row."""
        ...


@dataclasses.dataclass(frozen=True)
class Examples:
    """Encoded texts end to end: row r is `tokens[offsets[r]:offsets[r + 1]]`.

    Raises:
      ValueError: If the offsets do not cut the tokens into as many rows as there are
        labels.
    """

    tokens: Int32[np.ndarray, "N"]
    offsets: Int64[np.ndarray, "ends"]
    labels: Float32[np.ndarray, "R"]

    def __post_init__(self) -> None:
        ends = self.offsets
        if len(ends) != len(self.labels) + 1:
            raise ValueError(
                f"{len(self.labels)} labels need {len(self.labels) + 1} offsets, the "
                f"last one the end; got {len(ends)}."
            )
        if ends[0] != 0 or ends[-1] != len(self.tokens) or np.any(np.diff(ends) < 0):
            row = int(np.argmin(np.diff(ends))) if len(ends) > 1 else 0
            raise ValueError(
                f"offsets must rise from 0 to {len(self.tokens)}, the number of "
                f"tokens; got {ends[0]} to {ends[-1]}, the shortest row of length "
                f"{int(np.diff(ends)[row]) if len(ends) > 1 else 0} at row {row}."
            )

    @classmethod
    def from_rows(cls, rows: Sequence[np.ndarray], labels: ArrayLike) -> "Examples":
        """Joins one array of ids per row.

        >>> Examples.from_rows([np.array([5, 6]), np.array([])], [1, 0]).lengths
        array([2, 0])
        """
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        tokens = np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32)
        return cls(tokens, offsets, np.asarray(labels, np.float32))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Int32[np.ndarray, "n"], float]:
        """Returns the ids and the label of one row."""
        row = range(len(self))[row]
        ids = self.tokens[self.offsets[row] : self.offsets[row + 1]]
        return ids, float(self.labels[row])

    @property
    def lengths(self) -> Int64[np.ndarray, "R"]:
        """Number of tokens of each row."""
        return np.diff(self.offsets)

    def check_ids(self, vocabulary_size: int) -> "Examples":
        """Returns itself, after finding every id in the vocabulary.

        JAX would take the last word's vector, or NaN, for an id beyond it, in silence.

        Raises:
          UserError: If an id is negative or `vocabulary_size` or more; names its row.
        """
        wrong = (self.tokens < 0) | (self.tokens >= vocabulary_size)
        if np.any(wrong):
            place = int(np.argmax(wrong))
            row = int(np.searchsorted(self.offsets, place, side="right")) - 1
            raise UserError(
                f"token id {self.tokens[place]} in row {row} is outside the vocabulary "
                f"of {vocabulary_size} words; expected 0 to {vocabulary_size - 1}. Is "
                "it of another tokenizer?"
            )
        return self

    def take(self, rows: Int[np.ndarray, "n"]) -> "Examples":
        """Returns the given rows in the given order."""
        lengths = self.lengths[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        shift = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        tokens = self.tokens[np.arange(offsets[-1]) + shift]
        return Examples(tokens, offsets, self.labels[rows])
