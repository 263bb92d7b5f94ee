"""Signals within this process; those that end one are tested in tests/faults."""

import os
import signal
import threading

import pytest

from flax_lstm.commands.signals import ENDING, exit_code, listening
from flax_lstm.stopping import Stop, Stopped


@pytest.mark.parametrize("number", ENDING)
def test_the_first_signal_asks_and_everything_is_put_back(number):
    before = {n: signal.getsignal(n) for n in ENDING}
    was = signal.signal(number, signal.SIG_DFL)  # a shell may have had it ignored
    threads, files = threading.active_count(), len(os.listdir("/dev/fd"))
    stop = Stop()
    try:
        with listening(stop), stop.deferred():
            os.kill(os.getpid(), number)
            assert stop.reason == number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, was)
    assert {n: signal.getsignal(n) for n in ENDING} == before
    assert threading.active_count() == threads
    assert len(os.listdir("/dev/fd")) == files


def test_a_signal_raises_where_nothing_is_to_be_saved():
    with pytest.raises(Stopped), listening(Stop()):
        os.kill(os.getpid(), signal.SIGTERM)


def test_exit_codes_are_those_of_a_shell():
    assert sorted(exit_code(n) for n in ENDING) == [129, 130, 143]
