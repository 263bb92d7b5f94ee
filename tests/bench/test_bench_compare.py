"""A verdict only where the quartiles part, and only on the same work."""

import pytest

from flax_lstm.bench.compare import compare, compare_rows


def row(low: float, median: float, high: float, **changed: object) -> dict:
    return {
        "implementation": "ours",
        "shape": "rl-256",
        "dtype": "float32",
        "mode": "forward",
        "status": "timed",
        "batch": 1,
        "steps": 2,
        "inputs": 3,
        "hidden": 4,
        "tokens": 2,
        "lengths": "-",
        "resets": "yes",
        "device": "cpu cpu",
        "processor": "a x2",
        "threads": 2,
        "q25_ms": low,
        "median_ms": median,
        "q75_ms": high,
    } | changed


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ((4, 5, 8.9), "faster"),
        ((4, 5, 9.1), "no difference seen"),
        ((10.9, 12, 13), "no difference seen"),
        ((11.1, 12, 13), "slower"),
        ((9, 10, 11), "no difference seen"),
    ],
)
def test_a_verdict_needs_quartiles_apart(after, verdict):
    found = compare_rows(row(9, 10, 11), row(*after))
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(10 / after[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lengths", "padded"),
        ("resets", "ignored"),
        ("threads", 1),
        ("device", "gpu H100"),
        ("processor", "b x2"),
        ("hidden", 5),
        ("tokens", 3),
    ],
)
def test_other_work_is_refused_with_the_reason(name, value):
    found = compare_rows(row(9, 10, 11), row(1, 2, 3, **{name: value}))
    assert found.verdict == "refused"
    assert found.ratio is None
    assert name in found.reason
    assert str(value) in found.reason


def test_a_row_that_was_not_timed_is_refused():
    found = compare_rows(row(9, 10, 11), row(9, 10, 11, status="wrong"))
    assert (found.verdict, found.reason) == ("refused", "wrong in the second run")


def test_rows_of_one_run_only_are_refused():
    keys = ("ours", "other")
    first, second = (row(1, 1, 1, implementation=name) for name in keys)
    shared = row(1, 1, 1, mode="gradient")
    found = compare([first, shared], [second, shared])
    assert [(one.key[0], one.verdict, one.reason) for one in found] == [
        ("other", "refused", "only in the second run"),
        ("ours", "no difference seen", ""),
        ("ours", "refused", "only in the first run"),
    ]
