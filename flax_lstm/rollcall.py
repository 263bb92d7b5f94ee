"""Waits until every process of a run has come to one address, and tells who has not.

JAX's own service ends a process with a stack trace where others stay away, and does not
say which. So the processes meet first over plain sockets, at the address where the
service starts next. Only small numbers are exchanged, as text.
"""

import contextlib
import socket
import time

from flax_lstm.config import UserError

LINE_LIMIT = 4096
"""Bytes read of a line at the most."""
CALL_LIMIT_S = 2.0
"""Time that a caller has to say its number."""


def roll_call(address: str, process: int, count: int, limit_s: float) -> None:
    """Returns once all processes have called; process 0 waits at the address.

    Args:
      address: HOST:PORT of process 0.
      process: Number of this process, below `count`.
      count: Number of processes.
      limit_s: Seconds to wait.

    Raises:
      UserError: If the numbers do not fit together, as two processes of one number.
      ConnectionError: If not all came in time; names the missing where they are known.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + limit_s
    if process == 0:
        _answer(int(port), address, count, until, limit_s)
    else:
        _report(host, int(port), address, process, count, until, limit_s)


def _answer(port: int, address: str, count: int, until: float, limit_s: float) -> None:
    """Hears all others, then tells each "go", or what is wrong."""
    present: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", port)))
        except OSError as error:
            raise UserError(
                f"process 0 cannot wait at {address}: {error.strerror}; give a port of "
                "this machine that is free."
            ) from error

        def tell_all(line: str) -> None:
            for other in present.values():
                with contextlib.suppress(OSError):  # it is gone, and shows so later
                    other.sendall(f"{line}\n".encode())

        while len(present) < count - 1:
            left = until - time.monotonic()
            server.settimeout(max(left, 0.01))
            try:
                caller, _ = server.accept()
            except TimeoutError:
                missing = [n for n in range(1, count) if n not in present]
                why = (
                    f"processes {missing} of {count} did not come to {address} within "
                    f"{limit_s:.0f} s; start them with --process-id, or give the right "
                    "--process-count"
                )
                tell_all(why)
                raise ConnectionError(f"{why}.") from None
            stack.enter_context(caller)
            caller.settimeout(CALL_LIMIT_S)
            try:
                said = _read_line(caller).split()
            except OSError:
                continue  # hung up, or said nothing
            if len(said) != 3 or said[0] != "flax-lstm" or not _numbers(said[1:]):
                continue  # a stranger
            number, its_count = int(said[1]), int(said[2])
            wrong = None
            if its_count != count:
                wrong = f"process {number} was told of {its_count} processes, process "
                wrong += f"0 of {count}; give all the same --process-count"
            elif not 0 < number < count or number in present:
                wrong = f"two processes at {address} have the number {number}; give "
                wrong += "each its own --process-id"
            if wrong:
                present[-1] = caller
                tell_all(wrong)
                raise UserError(f"{wrong}.")
            present[number] = caller
        tell_all("go")


def _report(
    host: str,
    port: int,
    address: str,
    process: int,
    count: int,
    until: float,
    limit_s: float,
) -> None:
    """Calls process 0 until it answers."""
    while True:
        try:
            call = socket.create_connection((host, port), timeout=1)
            break
        except OSError as error:
            if time.monotonic() > until:
                raise ConnectionError(
                    f"process {process} found no process 0 at {address} within "
                    f"{limit_s:.0f} s ({error}); start it, or give its address."
                ) from error
            time.sleep(0.1)
    with call:
        # A moment more than process 0 waits, so that it can say who is missing.
        call.settimeout(max(until - time.monotonic(), 0) + 5)
        try:
            call.sendall(f"flax-lstm {process} {count}\n".encode())
            said = _read_line(call)
        except OSError as error:
            raise ConnectionError(
                f"process {process} lost process 0 at {address}: {error}."
            ) from error
    if not said:
        raise ConnectionError(f"process 0 at {address} has ended; see what it said.")
    if said != "go":
        raise UserError(f"{said}.")


def _read_line(peer: socket.socket) -> str:
    """Returns what comes until the end of a line or of the connection."""
    said = b""
    while not said.endswith(b"\n") and len(said) < LINE_LIMIT:
        more = peer.recv(LINE_LIMIT)
        if not more:
            break
        said += more
    return said.decode("utf-8", "replace").strip()


def _numbers(words: list[str]) -> bool:
    return all(word.isdecimal() and word.isascii() for word in words)
