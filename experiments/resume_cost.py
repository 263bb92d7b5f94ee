"""What do verified checkpoints cost: to restore, and to the steps beside a save?

    python experiments/resume_cost.py [--rounds 5]

The state is the classifier's with a large vocabulary: parameters and two slots of
AdamW, some 200 MB. Restoring: Orbax alone, and `Checkpoints`, which also compares the
forms and verifies the SHA-256 of every leaf; they take turns. Saving: the same number
of steps without a save and with one at their beginning, which then runs beside them;
they take turns too. A save is over before a round ends, so that all of it is counted.

Writes results/resume_cost.csv.
"""

import argparse
import csv
import datetime
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from flax_lstm import data, environment, nnx
from flax_lstm.checkpoint import Checkpoints
from flax_lstm.config import ModelConfig, TrainConfig
from flax_lstm.leaves import to_host
from flax_lstm.train import init_train_state, make_optimizer, parallelize

RESULTS = Path(__file__).parent / "results" / "resume_cost.csv"
VOCABULARY, ROWS, LENGTH = 32_000, 64, 40
MODEL = ModelConfig(embedding_size=512)


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Returns wall time, and time of the CPUs, which counts no waiting for others."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    asked = parser.parse_args()
    config = TrainConfig()
    init, apply = nnx.classifier_functions(MODEL, VOCABULARY)
    optimizer = make_optimizer(config, 10_000)
    program = parallelize(apply, optimizer, config)
    state = program.place_state(init_train_state(init, optimizer, jax.random.key(0)))
    template = jax.eval_shape(lambda: state)
    draw = np.random.default_rng(0)
    ones = np.ones(ROWS, np.float32)
    tokens = draw.integers(1, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    batch = data.Batch(tokens, np.full(ROWS, LENGTH, np.int32), ones, ones)

    def steps() -> None:
        nonlocal state
        for _ in range(asked.steps):
            state, metrics = program.step(state, batch)
        jax.block_until_ready((state, metrics))

    arrays, _ = to_host(state)
    mebibytes = sum(array.nbytes for array in arrays.values()) / 2**20
    orbax = ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler())
    )
    target = {name: np.empty_like(array) for name, array in arrays.items()}
    taken: dict[str, list[tuple[float, float]]] = {
        n: []
        for n in ("orbax", "verified", "steps", "steps with a save", "handing over")
    }
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "checkpoints"
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, state, {})
        for number in range(asked.rounds + 1):
            seconds = {
                "orbax": timed(
                    lambda: orbax.restore(
                        folder / "1",
                        args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
                    )
                )
            }
            with Checkpoints(folder, read_only=True) as checkpoints:
                seconds["verified"] = timed(lambda: checkpoints.restore_last(template))

            def with_save(seconds: dict[str, tuple[float, float]] = seconds) -> None:
                with Checkpoints(Path(work) / "saved") as checkpoints:
                    seconds["handing over"] = timed(
                        lambda: checkpoints.save(1, state, {})
                    )
                    steps()

            order = [("steps", steps), ("steps with a save", with_save)]
            for name, action in order if number % 2 else order[::-1]:
                seconds[name] = timed(action)
            shutil.rmtree(Path(work) / "saved")
            if number:  # the first one compiles, and reads the disk
                for name, value in seconds.items():
                    taken[name].append(value)
    facts = environment.describe(tuple(jax.devices()[:1]))
    rows = []
    for name, values in taken.items():
        walls, cpus = np.transpose(values)
        p20, p50, p80 = np.percentile(walls, [20, 50, 80])
        rows.append(
            {
                "what": name,
                "state_mib": f"{mebibytes:.0f}",
                "steps": asked.steps if "steps" in name else "",
                "rounds": asked.rounds,
                "p20_s": f"{p20:.3f}",
                "p50_s": f"{p50:.3f}",
                "p80_s": f"{p80:.3f}",
                "p50_cpu_s": f"{np.median(cpus):.3f}",
                "device": facts["devices"][0],
                "jax": facts["packages"]["jax"],
                "commit": facts["commit"],
                "date": datetime.date.today().isoformat(),
            }
        )
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    middle = {name: np.median(values, axis=0) for name, values in taken.items()}
    more = middle["verified"] - middle["orbax"]
    save = middle["steps with a save"] - middle["steps"]
    print(f"{mebibytes:.0f} MiB; medians of wall and CPU seconds: {middle}")
    print(f"verifying adds {more[0]:.2f} s ({more[1]:.2f} s of CPU) to a restore")
    print(
        f"one save costs the steps {save[0]:.2f} s, {save[1]:.2f} s of CPU: 5 % where "
        f"saves are {save[1] / 0.05:.0f} s of CPU apart"
    )


if __name__ == "__main__":
    main()
