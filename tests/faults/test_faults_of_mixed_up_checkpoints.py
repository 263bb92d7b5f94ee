"""Checkpoints that are whole, but of something else, somewhere else, or fought for.

Of another configuration, run, vocabulary, dtype, format or number of devices; moved;
and read or written by two at once.
"""

import json
import math
import re
import shutil
import signal
import socket
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from fault_runs import (
    CARRIED,
    EVERY,
    KILL,
    NOTE,
    SAVED_AT_ONCE,
    STEPS,
    at_step,
    end,
    final,
    newest,
    noted,
    resumed_as_straight,
    start,
    train,
    train_argv,
)
from small_runs import make_config

from flax_lstm import run
from flax_lstm.checkpoint import Checkpoints, CheckpointWarning, remove
from flax_lstm.config import UserError
from flax_lstm.leaves import digest_json
from flax_lstm.run import Run

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(features=(6,)), r"model.features = \(5,\).*\(6,\)"),
        (dict(features=(5, 5)), r"model.features = \(5,\).*\(5, 5\)"),
        (dict(optimizer="adadelta"), r"training.optimizer = 'adamw'.*'adadelta'"),
        (dict(vocabulary_size=7), r"data.vocabulary_size = 30000.* 7"),
        (dict(batch_size=8), r"data.batch_size = 16.* 8"),
        (dict(epochs=1), r"training.epochs = 4.* 1; epochs can only grow"),
        (dict(dtype="bfloat16"), r"model.dtype = 'float32'.*'bfloat16'; --cast-dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_configuration(source, trained, changes, words):
    with pytest.raises(UserError, match=f"the run in .* has {words}"):
        run.train(make_config(source, **changes), trained[0].folder, resume=True)


@pytest.mark.parametrize("changes", [dict(features=(6,)), dict(seed=1)], ids=str)
def test_a_checkpoint_of_another_run(source, trained, tmp_path, changes):
    """Copied in between runs: both values are named, and the shapes come second."""
    other = run.train(make_config(source, epochs=1, **changes), tmp_path / "other")
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(other.folder / "checkpoints", folder / "checkpoints")
    name, theirs = next(iter(changes.items()))
    words = re.escape(repr(theirs))
    words = f"a checkpoint in {folder} has .*{name} = {words}, "
    with pytest.raises(UserError, match=words):
        Run.load(folder)
    with pytest.raises(UserError, match=words):
        run.train(make_config(source), folder, resume=True)


def test_a_checkpoint_of_another_vocabulary(trained, tmp_path):
    folder = shutil.copytree(trained[0].folder, tmp_path / "run")
    for path in folder.rglob("meta/metadata"):
        rewrite(path, lambda record: record["meta"].update(tokenizer="0" * 64))
    with pytest.raises(UserError, match=r"made with another vocabulary: .*0000"):
        Run.load(folder)


def rewrite(path: Path, change) -> None:
    """Changes a record, whose digest is made to match again."""
    record = json.loads(path.read_text())
    record.pop("sha256")
    change(record)
    path.write_text(json.dumps({**record, "sha256": digest_json(record)}))


def test_another_dtype(source, tmp_path, straight_run):
    """Float64 of a float32 run: refused, unless it is asked for by name."""
    folder = shutil.copytree(straight_run(), tmp_path / "run")
    wide = {"JAX_ENABLE_X64": "1"}
    argv = ("--resume", "--dtype", "float64", "--epochs", "5")
    refused = train(source, folder, *argv, env=wide)
    assert refused.code == 2
    assert "model.dtype = 'float32'" in refused.message()
    assert "'float64'; --cast-dtype converts" in refused.message()
    before = jax.tree.leaves_with_path(Run.load(folder).params)
    given = tmp_path / "given.npz"
    fault = NOTE + at_step(1, f"note(state, {str(given)!r})")
    cast = train(source, folder, *argv, "--cast-dtype", fault=fault, env=wide)
    assert cast.code == 0, cast.err
    leaves = final(folder)["leaves"]
    assert {leaf["dtype"] for name, leaf in leaves.items() if "kernel" in name} == {
        "float64"
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["dtype"] == "float64"
    # What was restored are the numbers that were saved, of which float64 has all.
    restored = noted(given)
    for keys, leaf in before:
        got = restored[f".params{jax.tree_util.keystr(keys)}"]
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, leaf)


def test_an_older_and_a_newer_format(source, tmp_path, straight_run):
    folder = tmp_path / "run"
    ended = train(source, folder, fault=SAVED_AT_ONCE + at_step(18, KILL))
    assert ended.code < 0

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").unlink()  # all is in the checkpoint
    epochs = [json.loads(line) for line in lines]
    for epoch in epochs:
        del epoch["skipped"]

    def age(record):
        record["format"] = 1
        del record["meta"]["config"], record["meta"]["history"]
        progress = record["meta"]["progress"]
        del progress["tally"]
        progress["history"] = epochs[: progress["epoch"]]

    for path in folder.rglob("meta/metadata"):
        rewrite(path, age)
    newer = shutil.copytree(folder, tmp_path / "newer")
    resumed = train(source, folder, "--resume")
    assert resumed.code == 0, resumed.err
    got, want = final(folder), final(straight_run())
    for epoch in (*got["epochs"], *want["epochs"]):
        epoch.pop("skipped", None)
    assert got == want
    for path in newer.rglob("meta/metadata"):
        rewrite(path, lambda record: record.update(format=4))
    refused = train(source, newer, "--resume")
    assert refused.code == 2
    assert "has format 4; this version reads up to 3" in refused.message()


def test_another_topology(source, tmp_path, straight_run):
    """Saved on four devices, within an epoch; gone on with on one and on two.

    What the devices are given is what they held, to the bit, every leaf; the state that
    is carried lies on them by rows. What is trained from there is what one device
    trains without a break.
    """
    folder, before = tmp_path / "four", tmp_path / "before.npz"
    argv = (*CARRIED, "--parallel", "sharded", *EVERY)

    def devices(count: int) -> dict[str, str]:
        flag = f"--xla_force_host_platform_device_count={count}"
        return {"XLA_FLAGS": flag, "JAX_NUM_CPU_DEVICES": str(count)}

    def fault(path: Path, step: int, then: str = "") -> str:
        action = f"note(state, {str(path)!r}); {then}"
        return NOTE + SAVED_AT_ONCE + at_step(step, action)

    killed = train(source, folder, *argv, fault=fault(before, 11, KILL), env=devices(4))
    assert killed.code < 0
    assert newest(folder).name == "10"
    first_epoch = (folder / "metrics.jsonl").read_text()
    want = noted(before)
    assert any(leaf.any() for name, leaf in want.items() if "carry" in name)
    straight = straight_run(*CARRIED)
    for count in (1, 2):
        copy, after = tmp_path / f"on-{count}", tmp_path / f"after-{count}.npz"
        shutil.copytree(folder, copy)
        done = train(
            source, copy, *argv, "--resume", fault=fault(after, 1), env=devices(count)
        )
        assert done.code == 0, done.err
        got = noted(after)
        assert got.keys() == want.keys()
        for name, leaf in got.items():
            assert leaf.dtype == want[name].dtype, name
            assert leaf.tobytes() == want[name].tobytes(), name
        assert (copy / "metrics.jsonl").read_text().startswith(first_epoch)
        assert final(copy)["test"]["count"] == 8
        for one, other in zip(
            jax.tree.leaves(Run.load(copy).params),
            jax.tree.leaves(Run.load(straight).params),
            strict=True,
        ):
            # Sums over rows go another way in 32 steps: float32 rounding, of weights
            # up to 1 or so.
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
        for epoch, other in zip(
            final(copy)["epochs"], final(straight)["epochs"], strict=True
        ):
            for name in ("train_loss_mean", "validation_loss"):
                assert epoch[name] == pytest.approx(other[name], rel=1e-5), name
            for name in ("train_accuracy", "validation_accuracy", "tokens"):
                assert epoch[name] == other[name], name  # of counts, which are exact


def test_two_writers(source, tmp_path, straight_run):
    """The second ends at once and names the first, which goes on; a dead one yields."""
    folder = tmp_path / "run"
    first = start(*train_argv(source, folder, "--epochs", "100000"))
    for line in first.stdout:
        if line.startswith("Epoch: 1/"):
            break
    second = train(source, folder, "--epochs", "100000", "--resume")
    assert second.code == 2
    assert f"is being written by process {first.pid} on {socket.gethostname()}" in (
        second.message()
    )
    first.send_signal(signal.SIGTERM)
    stopped = end(first)
    assert stopped.code == 143
    steps = final(folder)["step"]
    assert steps > STEPS / 4
    dead = start(*train_argv(source, folder, "--epochs", "100000", "--resume"))
    dead.stdout.readline()
    dead.kill()
    end(dead)
    again = train(
        source,
        folder,
        *("--epochs", "100000", "--resume"),
        fault=SAVED_AT_ONCE + at_step(3, "os.kill(os.getpid(), signal.SIGTERM)"),
    )
    assert again.code == 143, again.err
    assert final(folder)["step"] >= steps + 3


def test_a_directory_moved_renamed_linked_and_relative(source, tmp_path, straight_run):
    folder = tmp_path / "run"
    assert (
        train(source, folder, *EVERY, fault=SAVED_AT_ONCE + at_step(12, KILL)).code < 0
    )
    moved = tmp_path / "ma première course" / "実験 1"
    moved.parent.mkdir()
    folder.rename(moved)
    (tmp_path / "link").symlink_to(moved)
    again = train(
        source,
        Path("link"),
        *EVERY,
        "--resume",
        fault=SAVED_AT_ONCE + at_step(7, KILL),
        cwd=tmp_path,
    )
    assert again.code < 0
    resumed = train(source, Path("実験 1"), "--resume", cwd=moved.parent)
    assert resumed.code == 0, resumed.err
    assert final(moved) == final(straight_run())


def test_a_save_of_an_older_step_after_a_rollback(source, tmp_path, straight_run):
    """Newer checkpoints are moved away by hand: it goes on from the older one."""
    folder = tmp_path / "run"
    assert (
        train(source, folder, *EVERY, fault=SAVED_AT_ONCE + at_step(22, KILL)).code < 0
    )
    kept = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
    assert kept[-1] == 20
    (folder / "checkpoints" / "20").rename(tmp_path / "20")
    resumed_as_straight(source, folder, straight_run())


def test_reading_a_run_that_is_being_written(source, tmp_path):
    """Fifteen times during the training: whole steps, and never an error."""
    folder = tmp_path / "run"
    argv = ("--epochs", "100000", "--save-every", "2", "--patience", "None")
    writer = start(*train_argv(source, folder, *argv))
    for line in writer.stdout:
        if line.startswith("Epoch: 1/"):
            break
    seen = set()
    with warnings.catch_warnings(action="error", category=CheckpointWarning):
        for _ in range(15):
            loaded = Run.load(folder)
            assert math.isfinite(loaded.evaluate("validation")["loss"])
            seen.add(len(loaded.metrics["epochs"]))
    writer.send_signal(signal.SIGTERM)
    ended = end(writer)
    assert ended.code == 143, ended.err
    assert len(seen) > 1  # it did write meanwhile


def test_a_step_pruned_while_it_is_read(tmp_path, monkeypatch):
    """Between the list and the read: the next is read, and nothing is said."""
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"a": np.full(3, step)}, {}, metric=-float(step))
    restore, pruned = Checkpoints._restore, []

    def racing(self, step, *rest):
        if not pruned:
            with Checkpoints(tmp_path) as writer:
                writer.save(3, {"a": np.full(3, 3)}, {}, metric=9.0)
            for old in (1, 2):
                remove(tmp_path / str(old))
            pruned.append(step)
        return restore(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "_restore", racing)
    with (
        warnings.catch_warnings(action="error", category=CheckpointWarning),
        Checkpoints(tmp_path, read_only=True) as reader,
    ):
        got, _ = reader.restore_best({"a": np.zeros(3, int)})
    assert pruned == [1]
    np.testing.assert_array_equal(got["a"], np.full(3, 3))
