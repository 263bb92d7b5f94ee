"""What does the derivative of the sequence cost: "xla" against "scan"?

Value and gradient of one layer with respect to weights and inputs, float32. The
implementations take turns within one process, so that a busy moment of the machine
meets both; time is that of the process's CPUs, which counts no waiting for others.

    python experiments/derivative_cost.py [--rounds 15]

Writes experiments/results/derivative_cost.csv: times as percentiles over the rounds,
peak memory as XLA plans it (scratch and results).
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measured import provenance, write_rows

import flax_lstm as fl
from flax_lstm.derivative import Options, recurrence

RESULTS = Path(__file__).parent / "results" / "derivative_cost.csv"
# T, B, I, H: the two that the derivative was tuned at, a wide one, a tutorial's layer,
# and a long one for memory.
SHAPES = (
    (128, 64, 256, 256),
    (128, 32, 512, 512),
    (32, 16, 1024, 1024),
    (40, 256, 300, 128),
    (1024, 8, 256, 256),
)


def arranged(**options: bool) -> Any:
    """Returns the recurrence in an arrangement that need not be the default here."""

    def run(params, inputs, state):
        return recurrence(Options(**options), params, inputs, state, None, None)

    return run


def by_name(implementation: Any, **options: Any) -> Any:
    def run(params, inputs, state):
        return fl.lstm(params, inputs, state, implementation=implementation, **options)

    return run


CANDIDATES = {
    "scan": by_name("scan"),
    "xla": by_name("xla"),
    "xla, inputs multiplied first": arranged(hoist=True, flatten=True),
    "xla, time and batch apart": arranged(hoist=False, flatten=False),
    "xla, remat": by_name("xla", remat=True),
}


def measure(shape: tuple[int, int, int, int], rounds: int) -> list[dict[str, Any]]:
    """Returns a row for each candidate."""
    steps, batch, size, hidden = shape
    keys = jax.random.split(jax.random.key(0), 3)
    params = fl.init_lstm_params(keys[0], size, hidden)
    inputs = jax.random.normal(keys[1], (steps, batch, size))
    weights = jax.random.normal(keys[2], (steps, batch, hidden))
    state = fl.zero_state((batch,), hidden)

    def gradient(run):
        def loss(params, inputs):
            return jnp.sum(run(params, inputs, state)[1] * weights)

        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, inputs).compile()

    compiled = {name: gradient(run) for name, run in CANDIDATES.items()}
    want = compiled["scan"](params, inputs)
    for name, call in compiled.items():
        for got, wanted in zip(
            jax.tree.leaves(call(params, inputs)), jax.tree.leaves(want), strict=True
        ):
            error = jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)
            if not error < 1e-5:
                raise AssertionError(f"{name} differs from the scan by {error}.")
    taken: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, call in compiled.items():
            start = time.process_time()
            jax.block_until_ready(call(params, inputs))
            taken[name].append(1e3 * (time.process_time() - start))
    rows = []
    for name, call in compiled.items():
        memory: Any = call.memory_analysis()
        peak = memory.temp_size_in_bytes + memory.output_size_in_bytes
        p20, p50, p80 = np.percentile(taken[name], [20, 50, 80])
        rows.append(
            {
                "op": "lstm",
                "implementation": name,
                "mode": "value and gradient",
                "T": steps,
                "B": batch,
                "D": size,
                "H": hidden,
                "dtype": "float32",
                "p20_ms": f"{p20:.1f}",
                "p50_ms": f"{p50:.1f}",
                "p80_ms": f"{p80:.1f}",
                "peak_mib": f"{peak / 2**20:.1f}",
            }
        )
    return rows


def processor() -> str:
    """Returns the name of the processor and the number of CPUs, or the device's."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else 'cpu'} x{len(names)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    common = provenance() | {"device": processor()}
    rows = []
    for shape in SHAPES:
        found = measure(shape, options.rounds)
        base = found[0]
        for row in found:
            speed = float(base["p50_ms"]) / float(row["p50_ms"])
            memory = float(row["peak_mib"]) / float(base["peak_mib"])
            print(
                f"T B D H {shape} {row['implementation']:30} {row['p50_ms']:>8} ms "
                f"{row['peak_mib']:>7} MiB   {speed:.2f}x as fast as the scan, "
                f"{memory:.2f} of its memory",
                flush=True,
            )
        rows += [row | common for row in found]
    options.output.parent.mkdir(exist_ok=True)
    write_rows(options.output, rows)


if __name__ == "__main__":
    main()
