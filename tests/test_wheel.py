"""The wheel: what is in it, and that it works from an empty folder."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command and returns its standard output."""
    finished = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Builds the wheel from a copy, where no old build folder can leak into it."""
    pytest.importorskip("build", reason="needs build, which is in the test extra")
    # The build runs in this environment, so that the test needs no network.
    major = int(importlib.metadata.version("setuptools").split(".")[0])
    if major < 77:
        pytest.skip(f"needs setuptools >= 77 installed; this has {major}")
    folder = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("flax_lstm", "kernels", "tests", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    run(
        sys.executable,
        *("-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"),
        cwd=folder,
    )
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    (info,) = (top for top in tops if top.endswith(".dist-info"))
    # `kernels` is the import name of someone else's package: ours must not claim it.
    assert tops == {"flax_lstm", "flax_lstm_kernels", info}
    wanted = {
        str(path.relative_to(root))
        for root in (ROOT, ROOT / "kernels")
        for path in root.glob("flax_lstm*/**/*.py")
    }
    wanted |= {"flax_lstm/py.typed", "flax_lstm_kernels/py.typed"}
    wanted |= {"flax_lstm_kernels/tuning.csv"}
    cpu = ROOT / "kernels" / "flax_lstm_kernels" / "cpu"
    wanted |= {f"flax_lstm_kernels/cpu/{path.name}" for path in cpu.glob("*.[ch]*")}
    assert wanted <= set(names)
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_declares_licence_python_and_command(wheel):
    archive = zipfile.ZipFile(wheel)
    info = next(n for n in archive.namelist() if n.endswith("/METADATA"))
    metadata = archive.read(info).decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    points = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "flax-lstm = flax_lstm.cli:main" in points


def test_the_wheel_works_from_an_empty_folder(wheel, tmp_path):
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    program = (
        "import flax_lstm as fl, flax_lstm_kernels as flk, jax, jax.numpy as jnp\n"
        "print(fl.__file__); print(flk.__file__)\n"
        "params = fl.init_lstm_params(jax.random.key(0), 3, 4)\n"
        "print(fl.lstm(params, jnp.zeros((2, 5, 3)))[1].shape)\n"
    )
    out = run(sys.executable, "-c", program, cwd=empty, PYTHONPATH=str(target))
    package, kernels, shape = out.splitlines()
    assert Path(package).is_relative_to(target)
    assert Path(kernels).is_relative_to(target)
    assert shape == "(2, 5, 4)"
