"""How does the time of the layer grow with the sequence and the batch?

    python experiments/scaling.py [--rounds 9]

Forward, and forward with backward, at a shape, at twice the steps and at twice the
rows, in alternating rounds (`flax_lstm.bench.timing`). Freed memory is kept for the
next call, as in `flax-lstm train` and `flax-lstm bench`.

Writes results/scaling.csv.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
from measured import provenance, write_rows

from flax_lstm import init_lstm_params, lstm
from flax_lstm.bench.machine import threads
from flax_lstm.bench.timing import alternate
from flax_lstm.host_memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "scaling.csv"
# (T, B, I, H): the tutorial's first layer, reinforcement learning, a language model.
SHAPES = ((40, 256, 300, 128), (128, 256, 256, 256), (70, 64, 1024, 1024))


def programs(shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns compiled calls without arguments of both modes."""
    both, (params, x, d_y) = gradient_program(shape)
    forward = jax.jit(lstm).lower(params, x).compile()
    return {
        "forward": lambda: jax.block_until_ready(forward(params, x)),
        "gradient": lambda: jax.block_until_ready(both(params, x, d_y)),
    }


def gradient_program(shape: tuple[int, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Returns the compiled gradient, which also returns the outputs, and arguments."""
    steps, rows, size, hidden = shape
    keys = jax.random.split(jax.random.key(0), 3)
    params = init_lstm_params(keys[0], size, hidden)
    x = jax.random.normal(keys[1], (steps, rows, size))
    d_y = jax.random.normal(keys[2], (steps, rows, hidden))

    def gradient(params, x, d_y):
        y, transpose = jax.vjp(lambda p, x: lstm(p, x)[1], params, x)
        return y, transpose(d_y)

    arguments = (params, x, d_y)
    return jax.jit(gradient).lower(*arguments).compile(), arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    kept = keep_freed_memory()
    common = provenance(threads=threads(), freed_memory_kept=kept)
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
                }
                print(row, flush=True)
                rows.append(row | common)
        del made, cases
    write_rows(RESULTS, rows)


if __name__ == "__main__":
    main()
