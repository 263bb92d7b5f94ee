"""Processes that need not import the package: forks of one that did nothing else.

Half of what a small run costs is importing JAX and what stands on it. Nothing is forked
but that: no device is there yet, and no second thread. The parents take turns, so that
one process does not hash strings as the one before it did.
"""

import atexit
import contextlib
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

PARENT = """
import gc, json, os, signal, socket, sys, threading
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # it waits for none of them
import flax_lstm.cli, flax_lstm.commands.training, flax_lstm.run
assert threading.active_count() == 1
gc.freeze()  # what is here will not become garbage in a fork
asked = socket.socket(fileno=int(sys.argv[1]))
while True:
    message, given, _, _ = socket.recv_fds(asked, 1 << 20, 3)
    if not message:  # the tests are over
        sys.exit()
    if not os.fork():
        break
    for descriptor in given:
        os.close(descriptor)
asked.close()
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
answer, *outputs = given
forked = os.fork()
if forked:  # tells how the other one ends
    for descriptor in outputs:
        os.close(descriptor)
    os.write(answer, b"%d\\n" % forked)
    _, status = os.waitpid(forked, 0)
    os.write(answer, b"%d\\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)
for number, descriptor in enumerate(outputs, 1):
    os.dup2(descriptor, number)
for descriptor in given:
    os.close(descriptor)
code, folder, *sys.argv[1:] = json.loads(message)
os.chdir(folder)
exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
"""


class Parent:
    """A process that has imported the package, and forks.

    Args:
      environment: Its own, and that of its forks.
    """

    def __init__(self, environment: dict[str, str]):
        self._ask, asked = socket.socketpair()
        with asked:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PARENT, str(asked.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # as those of its forks, which are pipes
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=[asked.fileno()],
                env=environment,
            )
        atexit.register(self.end)

    def fork(self, code: str, argv: Sequence[str], folder: str) -> "Fork":
        """Starts a process that runs the code, with these arguments, in a folder."""
        pipes = [os.pipe() for _ in range(3)]
        message = json.dumps([code, folder, *argv]).encode()
        socket.send_fds(self._ask, [message], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        told, *outputs = (os.fdopen(read, encoding="utf-8") for read, _ in pipes)
        if not (pid := told.readline()):
            raise RuntimeError(f"it did not fork: {self._process.communicate()}")
        return Fork(int(pid), told, *outputs)

    def end(self) -> None:
        """Ends it, once the last fork has been made."""
        self._ask.close()
        self._process.communicate()


class Fork:
    """Such a process; as `subprocess.Popen`, as far as the tests need one.

    Attributes:
      pid: Its number.
      returncode: How it ended; None before it is known.
      stdout: Standard output, to be read.
      stderr: Standard error, to be read.
    """

    def __init__(self, pid: int, told: TextIO, stdout: TextIO, stderr: TextIO):
        self.pid = pid
        self.returncode: int | None = None
        self.stdout, self.stderr = stdout, stderr
        self._said: dict[TextIO, tuple[threading.Thread, list[str]]] = {}
        self._watch = threading.Thread(target=self._wait, args=[told], daemon=True)
        self._watch.start()

    def _wait(self, told: TextIO) -> None:
        with told:
            self.returncode = int(told.readline())

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._watch.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Returns what it says on both outputs, those that are open, until it ends."""
        for file in (self.stdout, self.stderr):
            if file not in self._said and not file.closed:
                read = threading.Thread(target=self._read, args=[file], daemon=True)
                self._said[file] = (read, [])
                read.start()
        self.wait(timeout)
        said = []
        for file in (self.stdout, self.stderr):
            read, texts = self._said.get(file, (self._watch, []))
            read.join()
            said.append("".join(texts))
        return said[0], said[1]

    def _read(self, file: TextIO) -> None:
        with file:
            self._said[file][1].append(file.read())


def in_turn(environment: frozenset[tuple[str, str]]) -> Iterator[Parent]:
    """Yields two parents in turn, each of which is made when it is first needed."""
    made = []
    for _ in range(2):
        made.append(Parent(dict(environment)))
        yield made[-1]
    yield from itertools.cycle(made)


parents = functools.cache(in_turn)


def start(
    code: str, argv: Sequence[str], environment: dict[str, str], folder: str | Path
) -> Fork:
    """Runs code that uses the package in a process of its own, in that folder."""
    same = {n: v for n, v in environment.items() if n != "PYTEST_CURRENT_TEST"}
    parent = next(parents(frozenset(same.items())))
    return parent.fork(code, argv, os.path.abspath(folder))
