"""Memory that stays with the process, seen by the pages that the kernel maps."""

import os
import subprocess
import sys

import pytest

from flax_lstm import host_memory

MEBIBYTES, TIMES = 64, 5
# Allocates, writes and frees; prints the pages mapped after the first time.
PROGRAM = f"""
import ctypes, resource, sys
from flax_lstm.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
c.malloc.argtypes = [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
for number in range({TIMES}):
    if number == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = c.malloc({MEBIBYTES} << 20)
    ctypes.memset(block, 1, {MEBIBYTES} << 20)
    c.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_mapped(what: str, **variables: str) -> list[str]:
    free = {n: v for n, v in os.environ.items() if not n.startswith("MALLOC_")}
    free.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what],
        capture_output=True,
        text=True,
        env=free | variables,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_blocks_freed_are_used_again_and_their_pages_stay():
    """Without it, every block after the first is mapped again, page by page."""
    kept, *pages = pages_mapped("keep")
    if kept == "False":
        pytest.skip("the C library is not glibc")
    again = (TIMES - 1) * (MEBIBYTES << 20) // os.sysconf("SC_PAGE_SIZE")
    assert int(pages[0]) < again / 100


def test_what_the_environment_says_is_left_alone():
    kept, _ = pages_mapped("keep", MALLOC_ARENA_MAX="2")
    assert kept == "False"


def test_the_memory_of_the_machine_is_that_of_proc():
    try:
        with open("/proc/meminfo") as file:
            total = int(file.readline().split()[1])
    except OSError:
        pytest.skip("no /proc/meminfo")
    assert host_memory.machine_bytes() == total * 1024
