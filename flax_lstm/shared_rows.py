"""Rows whose tokens lie in several processes, and how each gets those that it feeds.

Axes  R rows of a part.

The plan of an epoch is the same everywhere, since lengths and labels are known
everywhere. So every process knows what each of the others feeds and which ids it lacks,
and one exchange before the epoch gives each just those.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Int64

from flax_lstm import distributed
from flax_lstm.batching import Batch, PlannedBatch, assemble
from flax_lstm.examples import Examples


@dataclasses.dataclass(frozen=True)
class SharedRows:
    """A part of the data of which this process holds some rows.

    Attributes:
      lengths: Number of tokens of each row, wherever they lie.
      labels: Label of each row.
      holders: Number of the process that holds the tokens of each row.
      process: Number of this process.
      held: The rows that it holds, in the order that they have here.
    """

    lengths: Int64[np.ndarray, "R"]
    labels: Float32[np.ndarray, "R"]
    holders: Int64[np.ndarray, "R"]
    process: int
    held: Examples

    def __len__(self) -> int:
        return len(self.labels)

    def exchange(self, wanted: Sequence[Int64[np.ndarray, "_"]]) -> Examples:
        """Returns the rows that this process wants, in that order.

        All processes must call it, and with the same.

        Args:
          wanted: Which rows each process wants, by its number.
        """
        of_held = np.flatnonzero(self.holders == self.process)
        given = distributed.exchange(
            [
                self.held.take(
                    np.searchsorted(of_held, rows[self.holders[rows] == self.process])
                ).tokens
                for rows in wanted
            ]
        )
        mine = wanted[self.process]
        as_given = np.argsort(self.holders[mine], kind="stable")
        rows = mine[as_given]
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64)
        got = Examples(np.concatenate(given), offsets, self.labels[rows])
        return got.take(np.argsort(as_given))


def feed(
    rows: SharedRows, plan: Sequence[PlannedBatch], local: slice | None
) -> Examples:
    """Returns the rows that this process feeds, batch after batch.

    All processes must call it, and with the same plan.

    Args:
      rows: The part.
      plan: The batches that are to come.
      local: Rows of each batch that this process feeds; all when None.
    """
    ends = [None] if local is None else [local.start, local.stop]
    none = np.zeros(0, np.int64)
    return rows.exchange(
        [
            np.concatenate([none, *(batch.rows[slice(*ends)] for batch in plan)])
            for ends in distributed.gather(ends)
        ]
    )


def fed_batches(
    fed: Examples,
    plan: Sequence[PlannedBatch],
    local: slice,
    *,
    left: bool,
) -> Iterator[Batch]:
    """Yields this process' rows of each batch, as `batching.batches` does of all rows.

    Args:
      fed: From `feed`, with the same plan and the same rows of each batch.
      plan: The batches.
      local: Rows of each batch that this process feeds.
      left: Pads on the left.
    """
    first = 0
    for length, rows in plan:
        count = len(rows[local])
        yield assemble(
            fed,
            np.arange(first, first + count),
            length,
            local.stop - local.start,
            left=left,
        )
        first += count
