"""The reading of a source, shared among the processes that train one run.

Read   Process k of n reads, checks and encodes the k-th of n stretches of the rows, and
       holds their token ids for as long as the run lasts. Stretches are of the bytes of
       a csv, tsv or jsonl file, of the rows of a Parquet file or of a data set of the
       Hub, of the files of a folder. Whole row groups are unpacked, and an array in a
       json file is parsed by all; process 0 alone reads every byte, for the digest.
Known  What decides the batches is known everywhere: of each row its label, its group
       and its number of tokens; and the vocabulary, made of the counts of all.
Fed    Before an epoch the processes hand each other the ids of the rows that they feed
       to their devices in it, which are as many for each (shared_rows.py).

So the batches are those of one process, on any number of them.
"""

import contextlib
import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from flax_lstm import distributed


@dataclasses.dataclass(frozen=True)
class Share:
    """One process among those that read a source, and what it tells the others.

    Every method but `stretch` is one that all must come to, in the same order.

    Attributes:
      process: Number of this process.
      count: How many share the source; 1 where each reads all of it.
    """

    process: int = 0
    count: int = 1

    @property
    def whole(self) -> bool:
        """Whether this process reads all there is."""
        return self.count == 1

    def stretch(self, size: int) -> slice:
        """Returns which of `size` consecutive things this process reads.

        >>> [Share(k, 3).stretch(8) for k in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
        """
        first = size * self.process // self.count
        return slice(first, size * (self.process + 1) // self.count)

    def gather(self, value: Any) -> list[Any]:
        """Returns the plain JSON data of every process."""
        return [value] if self.whole else distributed.gather(value)

    def arrays(self, mine: np.ndarray) -> list[np.ndarray]:
        """Returns the array of every process; all have one axis, and one dtype."""
        if self.whole:
            return [mine]
        said = distributed.gather_bytes(mine.tobytes())
        return [np.frombuffer(one, mine.dtype) for one in said]

    def agree(self, **facts: Any) -> None:
        """Refuses to go on where the processes differ."""
        if not self.whole:
            distributed.agree(**facts)

    def together(self) -> AbstractContextManager[None]:
        """Makes the error of one that of all; see `distributed.together`."""
        return contextlib.nullcontext() if self.whole else distributed.together()


ALONE = Share()
"""Reads everything, whether or not there are other processes."""


def share_of_this_process() -> Share:
    """Returns the share of a process of the run."""
    return Share(*distributed.place())
