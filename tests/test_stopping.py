"""A request to stop: an exception where nothing is to be saved, else a flag."""

import pytest

from flax_lstm.stopping import Stop, Stopped


def test_a_request_raises_at_once_where_nothing_is_to_be_saved():
    stop = Stop()
    stop.check()
    with pytest.raises(Stopped) as stopped:
        stop.ask(15)
    assert stopped.value.reason == 15
    assert not isinstance(stopped.value, Exception)


def test_a_deferred_request_waits_for_who_looks_at_it():
    stop = Stop()
    with stop.deferred():
        assert stop.reason is None
        stop.ask(2)
        stop.check()
        assert stop.reason == 2
    with pytest.raises(Stopped, match="before anything was to be saved"):
        stop.check()


def test_an_error_ends_the_deferral_too():
    stop = Stop()
    with pytest.raises(KeyError), stop.deferred():
        raise KeyError
    with pytest.raises(Stopped):
        stop.ask(1)
