"""A run that is killed, anywhere, goes on to the bits of the run that was not."""

import signal

import pytest
from fault_runs import BATCHES, KILL, STEPS, at_step, final, train

pytestmark = pytest.mark.usefixtures("compilation_cache")

EVERY = ("--save-every", "5")
"""Steps between checkpoints: prime to the steps of an epoch, so that they fall on
different places of it."""
CARRIED = (
    *("--pipeline", "tutorial", "--carry-state", "--pooling", "last"),
    *("--optimizer", "adadelta", "--test-with", "last"),
)
"""The tutorial's ways: a state is carried from batch to batch."""


@pytest.mark.parametrize("recipe", [(), CARRIED], ids=["default", "tutorial"])
def test_kill_9_in_mid_epoch(source, tmp_path, straight_run, recipe):
    """At step 17 of 32, and again after the resumption, each time between saves."""
    folder = tmp_path / "run"
    killed = train(source, folder, *recipe, *EVERY, fault=at_step(18, KILL))
    assert killed.code == -signal.SIGKILL
    again = train(source, folder, *EVERY, "--resume", fault=at_step(9, KILL))
    assert again.code == -signal.SIGKILL
    resumed = train(source, folder, "--resume")
    assert resumed.code == 0, resumed.err
    assert final(folder) == final(straight_run(*recipe))
    assert final(folder)["step"] == STEPS == 4 * BATCHES


@pytest.mark.parametrize("step", [1, BATCHES, BATCHES + 1, STEPS])
def test_kill_9_at_the_ends_of_epochs(source, tmp_path, straight_run, step):
    """Before the first and the last step of the run, and on both sides of an epoch."""
    folder = tmp_path / "run"
    killed = train(source, folder, fault=at_step(step, KILL))
    assert killed.code == -signal.SIGKILL
    resumed = train(source, folder, "--auto-resume")
    assert resumed.code == 0, resumed.err
    assert final(folder) == final(straight_run())
