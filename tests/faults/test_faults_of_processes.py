"""A run that is killed, anywhere, goes on to the bits of the run that was not."""

import contextlib
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from fault_runs import (
    BATCHES,
    CARRIED,
    COMPILING,
    EVERY,
    FIRST_IS_BEST,
    KILL,
    SAVED_AT_ONCE,
    STEPS,
    at_step,
    end,
    final,
    resumed_as_straight,
    start,
    train,
    train_argv,
)

from flax_lstm.run import Run

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.mark.parametrize("recipe", [(), CARRIED], ids=["default", "tutorial"])
def test_kill_9_in_mid_epoch(source, tmp_path, straight_run, recipe):
    """At step 18 of 32, and again eight steps after the resumption, between saves."""
    folder = tmp_path / "run"
    killed = train(source, folder, *recipe, *EVERY, fault=at_step(18, KILL))
    assert killed.code == -signal.SIGKILL
    argv = (*recipe, *EVERY, "--auto-resume")
    again = train(source, folder, *argv, fault=at_step(9, KILL))
    assert again.code == -signal.SIGKILL
    resumed_as_straight(source, folder, straight_run(*recipe), *recipe)


@pytest.mark.parametrize("step", [1, BATCHES + 1, STEPS], ids=["first", "next", "end"])
def test_kill_9_at_an_epoch_change(source, tmp_path, straight_run, step):
    """Before the first and the last step of the run, and the first of an epoch.

    The first epoch is the best, is kept beside the last two, and is tested.
    """
    folder = tmp_path / "run"
    fault = FIRST_IS_BEST + SAVED_AT_ONCE + at_step(step, KILL)
    killed = train(source, folder, fault=fault)
    assert killed.code == -signal.SIGKILL
    epoch = (step - 1) // BATCHES  # the last one done
    kept = {int(path.name) for path in (folder / "checkpoints").iterdir()}
    assert kept == {BATCHES * n for n in (1, epoch - 1, epoch) if 0 <= n <= epoch}
    straight = straight_run(fault=FIRST_IS_BEST)
    resumed_as_straight(source, folder, straight, fault=FIRST_IS_BEST)
    assert [one["best"] for one in final(folder)["epochs"]] == [True] + [False] * 3
    assert final(folder)["best_epoch"] == final(folder)["tested_epoch"] == 1


IN_EVALUATION = """
import os, signal
import flax_lstm.epochs
evaluate, done = flax_lstm.epochs.evaluate, 0
def with_fault(eval_step, params, batches, *, carry):
    def until_fault():
        global done
        for batch in batches:
            done += 1
            if done == {batch}:
                {action}
            yield batch
    return evaluate(eval_step, params, until_fault(), carry=carry)
flax_lstm.epochs.evaluate = with_fault
"""


@pytest.mark.parametrize("batch", [2, 5], ids=["validation", "test"])
def test_kill_9_in_evaluation(source, tmp_path, straight_run, batch):
    """The validation part is one batch, so the fifth evaluation is the test."""
    folder = tmp_path / "run"
    fault = IN_EVALUATION.format(batch=batch, action=KILL)
    killed = train(source, folder, *EVERY, fault=fault)
    assert killed.code == -signal.SIGKILL
    resumed_as_straight(source, folder, straight_run())


def test_sigterm_in_evaluation(source, tmp_path, straight_run):
    """What was trained is saved, not validated; resuming validates it, and no more.

    Two batches in each validation: asked at the first of the first epoch's, which then
    must be known as the best.
    """
    folder, argv = tmp_path / "run", ("--batch-size", "4")
    action = "os.kill(os.getpid(), signal.SIGTERM)"
    fault = FIRST_IS_BEST + IN_EVALUATION.format(batch=1, action=action)
    stopped = train(source, folder, *argv, fault=fault)
    assert stopped.code == 143
    assert "stopped after step 16 of 64" in stopped.message()
    assert final(folder)["step"] == 16
    assert not final(folder)["epochs"]
    resumed = train(source, folder, *argv, "--resume", fault=FIRST_IS_BEST)
    assert resumed.code == 0, resumed.err
    assert final(folder) == final(straight_run(*argv, fault=FIRST_IS_BEST))
    assert final(folder)["tested_epoch"] == 1


def test_kill_9_in_the_first_compilation(source, tmp_path, straight_run):
    """XLA compiles for seconds where no compiled program is kept."""
    folder = tmp_path / "run"
    fault = COMPILING.format(action=KILL)
    killed = train(source, folder, "--no-compilation-cache", fault=fault)
    assert killed.code == -signal.SIGKILL
    assert "a step was taken" not in killed.err
    resumed_as_straight(source, folder, straight_run())


SMALL_WAITS = (0.0, 0.01, 0.02, 0.04, 0.08)


