"""Numbers that are not finite, or nearly so, and data sets at the edge of sense."""

import csv
import dataclasses
import json
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fault_runs import KILL, STEPS, at_step, final
from fault_runs import train as train_in_a_process
from small_runs import make_config

from flax_lstm import data, nnx, optim, run, train
from flax_lstm.config import ModelConfig, TrainConfig, UserError
from flax_lstm.events import EpochDone
from flax_lstm.finite import NonFiniteLossError
from flax_lstm.leaves import digest
from flax_lstm.run import Run
from flax_lstm.settings import MOST_STEPS, check_steps

pytestmark = pytest.mark.usefixtures("compilation_cache")

POISON = {
    "weight": "state = state._replace(params=jax.tree.map("
    "lambda x: x.at[0].set(float('nan')), state.params))",
    "embedding": "state.params['embedding']['embedding'] = "
    "state.params['embedding']['embedding'] * float('inf')",
    "batch": "batch = batch._replace(labels=batch.labels + float('inf'))",
}


def finite(folder: Path) -> bool:
    leaves = jax.tree.leaves(Run.load(folder).params)
    return all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize("what", POISON)
def test_a_loss_that_is_not_finite(source, tmp_path, straight_run, what):
    """A NaN in a weight, infinite word vectors, an infinite label: named, not saved."""
    folder = tmp_path / "run"
    argv = ("--save-every", "5")
    failed = train_in_a_process(source, folder, *argv, fault=at_step(12, POISON[what]))
    assert failed.code == 1
    message = failed.message()
    assert "flax-lstm: step 12, with learning rate 0.0" in message
    # All eight rows are named.
    assert re.search(r" on rows (\d+, ){7}\d+ of the training part", message)
    assert "the last good checkpoint is that of step 10" in message
    assert finite(folder)
    resumed = train_in_a_process(source, folder, *argv, "--resume")
    assert resumed.code == 0, resumed.err
    assert final(folder) == final(straight_run())


def test_a_learning_rate_without_bounds(source, tmp_path):
    """1e30: the first update is finite, and so large that the next loss is not."""
    folder = tmp_path / "run"
    argv = (
        "--learning-rate",
        "1e30",
        "--schedule",
        "constant",
        "--warmup-fraction",
        "0",
    )
    failed = train_in_a_process(source, folder, *argv)
    assert failed.code == 1
    assert "with learning rate 1e+30" in failed.message()
    assert finite(folder)


def test_skip_nonfinite_counts_and_resumes(source, tmp_path):
    """One step of 32 is left out, once, whether or not the run is killed after it."""
    argv = ("--skip-nonfinite", "--save-every", "5")
    poisoned = at_step(7, POISON["batch"])
    folder = tmp_path / "straight"
    done = train_in_a_process(source, folder, *argv, fault=poisoned)
    assert done.code == 0, done.err
    assert "Epoch: 1/4 Batch: 8/8" in done.out
    first_line = next(line for line in done.out.splitlines() if "Epoch: 1/4" in line)
    assert first_line.endswith("Skipped: 1")
    assert "Skipped 1 steps" in done.out
    both = f"{POISON['batch']}\n        if taken == 18: {KILL}"
    again = tmp_path / "killed"
    killed = train_in_a_process(source, again, *argv, fault=at_step(7, both))
    assert killed.code == -signal.SIGKILL
    resumed = train_in_a_process(source, again, *argv, "--resume")
    assert resumed.code == 0, resumed.err
    assert final(again) == final(folder)
    assert [epoch["skipped"] for epoch in final(folder)["epochs"]] == [1, 0, 0, 0]
    summary = json.loads((again / "summary.json").read_text())
    assert summary["result"]["skipped_steps"] == 1
    taken = np.array(STEPS - 1, np.int32)
    assert final(folder)["leaves"]["step"]["sha256"] == digest(taken)


def test_a_run_of_which_every_step_is_skipped_stops(source, tmp_path, monkeypatch):
    """A NaN that stays would else be skipped until the end, and nothing said."""
    initial = run.initial_state

    def poisoned(*args):
        state = initial(*args)
        return state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))

    monkeypatch.setattr(run, "initial_state", poisoned)
    with pytest.raises(NonFiniteLossError, match="all 4 steps of epoch 1"):
        run.train(make_config(source, skip_nonfinite=True), tmp_path / "run")


def test_parameters_that_are_not_finite_are_not_saved(source, tmp_path, monkeypatch):
    """Where the loss still is finite: the update of the last step overflowed."""
    compiled = run.parallelize

    def overflowing(*args, **kwargs):
        program = compiled(*args, **kwargs)

        def step(state, batch):
            state, metrics = program.step(state, batch)
            state.params["embedding"]["embedding"] *= np.inf
            return state, metrics

        return program._replace(step=step)

    monkeypatch.setattr(run, "parallelize", overflowing)
    with pytest.raises(NonFiniteLossError, match=r"after step 1 .* not finite in"):
        run.train(make_config(source, save_every=1), tmp_path / "run")
    assert finite(tmp_path / "run")


