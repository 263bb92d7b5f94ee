"""A run that is killed goes on to the bits of the run that was not."""

import signal

import pytest
from fault_runs import BATCHES, KILL, STEPS, at_step, final, train

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.mark.parametrize("step", [17, STEPS])
def test_kill_9_in_mid_epoch(source, tmp_path, straight_run, step):
    folder = tmp_path / "run"
    killed = train(source, folder, fault=at_step(step, KILL))
    assert killed.code == -signal.SIGKILL
    resumed = train(source, folder, "--resume")
    assert resumed.code == 0, resumed.err
    assert final(folder) == final(straight_run())
    assert final(folder)["step"] == STEPS == 4 * BATCHES
