"""The split into train, validation and test: by a seed, groups kept together."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64

from flax_lstm.batching import permutation
from flax_lstm.columns import Rows
from flax_lstm.config import DataConfig, UserError

PARTS = ("train", "validation", "test")
SPLIT_KEY = 7
"""Keeps the split's random numbers apart from those of the epochs."""


@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """Rows of one part after reading, with their labels as numbers.

    Where several processes share the reading, `rows` has the texts of the stretch that
    this one read, and labels and groups are those of all rows.

    Attributes:
      rows: What was read.
      labels: 0 or 1 for each row.
      starts: The first row that each process read, by its number.
      process: Number of this process.
    """

    rows: Rows
    labels: Float32[np.ndarray, "R"]
    starts: tuple[int, ...] = (0,)
    process: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def read(self) -> Int64[np.ndarray, "n"]:
        """The rows that this process read."""
        return self.starts[self.process] + np.arange(len(self.rows.texts))

    def holders(self, rows: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Returns the number of the process that read each of the given rows."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def held(self, rows: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "held"]:
        """Returns at which places among the given rows are those read here."""
        return np.flatnonzero(self.holders(rows) == self.process)

    def texts(self, rows: Int64[np.ndarray, "n"]) -> list[str]:
        """Returns the texts of the given rows, which were read here."""
        first = self.starts[self.process]
        return [self.rows.texts[int(row) - first] for row in rows]

    def groups(self, rows: Int64[np.ndarray, "n"]) -> list[str] | None:
        """Returns the groups of the given rows, if the source has groups."""
        if self.rows.groups is None:
            return None
        return [self.rows.groups[int(row)] for row in rows]


def split(
    counted: dict[str, LabelledRows],
    config: DataConfig,
    seed: int,
    usable: dict[str, np.ndarray] | None,
) -> dict[str, tuple[str, Int64[np.ndarray, "n"]]]:
    """Returns, for each part, the part of the source it is cut from and its rows."""
    if usable is None:
        usable = {name: np.arange(len(part)) for name, part in counted.items()}
    shares = {"train": 1.0}
    for name, fraction in [
        ("validation", config.validation_fraction),
        ("test", config.test_fraction),
    ]:
        if name not in counted:
            shares[name] = fraction
            shares["train"] -= fraction
    rows = usable["train"]
    order = rows[permutation(len(rows), seed, SPLIT_KEY)]
    ends = _ends(len(order), shares)
    groups = counted["train"].groups(order)
    if groups is not None:
        order, ends = _keep_groups(groups, order, ends, seed)
    cuts = np.split(order, ends[:-1])
    picked = {n: ("train", cut) for n, cut in zip(shares, cuts, strict=True)}
    for name in PARTS[1:]:
        if name in counted:
            picked[name] = (name, usable[name])
    for name in PARTS:
        if not len(picked[name][1]):
            few = "are too few" if groups is None else "have too few groups"
            raise UserError(
                f"the {name} part would be empty: {len(rows)} rows {few} to split by "
                f"{shares}. Give more data, or larger fractions."
            )
    return {name: picked[name] for name in PARTS}


def _ends(size: int, shares: dict[str, float]) -> list[int]:
    """Returns where each part ends: whole rows, the training part rounded down.

    >>> _ends(96_966, {"train": 0.8, "validation": 0.1, "test": 0.1})
    [77572, 87269, 96966]
    """
    # The small addition keeps 0.8 * 10 from being 7.999... and so 7 rows.
    train = int(size * shares["train"] + 1e-9)
    rest = 1 - shares["train"]
    ends, held_out = [train], 0.0
    for name in list(shares)[1:]:
        held_out += shares[name]
        ends.append(train + int((size - train) * held_out / rest + 1e-9))
    return ends


def _keep_groups(
    groups: Sequence[str], order: np.ndarray, ends: list[int], seed: int
) -> tuple[np.ndarray, list[int]]:
    """Moves the ends of the parts so that no group is cut.

    Groups are laid end to end in a random order; each goes to the part in which its
    middle falls. (In the order of their first rows, large groups would come first.)
    """
    _, code = np.unique(groups, return_inverse=True)
    shuffled = permutation(int(code.max()) + 1, seed, SPLIT_KEY, 1)
    sizes = np.bincount(code)[shuffled]
    part_of_group = np.zeros(len(shuffled), np.int64)
    middles = np.cumsum(sizes) - sizes / 2
    part_of_group[shuffled] = np.searchsorted(ends[:-1], middles)
    part = part_of_group[code]
    sorted_rows = order[np.argsort(part, kind="stable")]
    return sorted_rows, np.cumsum(np.bincount(part, minlength=len(ends))).tolist()


def shared_groups(
    counted: dict[str, LabelledRows], picked: dict[str, tuple[str, np.ndarray]]
) -> int:
    """Returns how many groups have rows in more than one part."""
    seen: Counter[str] = Counter()
    for origin, rows in picked.values():
        seen.update(set(counted[origin].groups(rows) or ()))
    return sum(count > 1 for count in seen.values())
