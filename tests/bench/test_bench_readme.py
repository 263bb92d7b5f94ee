"""The README's list of columns is that of the code."""

import re
from pathlib import Path

from flax_lstm.bench.results import COLUMNS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_readme_numbers_every_column_in_order():
    section = README.split("## Benchmarks")[1].split("\n## ")[0]
    found = re.findall(r"^(\d+)\. `(\w+)`: (.*(?:\n +.*)*)", section, re.MULTILINE)
    assert [int(number) for number, *_ in found] == list(range(1, len(COLUMNS) + 1))
    said = {name: " ".join(words.split()) for _, name, words in found}
    assert said == COLUMNS
