"""Checkpoints that were damaged, moved, mixed up or fought for.

The damage is done to the checkpoints of whole runs. What reads them back either gives
the very bits that were saved, or names what it skipped or refuses.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from fault_runs import (
    KILL,
    SAVED_AT_ONCE,
    STEPS,
    at_step,
    end,
    final,
    start,
    train,
    train_argv,
)
from small_runs import bits, make_config
from test_faults_of_processes import EVERY, resumed_as_straight

from flax_lstm import folder as files
from flax_lstm import run
from flax_lstm.checkpoint import (
    CheckpointError,
    Checkpoints,
    CheckpointWarning,
    remove,
)
from flax_lstm.config import UserError
from flax_lstm.leaves import digest_json
from flax_lstm.run import Run

pytestmark = [
    pytest.mark.usefixtures("compilation_cache"),
    # Orbax leaves coroutines behind when it meets a damaged file.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def newest(folder: Path) -> Path:
    """Returns the newest checkpoint of a run."""
    steps = [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
    return max(steps, key=lambda path: int(path.name))


IN_FILES = ("--features", "32")
"""Arrays of 16 KB. Those of the tiny run are so small that all of them lie in a node
of Orbax' database, which has a checksum; larger ones lie in files that have none."""


@pytest.fixture
def last_kept(source, tmp_path, straight_run):
    """A copy of a run and a function that restores its newest checkpoint.

    The function returns the bits and the data of what it got, and whether that is the
    newest step; it raises what restoring raises, and warnings are errors.
    """
    folder = shutil.copytree(straight_run(*IN_FILES), tmp_path / "run")
    config = Run.load(folder).config
    init, _ = run.classifier(config.model, Run.load(folder).tokenizer.vocabulary_size)
    template = run.state_template(config, init)

    def restore(fall_back: bool = False):
        with (
            warnings.catch_warnings(
                action="ignore" if fall_back else "error", category=CheckpointWarning
            ),
            Checkpoints(folder / files.CHECKPOINTS, read_only=True) as checkpoints,
        ):
            state, meta = checkpoints.restore_last(template)
        plain = state._replace(key=jax.random.key_data(state.key))
        return bits(plain), meta

    return folder, restore


def every_file(step: Path) -> list[Path]:
    return [p for p in sorted(step.rglob("*")) if p.is_file() and p.stat().st_size]


FLIPS = 41


