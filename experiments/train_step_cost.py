"""What does a whole training step cost, against PyTorch and against Flax and optax?

    python experiments/train_step_cost.py DATA [--rounds 15]

The tutorial's model: a vocabulary of 32 thousand words, vectors of 300, LSTM layers of
128 and 64, dropout of one half on both, a sigmoid on the output of the last word, mean
squared error, and Adadelta with the tutorial's constants. Word vectors and optimiser
are in the step. Batches of 256 messages padded to 40; all candidates meet the same
batches and start from the same weights. First the losses are compared, dropout off.

torch and Flax are written as their users write this: `nn.Embedding`, two `nn.LSTM`,
`torch.optim.Adadelta`; `nn.Embed`, two `nn.RNN`, `optax.adadelta`, one donated
`jax.jit`. Both update every word vector in every step (neither optimiser has another
way), where the tutorial's TensorFlow, and flax-lstm, update those of the batch.

An epoch is the sum over its batches of the median step of their shape: flax-lstm's in
its length buckets, torch's padded to 244 as the tutorial pads. Few steps of the latter
are timed, and the epoch is scaled up from them.

The candidates take turns within one process and each step is waited for; compilation
is told apart. `wall` is the time that passed, `cpu` that of the process's CPUs, which
counts no waiting for others on a shared machine. Each has as many threads as there are
CPUs for this process (`taskset` makes them fewer). Freed memory is kept for the next
step, as `flax-lstm train` does, for all of them (`--system-malloc`: for none).

Writes results/train_step_cost.csv, or adds its rows to it (`--append`).
"""

# pyright: reportMissingImports=false

import argparse
import csv
import dataclasses
import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from train_step_peers import VOCABULARY, Candidate, in_flax, in_torch

from flax_lstm import data, environment
from flax_lstm.config import TUTORIAL, Config
from flax_lstm.host_memory import keep_freed_memory
from flax_lstm.model_state import classifier, initial_carry
from flax_lstm.train import init_train_state, make_optimizer, parallelize

RESULTS = Path(__file__).parent / "results" / "train_step_cost.csv"
THREADS = len(os.sched_getaffinity(0))
PADDED = 40
TUTORIAL_PADDED = 244
PAUSE_S = 0.02
"""Before each turn: the threads of the one before stop spinning."""
LONG_ROUNDS = 5
"""Steps timed at the tutorial's padding, of which one takes as long as an epoch's
worth of short ones."""


def settings(source: str, **changes: Any) -> Config:
    """Returns the tutorial's model in the default pipeline, with changes.

    The changes go to whichever section has a setting of that name.
    """
    config = dataclasses.replace(
        TUTORIAL,
        data=dataclasses.replace(
            TUTORIAL.data,
            data=source,
            pipeline="words",
            vocabulary_size=VOCABULARY - 2,  # and the padding, and the unknown word
            min_count=1,
            max_length=PADDED,
            buckets=8,
        ),
        training=dataclasses.replace(TUTORIAL.training, carry_state=False),
    )
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        names = {field.name for field in dataclasses.fields(part)}
        mine = {name: changes[name] for name in names & changes.keys()}
        part = dataclasses.replace(part, **mine)
        config = dataclasses.replace(config, **{section.name: part})
    return config


