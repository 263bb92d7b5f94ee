"""Batches of fixed shapes, made from ragged rows of token ids.

Axes  B rows of a batch, T padded length, N all tokens of a part, R its rows.

The `words` pipeline pads on the right to one of a few bucket lengths, so that little
padding is computed and little is compiled; a short last batch of a bucket is filled
with rows of weight 0. The `tutorial` pipeline pads on the left to `max_length`, drops
the remainder of a training epoch and keeps the order of its batches.

The order of an epoch is a pure function of (seed, epoch): resuming needs no saved
state but the number of batches already used.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32, Int64

from flax_lstm.config import DataConfig, UserError
from flax_lstm.examples import Examples, Measured

ROUND = 4
"""Bucket lengths are multiples of this, so that few of them are nearly the same."""
CANDIDATES = 512
"""Lengths tried as bucket lengths at the most; longer texts are rounded more."""
NEAR_BEST = 1.02
"""The fewest buckets within this factor of the least cost are taken."""
COMPILE_STEPS = 20_000
"""Token steps an epoch may compute for nothing rather than compile one more length.

Compiling training and evaluation takes some seconds of a CPU core; a small corpus has
few epochs' worth of padding to win back in that time.
"""


class Batch(NamedTuple):
    """Rows of one shape, as NumPy arrays or placed on a device.

    Attributes:
      tokens: Token ids, 0 in the padding.
      lengths: Valid tokens of each row; None where the padding counts as text.
      labels: 0 or 1; 0 in filler rows.
      weights: 1 for a row of the data, 0 for a filler row.
    """

    tokens: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, "B"] | None
    labels: Float32[np.ndarray, "B"]
    weights: Float32[np.ndarray, "B"]


class PlannedBatch(NamedTuple):
    """Which rows make up a batch, and the length they are padded to."""

    padded_length: int
    rows: Int64[np.ndarray, "n"]


def permutation(size: int, *keys: int) -> Int64[np.ndarray, "size"]:
    """Returns a permutation that depends on `keys` alone, whatever NumPy's version.

    NumPy promises the raw stream of a bit generator, not `Generator.permutation`.
    """
    entropy = [key % 2**64 for key in keys]
    stream = np.random.Philox(np.random.SeedSequence(entropy))
    return np.argsort(stream.random_raw(size), kind="stable")


def padded_lengths(examples: Measured, config: DataConfig) -> tuple[int, ...]:
    """Returns the bucket lengths, rising, that cost the least.

    The cost of an epoch is the steps computed, in whole batches with their filler
    rows, and `COMPILE_STEPS` for each length. Takes the fewest lengths that are within
    2 % of the best, `config.buckets` at the most.

    >>> rows = [np.ones(n) for n in [4, 40] * 1000]
    >>> examples = Examples.from_rows(rows, [0.0] * 2000)
    >>> padded_lengths(examples, DataConfig(batch_size=10))
    (4, 40)
    >>> padded_lengths(examples, DataConfig(batch_size=10, buckets=1))
    (40,)
    """
    if config.pipeline == "tutorial" or not len(examples):
        return (config.max_length,)
    lengths = np.clip(examples.lengths, 1, config.max_length)
    step = ROUND * -(-int(lengths.max()) // (ROUND * CANDIDATES))
    rounded = np.minimum(-(-lengths // step) * step, config.max_length)
    candidates, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # cost[i, j]: computed steps if rows of candidates i .. j - 1 share one bucket.
    rows = np.maximum(below[None, :] - below[:, None], 0)
    tall = np.concatenate([[0], candidates]).astype(np.float64)
    cost = -(-rows // config.batch_size) * config.batch_size * tall[None, :]
    cost[np.tril_indices(len(below))] = np.inf
    best = [cost[0]]
    choice = []
    for _ in range(1, min(config.buckets, len(candidates))):
        total = best[-1][:, None] + cost
        choice.append(np.argmin(total, axis=0))
        best.append(np.min(total, axis=0))
    totals = np.array([row[-1] + n * COMPILE_STEPS for n, row in enumerate(best)])
    count = int(np.argmax(totals <= NEAR_BEST * totals.min()))
    end, ends = len(candidates), []
    for table in [*reversed(choice[:count]), None]:
        ends.append(int(candidates[end - 1]))
        end = int(table[end]) if table is not None else 0
    return tuple(reversed(ends))


def batch_plan(
    examples: Measured,
    lengths: tuple[int, ...],
    config: DataConfig,
    *,
    seed: int,
    epoch: int | None,
    drop_remainder: bool | None = None,
) -> list[PlannedBatch]:
    """Returns the rows of every batch of an epoch, in order.

    Args:
      examples: The rows.
      lengths: Bucket lengths from `padded_lengths`. Rows longer than all of them go
        to one more bucket, of `config.max_length`.
      config: Pipeline and batch size.
      seed: Seed of the order.
      epoch: Number of the epoch; None keeps the order of the rows within a bucket.
      drop_remainder: Leaves out a short last batch. When None, only training epochs
        of the `tutorial` pipeline do so.

    Raises:
      UserError: If a training epoch would have no batch.
    """
    tutorial = config.pipeline == "tutorial"
    if drop_remainder is None:
        drop_remainder = tutorial and epoch is not None
    shuffled = epoch is not None and not tutorial
    order = np.arange(len(examples))
    if shuffled:
        order = permutation(len(examples), seed, epoch or 0, 0)
    if tutorial:
        lengths = (config.max_length,)
    else:
        lengths = (*lengths, max(config.max_length, lengths[-1]))
    bucket = np.searchsorted(lengths, np.minimum(examples.lengths, lengths[-1]))[order]
    plan = []
    for index, length in enumerate(lengths):
        rows = order[bucket == index]
        for start in range(0, len(rows), config.batch_size):
            chunk = rows[start : start + config.batch_size]
            if len(chunk) == config.batch_size or not drop_remainder:
                plan.append(PlannedBatch(length, chunk))
    if epoch is not None and not plan:
        raise UserError(
            f"the training part has {len(examples)} rows, fewer than the batch size "
            f"{config.batch_size}, and the {config.pipeline} pipeline drops a short "
            "batch; use a smaller --batch-size."
        )
    if shuffled:
        plan = [plan[i] for i in permutation(len(plan), seed, epoch or 0, 1)]
    return plan


def batch_count(
    examples: Measured, lengths: tuple[int, ...], config: DataConfig
) -> int:
    """Returns the number of batches of a training epoch, the same for every epoch."""
    return len(batch_plan(examples, lengths, config, seed=0, epoch=0))


def batches(
    examples: Examples,
    lengths: tuple[int, ...],
    config: DataConfig,
    *,
    seed: int,
    epoch: int | None,
    start: int = 0,
    drop_remainder: bool | None = None,
    local: slice | None = None,
) -> Iterator[Batch]:
    """Yields the batches of an epoch as NumPy arrays; see `batch_plan`.

    Args:
      examples: The rows.
      lengths: Bucket lengths from `padded_lengths`.
      config: Pipeline and batch size.
      seed: Seed of the order.
      epoch: Number of the epoch; None is a fixed order with nothing dropped.
      start: Number of batches to skip, to resume an epoch.
      drop_remainder: As in `batch_plan`.
      local: Rows of each batch that this process feeds, where there are several; those
        past the end of a short batch are filler rows. All when None.
    """
    plan = batch_plan(
        examples, lengths, config, seed=seed, epoch=epoch, drop_remainder=drop_remainder
    )
    local = local or slice(0, config.batch_size)
    left = config.pipeline != "words"
    for length, rows in left_of(plan, start):
        yield assemble(
            examples, rows[local], length, local.stop - local.start, left=left
        )


def left_of(plan: list[PlannedBatch], start: int) -> list[PlannedBatch]:
    """Returns what is left of an epoch after its first `start` batches."""
    if not 0 <= start <= len(plan):
        raise ValueError(
            f"start must be 0 to {len(plan)}, the batches of this epoch; got {start}."
        )
    return plan[start:]


def assemble(
    examples: Examples,
    rows: Int64[np.ndarray, "n"],
    padded_length: int,
    batch_size: int,
    *,
    left: bool = False,
) -> Batch:
    """Pads rows to `padded_length` and to `batch_size`, without a loop over rows.

    >>> data = Examples.from_rows([np.array([7, 8]), np.array([9])], [1, 0])
    >>> assemble(data, np.array([0, 1]), 3, 2).tokens.tolist()
    [[7, 8, 0], [9, 0, 0]]
    >>> assemble(data, np.array([0, 1]), 3, 2, left=True).tokens.tolist()
    [[0, 7, 8], [0, 0, 9]]
    """
    real = len(rows)
    lengths = np.zeros(batch_size, np.int32)
    lengths[:real] = np.minimum(examples.lengths[rows], padded_length)
    first = np.zeros(batch_size, np.int64)
    first[:real] = examples.offsets[rows]
    column = np.broadcast_to(np.arange(padded_length), (batch_size, padded_length))
    if left:
        column = column - (padded_length - lengths)[:, None]
    valid = (column >= 0) & (column < lengths[:, None])
    tokens = np.zeros((batch_size, padded_length), np.int32)
    tokens[valid] = examples.tokens[(first[:, None] + column)[valid]]
    labels = np.zeros(batch_size, np.float32)
    labels[:real] = examples.labels[rows]
    weights = np.zeros(batch_size, np.float32)
    weights[:real] = 1
    return Batch(tokens, None if left else lengths, labels, weights)


def prefetch(
    iterator: Iterator[Batch],
    size: int = 2,
    place: Callable[[Batch], Batch] = jax.device_put,
) -> Generator[Batch, None, None]:
    """Yields from `iterator`, keeping `size` items on the device ahead of use.

    A thread takes and places the items. Its errors are raised here, and closing this
    generator (or leaving its loop and dropping it) ends the thread.

    Args:
      iterator: Source of the items.
      size: Items placed ahead.
      place: What puts an item onto the device or devices.
    """
    ready: queue.Queue = queue.Queue(maxsize=size)
    stopped = threading.Event()

    def offer(kind: str, value: object) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in iterator:
                if not offer("item", place(item)):
                    return
            offer("end", None)
        except BaseException as error:  # raised again by the consumer, whatever it is
            offer("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