class TestExplodingGradients:
    """Readout weights far too large, over two thousand steps of time."""

    def step_of(self, scale: float):
        model = ModelConfig(
            embedding_size=4, features=(6,), pooling="last", dropout=0.0
        )
        init, apply = nnx.classifier_functions(model, 50)
        rule = optim.Optimizer(optax.sgd(1.0), clip_norm=1.0)
        state = train.init_train_state(init, rule, jax.random.key(0))
        state.params["readout"]["kernel"] *= scale
        rng = np.random.default_rng(0)
        tokens = rng.integers(1, 50, (2, 2000)).astype(np.int32)
        ones = np.ones(2, np.float32)
        lengths = np.full(2, 2000, np.int32)
        batch = data.Batch(tokens, lengths, np.array([0, 1], np.float32), ones)
        step = train.make_train_step(apply, rule, TrainConfig(loss="bce"))
        new, metrics = jax.jit(step)(state, batch)
        moved = jax.tree.map(jnp.subtract, new.params, state.params)
        norm = float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(moved))))
        return norm, metrics

    def test_the_global_norm_is_clipped(self):
        """Plain descent at rate 1 moves by the clipped gradient: by 1."""
        moved, metrics = self.step_of(1e3)
        assert metrics["finite"]
        assert metrics["grad_norm"] > 10.0  # there was something to clip
        # Of weights up to 1e3 float32 has steps of 6e-5; seven of them move.
        assert moved == pytest.approx(1.0, abs=1e-3)

    def test_a_norm_that_overflows_changes_no_parameter(self):
        """Each gradient is finite, but its square is not, and nor is the norm."""
        moved, metrics = self.step_of(1e25)
        assert jnp.isfinite(metrics["loss"])
        assert not jnp.isfinite(metrics["grad_norm"])
        assert not metrics["finite"]
        assert moved == 0.0


@pytest.mark.parametrize("name", ["adadelta", "adamw"])
@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("clip", [None, 0.0, 1.0])
def test_zero_gradients_and_a_rate_of_zero_divide_nothing_by_zero(name, rate, clip):
    config = TrainConfig(
        optimizer=name,
        learning_rate=rate,
        clip_norm=clip,
        weight_decay=0.0,
        sparse_embedding=False,
        epsilon=1e-8,
    )
    rule = train.make_optimizer(config, 10)
    params = {"embedding": {"embedding": jnp.ones((3, 2))}, "a": jnp.ones(4)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = rule.init(params)
    for _ in range(3):
        params, state = optim.update(
            rule,
            params,
            state,
            zeros,
            None,
            norm=jnp.zeros(()),
            apply_if=jnp.array(True),
        )
    for leaf in jax.tree.leaves((params, state)):
        assert np.isfinite(leaf).all()
    for leaf in jax.tree.leaves(params):
        np.testing.assert_array_equal(leaf, np.ones_like(leaf))


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "label"), *rows])
    return path


def test_one_class_only(tmp_path):
    rows = [(f"a good film {n}", "good") for n in range(20)]
    with pytest.raises(UserError, match=r"two classes; found 1: 'good' \(20 rows"):
        run.train(make_config(write_rows(tmp_path / "x.csv", rows)), tmp_path / "r")


@pytest.mark.parametrize("count", [2, 11])
def test_few_examples_and_a_batch_beyond_the_data(tmp_path, count):
    """Fewer rows than a batch has, a short last batch, parts without any row."""
    rows = [(f"w{n} {['bad', 'good'][n % 2]}", "ny"[n % 2]) for n in range(count)]
    path = write_rows(tmp_path / "x.csv", rows)
    config = make_config(path, batch_size=64, epochs=2, min_count=1)
    if count < 5:  # of which nothing can be held out
        with pytest.raises(UserError, match=f"{count} rows are too few to split"):
            run.train(config, tmp_path / "r")
        return
    events = []
    result = run.train(config, tmp_path / "r", on_event=events.append)
    done = [event for event in events if isinstance(event, EpochDone)]
    parts = result.metrics["epochs"][0]
    assert np.isfinite(parts["train_loss_mean"])
    assert 0 <= done[0].train_accuracy <= 1
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    rows_of = summary["data"]["rows"]
    assert (done[0].validation_loss is None) == (rows_of["validation"] == 0)
    assert (result.metrics["test"] is None) == (rows_of["test"] == 0)
    # Accuracies are those of whole rows: the filler rows of the batch do not count.
    hits = done[0].train_accuracy * rows_of["train"]
    assert hits == pytest.approx(round(hits), abs=1e-5)