def ours(name: str, config: Config, params: Any, batch: data.Batch) -> Candidate:
    """Builds flax-lstm's step, as `flax-lstm train` runs it."""
    _, apply = classifier(config.model, VOCABULARY)
    optimizer = make_optimizer(config.training, 1)
    program = parallelize(apply, optimizer, config.training)
    state = program.place_state(
        init_train_state(
            lambda key: params,
            optimizer,
            jax.random.key(0),
            carry=initial_carry(config),
        )
    )

    def step(batch: data.Batch) -> float:
        nonlocal state
        state, metrics = program.step(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    # Compiled for a state that is given away, so that all start from the same weights.
    start = time.perf_counter()
    step(batch)
    spent = time.perf_counter() - start
    state = program.place_state(
        init_train_state(
            lambda key: params,
            optimizer,
            jax.random.key(0),
            carry=initial_carry(config),
        )
    )
    return Candidate(name, step, spent)


def check_losses(
    candidates: list[Candidate], batches: list[data.Batch]
) -> dict[str, float]:
    """Compares the losses of the first step and those after updates.

    The first are of the same weights and must agree to float32; later ones may differ
    as much as the rules for words outside the batch let them.
    """
    first = {name: step(batches[0]) for name, step, _ in candidates}
    wanted = first["torch"]
    for name, loss in first.items():
        if not abs(loss - wanted) <= 1e-5 * wanted:
            raise AssertionError(f"{name} has loss {loss}, torch {wanted}.")
    second = {name: step(batches[1]) for name, step, _ in candidates}
    print("losses of two steps, dropout off:")
    for name in first:
        print(f"  {name:32} {first[name]:.7f} {second[name]:.7f}")
    return first


def take_turns(
    calls: dict[Any, Callable[[], Any]], rounds: int
) -> dict[Any, np.ndarray]:
    """Returns `[rounds, 2]` for each call: wall and CPU ms, after one unseen."""
    taken: dict[Any, list[tuple[float, float]]] = {name: [] for name in calls}
    order = np.random.default_rng(0)
    names = list(calls)
    for number in range(rounds + 1):
        for at in order.permutation(len(names)):
            name = names[at]
            call = calls[name]
            time.sleep(PAUSE_S)
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            spent = (time.perf_counter() - wall, time.process_time() - cpu)
            if number:
                taken[name].append(spent)
    return {name: 1e3 * np.array(times) for name, times in taken.items()}


def row(name: str, what: str, steps: int, times: np.ndarray, **more: Any) -> dict:
    quartiles = np.percentile(times, [25, 50, 75], axis=0)
    return {
        "implementation": name,
        "what": what,
        "T": steps,
        "rounds": len(times),
        **{
            f"{clock}_p{share}_ms": f"{quartiles[i, j]:.2f}"
            for j, clock in enumerate(("wall", "cpu"))
            for i, share in enumerate((25, 50, 75))
        },
        "compile_s": "",
        "epoch_batches": "",
        "epoch_s": "",
        **more,
    }


def left_padded(batch: data.Batch, padded: int) -> data.Batch:
    """Returns the same texts padded on the left, every token text, as the tutorial."""
    tokens = np.zeros((len(batch.labels), padded), np.int32)
    assert batch.lengths is not None
    for number, length in enumerate(batch.lengths):
        tokens[number, padded - length :] = batch.tokens[number, :length]
    return batch._replace(tokens=tokens, lengths=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epoch-rounds", type=int, default=LONG_ROUNDS)
    parser.add_argument("--implementations", nargs="+", default=["xla", "cpu"])
    parser.add_argument("--system-malloc", action="store_true")
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    kept = not asked.system_malloc and keep_freed_memory()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = settings(asked.data, library="linen")
    corpus = data.load(config.data, seed=0)
    init, _ = classifier(config.model, VOCABULARY)
    params = jax.tree.map(np.asarray, init(jax.random.key(0)))

    # Full batches of the longest padding, the rows in the order of the file.
    whole = dataclasses.replace(config.data, buckets=1)
    batches = [
        batch
        for batch in data.batches(
            corpus.parts["train"], (PADDED,), whole, seed=0, epoch=1
        )
        if batch.weights.all()
    ]
    first = batches[0]

    still = settings(asked.data, library="linen", dropout=0.0)
    check_losses(
        [
            in_torch(params, still),
            in_flax(params, still, first),
            *(
                ours(f"flax-lstm, {one}", with_(still, one), params, first)
                for one in asked.implementations
            ),
        ],
        batches,
    )

    candidates = [in_torch(params, config), in_flax(params, config, first)]
    for one in asked.implementations:
        named = with_(config, one)
        candidates.append(ours(f"flax-lstm, {one}", named, params, first))
    tutorial = dataclasses.replace(
        config, training=dataclasses.replace(config.training, carry_state=True)
    )
    left = [left_padded(batch, PADDED) for batch in batches[: asked.rounds + 1]]
    preset = [
        ours(
            f"flax-lstm, tutorial preset, {one}", with_(tutorial, one), params, left[0]
        )
        for one in asked.implementations
    ]

    def calls(number_of: dict[str, int]) -> dict[str, Callable[[], Any]]:
        def next_batch(candidate: Candidate, source: list[data.Batch]):
            def call():
                number = number_of[candidate.name] = number_of[candidate.name] + 1
                return candidate.step(source[number % len(source)])

            return call

        made = {c.name: next_batch(c, batches) for c in candidates}
        return made | {c.name: next_batch(c, left) for c in preset}

    everyone = [*candidates, *preset]
    taken = take_turns(calls({c.name: -1 for c in everyone}), asked.rounds)
    rows = [
        row(c.name, "step", PADDED, taken[c.name], compile_s=f"{c.compile_s:.1f}")
        for c in everyone
    ]
    for one in rows:
        print(
            f"{one['implementation']:36} wall {one['wall_p50_ms']:>8} ms "
            f"[{one['wall_p25_ms']}, {one['wall_p75_ms']}]  cpu "
            f"{one['cpu_p50_ms']:>8} ms [{one['cpu_p25_ms']}, {one['cpu_p75_ms']}]",
            flush=True,
        )
    if asked.epoch_rounds:
        rows += epochs(candidates, corpus, config, asked.epoch_rounds)

    facts = environment.describe(tuple(jax.devices()[:1]))
    common = {
        "device": facts["devices"][0],
        "threads": THREADS,
        "freed_memory_kept": kept,
        "jax": facts["packages"]["jax"],
        "torch": torch.__version__,
        "commit": facts["commit"],
        "date": datetime.date.today().isoformat(),
    }
    mode = "a" if asked.append else "w"
    with asked.output.open(mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *common])
        if not asked.append:
            writer.writeheader()
        writer.writerows(one | common for one in rows)


def with_(config: Config, implementation: str) -> Config:
    """Returns the configuration with the recurrence run by name."""
    model: Any = dataclasses.replace(config.model, implementation=implementation)
    return dataclasses.replace(config, model=model)


def epochs(
    candidates: list[Candidate], corpus: data.Corpus, config: Config, rounds: int
) -> list[dict]:
    """Returns rows for whole epochs: ours in buckets, torch's as the tutorial pads."""
    examples: dict[int, data.Batch] = {}
    counts: dict[int, int] = {}
    for batch in data.batches(
        corpus.parts["train"], corpus.bucket_lengths, config.data, seed=0, epoch=1
    ):
        length = batch.tokens.shape[1]
        counts[length] = counts.get(length, 0) + 1
        if length not in examples or batch.weights.all():
            examples[length] = batch
    longest = left_padded(examples[max(examples)], TUTORIAL_PADDED)
    full = len(corpus.parts["train"]) // config.data.batch_size
    plans = {
        c.name: {TUTORIAL_PADDED: (full, longest)}
        if c.name == "torch"
        else {length: (counts[length], examples[length]) for length in examples}
        for c in candidates
        if c.name != "Flax and optax"
    }
    steps = {c.name: c.step for c in candidates}
    made = {
        (name, length): lambda step=steps[name], batch=batch: step(batch)
        for name, plan in plans.items()
        for length, (_, batch) in plan.items()
    }
    taken = take_turns(made, rounds)
    rows, seconds = [], {}
    for (name, length), times in taken.items():
        count = plans[name][length][0]
        spent = count * np.median(times[:, 0]) / 1e3
        seconds[name] = seconds.get(name, 0.0) + spent
        more = {"epoch_batches": count, "epoch_s": f"{spent:.2f}"}
        rows.append(row(name, "epoch", length, times, **more))
    for name, spent in seconds.items():
        share = seconds["torch"] / spent
        print(f"an epoch of {name}: {spent:.1f} s, torch's takes {share:.1f} times it")
    return rows


if __name__ == "__main__":
    main()
