"""Counts of words, in all texts or in a stretch of them; counts of stretches add up.

Axes  W words, N tokens of all texts, end to end.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

NEVER = np.iinfo(np.int64).max
"""Where a word is first that does not occur among the counted tokens."""


class WordCounts(NamedTuple):
    """How often each of some words occurs, and where it does first.

    Attributes:
      words: The words, each once.
      counts: How often each occurs.
      first: Rises with the place of its first token among all texts.
    """

    words: list[str]
    counts: Int64[np.ndarray, "W"]
    first: Int64[np.ndarray, "W"]

    def to_json(self) -> list[list[Any]]:
        """Returns plain JSON data."""
        return [self.words, self.counts.tolist(), self.first.tolist()]

    @classmethod
    def from_json(
        cls, words: list[str], counts: list[int], first: list[int]
    ) -> "WordCounts":
        """Takes what `to_json` gave."""
        return cls(words, np.array(counts, np.int64), np.array(first, np.int64))


def count(
    words: list[str],
    ids: Int32[np.ndarray, "N"],
    offsets: Int64[np.ndarray, "ends"],
    max_length: int | None,
    rows: Int64[np.ndarray, "texts"] | None = None,
) -> WordCounts:
    """Counts the tokens that are kept of each text.

    >>> ids, offsets = np.array([1, 0, 0, 1], np.int32), np.array([0, 2, 4])
    >>> count(["a", "b"], ids, offsets, 1).to_json()  # the first word of each text
    [['a', 'b'], [1, 1], [2, 0]]

    Args:
      words: The word of each id; ids beyond are not counted.
      ids: Of all texts, end to end.
      offsets: Where each text begins, and the end.
      max_length: Tokens kept of a text; all when None.
      rows: Place of each text among those of all processes; their order when None.
    """
    position = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
    place = np.arange(len(ids))
    if rows is not None:
        # The lengths of the texts between these are not known here; this rises alike.
        place = (np.repeat(rows, np.diff(offsets)) << 32) + position
    kept = ids < len(words)
    if max_length is not None:
        kept &= position < max_length
    first = np.full(len(words), NEVER)
    np.minimum.at(first, ids[kept], place[kept])
    return WordCounts(words, np.bincount(ids[kept], minlength=len(words)), first)


def add_up(parts: Sequence[WordCounts]) -> WordCounts:
    """Returns the counts in all the texts, of which each part is of a stretch.

    >>> one = WordCounts(["a"], np.array([2]), np.array([4]))
    >>> add_up([one, WordCounts(["b", "a"], np.array([1, 1]), np.array([5, 3]))])[1:]
    (array([3, 1]), array([3, 5]))
    """
    if len(parts) == 1:
        return parts[0]
    number: dict[str, int] = {}
    of_part = [[number.setdefault(w, len(number)) for w in p.words] for p in parts]
    counts = np.zeros(len(number), np.int64)
    first = np.full(len(number), NEVER)
    for numbers, part in zip(of_part, parts, strict=True):
        counts[numbers] += part.counts
        first[numbers] = np.minimum(first[numbers], part.first)
    return WordCounts(list(number), counts, first)
