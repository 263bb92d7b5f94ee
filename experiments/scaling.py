"""How do time and memory of the layer grow with the sequence and the batch?

    python experiments/scaling.py [--rounds 9]

Time: forward, and forward with backward, at a shape, at twice the steps and at twice
the rows, in alternating rounds (`flax_lstm.bench.timing`).

Memory: of forward with backward, one call in a process of its own. `peak_mib` is what
the resident memory grows by during the call, its results included, and the inputs;
`kept_mib` is what a backward pass must find: inputs, gates, c and h of every step. The
weights and the gradient of the outputs, which the caller has, are in neither.

Writes results/scaling.csv.
"""

import argparse
import csv
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from flax_lstm import environment, init_lstm_params, lstm
from flax_lstm.bench.machine import threads
from flax_lstm.bench.timing import alternate

RESULTS = Path(__file__).parent / "results" / "scaling.csv"
# (T, B, I, H): the tutorial's first layer, reinforcement learning, a language model.
SHAPES = ((40, 256, 300, 128), (128, 256, 256, 256), (70, 64, 1024, 1024))
MIB = 2**20


def programs(shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns compiled calls without arguments of both modes."""
    steps, rows, size, hidden = shape
    keys = jax.random.split(jax.random.key(0), 3)
    params = init_lstm_params(keys[0], size, hidden)
    x = jax.random.normal(keys[1], (steps, rows, size))
    d_y = jax.random.normal(keys[2], (steps, rows, hidden))

    def gradient(params, x, d_y):
        y, transpose = jax.vjp(lambda p, x: lstm(p, x)[1], params, x)
        return y, transpose(d_y)

    forward = jax.jit(lstm).lower(params, x).compile()
    both = jax.jit(gradient).lower(params, x, d_y).compile()
    return {
        "forward": lambda: jax.block_until_ready(forward(params, x)),
        "gradient": lambda: jax.block_until_ready(both(params, x, d_y)),
    }


def resident(field: str) -> int:
    """Returns VmRSS or VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found, f"no {field} in /proc/self/status"
    return 1024 * int(found[1])


def memory(shape: tuple[int, ...]) -> dict[str, float]:
    """Returns the peak of one call in this process, and what must be kept, in MiB."""
    steps, rows, size, hidden = shape
    call = programs(shape)["gradient"]
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    results = call()
    grown = resident("VmHWM") - before
    del results
    floats = 4 * steps * rows
    return {
        "peak_mib": (grown + floats * size) / MIB,
        "kept_mib": floats * (size + 6 * hidden) / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory:
        print(json.dumps(memory(tuple(asked.memory))))
        return
    facts = environment.describe(tuple(jax.devices()[:1]))
    common = {
        "device": facts["devices"][0],
        "threads": threads(),
        "jax": facts["packages"]["jax"],
        "commit": facts["commit"],
        "date": datetime.date.today().isoformat(),
    }
    rows = []
    for steps, batch, size, hidden in SHAPES:
        variants = {
            "as it is": (steps, batch, size, hidden),
            "T doubled": (2 * steps, batch, size, hidden),
            "B doubled": (steps, 2 * batch, size, hidden),
        }
        made = {name: programs(shape) for name, shape in variants.items()}
        for mode in ("forward", "gradient"):
            cases = {name: made[name][mode] for name in variants}
            taken = alternate(cases, rounds=asked.rounds, budget_s=0.0)
            base = taken["as it is"].quartiles[1]
            for name, (t, b, _, _) in variants.items():
                low, middle, high = (1e3 * s for s in taken[name].quartiles)
                row = {"T": t, "B": b, "I": size, "H": hidden, "mode": mode}
                row |= {
                    "variant": name,
                    "p25_ms": f"{low:.3f}",
                    "p50_ms": f"{middle:.3f}",
                    "p75_ms": f"{high:.3f}",
                    "ratio": f"{middle * 1e-3 / base:.2f}",
                    "peak_mib": "",
                    "kept_mib": "",
                    "peak_of_kept": "",
                }
                if mode == "gradient":
                    found = in_a_process_of_its_own(variants[name])
                    row |= {key: f"{value:.1f}" for key, value in found.items()}
                    share = found["peak_mib"] / found["kept_mib"]
                    row["peak_of_kept"] = f"{share:.2f}"
                print(row, flush=True)
                rows.append(row | common)
        del made, cases
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def in_a_process_of_its_own(shape: tuple[int, ...]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--memory", json.dumps(shape)],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
