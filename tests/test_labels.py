"""Which two classes there are, and which is positive; every other form is refused."""

from decimal import Decimal

import pytest

from flax_lstm.config import UserError
from flax_lstm.labels import classes_named, find_classes, tally, to_numbers


def where(labels):
    return [f"row {i + 1} of FILE" for i in range(len(labels))]


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        ([0, 1, 1], [0, 1, 1]),
        (["1", "0", "1.0"], [1, 0, 1]),
        ([1.0, 0.0, 1], [1, 0, 1]),
        ([-1, 1], [0, 1]),
        (["0e0", "1e0", "1E+00", "0.000e+00"], [0, 1, 1, 0]),
        (["5e0", "1e1", "10", "5."], [0, 1, 1, 0]),
        ([Decimal("0.00"), Decimal("1.00"), 1], [0, 1, 1]),
        (["1_0", "10_0"], [1, 0]),  # words, in the order of the alphabet
        ([2, 1, 2], [1, 0, 1]),
        ([True, False], [1, 0]),
        (["TRUE", "false", " true "], [1, 0, 1]),
        (["pos", "neg"], [1, 0]),
        (["Positive", "Negative", "positive"], [1, 0, 1]),
        (["Bearish", "Bullish"], [0, 1]),
        (["yes", "no"], [1, 0]),
        (["good", "meh"], [1, 0]),
        (["bad", "alright"], [0, 1]),
        (["ham", "spam", "ham"], [0, 1, 0]),
    ],
    ids=str,
)
def test_two_classes_in_any_usual_form(labels, want):
    classes = find_classes([tally(labels, where(labels))])
    assert to_numbers(labels, where(labels), classes).tolist() == want


def test_names_are_kept_and_the_rule_is_told():
    labels = ["Positive", "negative", "POSITIVE"]
    classes = find_classes([tally(labels, where(labels))])
    assert classes.names == ("negative", "Positive")
    assert classes.rule == "known words"
    assert "alphabet" in find_classes([tally(["b", "a"], where("ba"))]).rule
    assert "larger" in find_classes([tally([0, 1], where("ba"))]).rule


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, None], "row 3 of FILE has no label"),
        ([0, "", 1], "row 2 of FILE has no label"),
        ([0, 1.5, 1], "row 2 of FILE has the label 1.5"),
        (["0", "1.5"], "row 2 of FILE has the label '1.5'"),
        ([0, "5e-1", 1], "row 2 of FILE has the label '5e-1'; a label is a whole"),
        (["0", "1e999"], "row 2 of FILE has the label '1e999'; a label is a whole"),
        (["0", "-Infinity"], "row 2 of FILE has the label '-Infinity'; a label is a"),
        ([0, Decimal("0.5"), 1], r"row 2 of FILE has the label Decimal\('0.5'\)"),
        (["1_0", "1", "1"], "row 1 of FILE has the unknown label '1_0'"),
        ([0, float("nan")], "row 2 of FILE has the label nan"),
        ([["a"], 1], r"row 1 of FILE has the label \['a'\]"),
        (["0", "zero", "1", "1"], "row 2 of FILE has the unknown label 'zero'"),
        ([1, 1, 1], "exactly two classes; found 1: '1' .3 rows, first row 1"),
        ([0, 1, 2, 2], "found 3: .*'2' .2 rows, first row 3 of FILE"),
        ([-3, 0, 1], "found 3: '-3'"),
        (["x" * 99, "b", "c"], "found 3: 'xxxxx[x]*[.][.][.] "),
        ([], "found 0"),
    ],
)
def test_labels_that_are_not_two_classes_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        find_classes([tally(labels, where(labels))])


def test_numbers_too_long_for_a_float_stay_what_they_are():
    """A float holds 15 digits; the last of these is the 20th."""
    labels = ["12345678901234567890", "12345678901234567891.0", "12345678901234567890"]
    classes = find_classes([tally(labels, where(labels))])
    assert to_numbers(labels, where(labels), classes).tolist() == [0, 1, 0]


def test_another_source_must_use_the_labels_of_the_run():
    classes = classes_named(("bearish", "Bullish"))
    assert to_numbers(["BULLISH", "bearish"], where("ab"), classes).tolist() == [1, 0]
    with pytest.raises(
        UserError, match="row 1 of FILE has the label 'up'; expected 'bearish' or"
    ):
        to_numbers(["up"], where("a"), classes)
