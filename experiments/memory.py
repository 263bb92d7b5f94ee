"""How much memory does forward with backward need, of what a backward pass must find?

    python experiments/memory.py

One call of the gradient for each shape, in a process of its own, after a call that
compiled and loaded everything and whose memory went back to the system: there malloc
maps every block of 128 KiB or more by itself, and gives it back when it is freed.

`peak_mib` is what the resident memory grows by during the call, and the inputs. The
weights and the gradient of the outputs, which the caller has, are in no column.
`kept_mib` is what a backward pass must find: inputs, gates, c and h of every step.
`gradients_mib` is what the call is for and hands to the caller: the gradients of the
inputs and of the weights. `plan_mib` is XLA's plan of the same, which knows nothing of
what a kernel allocates: scratch memory, results, and the inputs.

Writes results/memory.csv.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
from measured import provenance, write_rows
from scaling import SHAPES, gradient_program

RESULTS = Path(__file__).parent / "results" / "memory.csv"
MIB = 2**20
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}


def resident(field: str) -> int:
    """Returns VmRSS or VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found, f"no {field} in /proc/self/status"
    return 1024 * int(found[1])


def measure(shape: tuple[int, ...]) -> dict[str, float]:
    """Returns the columns in MiB of one call in this process."""
    steps, rows, size, hidden = shape
    program, arguments = gradient_program(shape)
    jax.block_until_ready(program(*arguments))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    results = jax.block_until_ready(program(*arguments))
    grown = resident("VmHWM") - before
    gradients = sum(array.nbytes for array in jax.tree.leaves(results[1]))
    plan = program.memory_analysis()
    floats = 4 * steps * rows
    return {
        "peak_mib": (grown + floats * size) / MIB,
        "kept_mib": floats * (size + 6 * hidden) / MIB,
        "gradients_mib": gradients / MIB,
        "plan_mib": (
            plan.temp_size_in_bytes + plan.output_size_in_bytes + floats * size
        )
        / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:  # the process of one shape
        print(json.dumps(measure(tuple(asked.one))))
        return
    common = provenance()
    rows = []
    for steps, batch, size, hidden in SHAPES:
        variants = {
            "as it is": (steps, batch, size, hidden),
            "T doubled": (2 * steps, batch, size, hidden),
            "B doubled": (steps, 2 * batch, size, hidden),
        }
        for name, shape in variants.items():
            done = subprocess.run(
                [sys.executable, __file__, "--one", json.dumps(shape)],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | MAPPED,
            )
            found = json.loads(done.stdout)
            working = found["peak_mib"] - found["gradients_mib"]
            row = dict(zip("TBIH", shape, strict=True)) | {"variant": name}
            row |= {key: f"{value:.1f}" for key, value in found.items()}
            row |= {
                "peak_of_kept": f"{found['peak_mib'] / found['kept_mib']:.2f}",
                "of_kept_less_gradients": f"{working / found['kept_mib']:.2f}",
            }
            row |= common
            print(row, flush=True)
            rows.append(row)
    write_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
