"""Rows end to end: cut where the offsets say, and refused where they cannot be."""

import numpy as np
import pytest

from flax_lstm.examples import Examples


def test_take_gives_rows_in_the_given_order():
    texts = [np.arange(10 * row, 10 * row + row % 4) for row in range(10)]
    examples = Examples.from_rows(texts, [row % 3 == 0 for row in range(10)])
    picked = examples.take(np.array([7, 0, 7, 3]))
    assert len(picked) == 4
    for place, row in enumerate([7, 0, 7, 3]):
        assert np.array_equal(picked[place][0], texts[row])
        assert np.array_equal(picked[place][0], examples[row][0])
        assert picked[place][1] == examples[row][1]
    assert picked[-1][1] == examples[3][1]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 2], "2 labels need 3 offsets"),
        ([0, 4, 3], "rise from 0 to 3.* length -1 at row 1"),
        ([0, 2, 4], "rise from 0 to 3, .* got 0 to 4"),
        ([1, 2, 3], "rise from 0 to 3, .* got 1 to 3"),
    ],
)
def test_lengths_that_do_not_fit_the_tokens_are_refused(offsets, message):
    tokens, labels = np.array([5, 6, 7], np.int32), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=message):
        Examples(tokens, np.array(offsets), labels)


@pytest.mark.parametrize("id_", [10, -1])
def test_an_id_outside_the_vocabulary_names_its_row(id_):
    rows = [np.array([1, 2]), np.array([], int), np.array([9, id_])]
    examples = Examples.from_rows(rows, [0, 1, 0])
    with pytest.raises(ValueError, match=rf"token id {id_} in row 2 .* of 10 words"):
        examples.check_ids(10)
    assert Examples.from_rows(rows[:2], [0, 1]).check_ids(3) is not None