def test_bit_flip(last_kept):
    """One bit at 41 places of every file: found out, or without any effect.

    Orbax alone restores most of the flips in the arrays without a word.
    """
    folder, restore = last_kept
    want = restore()
    found = {}
    for path in every_file(newest(folder)):
        whole = path.read_bytes()
        detected = harmless = 0
        for at in np.linspace(0, 8 * len(whole) - 1, FLIPS).astype(int):
            flipped = bytearray(whole)
            flipped[at // 8] ^= 1 << int(at) % 8
            path.write_bytes(flipped)
            try:
                got = restore()
            except CheckpointWarning:
                detected += 1
            else:
                assert got == want, f"silent: bit {at} of {path}"
                harmless += 1
        path.write_bytes(whole)
        assert detected + harmless == FLIPS
        item = path.relative_to(newest(folder)).parts[0]
        found[item] = found.get(item, 0) + detected
    assert restore() == want
    # Nearly all of the meta is under its digest; the rest is Orbax's own bookkeeping.
    assert found["meta"] > FLIPS / 2
    assert found["state"] > 0


@pytest.mark.parametrize("damage", ["truncated", "empty", "deleted"])
def test_a_file_that_is(last_kept, damage):
    """Every file in turn: the bits that were saved, or the step before, and named."""
    folder, restore = last_kept
    want = restore()
    last = newest(folder)
    fell_back = 0
    for path in every_file(last):
        whole = path.read_bytes()
        if damage == "deleted":
            path.unlink()
        else:
            os.truncate(path, len(whole) // 2 if damage == "truncated" else 0)
        try:
            got = restore()
        except CheckpointWarning as warning:
            said = str(warning)
        else:
            said = ""
            assert got == want, path
        if said:
            assert f"checkpoint {last} is " in said
            _, meta = restore(fall_back=True)
            assert meta["progress"]["epoch"] == 3, path
            fell_back += 1
        path.write_bytes(whole)
    assert fell_back >= 2  # the meta and the arrays themselves


def test_resuming_from_a_damaged_checkpoint_falls_back_and_says_so(
    source, tmp_path, straight_run
):
    """The newest is damaged, and an empty folder lies above it: two warnings."""
    folder = tmp_path / "run"
    assert (
        train(source, folder, *EVERY, fault=SAVED_AT_ONCE + at_step(18, KILL)).code < 0
    )
    assert newest(folder).name == "16"
    for path in every_file(newest(folder) / "state"):
        os.truncate(path, path.stat().st_size // 2)
    (folder / "checkpoints" / "17").mkdir()
    resumed = train(source, folder, "--resume")
    assert resumed.code == 0, resumed.err
    said = resumed.err.splitlines()
    assert len(said) == 2, resumed.err
    assert any("checkpoints/16 is damaged" in line for line in said)
    assert any("checkpoints/17 is not a complete checkpoint" in line for line in said)
    assert (folder / "checkpoints" / "damaged-16-0").is_dir()
    assert final(folder) == final(straight_run())


def test_an_empty_or_foreign_directory_named_like_a_step(
    source, tmp_path, straight_run
):
    """One warning for each, though one is in the way of a step that is to be saved."""
    folder = tmp_path / "run"
    assert (
        train(source, folder, *EVERY, fault=SAVED_AT_ONCE + at_step(12, KILL)).code < 0
    )
    for name in ("24", "99", "007", "-4", "x"):
        (folder / "checkpoints" / name).mkdir()
    (folder / "checkpoints" / "notes.txt").write_text("mine")
    resumed = train(source, folder, "--resume")
    assert resumed.code == 0, resumed.err
    said = [line for line in resumed.err.splitlines() if line]
    assert len(said) == 2, resumed.err
    assert all("not a complete checkpoint; it was skipped" in line for line in said)
    assert (folder / "checkpoints" / "notes.txt").read_text() == "mine"
    assert (folder / "checkpoints" / "foreign-24-0").is_dir()
    shutil.rmtree(folder / "checkpoints" / "99")
    assert final(folder) == final(straight_run())


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
    before = Run.load(folder).predict(["a lovely film"])[0].score
    cast = train(source, folder, *argv, "--cast-dtype", env=wide)
    assert cast.code == 0, cast.err
    leaves = final(folder)["leaves"]
    assert {leaf["dtype"] for name, leaf in leaves.items() if "kernel" in name} == {
        "float64"
    }
    # What was restored are the numbers that were saved, of which float64 has all.
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["dtype"] == "float64"
    assert 0 < before < 1


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


def test_another_topology(source, tmp_path):
    """Saved on four devices, within an epoch; gone on with on one and on two."""
    folder = tmp_path / "four"
    argv = ("--parallel", "sharded", *EVERY)

    def devices(count: int) -> dict[str, str]:
        flag = f"--xla_force_host_platform_device_count={count}"
        return {"XLA_FLAGS": flag, "JAX_NUM_CPU_DEVICES": str(count)}

    killed = train(
        source, folder, *argv, fault=SAVED_AT_ONCE + at_step(18, KILL), env=devices(4)
    )
    assert killed.code < 0
    results = {}
    for count in (1, 2):
        copy = shutil.copytree(folder, tmp_path / f"on-{count}")
        done = train(source, copy, "--resume", env=devices(count))
        assert done.code == 0, done.err
        results[count] = final(copy)
    one, two = results[1], results[2]
    assert one["test"]["count"] == two["test"]["count"] == 8
    assert one["epochs"][0] == two["epochs"][0]  # done on four devices, and restored
    for epoch, other in zip(one["epochs"], two["epochs"], strict=True):
        # Fifteen steps whose sums over rows go another way: float32 rounding.
        assert abs(epoch["validation_loss"] - other["validation_loss"]) < 1e-6
        assert epoch["train_accuracy"] == other["train_accuracy"]  # counts are exact


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


FILL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))"  # bytes


def test_a_limit_of_file_size_stands_for_a_full_disk(source, tmp_path, straight_run):
    """From step 12 on no file may grow: the save of step 15 fails, that of 10 stays."""
    folder = tmp_path / "run"
    failed = train(source, folder, *EVERY, fault=SAVED_AT_ONCE + at_step(12, FILL))
    assert failed.code == 1
    message = failed.message()
    assert f"saving step 15 to {folder}/checkpoints failed: " in message
    assert "it needs about 0.0 MiB" in message
    assert "step 10 is intact" in message
    assert newest(folder).name == "10"
    resumed_as_straight(source, folder, straight_run())


@pytest.fixture
def tmpfs(tmp_path):
    """Mounts small file systems; only who may mount has them."""
    mounted = []

    def mount(name: str, options: str) -> Path:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"may not mount a file system: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(source, tmp_path, straight_run, tmpfs):
    """A file system of its own, filled to the last byte before step 12."""
    disk = tmpfs("disk", "size=8m")
    filler = disk / "filler"
    fill = (
        f"file = os.open({str(filler)!r}, os.O_CREAT | os.O_WRONLY); "
        "exec('try:\\n while True: os.write(file, bytes(4096))\\nexcept OSError: 0')"
    )
    failed = train(
        source, disk / "run", *EVERY, fault=SAVED_AT_ONCE + at_step(12, fill)
    )
    assert failed.code == 1
    message = failed.message()
    assert "saving step 15" in message
    assert "0.0 MiB are free there" in message
    assert "step 10 is intact" in message
    filler.unlink()
    resumed_as_straight(source, disk / "run", straight_run())


def test_a_read_only_directory(source, tmp_path, straight_run, tmpfs):
    """Refused before anything is read or compiled; what is there can still be used."""
    disk = tmpfs("disk", "size=8m")
    shutil.copytree(straight_run(), disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    went_on = "import flax_lstm.data\nflax_lstm.data.load = None\n"
    for argv in (("--resume", "--epochs", "5"), ()):
        folder = disk / ("run" if argv else "new")
        refused = train(source, folder, *argv, fault=went_on)
        assert refused.code == 2
        assert f"cannot write to the run folder {folder}: Read-only" in (
            refused.message()
        )
    assert Run.load(disk / "run").evaluate()["count"] == 8


def test_all_checkpoints_damaged(source, tmp_path, straight_run):
    folder = shutil.copytree(straight_run(), tmp_path / "run")
    for step in (folder / "checkpoints").iterdir():
        for path in every_file(step / "state"):
            os.truncate(path, 0)
    with (
        warnings.catch_warnings(action="ignore", category=CheckpointWarning),
        pytest.raises(CheckpointError, match="no intact checkpoint"),
    ):
        Run.load(folder)
    refused = train(source, folder, "--resume", "--epochs", "5")
    assert refused.code == 1
    assert "no intact checkpoint" in refused.message()


def test_an_orphan_is_removed_and_a_link_is_not_followed(tmp_path):
    """What a killed save or clean-up left behind goes; what it led to stays."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    folder = tmp_path / "c"
    for name in ("5.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-old"):
        (folder / name / "state").mkdir(parents=True)
    (folder / "6.orbax-checkpoint-tmp").symlink_to(outside)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(5, {"a": np.ones(2)}, {})
    assert sorted(p.name for p in folder.iterdir()) == ["5"]
    assert (outside / "file").read_text() == "mine"
