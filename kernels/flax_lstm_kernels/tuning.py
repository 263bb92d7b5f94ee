"""Plans that were measured to be better than the heuristic's, as data.

`tuning.csv` has a row for each, written by `experiments/tune_kernels.py` on the device
itself. What is not in it is planned by the heuristic of the kernel.

Axes     B batch, H hidden size as the kernel counts it: on a TPU in whole lanes.
"""

import csv
import functools
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_name("tuning.csv")


class Key(NamedTuple):
    """What a plan is looked up by.

    Attributes:
      kernel: "tpu", or the name of the GPU's kernel.
      which: "forward" or "backward".
      device: `device_kind` of a TPU, compute capability of a GPU.
      hidden: H.
      rows: B.
      itemsize: Bytes of the computation dtype.
    """

    kernel: str
    which: str
    device: str
    hidden: int
    rows: int
    itemsize: int


# Times in microseconds, of the plan and of the heuristic's.
FIELDS = (*Key._fields, "plan", "time", "heuristic_time", "jax")


def find(key: Key) -> dict[str, int]:
    """Returns the fields of the plan to use; none where the heuristic decides."""
    return read(TABLE).get(key, {})


@functools.cache
def read(path: Path) -> dict[Key, dict[str, int]]:
    """Reads a table of tuned plans."""
    with path.open(newline="", encoding="utf-8") as file:
        return {key_of(row): fields_of(row["plan"]) for row in csv.DictReader(file)}


def key_of(row: dict[str, str]) -> Key:
    """Returns what a row of the table is looked up by."""
    texts = {name: row[name] for name in Key._fields}
    numbers = {name: int(row[name]) for name in ("hidden", "rows", "itemsize")}
    return Key(**{**texts, **numbers})  # pyright: ignore[reportArgumentType]


def text_of(fields: dict[str, Any]) -> str:
    """Writes numbers of a plan as one text; what is no number is left out.

    >>> text_of({"kernel": "single", "rows": 8, "fused": True})
    'rows=8 fused=1'
    """
    numbers = {name: v for name, v in fields.items() if isinstance(v, int)}
    return " ".join(f"{name}={int(value)}" for name, value in numbers.items())


def fields_of(text: str) -> dict[str, int]:
    """Reads what `text_of` wrote.

    >>> fields_of("rows=8 fused=1")
    {'rows': 8, 'fused': 1}
    """
    return {name: int(v) for name, v in (part.split("=") for part in text.split())}
