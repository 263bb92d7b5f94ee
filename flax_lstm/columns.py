"""Which columns of a source are its texts, labels and groups, and rows made of them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_lstm.config import DataConfig, UserError
from flax_lstm.labels import shown

TEXT_NAMES = ("text", "review", "sentence", "message", "content", "comment", "tweet")
LABEL_NAMES = ("label", "labels", "sentiment", "target", "class", "polarity")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts, raw labels and groups of one part, in the order of the source.

    `where[i]` names row i for messages.
    """

    texts: Sequence[str]
    labels: Sequence[object]
    groups: Sequence[str] | None
    where: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)


class Where(Sequence):
    """Names rows as "row 3 of FILE" when asked, without holding a million strings."""

    def __init__(self, origin: str, numbers: Sequence[int], unit: str = "row"):
        self._origin, self._numbers, self._unit = origin, numbers, unit

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, row):
        return f"{self._unit} {self._numbers[row]} of {self._origin}"


def check_names(names: Sequence[str], path: Path) -> None:
    """Raises UserError where two columns of a file have one name."""
    repeated = sorted({name for name in names if names.count(name) > 1 and name})
    if repeated:
        raise UserError(
            f"{path} has more than one column {repeated[0]!r}; rename them so that "
            "each name occurs once."
        )


def chosen(
    names: Sequence[str], origin: str, config: DataConfig
) -> tuple[str, str, str | None]:
    """Returns the columns of the text, of the label and of the group."""
    text = _column(names, config.text_column, TEXT_NAMES, origin, "text")
    label = _column(names, config.label_column, LABEL_NAMES, origin, "label")
    if text == label:
        raise UserError(f"{origin}: text and label are both column {text!r}.")
    group = config.group_column
    if group is not None:
        group = _column(names, group, (), origin, "group")
    return text, label, group


def _column(
    names: Sequence[str],
    given: str | None,
    usual: Sequence[str],
    origin: str,
    role: str,
) -> str:
    columns = f"columns are {', '.join(map(repr, names))}"
    if given is not None:
        if given in names:
            return given
        raise UserError(
            f"{origin} has no column {given!r}; {columns}. Correct --{role}-column."
        )
    found = [name for name in names if name.strip().lower() in usual]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{origin} has several columns that could be the {role}: "
            f"{', '.join(map(repr, found))}. Choose one with --{role}-column."
        )
    advice = f"Choose one with --{role}-column."
    for mark in ";\t|":
        if len(names) == 1 and mark in names[0]:
            advice = (
                f"Are its fields separated by {mark!r}? Expected commas, or tabs in a "
                ".tsv file."
            )
    raise UserError(
        f"{origin} has no column for the {role}: none is called "
        f"{', '.join(usual)}; {columns}. {advice}"
    )


def rows_of(
    columns: dict[str, list[Any]],
    where: Sequence[str],
    origin: str,
    config: DataConfig,
) -> Rows:
    """Takes the columns that are needed, and checks their values but the labels.

    Raises:
      UserError: If a column is missing, or a text or a group; names its row.
    """
    text, label, group = chosen(list(columns), origin, config)
    for row, value in enumerate(columns[text]):
        if not isinstance(value, str):
            raise UserError(
                f"{where[row]} has {shown(value)} for a text in column {text!r}; "
                "expected a string. Correct the row or remove it."
            )
    groups = None
    if group is not None:
        for row, value in enumerate(columns[group]):
            if value is None or value == "":
                raise UserError(
                    f"{where[row]} has no value in the group column {group!r}."
                )
        groups = [str(value) for value in columns[group]]
    return Rows(columns[text], columns[label], groups, where)
