"""The memory of this machine: how much there is, and keeping what a step has freed."""

import ctypes
import os
import resource
import sys

# mallopt(3), from malloc.h of glibc.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8


class OutOfMemoryError(MemoryError):
    """There is not enough memory for the settings of a run."""


def machine_bytes() -> int | None:
    """Returns the memory that this process may have: the machine's, or its limit.

    None where the system does not tell.
    """
    try:
        there_is = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    except (AttributeError, ValueError, OSError):
        return None
    return there_is if limit == resource.RLIM_INFINITY else min(limit, there_is)


def keep_freed_memory() -> bool:
    """Lets the next step have the memory that the last one has freed.

    XLA allocates the scratch memory of a program at every call, some tens of MiB for a
    training step. glibc takes blocks of that size from the kernel and returns them at
    once, so each step has all of its pages mapped and zeroed again. After this they
    stay with the process, in one heap for all threads: it grows to its largest step
    and does not shrink.

    To be called before JAX starts its threads, whose heaps would be others. Nothing is
    changed where the environment says how to allocate (`MALLOC_...`, `GLIBC_TUNABLES`).

    Returns:
      Whether it is so now; False where the C library is not glibc.
    """
    told = any(n.startswith("MALLOC_") or n == "GLIBC_TUNABLES" for n in os.environ)
    if told or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    wanted = {
        ARENA_MAX: 1,
        MMAP_MAX: 0,
        TRIM_THRESHOLD: 2**31 - 1,
        TOP_PAD: 2**26,
    }
    return all([library.mallopt(name, value) for name, value in wanted.items()])
