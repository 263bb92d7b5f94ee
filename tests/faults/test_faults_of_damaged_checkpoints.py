"""Checkpoints whose bytes are damaged, or for which the disk has no room.

The damage is done to the checkpoints of whole runs. What reads them back either gives
the very bits that were saved, or names what it skipped or refuses.
"""

import os
import shutil
import subprocess
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from fault_runs import (
    EVERY,
    KILL,
    SAVED_AT_ONCE,
    at_step,
    final,
    newest,
    resumed_as_straight,
    train,
)
from small_runs import bits

from flax_lstm import folder as files
from flax_lstm import run
from flax_lstm.checkpoint import CheckpointError, Checkpoints, CheckpointWarning
from flax_lstm.run import Run

pytestmark = [
    pytest.mark.usefixtures("compilation_cache"),
    # Orbax leaves coroutines behind when it meets a damaged file.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


IN_FILES = ("--features", "32")
"""Arrays of 16 KB. Those of the tiny run are so small that all of them lie in a node
of Orbax' database, which has a checksum; larger ones lie in files that have none."""


@pytest.fixture
def last_kept(tmp_path, straight_run):
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


def test_a_full_disk(source, straight_run, tmpfs):
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


def test_a_read_only_directory(source, straight_run, tmpfs):
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
