"""The roll call, by threads that stand for processes."""

import socket
import threading

import pytest

from flax_lstm.config import UserError
from flax_lstm.rollcall import roll_call


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def call_all(*callers, limit_s=10.0):
    """Lets (process, count) pairs call at once; returns the error of each, or None."""
    address, errors = f"localhost:{free_port()}", {}

    def call(number, process, count):
        try:
            roll_call(address, process, count, limit_s)
            errors[number] = None
        except (UserError, ConnectionError) as error:
            errors[number] = error

    threads = [
        threading.Thread(target=call, args=(number, *caller))
        for number, caller in enumerate(callers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return [errors[number] for number in range(len(callers))]


def test_all_go_on_when_all_are_there():
    assert call_all((2, 3), (0, 3), (1, 3)) == [None, None, None]
    assert call_all((0, 1)) == [None]


def test_those_who_come_are_told_who_does_not():
    errors = call_all((0, 4), (2, 4), limit_s=1.0)
    for error in errors:
        assert "processes [1, 3] of 4 did not come to localhost:" in str(error)


def test_nobody_waits_for_a_first_process_that_does_not_come():
    (error,) = call_all((1, 2), limit_s=0.5)
    assert isinstance(error, ConnectionError)
    assert "process 1 found no process 0 at localhost:" in str(error)


def test_two_processes_of_one_number_are_refused():
    first, *others = call_all((0, 3), (1, 3), (1, 3))
    assert isinstance(first, UserError)
    for error in (first, *others):
        assert "two processes at localhost:" in str(error)
        assert "have the number 1" in str(error)


def test_processes_told_of_other_counts_are_refused():
    for error in call_all((0, 2), (1, 3)):
        assert "process 1 was told of 3 processes, process 0 of 2" in str(error)


def test_strangers_are_not_counted():
    port = free_port()
    done = threading.Thread(target=roll_call, args=(f"localhost:{port}", 0, 2, 20.0))
    done.start()
    strangers = (b"other 1 2\n", b"GET / HTTP/1.1\r\n\r\n", b"flax-lstm one 2\n", b"")
    for said in strangers:
        for _ in range(100):
            try:
                stranger = socket.create_connection(("localhost", port), timeout=5)
                break
            except ConnectionRefusedError:
                threading.Event().wait(0.05)
        with stranger:
            stranger.sendall(said)
    assert done.is_alive()
    roll_call(f"localhost:{port}", 1, 2, 10.0)
    done.join(10)
    assert not done.is_alive()


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot wait at localhost:{port}"):
            roll_call(f"localhost:{port}", 0, 2, 1.0)