@pytest.mark.parametrize("batch_size", [7, 64, 1000])
@pytest.mark.parametrize("parallel", ["jit", "pmap", "sharded"])
def test_metrics_are_exact_over_partial_batches_and_devices(
    trained, parallel, batch_size
):
    """Counts against those of the scores of all rows, one by one, in NumPy.

    Every third label is turned, so that there is something of each of the four kinds.
    """
    result, _ = trained
    config = dataclasses.replace(
        result.config,
        data=dataclasses.replace(result.config.data, batch_size=batch_size),
        training=dataclasses.replace(result.config.training, parallel=parallel),
    )
    corpus = data.load(config.data, config.training.seed, result.tokenizer)
    examples = corpus.parts["train"]
    turned = np.arange(len(examples)) % 3 == 0
    labels = np.abs(np.asarray(examples.labels) - turned).astype(np.float32)
    examples = dataclasses.replace(examples, labels=labels)
    _, apply = run.classifier(config.model, result.tokenizer.vocabulary_size)
    program = train.parallelize(
        apply, train.make_optimizer(config.training, 1), config.training
    )
    init, _ = run.classifier(config.model, result.tokenizer.vocabulary_size)
    state = run.initial_state(config, init, jax.random.key(0))
    placed = program.place_state(state._replace(params=result.params))
    source = data.batches(examples, result.lengths, config.data, seed=0, epoch=None)
    got = train.evaluate(program.eval_step, placed.params, source)
    texts = corpus.texts["train"]
    scores = np.array([one.score for one in result.predict(texts)])
    right = np.round(scores) == labels
    assert got["count"] == len(labels) == 64
    for name, these in (
        ("true_positives", right & (labels == 1)),
        ("true_negatives", right & (labels == 0)),
        ("false_positives", ~right & (labels == 0)),
        ("false_negatives", ~right & (labels == 1)),
    ):
        assert got[name] == np.sum(these) > 0, name
    assert got["accuracy"] == right.mean()
    # Float32 squares, summed by batches and devices.
    assert got["loss"] == pytest.approx(np.mean((scores - labels) ** 2), rel=1e-5)


def test_a_changed_number_of_epochs_or_batch_size(source, trained):
    """On resumption: more epochs are allowed, another batch size is refused."""
    with pytest.raises(UserError, match=r"data.batch_size = 16, .*with 8"):
        run.train(make_config(source, batch_size=8), trained[0].folder, resume=True)
    with pytest.raises(UserError, match=r"epochs = 4, .* 3; epochs can only grow"):
        run.train(make_config(source, epochs=3), trained[0].folder, resume=True)


@pytest.mark.parametrize(("dtype", "loss"), [("bfloat16", "bce"), ("float16", "mse")])
def test_low_precision_neither_overflows_nor_drifts(source, tmp_path, dtype, loss):
    """Two epochs in 16 bits beside two in 32; then logits far beyond float16.

    Mean losses lie within 0.02 of each other: 8 bits of mantissa, eight steps of AdamW
    that are as large as the rate whatever the gradient.
    """
    runs = [
        run.train(
            make_config(source, dtype=kind, loss=loss, dropout=0.0, epochs=2),
            tmp_path / kind,
        )
        for kind in ("float32", dtype)
    ]
    losses = [
        [epoch["train_loss_mean"] for epoch in one.metrics["epochs"]] for one in runs
    ]
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses[0], losses[1], atol=0.02)
    _, apply = run.classifier(runs[1].config.model, runs[1].tokenizer.vocabulary_size)
    huge = jax.tree.map(lambda x: x * 1e4, runs[1].params)  # far beyond float16
    tokens, ones = np.ones((2, 4), np.int32), np.ones(2, np.float32)
    logits, _ = apply(huge, tokens, np.full(2, 4, np.int32))
    got = train.row_losses(loss, jnp.asarray(logits, jnp.float32), jnp.asarray(ones))
    assert np.isfinite(got).all()


def test_steps_beyond_int32_do_not_wrap(source):
    """At 2**31 - 2 there is one step left; the next one stays where it is."""
    model = ModelConfig(embedding_size=4, features=(6,), dropout=0.1)
    config = TrainConfig(sparse_embedding=True)
    init, apply = nnx.classifier_functions(model, 50)
    rule = train.make_optimizer(config, MOST_STEPS)
    state = train.init_train_state(init, rule, jax.random.key(0))
    state = state._replace(step=jnp.array(2**31 - 2, jnp.int32))
    ones = np.ones(2, np.float32)
    batch = data.Batch(np.ones((2, 4), np.int32), np.full(2, 4, np.int32), ones, ones)
    step = jax.jit(train.make_train_step(apply, rule, config))
    seen = []
    for _ in range(2):
        state, metrics = step(state, batch)
        assert metrics["finite"]
        seen.append(int(state.step))
    assert seen == [2**31 - 1, 2**31 - 1]
    config = make_config(source, epochs=2**20)
    check_steps(config, 2**11 - 1)
    with pytest.raises(UserError, match=r"at most 2,147,483,647 can be counted"):
        check_steps(config, 2**11)
