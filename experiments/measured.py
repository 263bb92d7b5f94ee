"""What scripts of measurement share: where a row came from, and the file of rows."""

import csv
import datetime
from pathlib import Path
from typing import Any

import jax

from flax_lstm import environment


def provenance(**more: Any) -> dict[str, Any]:
    """Returns device, versions, commit and date, with further columns before them."""
    facts = environment.describe(tuple(jax.devices()[:1]))
    return {
        "device": facts["devices"][0],
        **more,
        "jax": facts["packages"]["jax"],
        "commit": facts["commit"],
        "date": datetime.date.today().isoformat(),
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows of the same columns as csv, in place of what was there."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
