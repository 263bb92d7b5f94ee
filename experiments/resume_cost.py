"""What do verified checkpoints cost: to restore, and to the steps beside a save?

    python experiments/resume_cost.py [--interval 5 20 --rounds 12 16]

The state is the classifier's with a large vocabulary: parameters and two slots of
AdamW, some 200 MB, of random numbers, which take longest to write. Each round measures

* a restore by Orbax alone, and one by `Checkpoints`, which also compares the forms and
  verifies the SHA-256 of every leaf;
* the same steps without a save, and with one before the first of them, which then runs
  beside them: all that `flax-lstm train` does for it, the search for numbers that are
  not finite and the deletion of the oldest step included.

Each pair takes turns in going first. As many steps are taken as last for `--interval`
seconds: saves that far apart are what is measured. Ten minutes, which is what
`flax-lstm train` leaves between saves, are computed: the seconds that a save takes at
the first interval, of 600. Give `--interval 600 --rounds 5` to measure them, in 100
minutes.

Writes results/resume_cost.csv; medians and quartiles, of differences within a round.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from measured import provenance, write_rows

from flax_lstm import data, nnx
from flax_lstm.checkpoint import Checkpoints
from flax_lstm.config import ModelConfig, TrainConfig
from flax_lstm.finite import nonfinite_leaves
from flax_lstm.host_memory import keep_freed_memory
from flax_lstm.leaves import to_save
from flax_lstm.train import (
    init_train_state,
    make_optimizer,
    parallelize,
)

RESULTS = Path(__file__).parent / "results" / "resume_cost.csv"
VOCABULARY, ROWS, LENGTH = 32_000, 64, 40
MODEL = ModelConfig(embedding_size=512)
RESTORES = ("restore by Orbax", "verified restore", "verifying")
CALIBRATION = 20
"""Steps that are timed to choose how many take as long as was asked for."""


def timed(action: Callable[[], Any]) -> np.ndarray:
    """Returns wall time, and time of the CPUs, which counts no waiting for others."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def in_turn(number: int, pair: dict[str, Callable[[], Any]]) -> dict[str, np.ndarray]:
    """Times two actions; the second one goes first in every other round."""
    names = list(pair) if number % 2 else list(pair)[::-1]
    return {name: timed(pair[name]) for name in names}


class Training:
    """The steps that are timed, and the state that they change."""

    def __init__(self) -> None:
        config = TrainConfig()
        init, apply = nnx.classifier_functions(MODEL, VOCABULARY)
        optimizer = make_optimizer(config, 10_000)
        self.program = parallelize(apply, optimizer, config)
        draw = np.random.default_rng(0)
        state = init_train_state(init, optimizer, jax.random.key(0))
        # Slots of word vectors that no batch has used are zeros, and soon written.
        slots = jax.tree.map(
            lambda x: (
                np.square(draw.normal(size=x.shape)).astype(x.dtype) if x.ndim else x
            ),
            state.optimizer_state,
        )
        self.state = self.program.place_state(state._replace(optimizer_state=slots))
        ones = np.ones(ROWS, np.float32)
        tokens = draw.integers(1, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
        self.batch = data.Batch(tokens, np.full(ROWS, LENGTH, np.int32), ones, ones)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.state, metrics = self.program.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        plain = self.program.fetch(self.state)
        odd = nonfinite_leaves([plain.params, plain.optimizer_state])
        if odd:
            raise FloatingPointError(f"{odd} are not finite")
        checkpoints.save(step, plain, {})


def measure(
    intervals: list[float], rounds: list[int], work: Path
) -> tuple[dict[tuple[str, float], list[np.ndarray]], float]:
    """Returns the (wall, CPU) seconds of each round, and the MiB of the state.

    They are by what was timed and the interval, which is 0 where there is none.
    """
    training = Training()
    training.steps(CALIBRATION)
    taken = timed(lambda: training.steps(CALIBRATION))[0] / CALIBRATION
    template = jax.eval_shape(lambda: training.state)
    arrays, _ = to_save(training.state)
    stored = {name: array for name, array in arrays.items() if array.size}
    orbax = ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler())
    )
    found: dict[tuple[str, float], list[np.ndarray]] = {}
    with Checkpoints(work / "restored") as checkpoints:
        checkpoints.save(1, training.state, {})
    with (
        Checkpoints(work / "restored", read_only=True) as reader,
        Checkpoints(work / "saved") as writer,
    ):

        def by_orbax() -> None:
            target = {name: np.empty_like(array) for name, array in stored.items()}
            orbax.restore(
                work / "restored" / "1",
                args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
            )

        def verified() -> None:
            reader.restore_last(template)

        def one_round(number: int, steps: int) -> dict[str, np.ndarray]:
            handing_over = {}

            def with_save() -> None:
                handing_over["before a save returns"] = timed(
                    lambda: training.save(writer, number)
                )
                training.steps(steps)
                writer.wait()

            def without() -> None:
                training.steps(steps)

            restores = {"restore by Orbax": by_orbax, "verified restore": verified}
            seconds = in_turn(number, restores)
            seconds |= in_turn(
                number, {"steps": without, "steps with a save": with_save}
            )
            seconds |= handing_over
            pairs = {
                "verifying": ("verified restore", "restore by Orbax"),
                "a save": ("steps with a save", "steps"),
            }
            return seconds | {
                name: seconds[more] - seconds[less]
                for name, (more, less) in pairs.items()
            }

        one_round(0, CALIBRATION)  # compiles, and reads the disk
        number = 0
        for interval, times in zip(intervals, rounds, strict=True):
            for _ in range(times):
                number += 1
                seconds = one_round(number, max(round(interval / taken), 1))
                print(number, {name: value.round(3) for name, value in seconds.items()})
                for name, value in seconds.items():
                    of = 0.0 if name in RESTORES else interval
                    found.setdefault((name, of), []).append(value)
    return found, sum(array.nbytes for array in arrays.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--interval", type=float, nargs="+", default=[5.0, 20.0])
    parser.add_argument("--rounds", type=int, nargs="+", default=[12, 16])
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    keep_freed_memory()  # as `flax-lstm train` does; before JAX has threads
    with tempfile.TemporaryDirectory() as work:
        found, mebibytes = measure(asked.interval, asked.rounds, Path(work))
    rows, common = [], provenance()

    def add(what: str, interval: float, values: Any, unit: str, how: str) -> None:
        p25, p50, p75 = np.percentile(values, [25, 50, 75])
        rows.append(
            {
                "what": what,
                "interval_s": f"{interval:g}" if interval else "",
                "unit": unit,
                "p25": f"{p25:.3f}",
                "p50": f"{p50:.3f}",
                "p75": f"{p75:.3f}",
                "rounds": len(values),
                "how": how,
                "state_mib": f"{mebibytes:.0f}",
            }
            | common
        )

    for (name, interval), values in found.items():
        walls, cpus = np.transpose(values)
        add(name, interval, walls, "s", "measured")
        add(name, interval, cpus, "s of CPU", "measured")
    for interval in asked.interval:
        cost, steps = (
            np.array(found[name, interval])[:, 0] for name in ("a save", "steps")
        )
        add("a save", interval, 100 * cost / steps, "% of the steps", "measured")
    default = 60 * (TrainConfig().save_minutes or math.inf)
    cost = np.array(found["a save", asked.interval[0]])[:, 0]
    add("a save", default, 100 * cost / default, "% of the steps", "computed")
    write_rows(asked.out, rows)
    for row in rows:
        print("{what:18} {interval_s:>4} {p25} … {p50} … {p75} {unit}".format(**row))


if __name__ == "__main__":
    main()
