"""The eight ablations of "LSTM: A Search Space Odyssey" on a small task.

Greff, Srivastava, Koutník, Steunebrink & Schmidhuber (2017), section 3: each variant
takes one thing away from the vanilla LSTM, which has peepholes, or adds one. Each is a
few lines here, and runs over time by the same `scan_cell` as every cell.

    python experiments/ablations.py [--steps 300] [--seeds 3]

The task: add the two numbers of a sequence that are marked (Hochreiter & Schmidhuber
1997, task 4, with marks anywhere in 20 steps). The error of a network that does not
listen is 1/6. Writes experiments/results/ablations.csv.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measured import provenance, write_rows

from flax_lstm import LSTMState, scan_cell, zero_state
from flax_lstm.cell import preactivate
from flax_lstm.variants import PeepholeParams, init_peephole_params

RESULTS = Path(__file__).parent / "results" / "ablations.csv"
STEPS, BATCH, HIDDEN = 20, 64, 16
sigmoid, tanh = jax.nn.sigmoid, jnp.tanh


def vanilla(
    params: PeepholeParams,
    state: LSTMState,
    x: Any,
    *,
    input_gate: Any = sigmoid,
    forget_gate: Any = sigmoid,
    output_gate: Any = sigmoid,
    input_activation: Any = tanh,
    output_activation: Any = tanh,
    coupled: bool = False,
    peepholes: bool = True,
) -> tuple[LSTMState, Any]:
    """The paper's equations, with a place for each change."""
    i, f, g, o = jnp.split(preactivate(params, state.h, x), 4, axis=-1)
    p = params.peephole if peepholes else jnp.zeros_like(params.peephole)
    p_i, p_f, p_o = (jnp.broadcast_to(row, i.shape) for row in p)
    i = input_gate(i + p_i * state.c)
    f = 1 - i if coupled else forget_gate(f + p_f * state.c)
    c = f * state.c + i * input_activation(g)
    h = output_gate(o + p_o * c) * output_activation(c)
    return LSTMState(c, h), h


def full_gate_recurrence(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
    """FGR: every gate also sees all gates of the step before."""
    inner, gates = state
    h, c = inner.h, inner.c
    z = preactivate(params["cell"], h, x)
    z_i, z_f, g, z_o = jnp.split(z, 4, axis=-1)
    r_i, r_f, r_o = jnp.split(gates @ params["gates"], 3, axis=-1)
    p_i, p_f, p_o = (jnp.broadcast_to(p, c.shape) for p in params["cell"].peephole)
    i, f = sigmoid(z_i + p_i * c + r_i), sigmoid(z_f + p_f * c + r_f)
    c = f * c + i * tanh(g)
    o = sigmoid(z_o + p_o * c + r_o)
    h = o * tanh(c)
    return (LSTMState(c, h), jnp.concatenate([i, f, o], axis=-1)), h


def identity(z: Any) -> Any:
    return z


VARIANTS = {
    "V (vanilla)": vanilla,
    "NIG (no input gate)": partial(vanilla, input_gate=jnp.ones_like),
    "NFG (no forget gate)": partial(vanilla, forget_gate=jnp.ones_like),
    "NOG (no output gate)": partial(vanilla, output_gate=jnp.ones_like),
    "NIAF (no input activation)": partial(vanilla, input_activation=identity),
    "NOAF (no output activation)": partial(vanilla, output_activation=identity),
    "CIFG (coupled gates)": partial(vanilla, coupled=True),
    "NP (no peepholes)": partial(vanilla, peepholes=False),
    "FGR (full gate recurrence)": full_gate_recurrence,
}


def task(key: Any) -> tuple[Any, Any]:
    """Returns inputs `[T, B, 2]`, and the sums `[B]` of marked numbers."""
    key_n, key_m = jax.random.split(key)
    numbers = jax.random.uniform(key_n, (STEPS, BATCH))
    order = jnp.argsort(jax.random.uniform(key_m, (STEPS, BATCH)), axis=0)
    marks = (order < 2).astype(numbers.dtype)
    return jnp.stack([numbers, marks], axis=-1), jnp.sum(numbers * marks, axis=0)


def train(name: str, seed: int, steps: int) -> float:
    """Returns the mean squared error on fresh sequences after `steps` updates."""
    cell = VARIANTS[name]
    key_c, key_g, key_t, key_e = jax.random.split(jax.random.key(seed), 4)
    params: Any = init_peephole_params(key_c, 2, HIDDEN)
    state: Any = zero_state((BATCH,), HIDDEN)
    if cell is full_gate_recurrence:
        shape = (3 * HIDDEN, 3 * HIDDEN)
        gates = 0.1 * jax.random.normal(key_g, shape)
        params = {"cell": params, "gates": gates}
        state = (state, jnp.zeros((BATCH, 3 * HIDDEN)))
    weights = {"cell": params, "out": jnp.zeros(HIDDEN)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))

    def loss(weights, key):
        inputs, sums = task(key)
        _, outputs = scan_cell(cell, weights["cell"], inputs, state)
        return jnp.mean((outputs[-1] @ weights["out"] + 1 - sums) ** 2)

    def update(carry, key):
        weights, optimizer_state = carry
        gradient = jax.grad(loss)(weights, key)
        change, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(weights, change), optimizer_state), None

    @jax.jit
    def run(weights):
        keys = jax.random.split(key_t, steps)
        start = (weights, optimizer.init(weights))
        (weights, _), _ = jax.lax.scan(update, start, keys)
        return jnp.mean(jax.vmap(partial(loss, weights))(jax.random.split(key_e, 8)))

    return float(run(weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="updates of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows, common = [], provenance()
    for name in VARIANTS:
        errors = [train(name, seed, options.steps) for seed in range(options.seeds)]
        rows.append(
            {
                "variant": name,
                "updates": options.steps,
                "seeds": options.seeds,
                "median_error": f"{np.median(errors):.4f}",
                "worst_error": f"{max(errors):.4f}",
            }
            | common
        )
        print(f"{name:28} {rows[-1]['median_error']}", flush=True)
    options.output.parent.mkdir(exist_ok=True)
    write_rows(options.output, rows)


if __name__ == "__main__":
    main()
