"""Two classes out of whatever a source calls its labels: numbers, booleans, words."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from flax_lstm.config import UserError

POSITIVE = frozenset(
    (
        "pos",
        "positive",
        "bullish",
        "bull",
        "true",
        "yes",
        "y",
        "t",
        "good",
        "great",
        "up",
        "buy",
        "like",
        "happy",
    )
)
NEGATIVE = frozenset(
    (
        "neg",
        "negative",
        "bearish",
        "bear",
        "false",
        "no",
        "n",
        "f",
        "bad",
        "awful",
        "down",
        "sell",
        "dislike",
        "sad",
    )
)
_WHOLE = re.compile(r"([+-]?\d{1,1000})(\.0+)?")  # Python's int has a limit of 4300


class Classes(NamedTuple):
    """The two classes of a source.

    Attributes:
      names: Negative and positive class, as the source first writes them.
      keys: The same in the form in which labels are compared.
      rule: Why the second one is the positive one.
    """

    names: tuple[str, str]
    keys: tuple[str, str]
    rule: str


def key_of(label: object, where: str) -> str:
    """Returns the form of a label in which equal labels are equal.

    >>> [key_of(label, "row 1") for label in (1, 1.0, "1e0", True, " Positive ")]
    ['1', '1', '1', 'true', 'positive']

    Raises:
      UserError: If the value cannot be a label; the message begins with `where`.
    """
    if isinstance(label, bool | np.bool_):
        return str(bool(label)).lower()
    if isinstance(label, int | np.integer):
        return str(int(label))
    if isinstance(label, float | np.floating) and float(label).is_integer():
        return str(int(label))
    if isinstance(label, str | Decimal) and str(label).strip():
        text = str(label).strip().casefold()
        if whole := _WHOLE.fullmatch(text):
            return str(int(whole[1]))
        number = _number(text)
        if number is None:
            return text
        if number.is_integer():
            return str(int(number))
    what = "no label" if label is None or label == "" else f"the label {shown(label)}"
    raise UserError(
        f"{where} has {what}; a label is a whole number (0, 1), a boolean or a word. "
        "Correct the row or remove it, or choose another --label-column."
    )


def _number(text: str) -> float | None:
    """Returns the number that a text is, or None for a word."""
    try:
        return None if "_" in text else float(text)  # float takes 1_0 for 10
    except ValueError:
        return None


def tally(labels: Sequence[object], where: Sequence[str]) -> dict[str, list]:
    """Returns each class as it was first written, where that was, and its rows.

    Plain JSON: keys in the form in which labels are compared, in order of appearance.

    Args:
      labels: Raw label of every row.
      where: Name of every row for messages, such as "row 3 of FILE".

    Raises:
      UserError: If a label is in no known form.
    """
    seen: dict[str, tuple[str, int]] = {}
    counts: dict[str, int] = {}
    cache: dict[tuple[type, object], str] = {}
    for row, label in enumerate(labels):
        known = (type(label), label)
        key = cache.get(known) if label.__hash__ else None
        if key is None:
            key = key_of(label, where[row])
            cache[known] = key
            seen.setdefault(key, (str(label).strip(), row))
        counts[key] = counts.get(key, 0) + 1
    return {key: [name, where[row], counts[key]] for key, (name, row) in seen.items()}


def find_classes(tallies: Iterable[dict[str, list]]) -> Classes:
    """Finds the two classes, and which of them is the positive one.

    A number: the larger is positive. Words: a known one (positive, bullish, true,
    yes, good ...) is positive, a known opposite is negative; otherwise the second in
    the alphabet is positive.

    Args:
      tallies: From `tally`, of stretches of rows one after the other.

    Raises:
      UserError: If there are not exactly two classes.
    """
    seen: dict[str, tuple[str, str]] = {}
    counts: Counter[str] = Counter()
    for found in tallies:
        for key, (name, place, count) in found.items():
            seen.setdefault(key, (name, place))
            counts[key] += count
    keys = list(seen)
    numbers = [key for key in keys if _WHOLE.fullmatch(key)]
    words = [key for key in keys if key not in numbers]
    if numbers and words:
        odd, usual = sorted(
            (numbers, words), key=lambda group: sum(counts[key] for key in group)
        )
        name, place = seen[odd[0]]
        raise UserError(
            f"{place} has the unknown label {shown(name)}; other rows have "
            f"{', '.join(shown(seen[key][0]) for key in usual[:3])}. Labels are two "
            "numbers or two words; correct the row or remove it."
        )
    if len(keys) != 2:
        found = ", ".join(
            f"{shown(seen[key][0])} ({counts[key]} rows, first {seen[key][1]})"
            for key in keys[:5]
        )
        more = ", ..." if len(keys) > 5 else ""
        raise UserError(
            f"the labels must be of exactly two classes; found {len(keys)}: "
            f"{found}{more}. Choose another --label-column, or map the classes to two."
        )
    if numbers:
        negative, positive = sorted(keys, key=int)
        rule = "the larger number is positive"
    else:
        negative, positive = sorted(keys)
        rule = "alphabetical order, no known word"
        first_wins = (negative in POSITIVE) + (positive in NEGATIVE)
        second_wins = (negative in NEGATIVE) + (positive in POSITIVE)
        if first_wins > second_wins:
            negative, positive = positive, negative
        if first_wins != second_wins:
            rule = "known words"
    names = (seen[negative][0], seen[positive][0])
    return Classes(names, (negative, positive), rule)


def to_numbers(
    labels: Sequence[object], where: Sequence[str], classes: Classes
) -> Float32[np.ndarray, "R"]:
    """Returns 0 or 1 for every row.

    Raises:
      UserError: If a label is neither of the two classes.
    """
    values = {classes.keys[0]: 0.0, classes.keys[1]: 1.0}
    numbers = np.zeros(len(labels), np.float32)
    for row, label in enumerate(labels):
        key = key_of(label, where[row])
        if key not in values:
            raise UserError(
                f"{where[row]} has the label {shown(label)}; expected "
                f"{classes.names[0]!r} or {classes.names[1]!r}."
            )
        numbers[row] = values[key]
    return numbers


def classes_named(names: tuple[str, str]) -> Classes:
    """Returns the classes of an earlier run, to read other data with."""
    keys = (key_of(names[0], "the negative class"), key_of(names[1], "the positive"))
    return Classes(names, keys, "those of the run")


def shown(value: object) -> str:
    """Returns a value for a message, shortened.

    >>> shown("a" * 50), shown(None)
    ("'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...", 'nothing')
    """
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
