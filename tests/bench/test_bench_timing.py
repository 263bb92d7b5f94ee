"""Alternating rounds, with a clock that only the cases move."""

import gc

import pytest

from flax_lstm.bench.timing import SAMPLE_S, Samples, alternate


class Clock:
    """Time that passes by the calls of cases and by pauses."""

    def __init__(self):
        self.now, self.order, self.pauses = 0.0, [], 0
        self.collecting = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses += 1
        self.now += seconds

    def case(self, name: str, *seconds: float):
        """A case whose calls take these times one after another, the last for ever."""
        left = list(seconds)

        def call():
            self.order.append(name)
            self.collecting.append(gc.isenabled())
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_every_round_gives_each_case_a_turn_in_another_order():
    clock = Clock()
    cases = {name: clock.case(name, 1.0) for name in "abc"}
    found = alternate(
        cases, rounds=30, budget_s=0.0, pause_s=0.5, clock=clock, sleep=clock.sleep
    )
    turns = clock.order[6:]  # after two calls to warm up each
    orders = {"".join(turns[at : at + 3]) for at in range(0, 90, 3)}
    assert orders == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert clock.pauses == 90
    assert {name: len(one.seconds) for name, one in found.items()} == {
        "a": 30,
        "b": 30,
        "c": 30,
    }


def test_samples_are_what_each_turn_took_without_the_pause():
    clock = Clock()
    # The first two calls warm up.
    case = clock.case("a", 9.0, 9.0, 1.0, 4.0, 2.0, 3.0, 5.0)
    found = alternate(
        {"a": case}, rounds=5, budget_s=0.0, pause_s=7.0, clock=clock, sleep=clock.sleep
    )
    assert found["a"].seconds == pytest.approx((1, 4, 2, 3, 5))
    assert found["a"].quartiles == pytest.approx((2, 3, 4))
    assert found["a"].calls == 1


def test_short_calls_are_repeated_until_a_turn_is_long_enough():
    clock = Clock()
    case = clock.case("a", 1e-5)
    found = alternate(
        {"a": case}, rounds=2, budget_s=0.0, clock=clock, sleep=clock.sleep
    )
    assert found["a"].calls * 1e-5 == pytest.approx(SAMPLE_S, rel=0.01)
    assert found["a"].seconds == pytest.approx((1e-5, 1e-5))


def test_rounds_go_on_within_the_budget():
    clock = Clock()
    case = clock.case("a", 1.0)
    found = alternate(
        {"a": case}, rounds=2, budget_s=9.5, pause_s=0.0, clock=clock, sleep=clock.sleep
    )
    assert len(found["a"].seconds) == 10


def test_garbage_is_not_collected_during_a_round():
    clock = Clock()
    alternate({"a": clock.case("a", 1.0)}, rounds=2, budget_s=0.0, sleep=clock.sleep)
    assert not any(clock.collecting[2:])
    assert gc.isenabled()


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1; got 0"):
        alternate({}, rounds=0)


def test_no_case_gives_no_samples():
    assert alternate({}, rounds=1, budget_s=0.0) == {}


def test_quartiles_of_a_single_round_are_its_time():
    assert Samples((2.0,), 1).quartiles == (2.0, 2.0, 2.0)
