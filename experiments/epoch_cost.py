"""What does padding cost: an epoch of the tutorial's pipeline against length buckets.

    python experiments/epoch_cost.py DATA [--rounds 5]

The same model (the tutorial's sizes), optimiser, batch size and program. A step of each
padded shape is timed, the shapes taking turns within one process, and the epoch is the
sum over its batches of the median of their shape. Compilation is not in it. Time is
that of the process's CPUs, which counts no waiting for others on a shared machine.

Writes results/epoch_cost.csv.
"""

import argparse
import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measured import provenance, write_rows

from flax_lstm import data, nnx
from flax_lstm.config import TUTORIAL
from flax_lstm.train import init_train_state, make_optimizer, parallelize

RESULTS = Path(__file__).parent / "results" / "epoch_cost.csv"


def program(pipeline: str, source: str) -> tuple[Any, Counter, dict[int, Any], Any]:
    """Returns a compiled step, batches and one example of each length, and a state."""
    config = dataclasses.replace(
        TUTORIAL,
        data=dataclasses.replace(TUTORIAL.data, data=source, pipeline=pipeline),
        training=dataclasses.replace(TUTORIAL.training, carry_state=False),
    )
    corpus = data.load(config.data, seed=0)
    init, apply = nnx.classifier_functions(
        config.model, corpus.tokenizer.vocabulary_size
    )
    optimizer = make_optimizer(config.training, 1)
    compiled = parallelize(apply, optimizer, config.training)
    state = compiled.place_state(init_train_state(init, optimizer, jax.random.key(0)))
    counts, examples = Counter(), {}
    for batch in data.batches(
        corpus.parts["train"], corpus.bucket_lengths, config.data, seed=0, epoch=0
    ):
        steps = batch.tokens.shape[1]
        counts[steps] += 1
        examples[steps] = batch
    return compiled, counts, examples, state


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    made = {name: program(name, asked.data) for name in ("tutorial", "words")}
    states = {name: state for name, (*_, state) in made.items()}
    taken: dict[tuple[str, int], list[float]] = {}
    for round_number in range(asked.rounds + 1):  # the first compiles
        for name, (compiled, _, examples, _) in made.items():
            for steps, batch in examples.items():
                start = time.process_time()
                states[name], metrics = compiled.step(states[name], batch)
                jax.block_until_ready((states[name], metrics))
                if round_number:
                    spent = time.process_time() - start
                    taken.setdefault((name, steps), []).append(spent)
    rows, epochs, common = [], {}, provenance()
    for name, (_, counts, _, _) in made.items():
        for steps, count in sorted(counts.items()):
            p20, p50, p80 = np.percentile(taken[name, steps], [20, 50, 80])
            epochs[name] = epochs.get(name, 0.0) + count * p50
            rows.append(
                {
                    "pipeline": name,
                    "padded_length": steps,
                    "batches": count,
                    "step_p20_s": f"{p20:.4f}",
                    "step_p50_s": f"{p50:.4f}",
                    "step_p80_s": f"{p80:.4f}",
                    "epoch_cpu_s": f"{count * p50:.1f}",
                }
                | common
            )
    write_rows(RESULTS, rows)
    print({name: round(seconds, 1) for name, seconds in epochs.items()})
    print(f"tutorial / words: {epochs['tutorial'] / epochs['words']:.2f}")


if __name__ == "__main__":
    main()
