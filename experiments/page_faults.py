"""What does it cost when the system takes freed memory back between two calls?

    python experiments/page_faults.py [--calls 5]

The gradient at the benchmark's shape long-256, which takes and frees half a GiB in each
call: with freed memory kept by the process and with none kept, one call after another
and with a pause before each, in which a virtual machine may hand what is free to its
host. User and system time are those of the process's CPUs; medians over the calls.

Writes results/page_faults.csv.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
from measured import provenance, write_rows
from scaling import gradient_program

from flax_lstm.bench.machine import threads
from flax_lstm.bench.shapes import SHAPES
from flax_lstm.host_memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "page_faults.csv"
PAUSES_S = (0.0, 4.0)


def measure(kept: bool, pause_s: float, calls: int) -> dict[str, Any]:
    """Returns the columns of one process."""
    if kept and not keep_freed_memory():
        raise SystemExit("This C library has no way of keeping freed memory.")
    long = SHAPES["long-256"]
    program, arguments = gradient_program(
        (long.steps, long.batch, long.inputs, long.hidden)
    )
    jax.block_until_ready(program(*arguments))
    taken = []
    for _ in range(calls):
        time.sleep(pause_s)
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        jax.block_until_ready(program(*arguments))
        wall, after = (
            time.perf_counter() - start,
            resource.getrusage(resource.RUSAGE_SELF),
        )
        user, system = (
            after.ru_utime - before.ru_utime,
            after.ru_stime - before.ru_stime,
        )
        faults = after.ru_minflt - before.ru_minflt
        taken.append((1e3 * wall, 1e3 * user, 1e3 * system, faults))
    middle = [statistics.median(column) for column in zip(*taken, strict=True)]
    names = ("wall_p50_ms", "user_p50_ms", "system_p50_ms", "faults_p50")
    return dict(zip(names, (f"{value:.0f}" for value in middle), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        kept, pause_s = asked.one
        print(json.dumps(measure(kept, pause_s, asked.calls)))
        return
    common = provenance(threads=threads())
    rows = []
    for kept in (True, False):
        for pause_s in PAUSES_S:
            one = json.dumps([kept, pause_s])
            command = [sys.executable, __file__, "--one", one]
            done = subprocess.run(
                [*command, "--calls", str(asked.calls)],
                check=True,
                capture_output=True,
                text=True,
            )
            row = {"freed_memory_kept": kept, "pause_s": pause_s, "calls": asked.calls}
            row |= json.loads(done.stdout)
            row |= common
            print(row, flush=True)
            rows.append(row)
    write_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