def killed_while_saving(argv, folder: Path, wait_s: float, saves: int = 1) -> bool:
    """Kills a run some time into its n-th save or a later one.

    Says whether it ended before.
    """
    child = start(*argv)
    began, seen = time.time(), set()
    while child.poll() is None:
        for path in (folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
            with contextlib.suppress(FileNotFoundError):  # complete by now
                pruned = path.name.endswith("-old")
                if not pruned and path.stat().st_ctime > began:
                    seen.add(path.name)
        if len(seen) >= saves:
            time.sleep(wait_s)
            child.kill()
            break
        time.sleep(0.001)
    ended = end(child)
    assert ended.code in (0, -signal.SIGKILL), ended.err
    assert "skipped" not in ended.err  # what the kill before it left was whole
    return ended.code == 0


def test_kill_9_in_mid_save(source, tmp_path, straight_run):
    """A save after every step, and a kill in five of them; the large one is below.

    Each time in the third save that is seen, so that all but the first go on within an
    epoch.
    """
    folder = tmp_path / "run"
    argv = train_argv(source, folder, "--save-every", "1", "--auto-resume")
    reached = 0
    for wait_s in SMALL_WAITS:
        if not killed_while_saving(argv, folder, wait_s, saves=3):
            steps = {p.name for p in (folder / "checkpoints").iterdir()}
            whole = max(int(name) for name in steps if name.isdigit())
            assert whole > reached
            reached = whole
    assert reached < STEPS
    resumed_as_straight(source, folder, straight_run())


def write_many_words(path: Path, words: int) -> Path:
    """Writes texts without a word in common, for a large vocabulary."""
    per_text = 50
    lines = ["text,label"]
    for n in range(words // per_text):
        text = " ".join(f"w{n * per_text + i}" for i in range(per_text))
        lines.append(f"{text} {['awful', 'lovely'][n % 2]},{['bad', 'good'][n % 2]}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
def test_kill_9_in_mid_save_of_200_mb(tmp_path):
    """Twenty kills, 0 to 600 ms into the save of a state of 200 MB."""
    texts = write_many_words(tmp_path / "words.csv", 40_000)
    large = (
        *("--embedding-size", "512", "--vocabulary-size", "50000", "--min-count", "1"),
        *("--max-length", "60", "--batch-size", "32", "--epochs", "1"),
    )
    straight = tmp_path / "straight"
    assert train(texts, straight, *large).code == 0
    newest = straight / "checkpoints" / str(final(straight)["step"])
    assert sum(p.stat().st_size for p in newest.rglob("*") if p.is_file()) > 1.5e8
    folder = tmp_path / "run"
    argv = train_argv(texts, folder, *large, "--save-every", "1", "--auto-resume")
    waits = random.Random(0)
    kills = 0
    while kills < 20 and not killed_while_saving(argv, folder, waits.uniform(0, 0.6)):
        kills += 1
    assert kills >= 15  # twenty, or all that the steps of the epoch have room for
    resumed = train(texts, folder, *large, "--auto-resume")
    assert resumed.code == 0, resumed.err
    assert "skipped" not in resumed.err
    assert final(folder) == final(straight)
    assert not list((folder / "checkpoints").glob("*tmp*"))


AT_THE_END = """
import flax_lstm.epochs
run = flax_lstm.epochs.Trainer.run
def crashing(self, state, progress):
    run(self, state, progress)
    raise RuntimeError("a crash at the very end")
flax_lstm.epochs.Trainer.run = crashing
"""


def test_a_crash_at_the_very_end(source, tmp_path, straight_run):
    """After the last save has begun, and before anything waited for it."""
    folder = tmp_path / "run"
    crashed = train(source, folder, fault=AT_THE_END)
    assert crashed.code == 1
    assert crashed.message() == "flax-lstm: a crash at the very end"
    assert final(folder)["step"] == STEPS
    assert final(folder)["leaves"] == final(straight_run())["leaves"]
    assert Run.load(folder).metrics["epochs"]


def test_the_same_command_goes_on_to_the_end_and_then_has_nothing_to_do(
    source, tmp_path, straight_run
):
    """`--auto-resume` on nothing, on a part, and on a finished run."""
    folder = tmp_path / "run"
    first = train(source, folder, "--auto-resume", *EVERY, fault=at_step(12, KILL))
    assert first.code == -signal.SIGKILL
    resumed_as_straight(source, folder, straight_run())
    resumed_as_straight(source, folder, straight_run())
    plain = train(source, folder)
    assert plain.code == 2
    assert "already holds a run" in plain.message()


def test_a_run_whose_checkpoints_are_gone_does_not_start_afresh(
    source, tmp_path, straight_run
):
    folder = shutil.copytree(straight_run(), tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    refused = train(source, folder, "--resume")
    assert refused.code == 2
    assert "nothing to resume" in refused.message()
    assert (folder / "metrics.jsonl").read_text().count("\n") == 4
