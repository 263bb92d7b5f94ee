"""The launch files of experiments/launch, each as far as it runs without its cluster.

A stand-in takes the place of `srun`, `xpk` and Ray, and the command that each would
start is read by the command line.
"""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from flax_lstm import cli, run

LAUNCH = Path(__file__).parents[1] / "experiments" / "launch"
FLAGS = ["--data", "a b.csv", "--epochs", "3", "--mesh", "data=8"]


def started(name: str, stands_in: str, *argv: str, folder: Path, **env: str) -> list:
    """Returns the arguments that a script gives to the program it starts."""
    program = folder / stands_in
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
    )
    program.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", str(LAUNCH / name), *argv],
        env={"PATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def assert_asks_for_the_run(argv: list[str]) -> None:
    command = cli.parse(argv)
    assert isinstance(command, cli.Train)
    assert (command.distributed, command.auto_resume) == ("auto", True)
    assert command.out == Path("/shared/my run")
    assert command.settings.data.data == "a b.csv"
    assert command.settings.training.mesh == "data=8"
    assert command.settings.training.save_minutes == 10


def test_slurm(tmp_path):
    argv = started("slurm.sh", "srun", "/shared/my run", *FLAGS, folder=tmp_path)
    assert argv[:2] == ["--kill-on-bad-exit=1", "flax-lstm"]
    assert_asks_for_the_run(argv[2:])


def test_slurm_needs_a_folder():
    ended = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sh")], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode != 0
    assert "give the run folder" in ended.stderr


def test_xpk(tmp_path):
    env = {name: "x" for name in ("IMAGE", "CLUSTER", "PROJECT", "ZONE", "STORAGE")}
    given = ["lstm-1", "v5litepod-16", "/shared/my run", *FLAGS]
    argv = started("xpk.sh", "xpk", *given, folder=tmp_path, **env)
    assert argv[:2] == ["workload", "create"]
    flags = dict(flag.split("=", 1) for flag in argv[2:])
    assert flags["--workload"] == "lstm-1"
    assert flags["--tpu-type"] == "v5litepod-16"
    program, *rest = shlex.split(flags["--command"])
    assert program == "flax-lstm"
    assert_asks_for_the_run(rest)


@pytest.fixture
def launcher() -> ModuleType:
    path = LAUNCH / "ray_train.py"
    spec = importlib.util.spec_from_file_location("ray_train", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("flags", "scaling"),
    [
        (["--gpu"], {"num_workers": 2, "use_gpu": True}),
        (
            ["--tpu", "TPU-V6E,4x4"],
            {
                "num_workers": 2,
                "use_gpu": False,
                "use_tpu": True,
                "accelerator_type": "TPU-V6E",
                "topology": "4x4",
            },
        ),
    ],
)
def test_ray(monkeypatch, launcher, flags, scaling):
    """A stand-in for Ray runs the worker's function here."""

    class JaxTrainer:
        def __init__(self, worker, *, train_loop_config, scaling_config):
            assert scaling_config == scaling
            self.fit = lambda: worker(train_loop_config)

    jax_module = SimpleNamespace(JaxTrainer=JaxTrainer)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ray.train", SimpleNamespace(ScalingConfig=dict))
    monkeypatch.setitem(sys.modules, "ray.train.v2", SimpleNamespace(jax=jax_module))
    monkeypatch.setitem(sys.modules, "ray.train.v2.jax", jax_module)
    trained = []
    monkeypatch.setattr(run, "train", lambda *args, **how: trained.append((args, how)))
    launcher.main(["--workers", "2", *flags, "--", "--out", "/shared/my run", *FLAGS])
    ((config, folder), how) = trained[0]
    assert folder == Path("/shared/my run")
    assert how == {"resume": "auto"}
    assert (config.data.data, config.training.epochs) == ("a b.csv", 3)
